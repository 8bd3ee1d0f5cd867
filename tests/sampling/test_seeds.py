"""Item streams: every part of the key counts, nothing else does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.sampling import normal, stream


def first(*parts: Any) -> bytes:
    seed, purpose, iteration, position, sample = parts
    source = stream(seed, purpose, iteration=iteration, position=position, sample=sample)
    return source.bytes(16)


def global_numpy() -> bytes:
    return np.random.get_state(legacy=False)["state"]["key"].tobytes()


PARTS = st.one_of(
    st.tuples(
        st.integers(),
        st.sampled_from(["rollout", "timestep", "train-noise"]),
        st.integers(0, 2**70),
        st.integers(0, 2**70),
        st.integers(0, 2**70),
    ),
    st.tuples(
        st.integers(), st.just("eval"), st.none(), st.integers(0, 2**70), st.integers(0, 2**70)
    ),
)


@given(PARTS, PARTS)
def test_streams_are_equal_exactly_when_all_parts_are(one: Any, other: Any) -> None:
    assert (first(*one) == first(*other)) == (one == other)


def test_neighbouring_keys_give_unrelated_streams() -> None:
    # Among them: seeds that agree in their low 32 or 64 bits, and digits that could run together.
    keys = [
        (seed, purpose, iteration, position, sample)
        for seed in (0, 1, 11, 2**32, 2**64, -1)
        for purpose in ("rollout", "timestep", "train-noise")
        for iteration, position, sample in itertools.product((0, 1, 11), repeat=3)
    ]
    assert len({first(*key) for key in keys}) == len(keys)
    draws = np.stack(
        [
            stream(0, "rollout", iteration=i, position=p, sample=s).standard_normal(4096)
            for i, p, s in itertools.product((0, 1), repeat=3)
        ]
    )
    correlation = np.corrcoef(draws) - np.eye(8)
    assert np.abs(correlation).max() < 0.08  # 5 sigma of 1 / sqrt(4096)


def test_the_numbers_never_change_between_versions() -> None:
    # Saved runs are repeated from these keys: a change here breaks exact resume.
    source = stream(42, "rollout", iteration=3, position=2, sample=1)
    assert source.bytes(8).hex() == "ecc1c3a179dec211"


def test_keys_refuse_what_would_make_two_names_for_one_item() -> None:
    with pytest.raises(ValueError, match="eval"):
        stream(0, "eval", iteration=0, position=0, sample=0)
    with pytest.raises(ValueError, match="iteration"):
        stream(0, "rollout", iteration=None, position=0, sample=0)
    with pytest.raises(ValueError, match="negative"):
        stream(0, "rollout", iteration=0, position=-1, sample=0)
    with pytest.raises(ValueError, match="purpose"):
        stream(0, "sampling", iteration=0, position=0, sample=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        stream(0, "rollout", iteration=0, position=1.0, sample=0)  # type: ignore[arg-type]
    assert first(np.int64(5), "rollout", np.int32(1), 2, 3) == first(5, "rollout", 1, 2, 3)


def test_noise_is_standard_normal_float32_and_leaves_global_streams_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = (torch.random.get_rng_state(), global_numpy())
    sources = [stream(0, "eval", iteration=None, position=0, sample=i) for i in range(3)]
    noise = normal(sources, (4, 32, 32))
    assert noise.dtype == torch.float32 and noise.shape == (3, 4, 32, 32)
    assert abs(float(noise.mean())) < 5 / np.sqrt(noise.numel())
    assert abs(float(noise.var()) - 1) < 5 * np.sqrt(2 / noise.numel())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == global_numpy()
    again = [stream(0, "eval", iteration=None, position=0, sample=i) for i in (2, 0)]
    assert torch.equal(normal(again, (4, 32, 32)), noise[[2, 0]])
    assert not torch.equal(normal(sources, (4, 32, 32)), noise)
