"""Options of the supervised step: a frozen standard-library dataclass, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, positive


@dataclass(frozen=True)
class SupervisedOptions:
    """Pictures with captions that a method of reward gradients is fitted to beside its reward.

    Errors: a value out of range raises `OptionError`.
    """

    pictures: str = field(
        metadata={
            "doc": "a folder (captions in .txt files beside the pictures, or in one table), a "
            ".jsonl, .csv or .parquet table with path and prompt, or small-world (small-world:N)"
        }
    )
    every: int = field(
        default=1, metadata={"doc": "the first of so many iterations takes it; 1 = all of them"}
    )
    weight: float = field(
        default=1.0, metadata={"doc": "weight of the denoising loss in that iteration's update"}
    )
    batch_size: int = field(default=8, metadata={"doc": "pictures of one supervised step"})
    pictures_per_loss: int = field(
        default=8, metadata={"doc": "pictures in one forward; lower needs less memory"}
    )

    def __post_init__(self) -> None:
        if not self.pictures.strip():
            raise OptionError("pictures", "is empty", fix="name a folder, a table or small-world")
        at_least(self, 1, "every", "batch_size", "pictures_per_loss")
        positive(self, "weight")
