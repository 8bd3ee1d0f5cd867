"""Names, did-you-mean, and what loading refuses."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import reward_models
from reward_models.base import RewardError
from reward_models.catalogue import (
    ROWS,
    TOWERS,
    canonical,
    check_name,
    find,
    is_file,
    load,
    names,
)


def test_the_catalogue_imports_no_torch_and_answers_typos() -> None:
    code = (
        "import sys, reward_models, reward_models.catalogue as c\n"
        "c.names(); reward_models.RewardError\n"
        "try: c.check_name('aestetic')\n"
        "except reward_models.RewardError as error: print(error)\n"
        "assert not {'torch', 'open_clip', 'PIL', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean aesthetic ?" in done.stdout


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("aestetic", "aesthetic"), ("compresibility", "compressibility"), ("Tatse", "taste")],
)
def test_a_typo_gets_the_nearest_name(typo: str, meant: str) -> None:
    with pytest.raises(RewardError, match=f"did you mean {meant} "):
        load(typo)


def test_names_are_found_whatever_the_case_and_by_alias() -> None:
    assert find(" Aesthetic ").info.name == "aesthetic"
    assert find("aesthetic-v2").info.name == "aesthetic"
    check_name("my_package.rewards:Mine")


@pytest.mark.parametrize("name", ["ImageReward", "image_reward", "Image-Reward", "HPS-v2"])
def test_a_folder_does_not_shadow_a_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not is_file(name) and is_file(f"./{name}") and is_file("mine")
    check_name(name)
    with pytest.raises(RewardError, match=r"holds no reward\.safetensors"):
        check_name(f"./{name}")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused_in_words(name: str) -> None:
    for refuse in (find, check_name, load):
        with pytest.raises(RewardError, match="the name of the reward is empty"):
            refuse(name)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        (" Aesthetic_V2 ", "aesthetic"),
        ("ImageReward", "image-reward"),
        ("taste", "taste"),
        ("0.5*Clip_Score + 1.0*HPS-v2.1", "0.5*clip + hpsv2.1"),
        ("runs/Mine/reward.safetensors", "runs/Mine/reward.safetensors"),
        ("My_Package.rewards:Mine", "My_Package.rewards:Mine"),
        ("aestetic", "aestetic"),
        ("", ""),
    ],
)
def test_two_spellings_of_a_reward_become_one(name: str, written: str) -> None:
    assert canonical(name) == written == canonical(written)


def test_every_row_is_complete() -> None:
    assert names() == list(ROWS)
    for name, row in ROWS.items():
        module, _, function = row.target.partition(":")
        assert callable(getattr(import_module(module), function)), name
        assert row.info.name == name
        assert row.info.licence and row.info.range and row.info.source
        assert not row.tower or row.tower in TOWERS
        for file in row.files:
            assert file.asset or file.fetch_command(), f"{name}: nobody can fetch {file.name}"


def test_what_needs_no_download_counts_as_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path))
    assert find("compressibility").installed and find("taste").installed
    row = find("aesthetic-v1")
    assert [file.name for file in row.files] == [
        "sa_0_4_vit_l_14_linear.pth",
        "vit_large_patch14_clip_224.openai.safetensors",
    ]
    assert not row.installed
    for file in row.files:
        (tmp_path / file.name).touch()
    assert row.installed


def test_lazy_exports_all_resolve() -> None:
    assert all(getattr(reward_models, name) is not None for name in reward_models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reward_models.nothing


def test_a_gradient_is_asked_for_at_start_up() -> None:
    with pytest.raises(RewardError, match="compressibility: has no gradient"):
        load("compressibility", needs_gradient=True)


def test_files_for_a_reward_that_reads_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="takes no weights"):
        load("compressibility", weights=tmp_path / "a.pth")
    with pytest.raises(RewardError, match="stands on no tower"):
        load("verifier", tower=tmp_path / "b.safetensors")
