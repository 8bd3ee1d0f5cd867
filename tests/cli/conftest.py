"""A small random pipeline on disk, and the command line called in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusion_align.cli import app

BUILDERS = Path(__file__).parents[1] / "policy" / "tiny_pipelines.py"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion with a few ten thousand random weights, 32 x 32 pixels."""
    spec = importlib.util.spec_from_file_location("tiny_pipelines", BUILDERS)
    assert spec is not None and spec.loader is not None
    tiny: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("model")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(folder)
    return folder


@pytest.fixture
def call() -> Callable[..., Any]:
    """`call("train", "demo")`: the result has `exit_code`, `stdout` and `stderr`."""

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run
