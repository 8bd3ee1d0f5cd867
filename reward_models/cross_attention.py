"""The network with which MPS lets a picture read its prompt.

Four layers. Each adds to the image tokens what they find in the text (cross-attention), and then
what they find in each other (self-attention); both halves carry a feed-forward in parallel:

    x <- x + Out(Attend(Q n, K t, V t; mask)) + FF(n)        n = norm(x), t the text tokens as given
    x <- x + Out(Attend(R Q n, R K n, V n)) + FF(n)          n = norm(x), R the rotary rotation

Attend(q, k, v) = softmax(q.k / sqrt(d)) v: every head has its own queries, and all heads share one
key and one value per token (Shazeer, arXiv:1911.02150). FF(n) = W (a silu(g)), with (a, g) = U n.
Every token sees every other one: nothing is causal. The rotation turns the pair (j, j + d/2) at
position p by p w_j, w_j = 10000^(-2j/d), and the class token is position 0. The norms have epsilon
1e-5 and no learnt shift; files keep the zeros.

Source: Kwai-Kolors/MPS, after PaLM (arXiv:2204.02311, section 2). Names are those of its files,
under `cross_model.`. We differ in rounding only: fused attention, and the work that nothing asks
for is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.weights import load_strict


class CrossModel(nn.Module):
    """Image tokens that have read text tokens; float32, whatever the tower's dtype is.

    Args:
        dim: D, the length of a token.
        layers, heads, head_dim: of the published model by default.
        ff_mult: the feed-forward is `ff_mult * dim` wide.
    """

    def __init__(
        self,
        dim: int = 1024,
        layers: int = 4,
        heads: int = 16,
        head_dim: int = 64,
        ff_mult: int = 4,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Named(CrossAttention(dim, heads, head_dim, ff_mult)),
                    _Named(SelfAttention(dim, heads, head_dim, ff_mult)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Every image token after the last layer.

        Args:
            image_tokens: [B, N, D], the class token first.
            text_tokens: [B, L, D].
            mask: bool [B, L], true for the text tokens that may be read, at least one per item:
                attention over nothing is not defined.

        Returns:
            [B, N, D].
        """
        return self._run(image_tokens, text_tokens, mask, image_tokens.shape[1])

    def class_token(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Token 0 of `forward`, [B, D], without the last layer's work on the other tokens.

        The last self-attention asks for token 0 only. The others are still its keys and values, so
        everything before it is needed: an eighth of the work goes, and not a digit of the result.
        """
        return self._run(image_tokens, text_tokens, mask, 1)[:, 0]

    def _run(self, x: Tensor, text_tokens: Tensor, mask: Tensor, wanted: int) -> Tensor:
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            cross, own = (half.fn for half in layer)  # type: ignore[attr-defined]
            x = x + cross(x, text_tokens, mask)
            first = wanted if index == last else x.shape[1]
            x = x[:, :first] + own(x, first)
        return x


class CrossAttention(nn.Module):
    """Image tokens ask, text tokens answer; beside it a feed-forward of the image tokens."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        inner, hidden = heads * head_dim, ff_mult * dim
        self.heads = heads
        self.norm = _Norm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * head_dim, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(dim, 2 * hidden, bias=False), _SwiGLU(), nn.Linear(hidden, dim, bias=False)
        )

    def forward(self, x: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """What x [B, N, D] finds in text [B, L, D] where mask [B, L] is true: [B, N, D]."""
        x = self.norm(x)
        queries = self.to_q(x).unflatten(-1, (self.heads, -1))
        keys, values = self.to_kv(text_tokens).chunk(2, dim=-1)
        return self.to_out(_attend(queries, keys, values, mask)) + self.ff(x)  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Image tokens among themselves, by position; the feed-forward shares their projection."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        inner, hidden = heads * head_dim, ff_mult * dim
        self.heads = heads
        self.split = (inner, 2 * head_dim, 2 * hidden)
        self.norm = _Norm(dim)
        self.rotary_emb = _Rotary(head_dim)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.split), bias=False)
        self.attn_out = nn.Linear(inner, dim, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor, first: int) -> Tensor:
        """What the first tokens of x [B, N, D] find in all of them: [B, first, D]."""
        x = self.norm(x)
        asking = x[:, :first]
        to_q, to_kv, to_ff = self.fused_attn_ff_proj.weight.split(self.split)
        queries = F.linear(asking, to_q).unflatten(-1, (self.heads, -1))
        keys, values = F.linear(x, to_kv).chunk(2, dim=-1)
        angles = self.rotary_emb(x.shape[1])
        queries, keys = _rotate(queries, angles[:first, None]), _rotate(keys, angles)
        found = self.attn_out(_attend(queries, keys, values, None))
        return found + self.ff_out(F.linear(asking, to_ff))  # type: ignore[no-any-return]


def cross_model_from(tensors: Mapping[str, Tensor], path: Path) -> CrossModel:
    """The network that a file's tensors describe; float32, frozen, nothing random drawn.

    Args:
        tensors: the keys of `CrossModel.state_dict`; every size is read from their shapes.
        path: named in errors.

    Raises:
        RewardError: keys or shapes of another network.
    """
    sizes = _sizes(tensors, path)
    with torch.device("meta"):
        model = CrossModel(*sizes)
    load_strict(model, {key: value.float() for key, value in tensors.items()}, path, assign=True)
    return model.eval().requires_grad_(False)


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> tuple[int, int, int, int, int]:
    """(dim, layers, heads, head_dim, ff_mult) as the first layer has them."""
    layers = {int(found[1]) for key in tensors if (found := re.match(r"layers\.(\d+)\.", key))}
    try:
        dim = tensors["layers.0.0.fn.norm.weight"].shape[0]
        head_dim = tensors["layers.0.0.fn.to_kv.weight"].shape[0] // 2
        heads = tensors["layers.0.0.fn.to_q.weight"].shape[0] // head_dim
        ff_mult = tensors["layers.0.0.fn.ff.2.weight"].shape[1] // dim
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise RewardError(
            f"holds no cross-attention network of MPS ({error})",
            where=str(path),
            fix="expected layers.0.0.fn.{norm,to_q,to_kv,to_out,ff.0,ff.2}.weight and so on",
        ) from error
    return dim, max(layers) + 1, heads, head_dim, ff_mult


class _Named(nn.Module):
    """Files say `fn` where the published code wraps a block to add its input; `_run` adds it."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn


class _Norm(nn.Module):
    """Layer norm over [..., D] with a learnt scale and a fixed zero shift."""

    bias: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class _SwiGLU(nn.Module):
    """a silu(g) of [..., 2 H]: the second half is the gate (arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class _Rotary(nn.Module):
    """Angles [N, d/2] = position x frequency; the frequencies are the file's own."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inv_freq", 10000.0**-exponents)

    def forward(self, count: int) -> Tensor:
        positions = torch.arange(count, device=self.inv_freq.device, dtype=self.inv_freq.dtype)
        return positions[:, None] * self.inv_freq


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (j, j + d/2) of x [..., d] by angles [..., d/2] (arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of queries [B, N, H, d] over keys and values [B, L, d] that the heads share.

    With shared keys a head is no more than further queries, so H x N of them ask in one call.

    Args:
        mask: bool [B, L], true where an item's queries may look.

    Returns:
        [B, N, H d].
    """
    count, heads = queries.shape[1:3]
    found = F.scaled_dot_product_attention(
        queries.flatten(1, 2)[:, None],
        keys[:, None],
        values[:, None],
        attn_mask=None if mask is None else mask[:, None, None],
    )
    return found.squeeze(1).unflatten(1, (count, heads)).flatten(2)
