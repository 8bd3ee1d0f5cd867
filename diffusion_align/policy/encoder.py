"""Prompts to conditioning, each prompt captured once and kept.

Every prompt is captured alone, never with its neighbours: its embedding is then the same bits
whoever stands beside it, so a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.policy.capture import Layout, capture, probe
from diffusion_align.policy.choices import check_size
from diffusion_align.policy.conditioning import Branch, Conditioning, mapped
from diffusion_align.policy.families import Family
from diffusion_align.policy.latents import latent_of
from diffusion_align.policy.text_memory import TextMemory

_CacheKey = tuple[str, str, bool, int, int, int | None]


class PromptEncoder:
    """Captures conditioning from a pipeline and remembers it per prompt.

    Args:
        pipeline: a diffusers pipeline of `family`.
        family: its row.
        dtype: floating dtype in which the denoiser wants its arguments.
        cache_bytes: memory kept for conditioning, on the CPU; the least recently used prompts are
            dropped beyond it.
    """

    def __init__(
        self, pipeline: Any, family: Family, *, dtype: torch.dtype, cache_bytes: int = 1 << 30
    ) -> None:
        self._pipeline = pipeline
        self._family = family
        self._dtype = dtype
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[_CacheKey, Conditioning] = OrderedDict()
        self._held = 0
        self._layouts: dict[bool, Layout] = {}
        self._warned: set[str] = set()
        self._texts = TextMemory(pipeline)

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None,
        *,
        guided: bool,
        height: int,
        width: int,
        frames: int | None = None,
    ) -> Conditioning:
        """Conditioning of B prompts, on the CPU.

        Args:
            prompts: B texts, B >= 1.
            negative_prompts: B texts or None; an empty one means the pipeline's own default.
            guided: capture the negative branch too.
            height, width: pixels, multiples of the family's `size_multiple`.
            frames: length of a clip; None for images.

        Raises:
            UserError: a size that does not fit.
            ValueError: no prompts, or another number of negatives.
        """
        check_size(self._family, height, width)
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a non-empty list of texts")
        negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(negatives)} negative prompts")
        return Conditioning.collate(
            [
                self._one((prompt, negative, guided, height, width, frames))
                for prompt, negative in zip(prompts, negatives)
            ]
        )

    def _one(self, key: _CacheKey) -> Conditioning:
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            return known
        made = self._capture(key)
        self._cache[key] = made
        self._held += made.nbytes
        while self._held > self._cache_bytes and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return made

    def _capture(self, key: _CacheKey) -> Conditioning:
        prompt, negative, guided, height, width, frames = key
        # Of a long prompt the libraries print what is cut, without its name.
        with _libraries_quiet(), self._texts.remembering():
            for text in (prompt, negative) if guided else (prompt,):
                self._warn_if_cut(text)
            captured = capture(
                self._pipeline,
                self._family,
                [prompt],
                [negative] if guided and negative else None,
                guided=guided,
                height=height,
                width=width,
                frames=frames,
            )
        branches = self._layout(guided, height, width, frames).split(captured)
        latents = captured.latents
        if self._family.packing == "2x2":
            factor = self._pipeline.vae_scale_factor
            latents = latent_of(latents, height // factor, width // factor)
        return Conditioning(
            prompts=(prompt,),
            negative_prompts=(negative,),
            height=height,
            width=width,
            latent_shape=tuple(latents.shape[1:]),
            branches=tuple(_as_stored(branch, self._dtype) for branch in branches),
        )

    def _warn_if_cut(self, text: str) -> None:
        """Say once of a text that the text encoder reads only its beginning."""
        if text in self._warned:
            return
        for tokenizer, limit in self._readers():
            count = len(tokenizer(text).input_ids)
            if count > limit:
                self._warned.add(text)
                warnings.warn(
                    f"prompt {text[:56] + ' ...'!r} has {count} tokens and the text encoder reads "
                    f"{limit} (start and end included): the rest of it is ignored",
                    stacklevel=2,
                )
                return

    def _readers(self) -> list[tuple[Any, int]]:
        """Tokenizers whose limit cuts a prompt: all, or the one whose encoder reads furthest."""
        parts = self._pipeline.components
        if self._family.reader and parts.get(self._family.reader[0]) is not None:
            name, limit = self._family.reader
            return [(parts[name], limit)]
        return [
            (part, part.model_max_length)
            for name, part in parts.items()
            if name.startswith("tokenizer") and hasattr(part, "model_max_length")
        ]

    def _layout(self, guided: bool, height: int, width: int, frames: int | None) -> Layout:
        """The batch axes, probed when guidance is first asked for; they do not depend on size."""
        if guided not in self._layouts:
            layout = probe(
                self._pipeline,
                self._family,
                guided=guided,
                height=height,
                width=width,
                frames=frames,
            )
            if layout.branches * layout.calls != (2 if guided else 1):
                raise UserError(
                    "this model takes guidance as an input instead of running a negative branch",
                    where="model",
                    fix="use the undistilled model, or guidance_scale 1",
                )
            self._layouts[guided] = layout
        return self._layouts[guided]


@contextmanager
def _libraries_quiet() -> Iterator[None]:
    """Errors only from diffusers and transformers."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in loggers]
    for library in loggers:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(loggers, levels):
            library.set_verbosity(level)


def _as_stored(branch: Branch, dtype: torch.dtype) -> Branch:
    """A copy on the CPU that shares no memory with a larger capture; floats in `dtype`."""

    def stored(value: Tensor) -> Tensor:
        chosen = dtype if value.is_floating_point() else value.dtype
        return value.detach().to("cpu", chosen, copy=True).contiguous()

    return Branch(
        {path: stored(value) for path, value in branch.tensors.items()},
        branch.axes,
        {
            # Tables in tuples stay as they are: pipelines compute rotary embeddings in float32.
            path: stored(value) if isinstance(value, Tensor) else mapped(value, _copied)
            for path, value in branch.constants.items()
        },
    )


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
