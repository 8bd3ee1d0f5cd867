"""The optimiser that the options name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffusion_align.errors import UserError
from diffusion_align.training.options import TrainOptions


def make_optimizer(
    parameters: Sequence[nn.Parameter], options: TrainOptions, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over these parameters, or the one of bitsandbytes that keeps its moments in 8 bits.

    That one quantises the moments by blocks and leaves those of tensors below 4096 elements in
    float32 (Dettmers et al. 2022, arXiv 2110.02861), so that it saves little on a small LoRA.

    Raises:
        UserError: 8 bits without a CUDA device, or without bitsandbytes.
    """
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **hyperparameters(options))
    if device.type != "cuda":
        raise UserError(
            f"adamw8bit computes on CUDA devices only, and this run is on {device}",
            where="train.optimizer",
            fix="set train.optimizer=adamw",
        )
    try:
        bitsandbytes: Any = import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            f"adamw8bit needs bitsandbytes ({error})",
            where="train.optimizer",
            fix='pip install "diffusion-align[quantization]", or set train.optimizer=adamw',
        ) from error
    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, **hyperparameters(options)
    )
    return made


def hyperparameters(options: TrainOptions) -> dict[str, Any]:
    """AdamW's own names for what the options say."""
    return {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }
