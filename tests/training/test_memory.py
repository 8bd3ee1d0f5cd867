"""The meters of tensor memory, the counter of arithmetic, and 8-bit moments."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion_align.errors import UserError
from diffusion_align.training.flops import Flops
from diffusion_align.training.memory import LiveBytes, high_water, tensor_bytes
from diffusion_align.training.optimizer import make_optimizer
from diffusion_align.training.options import TrainOptions

MEGA = 1 << 20
CPU = torch.device("cpu")


def two_then_one() -> None:
    """2 MiB are alive at once, then 1, then 1.5."""
    a, b = torch.ones(MEGA // 4), torch.ones(MEGA // 4)
    c = a.view(-1, 4)  # a view is no memory
    a.add_(1)  # nor is a result in place
    del a, c
    torch.ones(MEGA // 8)
    del b


def test_live_bytes_are_those_of_storages() -> None:
    with LiveBytes("only") as live:
        two_then_one()
    assert live.peak == 2 * MEGA and live.now == 0 and live.peaks == {"only": 2 * MEGA}


def test_the_profiler_counts_the_same_bytes() -> None:
    def work() -> str:
        two_then_one()
        return "done"

    done, found = high_water(CPU, work)
    assert done == "done"
    assert 2 * MEGA <= found <= 2 * MEGA + 4096


def test_what_was_there_before_does_not_count() -> None:
    before = torch.ones(MEGA // 4)
    with LiveBytes() as live:
        before.add_(1)
        before.view(4, -1)
    assert live.peak == 0


def test_phases_have_peaks_of_their_own() -> None:
    with LiveBytes("first") as live:
        kept = torch.ones(MEGA // 4)
        with live.during("second"):
            torch.ones(MEGA // 2)
        torch.ones(MEGA // 8)
    assert live.peaks == {"first": MEGA + MEGA // 2, "second": 3 * MEGA}
    assert live.kept == {"first": 0, "second": MEGA}
    del kept


def test_saved_activations_are_alive_until_the_backward_pass() -> None:
    """x is given; every layer keeps its input: three of 1 MiB beside the output, by hand."""
    x = torch.zeros(256, 1024, requires_grad=True)
    with LiveBytes() as live:
        y = x.sin().sin().sin().sin()  # each keeps what it was given; the last result is y
        assert live.now == 4 * MEGA
        y.sum().backward()
        del y
    assert live.now == MEGA  # x.grad


def test_a_dry_run_counts_what_a_real_one_does() -> None:
    network = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    x = torch.randn(256, 64)

    def work() -> None:
        network(x).square().mean().backward()
        network.zero_grad()

    with LiveBytes() as real:
        work()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in network:
            for name, value in list(module._parameters.items()):
                assert value is not None
                module._parameters[name] = nn.Parameter(torch.empty(value.shape))
    with LiveBytes() as dry:
        work()
    assert dry.peak == real.peak > 256 * 512 * 4 * 2


def test_flops_are_two_per_multiplication_and_addition() -> None:
    with Flops() as flops:
        torch.ones(3, 5) @ torch.ones(5, 7)
        flops.phase = "other"
        nn.functional.conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 1, 1))
        torch.ones(9).exp()
    assert flops.by_phase == {"run": 2 * 3 * 5 * 7, "other": 2 * 2 * 3 * 16}


def test_tied_weights_are_counted_once() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert tensor_bytes(nn.Sequential(layer, layer)) == 8 * 8 * 4


def test_eight_bits_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.zeros(3))]
    options = TrainOptions(optimizer="adamw8bit")
    with pytest.raises(UserError, match=r"CUDA.*\n.*train.optimizer=adamw"):
        make_optimizer(parameters, options, CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"diffusion-align\[quantization\]"):
        make_optimizer(parameters, options, torch.device("cuda"))


def test_eight_bits_get_the_hyperparameters_of_the_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=torch.optim.AdamW))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)  # type: ignore[arg-type]
    options = TrainOptions(optimizer="adamw8bit", learning_rate=0.5, adam_beta2=0.7)
    made = make_optimizer([nn.Parameter(torch.zeros(3))], options, torch.device("cuda"))
    assert made.defaults["lr"] == 0.5 and made.defaults["betas"] == (0.9, 0.7)
