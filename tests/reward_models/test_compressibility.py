"""JPEG sizes against an independent encode."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.catalogue import load
from reward_models.media import read_image


def test_scores_are_the_kilobytes_of_an_independent_encode(tmp_path: Path, photo) -> None:  # type: ignore[no-untyped-def]
    pictures = [photo(48, 64, seed) for seed in range(3)]
    sizes = []
    for index, picture in enumerate(pictures):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(picture).save(path, quality=95)
        sizes.append(os.path.getsize(path) / 1000)
    media = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    assert load("incompressibility").score(media, [""] * 3).values.tolist() == pytest.approx(sizes)
    negated = [-size for size in sizes]
    assert load("compressibility").score(media, [""] * 3).values.tolist() == pytest.approx(negated)


def test_noise_is_larger_than_a_plain_picture() -> None:
    media = torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)])
    plain, noise = load("incompressibility").score(media, ["", ""]).values.tolist()
    assert noise > 5 * plain


def test_a_nan_picture_scores_nan_alone() -> None:
    media = torch.rand(3, 3, 16, 16)
    media[1, 0, 0, 0] = float("nan")
    values = load("compressibility").score(media, [""] * 3).values
    assert values.isnan().tolist() == [False, True, False]
    assert load("compressibility").score(media[1:2], [""]).values.isnan().all()


def test_a_saved_picture_scores_like_its_tensor(tmp_path: Path, photo) -> None:  # type: ignore[no-untyped-def]
    Image.fromarray(photo(32, 32)).save(tmp_path / "a.png")
    from_file = read_image(tmp_path / "a.png")[None]
    almost = (from_file + 0.001).clamp(0, 1)  # below half a level: the same uint8 picture
    reward = load("compressibility")
    assert reward.score(from_file, [""]).values == reward.score(almost, [""]).values
