"""What a user may say about the model and its LoRA. Plain values: the CLI imports this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, positive, require, words

DEFAULT_RANK = 8
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
LoRAInit = Literal["kaiming", "gaussian"]
GuidanceGradient = Literal["both", "conditional"]
"""Which guidance branches a gradient flows through."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how.

    Args:
        id: a name of the catalogue (`tiny-sd`, `sd15` ...), a folder, or a hub id `owner/name`.
        revision: branch, tag or commit on the hub; None is the repository's default.
        dtype: storage of the frozen weights: "float32", "bfloat16", "float16" or "float64".
            Trainable weights are float32 (float64 under "float64") whatever is said here.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1" ...
        gradient_checkpointing: recompute the denoiser's activations in the backward pass instead
            of keeping them; None is what `memory` says, as in the four keys below.
        release_text_encoders: keep text encoders in main memory and on the device only while new
            prompts are encoded.
        vae_slicing: decode one picture at a time.
        vae_tiling: decode in overlapping tiles; beyond the VAE's tile size it changes pictures
            slightly.
        channels_last: lay out convolution weights with channels last; faster on GPUs in half
            precision.
        compile: compile the denoiser's repeated blocks with torch.compile; a minute at the start.
        attention_backend: kernel of the attention, for example "native", "flash" or "xformers";
            None leaves the model's own, which is torch's.

    Errors: an unknown dtype or an empty backend raises `OptionError`.
    """

    id: str = "tiny-sd"
    revision: str | None = None
    dtype: Dtype = "float32"
    device: str = "auto"
    gradient_checkpointing: bool | None = None
    release_text_encoders: bool | None = None
    vae_slicing: bool | None = None
    vae_tiling: bool | None = None
    channels_last: bool = False
    compile: bool = False
    attention_backend: str | None = None

    def __post_init__(self) -> None:
        words(self)
        if self.attention_backend is not None and not self.attention_backend.strip():
            raise OptionError("attention_backend", "is empty", fix="null leaves the model's own")


@dataclass(frozen=True)
class LoRAOptions:
    """The low-rank adapter to train.

    Args:
        rank: inner width of every adapted layer, at least 1; None is 8, or the rank of the LoRA
            that path names. Another rank than that one's is refused.
        alpha: the update is scaled by alpha / rank; None means alpha = rank, a scale of 1.
        dropout: probability in [0, 1) of dropping an input of the adapter in a training forward
            (never in a rollout, a replay check or a picture).
        targets: names of the layers to adapt; None means the family's own list.
        init: how the first matrix A of each layer is drawn (the second begins at zero): `kaiming`,
            peft's own, uniform within 1 / sqrt(fan-in); `gaussian`, of standard deviation 1 / rank
            whatever the layer's width. AdamW's first steps move the second matrix by about the
            learning rate, so the model by that times A: a learning rate belongs to one of them.
        path: folder or file of a LoRA to start from. Its rank, alpha, targets and init are then
            the file's, and the reference of the run is a frozen snapshot of it.

    Errors: a value out of range raises `OptionError`; so do alpha, targets and
    init beside a path.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    init: LoRAInit = "kaiming"
    path: str | None = None

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "rank")
        positive(self, "alpha")
        require(self, "lie in [0, 1)", lambda share: 0 <= share < 1, "dropout")
        if self.targets is not None and not self.targets:
            raise OptionError("targets", "names no layer", fix="null means the family's own list")
        for name, unset in (("alpha", None), ("targets", None), ("init", "kaiming")):
            if self.path is not None and getattr(self, name) != unset:
                raise OptionError(
                    name,
                    f"is that of the LoRA in {self.path}",
                    fix=f"set {name}={'null' if unset is None else unset}, or leave path out",
                    reads=("path",),
                )

    @property
    def new_rank(self) -> int:
        """The rank of a LoRA that begins from nothing."""
        return DEFAULT_RANK if self.rank is None else self.rank
