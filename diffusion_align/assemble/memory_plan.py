"""`memory: auto | low | high`: which of the settings that save memory a run takes.

All of them leave what is learnt unchanged, to rounding: what a person says for a key counts more,
and 8-bit moments, narrower weights and mixed precision, which change the numbers, are only advised.
A run that is resumed keeps what `auto` chose when it began (memory.json in its folder), because
another choice would round differently.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.assemble.estimate import Estimate
    from diffusion_align.config import RunConfig

RECORD = "memory.json"
ROOM = 0.9
"""Share of the free memory that `auto` plans with: allocators round up and split blocks."""

KEYS = ("release_text_encoders", "vae_slicing", "gradient_checkpointing", "vae_tiling")
"""Keys of `model` that `memory` decides where they are null."""


@dataclass(frozen=True)
class MemoryPlan:
    """A config whose settings of memory are all settled.

    chosen: dotted key -> value that `memory` put there; lines: what to tell the person.
    """

    config: RunConfig
    chosen: Mapping[str, Any]
    lines: tuple[str, ...]


def settle(
    config: RunConfig,
    *,
    resume: bool = False,
    estimate: Callable[[RunConfig], Estimate] | None = None,
    free: int | None = None,
) -> MemoryPlan:
    """Decide every setting of memory that the config leaves open.

    Args:
        resume: take what is recorded in the run's folder.
        estimate, free: how `auto` judges; by default `estimate.estimate` and the free memory of
            the model's device in bytes.

    Raises:
        UserError: as `estimate`, or a damaged record.
    """
    if config.memory == "high":
        return MemoryPlan(config, {}, ())
    if config.memory == "low":
        plan = MemoryPlan(config, {}, ())
        for key, value in _everything(config):
            plan = _with(plan, key, value)
        return replace(plan, lines=(f"memory low: {_said(plan.chosen)}",))
    recorded = _record(config) if resume else None
    if recorded is not None:
        said = f"memory auto, as when the run began: {_said(recorded)}"
        return with_choice(config, recorded, (said,))
    return _search(config, estimate or _estimate, free_memory(config) if free is None else free)


def with_choice(config: RunConfig, chosen: Mapping[str, Any], lines: tuple[str, ...]) -> MemoryPlan:
    """The plan that somebody else (an earlier sitting, the main process) has made."""
    plan = MemoryPlan(config, {}, ())
    for key, value in chosen.items():
        plan = _with(plan, key, value)
    return replace(plan, lines=lines)


def write_plan(folder: Path, plan: MemoryPlan) -> None:
    """memory.json, where `auto` chose.

    Raises:
        UserError: it cannot be written.
    """
    from diffusion_align.training.disk import writing

    if plan.config.memory != "auto":
        return
    target, unfinished = folder / RECORD, folder / f".{RECORD}"
    with writing(target):
        unfinished.write_text(json.dumps(dict(plan.chosen), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(target)


def _search(config: RunConfig, estimate: Callable[[RunConfig], Estimate], free: int) -> MemoryPlan:
    """Take what helps the fullest phase until the estimate fits, cheapest first."""
    plan = MemoryPlan(config, {}, ())
    found = estimate(config)
    needed = found.peak
    while found.peak > ROOM * free:
        step = next(_helps(plan.config, found), None)
        if step is None:
            break
        for key, value in step:
            plan = _with(plan, key, value)
        found = estimate(plan.config)
    line = (
        f"memory auto: {_gib(free)} free, the run needs about {_gib(needed)}"
        if not plan.chosen
        else f"memory auto: {_gib(free)} free, the run would need about {_gib(needed)} and needs "
        f"{_gib(found.peak)} with {_said(plan.chosen)}"
    )
    if found.peak > ROOM * free:
        line += (
            "\nwarning: that may not fit. What is left changes what is learnt: "
            "model.dtype=bfloat16, train.mixed_precision=bf16, train.optimizer=adamw8bit, a LoRA "
            "instead of full fine-tuning, smaller pictures"
        )
    return replace(plan, lines=(line,))


def _helps(config: RunConfig, found: Estimate) -> Iterator[list[tuple[str, Any]]]:
    """Settings not taken yet that would make the fullest phase smaller, cheapest first."""
    model, options = config.model, config.algorithm.options
    on_gpu = _device(config).type != "cpu"
    if on_gpu and model.release_text_encoders is None:
        yield [("model.release_text_encoders", True)]
    if found.fullest in ("decoding", "looking"):
        if model.vae_slicing is None:
            yield [("model.vae_slicing", True)]
        if model.vae_tiling is None:
            yield [("model.vae_tiling", True)]
    if found.fullest == "updating":
        if model.gradient_checkpointing is None:
            yield [("model.gradient_checkpointing", True)]
        yield from _sizes(config, "updating")
        if options.train_batch_size > 1:
            yield _split(config, _smaller(options.train_batch_size))
    if found.fullest in ("decoding", "scoring"):
        yield from _sizes(config, found.fullest)
    if found.fullest in ("sampling", "decoding", "scoring") and config.sampling.batch_size > 1:
        yield [("sampling.batch_size", _smaller(config.sampling.batch_size))]
    if found.fullest == "looking" and config.evaluation.batch_size > 1:
        yield [("evaluation.batch_size", _smaller(config.evaluation.batch_size))]
    if on_gpu and config.reward_device is None:
        yield [("reward_device", "cpu")]


def _everything(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """What `low` sets: all that the person left open, and one sample at a time."""
    for key in KEYS:
        if getattr(config.model, key) is None:
            yield f"model.{key}", True
    if config.reward_device is None and _device(config).type != "cpu":
        yield "reward_device", "cpu"
    options = config.algorithm.options
    for phase in ("decoding", "scoring", "updating"):
        for name, size in options.sizes(phase, config.sampling.batch_size).items():
            if size > 1:
                yield f"algorithm.{name}", 1
    if options.train_batch_size > 1:
        yield from _split(config, 1)
    if config.sampling.batch_size > 1:
        yield "sampling.batch_size", 1
    if config.evaluation.batch_size > 1:
        yield "evaluation.batch_size", 1


def _sizes(config: RunConfig, phase: str) -> Iterator[list[tuple[str, Any]]]:
    """The method's own options that make a phase smaller."""
    sizes = config.algorithm.options.sizes(phase, config.sampling.batch_size)
    for name, size in sizes.items():
        if size > 1:
            yield [(f"algorithm.{name}", _smaller(size))]


def _split(config: RunConfig, size: int) -> list[tuple[str, Any]]:
    """The same update from smaller minibatches: as many more are accumulated."""
    parts = config.algorithm.options.train_batch_size // size
    return [
        ("algorithm.train_batch_size", size),
        ("train.accumulation", config.train.accumulation * parts),
    ]


def _smaller(size: int) -> int:
    """The largest proper divisor: a batch falls into equal parts."""
    return next(size // part for part in range(2, size + 1) if size % part == 0)


def _with(plan: MemoryPlan, key: str, value: Any) -> MemoryPlan:
    """`plan` with one more setting."""
    config, (section, _, leaf) = plan.config, key.partition(".")
    changed: dict[str, Any]
    if section == "algorithm":
        choice = config.algorithm
        changed = {section: replace(choice, options=replace(choice.options, **{leaf: value}))}
    elif leaf:
        changed = {section: replace(getattr(config, section), **{leaf: value})}
    else:
        changed = {section: value}
    return replace(plan, config=replace(config, **changed), chosen={**plan.chosen, key: value})


def _record(config: RunConfig) -> dict[str, Any] | None:
    path = Path(str(config.output)).expanduser() / RECORD
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read ({error})",
            where=str(path),
            fix="delete it: the run then chooses anew, and is no longer exactly resumed",
        ) from error
    return dict(recorded)


def _estimate(config: RunConfig) -> Estimate:
    from diffusion_align.assemble.estimate import estimate

    return estimate(config)


def _device(config: RunConfig) -> Any:
    from diffusion_align.policy.devices import device_of

    return device_of(config.model.device)


def free_memory(config: RunConfig) -> int:
    """Bytes that are free on the model's device."""
    from diffusion_align.training.memory import free_bytes

    return free_bytes(_device(config))


def _said(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={str(value).lower()}" for key, value in chosen.items()) or "nothing"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
