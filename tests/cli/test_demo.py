"""What the package promises on its front page, with the weights that travel in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_demo_proves_that_its_pictures_became_better(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    done = call("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 0, (done.stderr, done.exception)
    summary = json.loads((tmp_path / "demo" / "final" / "summary.json").read_text())
    assert summary["pairs"] >= 512
    assert summary["trained_on"] == ["tiny-aesthetic"]
    # The trained reward rose, and the pictures still show what their captions say.
    assert summary["rewards"]["tiny-aesthetic"]["ci95"][0] > 0
    assert summary["rewards"]["verifier"]["ci95"][0] > -0.05
