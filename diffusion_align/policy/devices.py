"""The device that a word names. Needs torch alone, so that scoring files brings in no diffusers."""

from __future__ import annotations

import os

import torch

from diffusion_align.errors import UserError


def device_of(name: str) -> torch.device:
    """The torch device of an option's word; "auto" is CUDA where there is one.

    Of several processes on a machine (LOCAL_RANK says which) each has a GPU of its own.

    Raises:
        UserError: an unknown device, or one that cannot be used on this machine.

    >>> device_of("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        # With its number, so that two devices can be told apart.
        name = f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"unknown device {name!r}", where="device", fix="auto, cpu, cuda or cuda:0"
        ) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"torch cannot use {name} here: {str(error).splitlines()[0]}",
            where="device",
            fix="use auto or cpu",
        ) from error
    return device
