"""Real inputs, and pictures that need no files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Published = Callable[[str], Path]
Photo = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="session")
def published() -> Published:
    """A real published file by its path below DIFFUSION_ALIGN_TEST_DATA, or a skip."""

    def find(name: str) -> Path:
        folder = os.environ.get("DIFFUSION_ALIGN_TEST_DATA")
        if not folder:
            pytest.skip("DIFFUSION_ALIGN_TEST_DATA names no folder of real test inputs")
        path = Path(folder) / name
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        return path

    return find


@pytest.fixture(scope="session")
def photo() -> Photo:
    """Photo-like uint8 [H, W, 3]: smooth colour with edges, texture and saturated parts."""

    def make(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3))
        smooth = Image.fromarray(coarse.astype(np.uint8)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        pixels = np.asarray(smooth).astype(np.int64) + rng.integers(-40, 41, (height, width, 3))
        pixels[: height // 3, : width // 4] = 255
        pixels[height // 2 :, width // 2 :: 7] = 0
        return np.clip(pixels, 0, 255).astype(np.uint8)

    return make
