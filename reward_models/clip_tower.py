"""A CLIP on open_clip: pictures and prompts to embeddings and tokens.

Everything about numbers is here; `backbones` finds and loads the weights. Scorers that stand on one
tower share its forward pass inside `one_pass`.
"""

from __future__ import annotations

import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from reward_models.base import RewardError
from reward_models.preprocess import clip_pixels, letterbox, normalise

Framing = Literal["crop", "letterbox"]
# How a prompt is cleaned before it becomes words, see `ClipTower.tokenize`.
Cleaning = Literal["ftfy", "nfc"]

# OpenAI's byte-pair vocabulary, which every CLIP here reads.
START, END = 49406, 49407
# How it cuts a cleaned, lower-case prompt into words.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
REMEMBERED_PROMPTS = 4096


@dataclass(frozen=True)
class Tokens:
    """Prompts as a CLIP text tower reads them.

    Args:
        ids: int64 [B, L], start, words, end, padding.
        truncated: how many prompts were longer than L and were cut (the end token is kept).
    """

    ids: Tensor
    truncated: int


class ClipTower:
    """A frozen CLIP: pictures and prompts to un-normalised embeddings.

    It computes in its own dtype: an autocast around it is switched off (`without_autocast`), unless
    it is trained (`following_autocast`).

    Args:
        model: an open_clip CLIP, whose parameters are frozen here.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        size = model.visual.image_size
        self.image_size: int = size[0] if isinstance(size, tuple) else size
        self._texts: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.text_projection.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.text_projection.dtype
        return dtype

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return int(self.model.text_projection.shape[1])

    @property
    def context_length(self) -> int:
        """L, the length of a tokenised prompt."""
        return int(self.model.context_length)

    @property
    def logit_scale(self) -> float:
        """The factor that CLIP's training learnt for its cosines (100 at most, usually)."""
        return float(self.model.logit_scale.double().exp())

    def embed(
        self,
        images: Tensor,
        *,
        framing: Framing = "crop",
        round_to_uint8: bool = False,
        antialias: bool = True,
    ) -> Tensor:
        """Embed pictures [B, 3, H, W] in [0, 1] as [B, D]; inside `one_pass` only once.

        Args: as `prepare`.
        """

        def compute() -> Tensor:
            pixels = self.prepare(
                images, framing=framing, round_to_uint8=round_to_uint8, antialias=antialias
            )
            return self.image_features(pixels)

        return _once_per_pass(self, images, (framing, round_to_uint8, antialias), compute)

    def prepare(
        self,
        images: Tensor,
        *,
        framing: Framing = "crop",
        round_to_uint8: bool = False,
        antialias: bool = True,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] as normalised pixels [B, 3, S, S] on the tower's device.

        Args:
            framing: CLIP's centre crop, or HPS's letterbox.
            round_to_uint8: of the crop: rounded as Pillow does; the gradient passes straight.
            antialias: of the letterbox: whether the resize filters what it makes smaller.
        """
        images = images.to(self.device)
        with without_autocast(self.device):
            if framing == "letterbox":
                return normalise(letterbox(images, self.image_size, antialias=antialias))
            return clip_pixels(images, self.image_size, round_to_uint8=round_to_uint8)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Embed prepared pixels [B, 3, S, S] (see `preprocess`) as [B, D].

        The gradient reaches the pixels. Half-precision towers answer in float32.
        """
        with _own_precision(self.device):
            return _at_least_float32(self.model.encode_image(pixels.to(self.device, self.dtype)))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Projected tokens [B, 1 + N, D] of the last block, class token first, before `ln_post`.

        The gradient reaches the pixels.
        """
        visual = self.model.visual
        with _own_precision(self.device):
            found = visual.forward_intermediates(
                pixels.to(self.device, self.dtype),
                indices=1,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
            parts = [found["image_intermediates_prefix"][-1], found["image_intermediates"][-1]]
            return _at_least_float32(torch.cat(parts, dim=1) @ visual.proj)

    def tokenize(
        self, prompts: Sequence[str], *, pad: int = 0, cleaning: Cleaning = "ftfy"
    ) -> Tokens:
        """Prompts as ids; lower case, at most L tokens long.

        Args:
            pad: the id behind the end token.
            cleaning: "ftfy" as OpenAI's CLIP, open_clip and HPS read a prompt: broken Unicode,
                curly quotes and ligatures are mended, HTML entities resolved. "nfc" as the fast
                CLIP tokenizer of transformers, with which PickScore and MPS are used: Unicode's
                NFC and nothing else. There "<|endoftext|>" in a prompt would end it; here it is
                text.
        """
        length = self.context_length
        ids = torch.full((len(prompts), length), pad, dtype=torch.long)
        truncated = 0
        for row, prompt in zip(ids, prompts, strict=True):
            words = _words(prompt, cleaning)
            truncated += len(words) > length - 2
            whole = (START, *words[: length - 2], END)
            row[: len(whole)] = torch.tensor(whole)
        return Tokens(ids.to(self.device), truncated)

    def text_features(self, prompts: Sequence[str], *, cleaning: Cleaning = "ftfy") -> Tensor:
        """Embed prompts as [B, D], without a gradient; long prompts are cut at L tokens.

        A prompt is encoded once: the newest thousands are remembered.

        Args:
            cleaning: see `tokenize`.
        """
        how = (cleaning, self.device, self.dtype)
        known = {prompt: self._texts.get((prompt, *how)) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, features in known.items() if features is None]
        if missing:
            with to_remember():
                found = self.encode_text(self.tokenize(missing, cleaning=cleaning).ids)
            known |= zip(missing, found, strict=True)
        for prompt, features in known.items():
            key = (prompt, *how)
            self._texts[key] = features  # type: ignore[assignment]
            self._texts.move_to_end(key)
        while len(self._texts) > REMEMBERED_PROMPTS:
            self._texts.popitem(last=False)
        if not prompts:
            return torch.empty(0, self.width, device=self.device)
        return torch.stack([known[prompt] for prompt in prompts])  # type: ignore[misc]

    def count_truncated(self, prompts: Sequence[str], *, cleaning: Cleaning = "ftfy") -> int:
        """How many of the prompts are longer than the tower reads."""
        length = self.context_length - 2
        return sum(len(_words(prompt, cleaning)) > length for prompt in prompts)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embed token ids [B, L] as [B, D], read at the first end token."""
        # Attention looks back only: nothing behind the last end token can change the answer.
        ends = (ids == END).long().cumsum(dim=1).eq(0).sum(dim=1)
        with _own_precision(self.device):
            hidden = self._hidden(ids[:, : int(ends.max()) + 1])
            pooled = hidden[torch.arange(len(ids), device=ids.device), ends]
            return _at_least_float32(pooled @ self.model.text_projection)

    def text_tokens(self, ids: Tensor) -> Tensor:
        """Projected tokens [B, L, D] of every position of ids [B, L], padding included."""
        with _own_precision(self.device):
            return _at_least_float32(self._hidden(ids) @ self.model.text_projection)

    def _hidden(self, ids: Tensor) -> Tensor:
        model, length = self.model, ids.shape[1]
        x = model.token_embedding(ids).to(self.dtype)
        x = x + model.positional_embedding[:length].to(self.dtype)
        mask = model.attn_mask[:length, :length]
        return model.ln_final(model.transformer(x, attn_mask=mask))  # type: ignore[no-any-return]


@contextmanager
def one_pass() -> Iterator[None]:
    """Inside, a tower embeds the very same tensor of pictures only once, however often it is asked.

    Scorers on one tower so share one forward pass, and one graph where gradients are on: then
    back-propagate through their sum, once. Passes may be nested; the outermost one counts. Pictures
    made under `torch.inference_mode` must not be written to inside: torch does not count that.
    """
    if _PASS.get() is not None:
        yield
        return
    token = _PASS.set({})
    try:
        yield
    finally:
        _PASS.reset(token)


# What was embedded in this pass: key -> (the pictures, kept so that their id stays theirs; result).
_PASS: ContextVar[dict[Hashable, tuple[Tensor, Tensor]] | None] = ContextVar("pass", default=None)


def _once_per_pass(
    tower: ClipTower, images: Tensor, how: tuple[object, ...], compute: Callable[[], Tensor]
) -> Tensor:
    known = _PASS.get()
    if known is None:
        return compute()
    # A tensor that was written to meanwhile has another version; without gradients, another graph.
    version = 0 if images.is_inference() else images._version
    graph = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    key = (id(tower), id(images), version, graph, how)
    if key not in known:
        known[key] = (images, compute())
    return known[key][1]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, no autocast lowers the precision of what is computed on this device."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def following_autocast() -> Iterator[None]:
    """Inside, towers compute as an autocast around them says: for training one, never for scores.

    What prepares pixels and what reads a tower's features stay in float32.
    """
    token = _FOLLOWING.set(True)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


_FOLLOWING: ContextVar[bool] = ContextVar("following autocast", default=False)


def _own_precision(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if _FOLLOWING.get() else without_autocast(device)


@contextmanager
def to_remember() -> Iterator[None]:
    """Inside, tensors have no gradient and are none of `torch.inference_mode`'s, whatever is on.

    For what outlives the call: inference tensors could take no part in a later gradient.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def open_clip_package() -> Any:
    """open_clip takes seconds to import: only who needs a tower pays."""
    try:
        import open_clip
    except ImportError as error:
        raise RewardError(
            f"open_clip cannot be imported: {error}", fix="pip install open_clip_torch torchvision"
        ) from error
    return open_clip


@lru_cache(maxsize=REMEMBERED_PROMPTS)
def _words(prompt: str, cleaning: Cleaning) -> tuple[int, ...]:
    """The byte-pair ids of a prompt, without start and end."""
    tokenizer = _tokenizer()
    if cleaning == "ftfy":
        return tuple(tokenizer.encode(prompt))
    # Letter by letter, as there: Python's own lower() writes a sigma at a word's end differently.
    text = "".join(letter.lower() for letter in unicodedata.normalize("NFC", prompt))
    ids: list[int] = []
    for word in _word_pattern().findall(text):
        letters = "".join(tokenizer.byte_encoder[byte] for byte in word.encode())
        ids += (tokenizer.encoder[part] for part in tokenizer.bpe(letters).split(" "))
    return tuple(ids)


@cache
def _word_pattern() -> Any:
    import regex  # open_clip needs it anyway; Python's own re knows no \p

    return regex.compile(_WORD)


@cache
def _tokenizer() -> Any:
    return open_clip_package().SimpleTokenizer()


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
