"""Folders with small random pipelines, saved once a session."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from diffusion_align import Policy


def _load(path: Path, name: str) -> ModuleType:
    """A module that lies beside the tests; they are no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The builders of `tiny_pipelines.py`."""
    return _load(Path(__file__).with_name("tiny_pipelines.py"), "tiny_pipelines")


@pytest.fixture(scope="session")
def folders(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines: `eps` and `v` (Stable Diffusion), `xl` (SDXL)."""
    root = tmp_path_factory.mktemp("pipelines")
    made = {
        "eps": tiny.stable_diffusion(tiny.ddim()),
        "v": tiny.stable_diffusion(tiny.ddim("v_prediction")),
        "xl": tiny.stable_diffusion_xl(tiny.ddim()),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture(scope="session")
def frozen(folders: dict[str, Path]) -> dict[str, Policy]:
    """One frozen policy per folder; tests leave them as they are."""
    return {name: Policy.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def transformers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines of the transformer families: SD3 (also with dynamic shifting), FLUX (also
    told no scale), Wan 2.1, CogVideoX (also with rotary positions), EasyAnimate V5.1 (also with
    dynamic shifting)."""
    tiny = _load(Path(__file__).with_name("tiny_transformers.py"), "tiny_transformers")
    root = tmp_path_factory.mktemp("transformers")
    made = {
        "sd3": tiny.stable_diffusion_3(),
        "sd3-dynamic": tiny.stable_diffusion_3(use_dynamic_shifting=True),
        "flux": tiny.flux(),
        "flux-schnell": tiny.flux(schnell=True),
        "wan": tiny.wan(),
        "cogvideox": tiny.cogvideox(),
        "cogvideox-rotary": tiny.cogvideox(rotary=True),
        "easyanimate": tiny.easyanimate(),
        "easyanimate-dynamic": tiny.easyanimate(shift=1.0, use_dynamic_shifting=True),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture(scope="session")
def frozen_transformers(transformers_of: dict[str, Path]) -> dict[str, Policy]:
    """One frozen policy per folder; tests leave them as they are."""
    return {name: Policy.load(folder) for name, folder in transformers_of.items()}
