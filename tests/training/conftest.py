"""The toy algorithms of the tests, loaded by their paths (tests are no packages)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The linear-Gaussian world of the algorithm tests."""
    return _load(Path(__file__).parent.parent / "algorithms" / "toy.py", "toy_of_training")


@pytest.fixture(scope="session")
def regression() -> ModuleType:
    """The smallest algorithm of the contract."""
    return _load(Path(__file__).with_name("regression.py"), "regression_of_training")
