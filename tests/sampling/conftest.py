"""A small random Stable Diffusion, saved once a session, built beside the policy tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from diffusion_align import Policy


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Stable Diffusion pipeline whose last step has noise."""
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_sampling", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("sampling")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def policy(folder: Path) -> Policy:
    """Frozen; tests leave it as it is."""
    return Policy.load(folder)
