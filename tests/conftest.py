"""What all tests share: no network, and real inputs that are either used or missed aloud.

Tests of real published files read the folder named by DIFFUSION_ALIGN_TEST_DATA and skip without
it. Where DIFFUSION_ALIGN_REQUIRE_DATA=1 says that the data (and hpsv2, for parity) must be there,
such a skip is a failure.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator

import pytest

# Before any library reads them: a test never waits for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Where converted copies of weight files go: never into the user's own cache.
os.environ.setdefault("REWARD_MODELS_HOME", tempfile.mkdtemp(prefix="reward_models-"))

REQUIRED = os.environ.get("DIFFUSION_ALIGN_REQUIRE_DATA") == "1"
DATA = os.environ.get("DIFFUSION_ALIGN_TEST_DATA", "")


def wanted(reason: str) -> bool:
    """Whether a skip is for want of something that DIFFUSION_ALIGN_REQUIRE_DATA demands."""
    names = ["DIFFUSION_ALIGN_TEST_DATA", "hpsv2", *([DATA] if DATA else [])]
    return any(name in reason for name in names)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a required test into a failure."""
    report = yield
    reason = str(report.longrepr)
    if REQUIRED and report.skipped and wanted(reason):
        report.outcome = "failed"
        report.longrepr = f"DIFFUSION_ALIGN_REQUIRE_DATA=1, but this was skipped: {reason}"
    return report
