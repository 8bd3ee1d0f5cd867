"""Evaluation options: documented, checked, and free of torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from diffusion_align.evaluation.options import EvaluationOptions


def test_every_field_is_documented_and_has_a_default() -> None:
    for option in dataclasses.fields(EvaluationOptions):
        assert option.metadata["doc"]
        assert option.default is not dataclasses.MISSING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds: must be at least 1"),
        ({"batch_size": 0}, "batch_size: must be at least 1"),
        ({"limit": 0}, "limit: must be at least 1"),
        ({"eta": 1.5}, "eta: must lie in .0, 1., not 1.5"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(**change)  # type: ignore[arg-type]


def test_importing_them_brings_no_torch() -> None:
    code = (
        "import sys, diffusion_align.evaluation.options, diffusion_align.data.prompts;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
