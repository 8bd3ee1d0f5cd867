"""LoRA through peft: add, load, save with its metadata, and switch to a reference.

Two switches are flipped by hand on a cached list of layers instead of through peft's
`set_adapter`/`disable_adapters`, which also flip `requires_grad` (a frozen snapshot would become
trainable) and walk the whole model at every call.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from diffusion_align.errors import UserError, did_you_mean
from diffusion_align.policy.families import Family
from diffusion_align.policy.options import LoRAInit
from diffusion_align.policy.tuned import LORA_FILE, find_lora

TRAINED = "default"
SNAPSHOT = "snapshot"


class TrainingDropout(nn.Module):
    """Dropout that acts exactly in training forwards: those made with gradients enabled.

    Every module stays in eval mode and nobody has to switch it: a rollout, a reference and a
    picture run without gradients and therefore without dropout. A method that compares the
    likelihood of a training forward with that of a rollout cannot have dropout at all, and
    refuses it. Masks come from torch's global stream.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.probability, training=torch.is_grad_enabled())


class Adapter:
    """The LoRA of one denoiser.

    Args:
        denoiser: a module that already carries the adapter `default` (and perhaps `snapshot`).
        dropout: probability for the trained adapter.
        dtype: of the trained weights; float32, or float64 for a float64 model.
        reference_is_snapshot: whether training began from a LoRA.
    """

    def __init__(
        self, denoiser: Any, *, dropout: float, dtype: torch.dtype, reference_is_snapshot: bool
    ) -> None:
        self._denoiser = denoiser
        self._layers = [module for module in denoiser.modules() if isinstance(module, LoraLayer)]
        self.reference_is_snapshot = reference_is_snapshot
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"{dropout} is not in [0, 1)", where="lora.dropout")
        for layer in self._layers:
            if TRAINED in layer.lora_dropout:
                layer.lora_dropout[TRAINED] = (
                    TrainingDropout(dropout) if dropout > 0.0 else nn.Identity()
                )
        denoiser.peft_config[TRAINED].lora_dropout = dropout
        denoiser.set_adapter(TRAINED)
        for name, parameter in denoiser.named_parameters():
            if f".{TRAINED}." in name and ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
            else:
                parameter.requires_grad_(False)
        denoiser.eval()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """The base model: every adapter off."""
        before = [layer._disable_adapters for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before):
                layer._disable_adapters = value

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """The LoRA that training began from: the frozen second adapter."""
        before = [layer._active_adapter for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [SNAPSHOT]
        try:
            yield
        finally:
            for layer, value in zip(self._layers, before):
                layer._active_adapter = value

    @contextmanager
    def scaled(self, value: float) -> Iterator[None]:
        """The trained adapter at `value` times its own strength."""
        layers = [layer for layer in self._layers if TRAINED in layer.scaling]
        before = [layer.scaling[TRAINED] for layer in layers]
        for layer, own in zip(layers, before):
            layer.scaling[TRAINED] = own * value
        try:
            yield
        finally:
            for layer, own in zip(layers, before):
                layer.scaling[TRAINED] = own

    def save(self, pipeline: Any, family: Family, folder: Path) -> None:
        """Write the trained adapter in diffusers' format with its metadata, atomically.

        Without the metadata a reload takes alpha = rank, and the pictures change. The keys stay in
        peft's form (`lora_A`, `lora_B`): diffusers' own conversion renames those of attention
        layers only, and its loader, which judges by the first key, then drops the rest in silence.
        """
        state = get_peft_model_state_dict(self._denoiser, adapter_name=TRAINED)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
            type(pipeline).save_lora_weights(
                unfinished,
                weight_name=LORA_FILE,
                safe_serialization=True,
                **{
                    f"{family.denoiser}_lora_layers": state,
                    f"{family.denoiser}_lora_adapter_metadata": self._denoiser.peft_config[
                        TRAINED
                    ].to_dict(),
                },
            )
            os.replace(Path(unfinished) / LORA_FILE, folder / LORA_FILE)


def add_lora(
    denoiser: Any,
    family: Family,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    targets: Sequence[str] | None,
    init: LoRAInit,
    seed: int,
    dtype: torch.dtype,
) -> Adapter:
    """Add a fresh LoRA, which changes nothing yet: its second matrices are zero.

    Args:
        denoiser: on the CPU.
        family: gives the targets when `targets` is None.
        rank, alpha, dropout, targets, init: see `LoRAOptions`.
        seed: of the first matrices, drawn from a generator of their own.
        dtype: of the new weights.

    Raises:
        UserError: a rank below 1, or targets that match no layer.
    """
    if rank < 1:
        raise UserError(f"{rank} is not at least 1", where="lora.rank")
    names = tuple(family.lora_targets if targets is None else targets)
    _check_targets(denoiser, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(names),
    )
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws weights that are drawn again below
            denoiser.add_adapter(config, adapter_name=TRAINED)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0], where="lora.targets") from error
    adapter = Adapter(denoiser, dropout=dropout, dtype=dtype, reference_is_snapshot=False)
    generator = torch.Generator().manual_seed(seed % 2**63)  # torch takes no larger one
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad and ".lora_A." in name:
            if init == "gaussian":
                nn.init.normal_(parameter, std=1 / rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    return adapter


def load_lora(
    pipeline: Any,
    family: Family,
    path: Path,
    *,
    rank: int | None,
    dropout: float,
    dtype: torch.dtype,
) -> Adapter:
    """Continue from a saved LoRA, and keep a frozen snapshot of it as the reference.

    Args:
        pipeline: a bare pipeline on the CPU.
        family: its row.
        path: `.safetensors` file, its folder, or a run.
        rank: what the user expects, or None.
        dropout: of the trained adapter from now on.
        dtype: of the trained weights.

    Raises:
        UserError: no weights, weights for another model or for a text encoder, another rank.
    """
    file = find_lora(path)
    denoiser = getattr(pipeline, family.denoiser)
    try:
        with safe_open(file, "pt") as stored:
            matrices = sum(len(stored.get_slice(key).get_shape()) > 1 for key in stored.keys())  # noqa: SIM118
        with loader_notices_off():
            for name in (TRAINED, SNAPSHOT):
                pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name
                )
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(
            f"this LoRA does not fit the model: {str(error).splitlines()[0]}",
            where=str(file),
            fix="load it with the model it was trained on",
        ) from error
    found = getattr(denoiser, "peft_config", {})
    if TRAINED not in found:
        raise UserError(f"it holds no layer of the {family.denoiser}", where=str(file))
    for name, component in pipeline.components.items():
        if name != family.denoiser and getattr(component, "peft_config", None):
            raise UserError(
                f"it also changes the {name}; only LoRAs of the {family.denoiser} are supported",
                where=str(file),
            )
    placed = sum(f".{TRAINED}." in name for name, _ in denoiser.named_parameters())
    if placed < matrices:
        raise UserError(
            f"only {placed} of its {matrices} matrices found a place in the model",
            where=str(file),
            fix="load it with the model it was trained on; files that mix the key formats of peft "
            "and diffusers must be saved again in one of them",
        )
    if rank is not None and rank != found[TRAINED].r:
        raise UserError(
            f"rank {rank} was asked for, but this LoRA has rank {found[TRAINED].r}",
            where=str(file),
            fix="leave the rank out when starting from a LoRA",
        )
    return Adapter(denoiser, dropout=dropout, dtype=dtype, reference_is_snapshot=True)


@contextmanager
def loader_notices_off() -> Iterator[None]:
    """Silence what the loaders say of every LoRA; what matters of it is checked by `load_lora`.

    diffusers reports that there is nothing for the text encoders, and peft asks whether a second
    adapter is meant (it is) and mentions layers that the file leaves out.
    """
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft")
            yield
    finally:
        diffusers_logging.set_verbosity(level)


def _check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    modules = [name for name, _ in denoiser.named_modules()]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in modules):
            continue
        endings = {name.rpartition(".")[2] for name in modules if name}
        endings = {ending for ending in endings if not ending.isdigit()}
        guess = did_you_mean(target, sorted(endings))
        raise UserError(
            f"{target!r} matches no layer of the denoiser",
            where="lora.targets",
            fix=f"did you mean {guess}?" if guess else "see the model's named_modules()",
        )
