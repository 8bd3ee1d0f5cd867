"""Rules over several sections, and names that other rooms know: models, rewards, prompts.

Each rule says which keys it reads and is skipped while one of them is in doubt, so that a typo does
not drag a phantom problem behind it. A rule yields `(key, what, hint)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.config.sections import RewardRunConfig, RunConfig
from diffusion_align.config.source import Node
from diffusion_align.config.validate import ALGORITHM, Reading
from diffusion_align.data.judgement_options import CROWDS, SMALL_WORLD
from diffusion_align.errors import OptionError, UserError, did_you_mean

# What every random generator below takes.
MAX_SEED = 2**63 - 1
Finding = tuple[str, str, str]
Check = Callable[[Mapping[str, Any]], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A check and the keys it reads."""

    reads: tuple[str, ...]
    check: Check


def apply(reading: Reading, root: Node) -> None:
    """Ask every rule whose keys are in order; findings join the reading's problems."""
    for rule in RULES_OF[reading.root]:
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


def _reward(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _reward_named("reward", sections["reward"])


def _held_out_rewards(sections: Mapping[str, Any]) -> Iterator[Finding]:
    for name in sections["evaluation"].rewards:
        yield from _reward_named("evaluation.rewards", name)


def _prompts(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _prompt_list("prompts.source", sections["prompts"].source)


def _held_out_prompts(sections: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _prompt_list("evaluation.prompts", sections["evaluation"].prompts)


def _seed(sections: Mapping[str, Any]) -> Iterator[Finding]:
    seed = sections["seed"]
    if not 0 <= seed <= MAX_SEED:
        shown = seed if abs(seed) < 10**30 else f"a number of {len(str(abs(seed)))} digits"
        yield "seed", f"must lie in [0, 2**63 - 1], not {shown}", f"the largest is {MAX_SEED}"


def _accumulation(sections: Mapping[str, Any]) -> Iterator[Finding]:
    options = sections[ALGORITHM].options
    try:
        sections["train"].check_accumulation(options.minibatches, options.arithmetic)
    except OptionError as error:
        yield "train.accumulation", error.what, error.fix


def _dropout(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.algorithms import catalogue

    lora, algorithm = sections["lora"], sections.get(ALGORITHM)
    if lora is None or algorithm is None or lora.dropout == 0:
        return
    needs = catalogue.resolve(algorithm.name).needs
    if needs.trajectory or needs.chained_losses:
        exact = "exact likelihoods" if needs.trajectory else "its own samples, run again"
        yield (
            "lora.dropout",
            f"{algorithm.name} trains on {exact}, which dropout would change",
            "set lora.dropout=0",
        )


def _one_update(sections: Mapping[str, Any]) -> Iterator[Finding]:
    """Chained losses run an iteration's chains again: with the weights that sampled them."""
    from diffusion_align.algorithms import catalogue

    algorithm = sections[ALGORITHM]
    if not catalogue.resolve(algorithm.name).needs.chained_losses:
        return
    count, options = algorithm.options.minibatches, algorithm.options
    if sections["train"].accumulation != count:
        yield (
            "train.accumulation",
            f"{options.arithmetic}, and {algorithm.name} makes one update of an iteration",
            f"set train.accumulation={count}, or algorithm.train_batch_size={options.samples}",
        )


def _active_steps(sections: Mapping[str, Any]) -> Iterator[Finding]:
    steps = sections["sampling"].steps
    if steps is None:
        return  # the model's own, known once it is loaded
    try:
        sections[ALGORITHM].options.plan.check(steps)
    except OptionError as error:
        yield f"{ALGORITHM}.{error.where}", error.what, error.fix


def _frames(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.policy.catalogue import resolve

    try:
        info = resolve(sections["model"].id)
    except UserError:
        return  # said already
    if not info.family or info.modality != "image":
        return
    for name in ("decode_frames", "reward_frames"):
        if getattr(sections[ALGORITHM].options, name) not in (None, "all"):
            yield (
                f"{ALGORITHM}.{name}",
                f"{info.name} makes images, which have no frames",
                "leave it out",
            )


def _half(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.algorithms import catalogue

    algorithm = sections.get(ALGORITHM)
    if algorithm is None or not catalogue.resolve(algorithm.name).needs.chained_losses:
        return
    what = f"{algorithm.name} chains its losses: fp16 underflows, and a scaler compounds"
    if sections["train"].mixed_precision == "fp16":
        yield "train.mixed_precision", what, "use no, or bf16"
    if sections["model"].dtype == "float16":
        yield "model.dtype", what, "use bfloat16 or float32"


def _differentiable(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.algorithms import catalogue
    from reward_models import catalogue as rewards

    algorithm = sections.get(ALGORITHM)
    if algorithm is None:
        return
    if not catalogue.resolve(algorithm.name).needs.differentiable_reward:
        return
    if lacking := rewards.without_gradient(sections["reward"]):
        yield (
            "reward",
            f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no gradient, and "
            f"{algorithm.name} back-propagates through the reward",
            f"those that have one: {', '.join(rewards.differentiable())}; or use "
            "algorithm.name=ddpo",
        )


def _scale_sweep(sections: Mapping[str, Any]) -> Iterator[Finding]:
    if sections["evaluation"].scale_sweep and sections["lora"] is None:
        yield (
            "evaluation.scale_sweep",
            "only a LoRA can be scaled, and this config trains the whole denoiser",
            "leave it out, or train a LoRA",
        )


def _supervised(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from diffusion_align.algorithms import catalogue

    options, algorithm = sections["supervised"], sections.get(ALGORITHM)
    if options is None:
        return
    if algorithm and not catalogue.resolve(algorithm.name).needs.differentiable_reward:
        yield (
            "supervised",
            f"{algorithm.name} takes no supervised step",
            "it is of methods that follow a reward's gradient; leave the section out",
        )
        return
    if options.pictures.partition(":")[0] == "small-world":
        yield from _prompt_list("supervised.pictures", options.pictures)
    elif not Path(options.pictures).expanduser().exists():
        yield (
            "supervised.pictures",
            f"no such folder or table of pictures: {options.pictures}",
            "give a folder of pictures, a .jsonl, .csv or .parquet table, or small-world",
        )


def _start(sections: Mapping[str, Any]) -> Iterator[Finding]:
    from reward_models import catalogue

    name = sections["reward"].start
    if name in catalogue.TOWERS:
        return
    try:
        catalogue.check_name(name)
    except catalogue.RewardError as error:
        near = did_you_mean(name, catalogue.TOWERS)
        hint = f"did you mean {near} ?   " if near else ""
        yield "reward.start", error.what, f"{hint}Towers: {', '.join(catalogue.TOWERS)}"


def _judgements(sections: Mapping[str, Any]) -> Iterator[Finding]:
    data = sections["data"]
    if data.crowd is not None:
        if data.crowd not in CROWDS:
            near = did_you_mean(data.crowd, CROWDS)
            known = ", ".join(f"{SMALL_WORLD}{name}" for name in CROWDS)
            hint = f"did you mean  {SMALL_WORLD}{near} ?" if near else f"known: {known}"
            yield "data.source", f"unknown crowd {data.crowd!r}", hint
        return
    if data.pictures is None and data.file_kind == "ava":
        yield "data.pictures", "missing", "AVA.txt names pictures by number: give their folder"


def _loss(sections: Mapping[str, Any]) -> Iterator[Finding]:
    loss, judged = sections[ALGORITHM].options.loss, sections["data"].judged
    if loss is not None and (loss == "regression") != (judged == "ratings"):
        fits = "regression" if judged == "ratings" else "soft-label or bradley-terry"
        yield f"{ALGORITHM}.loss", f"{loss} does not learn from {judged}", f"for {judged}: {fits}"


def _head(sections: Mapping[str, Any]) -> Iterator[Finding]:
    head = sections["reward"].head
    if sections[ALGORITHM].options.loss == "regression" and head in ("cosine", "cross"):
        yield "reward.head", f"a {head} head gives no ratings", "set reward.head=regression"


def _average(sections: Mapping[str, Any]) -> Iterator[Finding]:
    if sections["train"].ema_decay > 0:
        yield (
            "train.ema_decay",
            "a reward keeps the weights of its best validation, not an average",
            "leave it out (0)",
        )


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
    from diffusion_align.data.prompt_functions import names_function
    from diffusion_align.data.prompts import BUILT_IN, load_prompts

    # A plain built-in list is known to be good; drawing its captions would only cost time. A user's
    # own function runs when the run does, never for a look at its config.
    if not (isinstance(source, str) and source in BUILT_IN) and not names_function(source):
        yield from _asked(key, lambda: load_prompts(source))


_MINIBATCHES = tuple(
    f"{ALGORITHM}.{name}"
    for name in ("prompts_per_iteration", "samples_per_prompt", "train_batch_size", "inner_epochs")
)

RULES = (
    Rule(("model.id",), _model),
    Rule(("reward",), _reward),
    Rule(("evaluation.rewards",), _held_out_rewards),
    Rule(("prompts.source",), _prompts),
    Rule(("evaluation.prompts",), _held_out_prompts),
    Rule(("seed",), _seed),
    Rule(("lora.dropout",), _dropout),
    Rule(("lora", "evaluation.scale_sweep"), _scale_sweep),
    Rule(("supervised", "supervised.pictures"), _supervised),
    Rule((*_MINIBATCHES, "train.accumulation"), _accumulation),
    Rule((*_MINIBATCHES[:3], "train.accumulation"), _one_update),
    Rule(("train.mixed_precision", "model.dtype"), _half),
    Rule(("reward",), _differentiable),
    Rule((f"{ALGORITHM}.active_steps", "sampling.steps"), _active_steps),
    Rule((f"{ALGORITHM}.decode_frames", "model.id"), _frames),
)

REWARD_RULES = (
    Rule(("reward.start",), _start),
    Rule(("data.source", "data.kind", "data.pictures"), _judgements),
    Rule(("algorithm.loss", "data.source", "data.kind"), _loss),
    Rule(("algorithm.loss", "reward.head"), _head),
    Rule(("seed",), _seed),
    Rule(("train.ema_decay",), _average),
    Rule((f"{ALGORITHM}.batches_per_iteration", "train.accumulation"), _accumulation),
)

RULES_OF = {RunConfig: RULES, RewardRunConfig: REWARD_RULES}
