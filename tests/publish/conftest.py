"""Small random pipelines with LoRAs that were moved away from zero, and the stand-in of the hub."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from diffusion_align import Policy
from diffusion_align.cli import app

HERE = Path(__file__).parent
TOKEN = "hf_canaryCanaryCanaryCanary0123456789"


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines: `sd` and `xl`."""
    tiny = _load(HERE.parent / "policy" / "tiny_pipelines.py", "tiny_pipelines_of_publish")
    root = tmp_path_factory.mktemp("pipelines")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root / "sd")
    tiny.stable_diffusion_xl(tiny.ddim()).save_pretrained(root / "xl")
    return {name: root / name for name in ("sd", "xl")}


def disturb(policy: Policy, size: float = 0.2) -> None:
    """Stands for training: every trained weight moves."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(noise, alpha=size)


@pytest.fixture(scope="session")
def moved() -> Callable[..., None]:
    return disturb


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in; huggingface_hub is online for it, and uploads as it does without hf_xet."""
    from huggingface_hub import constants

    module = _load(HERE / "hub.py", "hub_stand_in")
    with module.running(TOKEN) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def call() -> Callable[..., Any]:
    """`call("push", run, ...)`: the result has `exit_code`, `stdout` and `stderr`."""

    def run(*words: object) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    return run
