"""MPS's fusion network against its formulas, written out slowly in float64."""

from __future__ import annotations

import cmath
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reward_models.base import RewardError
from reward_models.cross_attention import CrossModel, cross_model_from

DIM, LAYERS, HEADS, HEAD_DIM, FF = 24, 3, 4, 6, 2
FILE = Path("fusion.pth")


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a small network: names from the published layout, sizes from the formulas."""
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = HEADS * HEAD_DIM, FF * DIM

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    tensors = {}
    for layer in range(LAYERS):
        for half in range(2):
            name = f"layers.{layer}.{half}.fn"
            tensors[f"{name}.norm.weight"] = 1 + torch.randn(DIM, generator=generator) / 4
            tensors[f"{name}.norm.bias"] = torch.zeros(DIM)
        cross, own = f"layers.{layer}.0.fn", f"layers.{layer}.1.fn"
        tensors[f"{cross}.to_q.weight"] = 2 * draw(inner, DIM)
        tensors[f"{cross}.to_kv.weight"] = 2 * draw(2 * HEAD_DIM, DIM)
        tensors[f"{cross}.to_out.weight"] = draw(DIM, inner)
        tensors[f"{cross}.ff.0.weight"] = draw(2 * hidden, DIM)
        tensors[f"{cross}.ff.2.weight"] = draw(DIM, hidden)
        frequencies = [10000 ** (-2 * j / HEAD_DIM) for j in range(HEAD_DIM // 2)]
        tensors[f"{own}.rotary_emb.inv_freq"] = torch.tensor(frequencies)
        tensors[f"{own}.fused_attn_ff_proj.weight"] = 2 * draw(
            inner + 2 * HEAD_DIM + 2 * hidden, DIM
        )
        tensors[f"{own}.attn_out.weight"] = draw(DIM, inner)
        tensors[f"{own}.ff_out.1.weight"] = draw(DIM, hidden)
    return tensors


def inputs(seed: int = 0, batch: int = 2, count: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    image = torch.randn(batch, count, DIM, generator=generator)
    text = torch.randn(batch, 7, DIM, generator=generator)
    mask = torch.rand(batch, 7, generator=generator) < 0.5
    mask[:, 3] = True
    return image, text, mask


def oracle(tensors: dict[str, Tensor], image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """The formulas token by token and head by head; rotations are complex multiplications."""
    weights = {key: value.double() for key, value in tensors.items()}
    hidden = FF * DIM

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * weights[f"{name}.norm.weight"]

    def gated(x: Tensor) -> Tensor:
        value, gate = x[:hidden], x[hidden:]
        return value * gate / (1 + (-gate).exp())

    def turned(vector: Tensor, position: int) -> Tensor:
        half = HEAD_DIM // 2
        turns = [
            complex(vector[j], vector[j + half])
            * cmath.exp(1j * position * 10000 ** (-2 * j / HEAD_DIM))
            for j in range(half)
        ]
        parts = [z.real for z in turns] + [z.imag for z in turns]
        return torch.tensor(parts, dtype=torch.float64)

    def attention(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        scores = [math.exp(float(query @ key) / HEAD_DIM**0.5) for key in keys]
        pairs = zip(scores, values, strict=True)
        return sum(score * value for score, value in pairs) / sum(scores)  # type: ignore[return-value]

    def heads_of(projected: Tensor) -> list[Tensor]:
        return [projected[h * HEAD_DIM : (h + 1) * HEAD_DIM] for h in range(HEADS)]

    results = []
    for tokens, words, allowed in zip(image.double(), text.double(), mask, strict=True):
        x = list(tokens)
        for layer in range(LAYERS):
            name = f"layers.{layer}.0.fn"
            projected = [weights[f"{name}.to_kv.weight"] @ w for w, a in zip(words, allowed) if a]
            keys = [p[:HEAD_DIM] for p in projected]
            values = [p[HEAD_DIM:] for p in projected]
            after = []
            for token in x:
                n = norm(token, name)
                answers = [
                    attention(q, keys, values) for q in heads_of(weights[f"{name}.to_q.weight"] @ n)
                ]
                found = weights[f"{name}.to_out.weight"] @ torch.cat(answers)
                forward = weights[f"{name}.ff.2.weight"] @ gated(weights[f"{name}.ff.0.weight"] @ n)
                after.append(token + found + forward)
            x = after
            name = f"layers.{layer}.1.fn"
            inner = HEADS * HEAD_DIM
            fused = [
                weights[f"{name}.fused_attn_ff_proj.weight"] @ norm(token, name) for token in x
            ]
            keys = [turned(f[inner : inner + HEAD_DIM], p) for p, f in enumerate(fused)]
            values = [f[inner + HEAD_DIM : inner + 2 * HEAD_DIM] for f in fused]
            after = []
            for position, (token, f) in enumerate(zip(x, fused, strict=True)):
                answers = [
                    attention(turned(q, position), keys, values) for q in heads_of(f[:inner])
                ]
                found = weights[f"{name}.attn_out.weight"] @ torch.cat(answers)
                forward = weights[f"{name}.ff_out.1.weight"] @ gated(f[inner + 2 * HEAD_DIM :])
                after.append(token + found + forward)
            x = after
        results.append(torch.stack(x))
    return torch.stack(results)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_network_follows_its_formulas(seed: int) -> None:
    tensors = random_tensors(seed)
    image, text, mask = inputs(seed)
    expected = oracle(tensors, image, text, mask)
    found = cross_model_from(tensors, FILE)(image, text, mask)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    exact = cross_model_from(tensors, FILE).double()
    # In float64 only the frequencies are rounded: files keep them in float32.
    assert (exact(image.double(), text.double(), mask) - expected).abs().max() < 1e-6


def test_the_short_way_to_the_class_token_equals_the_full_computation() -> None:
    model = cross_model_from(random_tensors(), FILE)
    image, text, mask = inputs(batch=5)
    full, short = model(image, text, mask)[:, 0], model.class_token(image, text, mask)
    assert short.shape == (5, DIM)
    assert torch.allclose(short, full, atol=1e-5)
    model = model.double()
    image = image.double().requires_grad_()
    probe = torch.randn(5, DIM, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((answer * probe).sum(), image)[0]
        for answer in (
            model(image, text.double(), mask)[:, 0],
            model.class_token(image, text.double(), mask),
        )
    ]
    assert gradients[0][:, 1:].abs().sum() > 0
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)


def test_masked_text_tokens_are_not_read() -> None:
    model = cross_model_from(random_tensors(), FILE)
    image, text, mask = inputs()
    before = model(image, text, mask)
    hidden = torch.where(mask[..., None], text, 1e4 * torch.ones_like(text))
    assert torch.equal(model(image, hidden, mask), before)
    read = text.clone()
    read[:, 3] += 1  # allowed in every item
    assert not torch.allclose(model(image, read, mask), before, atol=1e-3)


def test_later_tokens_are_seen_and_positions_count() -> None:
    """Neither a causal mask nor a bag of tokens."""
    model = cross_model_from(random_tensors(), FILE)
    image, text, mask = inputs()
    before = model.class_token(image, text, mask)
    changed = image.clone()
    changed[:, -1] *= -1  # no shift or scale, which the norms would undo
    assert (model.class_token(changed, text, mask) - before).abs().max() > 1e-3
    swapped = image.clone()
    swapped[:, [2, 5]] = image[:, [5, 2]]
    assert (model.class_token(swapped, text, mask) - before).abs().max() > 1e-3


def test_the_published_network_has_52_tensors_and_118_million_numbers() -> None:
    with torch.device("meta"):
        model = CrossModel()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(4):
        cross, own = f"layers.{layer}.0.fn", f"layers.{layer}.1.fn"
        expected |= {
            f"{cross}.norm.weight": (1024,),
            f"{cross}.norm.bias": (1024,),
            f"{cross}.to_q.weight": (1024, 1024),
            f"{cross}.to_kv.weight": (128, 1024),
            f"{cross}.to_out.weight": (1024, 1024),
            f"{cross}.ff.0.weight": (8192, 1024),
            f"{cross}.ff.2.weight": (1024, 4096),
            f"{own}.norm.weight": (1024,),
            f"{own}.norm.bias": (1024,),
            f"{own}.rotary_emb.inv_freq": (32,),
            f"{own}.fused_attn_ff_proj.weight": (9344, 1024),
            f"{own}.attn_out.weight": (1024, 1024),
            f"{own}.ff_out.1.weight": (1024, 4096),
        }
    assert shapes == expected and len(shapes) == 52
    assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6, 1) == 118.5


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "head_dim", "ff_mult"),
    [(1024, 4, 16, 64, 4), (96, 2, 4, 24, 2), (32, 1, 2, 8, 3)],
)
def test_every_size_is_read_from_the_file(
    dim: int, layers: int, heads: int, head_dim: int, ff_mult: int
) -> None:
    with torch.device("meta"):
        model = CrossModel(dim, layers, heads, head_dim, ff_mult)
        read = cross_model_from({k: v.half() for k, v in model.state_dict().items()}, FILE)
    assert {key: tensor.shape for key, tensor in read.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    own = read.layers[0][0].fn  # type: ignore[index]
    assert (read.dim, own.heads) == (dim, heads)
    assert {tensor.dtype for tensor in read.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in read.parameters())


def test_reading_a_file_draws_no_random_numbers() -> None:
    tensors = random_tensors()
    before = torch.get_rng_state()
    cross_model_from(tensors, FILE)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_of_another_network_is_refused_by_name() -> None:
    tensors = random_tensors()
    with pytest.raises(RewardError, match=r"fusion.pth: holds no cross-attention network"):
        cross_model_from({"layers.0.weight": torch.zeros(3, 3)}, FILE)
    with pytest.raises(RewardError, match="holds no cross-attention network"):
        cross_model_from({}, FILE)
    short = {k: v for k, v in tensors.items() if k != "layers.2.1.fn.attn_out.weight"}
    with pytest.raises(RewardError, match=r"missing layers.2.1.fn.attn_out.weight"):
        cross_model_from(short, FILE)
    with pytest.raises(RewardError, match=r"unexpected layers.1.0.fn.to_q.bias"):
        cross_model_from(tensors | {"layers.1.0.fn.to_q.bias": torch.zeros(24)}, FILE)
    with pytest.raises(RewardError, match="size mismatch"):
        cross_model_from(tensors | {"layers.1.0.fn.to_kv.weight": torch.zeros(8, DIM)}, FILE)
