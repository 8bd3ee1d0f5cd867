"""Captioned pictures: every layout gives the same, every problem is named at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.data.captioned import cover, read_captioned
from diffusion_align.errors import UserError
from reward_models.base import RewardError
from reward_models.small_world import verify


def picture(path: Path, level: int, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 255)).save(path)
    return path


def test_the_layouts_of_one_set_give_the_same(tmp_path: Path) -> None:
    captions = {"a.png": "a red thing", "sub/b.png": "a blue thing"}
    beside, tabled = tmp_path / "beside", tmp_path / "tabled"
    for number, (name, caption) in enumerate(captions.items()):
        picture(beside / name, 10 * number).with_suffix(".txt").write_text(f"{caption}\n")
        picture(tabled / name, 10 * number)
    rows = [{"file_name": name, "text": caption} for name, caption in captions.items()]
    table = tabled / "metadata.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tabled.parent / "pictures.csv"
    lines = [f"tabled/{name},{caption}" for name, caption in captions.items()]
    other.write_text("\n".join(["path,prompt", *lines]))
    sets = [read_captioned(source) for source in (beside, tabled, table, other)]
    for found in sets:
        assert found.captions == ("a red thing", "a blue thing")
        assert [found.pixels(i, 8, 8)[0, 0, 0].item() * 255 for i in (0, 1)] == [
            pytest.approx(0),
            pytest.approx(10),
        ]
    assert len({found.fingerprint for found in sets}) == 1


def test_the_fingerprint_sees_other_captions_and_other_files(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", 1)
    file.with_suffix(".txt").write_text("one")
    before = read_captioned(tmp_path).fingerprint
    file.with_suffix(".txt").write_text("two")
    after = read_captioned(tmp_path).fingerprint
    picture(file, 1, (640, 480))
    assert len({before, after, read_captioned(tmp_path).fingerprint}) == 3


def test_renders_of_the_small_world_show_their_captions() -> None:
    found = read_captioned("small-world:20")
    assert len(found) == 20
    shown = np.stack([found.pixels(i, 64, 64).numpy() for i in range(20)])
    held = [verify(image, caption) for image, caption in zip(shown, found.captions, strict=True)]
    assert all(claims.strict for claims in held)
    assert np.array_equal(shown[3], found.pixels(3, 64, 64).numpy())
    assert found.pixels(0, 32, 48).shape == (3, 32, 48)


def test_a_picture_is_covered_and_cut_in_the_middle() -> None:
    wide = torch.zeros(3, 10, 30)
    wide[:, :, 10:20] = 1.0
    assert torch.equal(cover(wide, 10, 10), torch.ones(3, 10, 10))
    tall = cover(torch.rand(3, 90, 30), 16, 24)
    assert tall.shape == (3, 16, 24)
    assert tall.min() >= 0 and tall.max() <= 1
    exact = torch.rand(3, 16, 24)
    assert torch.equal(cover(exact, 16, 24), exact)
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    np.testing.assert_allclose(  # shrinking a ramp averages it
        cover(ramp, 16, 16)[0, 0, 2:-2], ramp[0, 0].view(16, 4).mean(1)[2:-2], atol=1e-3
    )


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name, 0)
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UserError) as raised:
        read_captioned(tmp_path)
    assert "a.png: no caption" in str(raised.value)
    assert "c.png: no caption" in str(raised.value)
    assert "b.png" not in str(raised.value)


def test_rows_without_a_picture_or_a_caption_are_named_with_their_lines(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    table = tmp_path / "t.jsonl"
    rows = [
        {"path": "a.png", "prompt": "fine"},
        {"path": "gone.png", "prompt": "lost"},
        {"path": "a.png"},
        {"path": "clip.mp4", "prompt": "moving"},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as raised:
        read_captioned(table)
    for line, what in ((2, "no such file: gone.png"), (3, "no caption"), (4, "a video")):
        assert f"t.jsonl:{line}: {what}" in str(raised.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no such folder or table"),
        ("small-world:heldout", "held out"),
        ("small-world:x", "unknown prompt list"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(source: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_captioned(source)


def test_a_folder_with_two_tables_or_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no images"):
        read_captioned(tmp_path)
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"which table has the captions\? a\.jsonl, b\.csv"):
        read_captioned(tmp_path)


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png", 0)
    file.with_suffix(".txt").write_text("one")
    file.write_bytes(file.read_bytes()[:50])
    found = read_captioned(tmp_path)
    with pytest.raises(RewardError, match=r"a\.png"):
        found.pixels(0, 8, 8)
