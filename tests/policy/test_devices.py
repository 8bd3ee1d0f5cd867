"""The device that a word names."""

from __future__ import annotations

import pytest
import torch

from diffusion_align import UserError
from diffusion_align.policy.devices import device_of


def test_words_name_devices() -> None:
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cuda_has_its_number_so_that_two_devices_can_be_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of("auto") == device_of("cuda") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("cuda") == torch.device("cuda:3")


def test_an_unknown_device_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"unknown device 'gpu'[^$]*auto, cpu, cuda"):
        device_of("gpu")


def test_a_device_that_this_machine_lacks_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="torch cannot use cuda:99 here"):
        device_of("cuda:99")
