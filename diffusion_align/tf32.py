"""TF32 on CUDA: ten bits of mantissa in what is called float32. cuDNN's convolutions use it unless
they are told not to, and a likelihood ratio is finer than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def in_use() -> bool:
    """Whether float32 convolutions or matrix products may be computed in TF32."""
    try:
        return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # set through the newer switches, which the older cannot express
        return any(switch.fp32_precision == "tf32" for switch in _newer())


@contextmanager
def switched_off() -> Iterator[None]:
    """No TF32 inside; afterwards the process's settings are what they were."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        with _newer_switched_off():
            yield
        return
    cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def _newer() -> list[Any]:
    cudnn: Any = torch.backends.cudnn
    return [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]


@contextmanager
def _newer_switched_off() -> Iterator[None]:
    before = [switch.fp32_precision for switch in _newer()]
    for switch in _newer():
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(_newer(), before, strict=True):
            switch.fp32_precision = value
