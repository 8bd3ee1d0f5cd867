"""Rules over several keys, and names that other rooms know: models, rewards, prompts.

Each rule says which keys it reads and is skipped while one of them is in doubt, so that a typo does
not drag a phantom problem behind it. A rule yields `(key, what, hint)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_align.config.source import Node
from diffusion_align.config.validate import ALGORITHM, Reading
from diffusion_align.errors import UserError

Finding = tuple[str, str, str]
Check = Callable[[Mapping[str, Any]], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A check and the keys it reads."""

    reads: tuple[str, ...]
    check: Check


def apply(reading: Reading, root: Node) -> None:
    """Ask every rule whose keys are in order; findings join the reading's problems."""
    for rule in RULES:
        if all(_trusted(reading, key) for key in rule.reads):
            for key, what, hint in rule.check(reading.sections):
                reading.report(root.find(key).place, key, what, hint)


def _trusted(reading: Reading, key: str) -> bool:
    section = key.partition(".")[0]
    if section not in reading.sections or (reading.bad | reading.meant) & {key, section}:
        return False
    # Another algorithm has other options; a rule about keys it lacks does not concern it.
    if section == ALGORITHM:
        return hasattr(reading.sections[ALGORITHM].options, key.partition(".")[2])
    return True


def _model(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.policy.catalogue import resolve

    yield from _asked("model.id", lambda: resolve(sections["model"].id))


def _sampling(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.sampling.options import resolve_sampling

    try:
        model = resolve(sections["model"].id)
    except UserError:
        return  # reported by the rule above
    if model.height is None:
        return  # a folder or hub id tells its size only once it is loaded
    try:
        resolve_sampling(sections["sampling"], model)
    except UserError as error:
        yield error.where or "sampling", error.what, error.fix


def _reward(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _reward_named("reward", sections["reward"])


def _held_out_rewards(sections: Mapping[str, Any]) -> Iterator[Finding]:
    for name in sections["evaluation"].rewards:
        yield from _reward_named("evaluation.rewards", name)


def _prompts(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _prompt_list("prompts.source", sections["prompts"].source)


def _held_out_prompts(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _prompt_list("evaluation.prompts", sections["evaluation"].prompts)


def _at_least_one(*dotted: str) -> Rule:
    """The counts that are divided by below are at least 1."""

    def check(sections: Mapping[str, Any]) -> Iterator[Finding]:
        for key in dotted:
            value = _value(sections, key)
            if value < 1:
                yield key, f"{value} is not at least 1", ""

    return Rule(dotted, check)


def _batches(sections: Mapping[str, Any]) -> Iterator[Finding]:
    options = sections[ALGORITHM].options
    prompts, each, batch = (
        options.prompts_per_iteration,
        options.samples_per_prompt,
        options.train_batch_size,
    )
    samples = prompts * each
    if min(prompts, each, batch) < 1 or samples % batch == 0:
        return
    total = f"{prompts} prompts x {each} samples = {samples} samples"
    what = f"{total} do not split into batches of {batch}"
    yield (
        f"{ALGORITHM}.train_batch_size",
        what,
        f"nearest that do: {nearest_divisors(samples, batch)}",
    )


def _accumulation(sections: Mapping[str, Any]) -> Iterator[Finding]:
    options, group = sections[ALGORITHM].options, sections["train"].accumulation
    samples = options.prompts_per_iteration * options.samples_per_prompt
    batch, epochs = options.train_batch_size, options.inner_epochs
    if min(samples, batch, epochs, group) < 1 or samples % batch:
        return  # reported by the rules above
    minibatches = samples // batch * epochs
    if minibatches % group:
        what = (
            f"{samples} samples / {batch} x {epochs} inner epochs = {minibatches} minibatches "
            f"do not split into groups of {group}"
        )
        yield "train.accumulation", what, f"nearest that do: {nearest_divisors(minibatches, group)}"


def nearest_divisors(total: int, wanted: int) -> str:
    """The divisors of `total` next below and above `wanted`: for 32 and 12 it is "8, 16"."""
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    below = [n for n in divisors if n <= wanted][-1:]
    above = [n for n in divisors if n > wanted][:1]
    return ", ".join(map(str, below + above))


def _value(sections: Mapping[str, Any], key: str) -> Any:
    section, _, leaf = key.partition(".")
    owner = sections[section].options if section == ALGORITHM else sections[section]
    return getattr(owner, leaf)


def _asked(key: str, question: Callable[[], object]) -> Iterator[Finding]:
    """What another room answers to `question`, as a finding where it refuses."""
    try:
        question()
    except UserError as error:
        # Where the room names a file and line of its own (prompts.txt:3), that is worth keeping.
        place = f"{error.where}: " if error.where and error.where != key.partition(".")[0] else ""
        yield key, f"{place}{error.what}", error.fix


def _reward_named(key: str, name: str) -> Iterator[Finding]:
    from reward_models import catalogue

    try:
        catalogue.check_name(name)
    except catalogue.RewardError as error:
        yield key, error.what, error.fix


def _prompt_list(key: str, source: str | list[str]) -> Iterator[Finding]:
    from diffusion_align.data.prompts import BUILT_IN, load_prompts

    # A plain built-in list is known to be good; drawing its captions would only cost time.
    if not (isinstance(source, str) and source in BUILT_IN):
        yield from _asked(key, lambda: load_prompts(source))


_COUNTS = tuple(
    f"{ALGORITHM}.{name}"
    for name in ("prompts_per_iteration", "samples_per_prompt", "train_batch_size", "inner_epochs")
)

RULES = (
    Rule(("model.id",), _model),
    Rule(("model.id", "sampling.steps", "sampling.eta", "sampling.batch_size"), _sampling),
    Rule(("reward",), _reward),
    Rule(("evaluation.rewards",), _held_out_rewards),
    Rule(("prompts.source",), _prompts),
    Rule(("evaluation.prompts",), _held_out_prompts),
    *(_at_least_one(key) for key in (*_COUNTS, "train.accumulation", "train.steps")),
    Rule(_COUNTS[:3], _batches),
    Rule((*_COUNTS, "train.accumulation"), _accumulation),
)
