"""The facts of a model card, gathered from a run's config, its record and its comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.assemble.named import shown_name
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.policy.families import Family
    from diffusion_align.policy.tuned import Tuned
    from diffusion_align.publish.card import Base, Card, Comparison, Kind, RewardFacts

_EXAMPLES = 5
# Sections of a config that say how the model was trained; the others say where, or are told apart.
_SECTIONS = ("lora", "sampling", "algorithm", "train")
# How a run is watched and kept says nothing about how it learnt.
_WATCHING = {"trackers", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints"}


def card_of(config: RunConfig, tuned: Tuned, kind: Kind, check: str) -> Card:
    """The card of what lies at `tuned`.

    Args:
        config: of the run that wrote it.
        kind: what is published of it.
        check: the self-check in a sentence, or "".

    Raises:
        UserError: a damaged `summary.json`, or a base model of which nothing is known.
    """
    from diffusion_align import __version__
    from diffusion_align.algorithms import catalogue
    from diffusion_align.assemble.named import (
        heldout_prompts,
        scored_with,
        shown_names,
        trained_on,
        training_prompts,
    )
    from diffusion_align.evaluation.generate import evaluation_sampling
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.publish.card import Card
    from diffusion_align.publish.contents import COMFYUI_FILE
    from diffusion_align.publish.example import loads_lora
    from diffusion_align.secrecy.redaction import redact

    info, method = resolve(config.model.id), catalogue.resolve(config.algorithm.name)
    family, scheduler = _pipeline_of(config, tuned, kind)
    if not info.family:  # a hub id that the catalogue does not know: as it was sampled
        info = replace(info, steps=family.steps, guidance_scale=family.guidance_scale)
    learnt = [prompt.text for prompt in training_prompts(config)]
    examples = [prompt.text for prompt in heldout_prompts(config)[:1]]
    drawn, names = evaluation_sampling(config.sampling, config.evaluation), trained_on(config)
    shown = shown_names([*scored_with(config), *names])
    return Card(
        name=redact(Path(str(config.output)).name),
        kind=kind,
        base=_base(config),
        family=family,
        scheduler=scheduler,
        loads_lora=loads_lora(family),
        method=method.name,
        description=method.description,
        citation=method.source,
        rewards=_rewards(config.reward),
        prompt_source=redact(shown_name(config.prompts.source)),
        prompt_count=len(learnt),
        prompt_examples=tuple(map(redact, learnt[:_EXAMPLES])),
        trained_on=tuple(shown[name] for name in names),
        comparison=read_summary(tuned.folder / "summary.json"),
        settings=tuple(_settings(config)),
        steps=drawn.steps or info.steps,
        guidance_scale=(
            info.guidance_scale if drawn.guidance_scale is None else drawn.guidance_scale
        ),
        eta=drawn.eta,
        height=drawn.height or info.height,
        width=drawn.width or info.width,
        frames=None if family.frames is None else drawn.frames or info.frames,
        fps=info.fps or _fps(family),
        example=redact(" ".join(examples)),
        comfyui=kind == "lora" and (tuned.folder / COMFYUI_FILE).is_file(),
        check=check,
        version=__version__,
    )


def read_summary(path: Path) -> Comparison | None:
    """The comparison that `summary.json` holds; None where there is no such file.

    Raises:
        UserError: a damaged file.
    """
    from diffusion_align.publish.card import Comparison, Measure

    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        measures = [
            Measure(
                name,
                row["base"],
                row["tuned"],
                row["difference"],
                _pair(row["ci95"]),
                row["win_rate"],
                _pair(row["win_rate_ci95"]),
            )
            for name, row in summary["rewards"].items()
        ]
        return Comparison(int(summary["pairs"]), int(summary["prompts"]), tuple(measures))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"damaged: {error!r}", where=str(path), fix="compare again, or remove the file"
        ) from error


def write_reward_card(final: Path) -> None:
    """`README.md` beside a trained reward, from what its own file says; an edited one stays."""
    from diffusion_align import __version__
    from diffusion_align.publish.card import write_card
    from diffusion_align.publish.contents import REWARD_FILE
    from diffusion_align.publish.reward_card import RewardCard, render_reward
    from diffusion_align.secrecy.redaction import redact
    from reward_models.trained import read_card

    card = read_card(final / REWARD_FILE)
    facts = RewardCard(
        name=redact(card.name),
        head=card.head,
        tower=card.tower,
        attributes=card.attributes,
        range=redact(card.range),
        licence=card.licence,
        source=redact(card.source),
        trained_on=tuple(redact(shown_name(name)) for name in card.trained_on),
        validation=tuple(card.validation.items()),
        version=__version__,
    )
    write_card(final, render_reward(facts, redact))


def _pair(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    low, high = values
    return low, high


def _base(config: RunConfig) -> Base:
    from diffusion_align.policy.catalogue import MODELS, resolve
    from diffusion_align.publish.card import Base

    info = resolve(config.model.id)
    source = Path(info.source)
    if source.is_dir() or source.is_absolute():
        if info.name in MODELS:  # it travels with this package
            imports = "from diffusion_align.policy import resolve"
            return Base(info.name, "", info.licence, f'resolve("{info.name}").source', imports)
        name = source.expanduser().resolve().name
        return Base(name, "", info.licence, ascii(name))
    revision = config.model.revision
    return Base(info.name, info.source, info.licence, ascii(info.source), revision=revision)


def _pipeline_of(config: RunConfig, tuned: Tuned, kind: Kind) -> tuple[Family, str]:
    """The family, and the scheduler that the example's base comes with ("" where unknown).

    Both stand in `model_index.json`, of a hub id in the cache: who has trained, has loaded it.
    """
    from huggingface_hub import try_to_load_from_cache

    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.policy.families import FAMILIES, family_of
    from diffusion_align.policy.tuned import MODEL_FILE

    info = resolve(config.model.id)
    folder = tuned.folder if kind == "model" else Path(info.source).expanduser()
    found: Any = folder / MODEL_FILE
    try:
        if not found.is_file():
            revision = config.model.revision
            found = try_to_load_from_cache(info.source, MODEL_FILE, revision=revision)
        index = json.loads(Path(found).read_text(encoding="utf-8"))
        return family_of(index["_class_name"], where=info.name), index["scheduler"][1]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        for family in FAMILIES:
            if family.name == info.family:
                return family, ""
        raise UserError(
            "which pipeline this is, is not known before it is loaded",
            where=info.name,
            fix="leave --no-check out: then it is loaded",
        ) from error


def _fps(family: Family) -> float | None:
    """Of a model that the catalogue does not know: what others of its family were trained on."""
    from diffusion_align.policy.catalogue import MODELS

    return next((info.fps for info in MODELS.values() if info.family == family.name), None)


def _rewards(name: str) -> tuple[RewardFacts, ...]:
    """The reward, or the terms of a sum, with what the catalogue or their own files say."""
    from diffusion_align.publish.card import RewardFacts
    from diffusion_align.secrecy.redaction import redact
    from reward_models.base import RewardError
    from reward_models.catalogue import TRAINED_FILE, components, find
    from reward_models.trained import read_card

    facts = []
    for term in dict.fromkeys(components(name) or (name,)):
        shown, source, licence = redact(shown_name(term)), "the user's own code", ""
        try:
            info = find(term).info
            source, licence = info.source, info.licence
        except RewardError:
            places = [Path(term), Path(term) / TRAINED_FILE, Path(term) / "final" / TRAINED_FILE]
            file = next((place for place in places if place.is_file()), None)
            if file is not None:
                card = read_card(file)
                source, licence = card.source or "trained with diffusion-align", card.licence
        facts.append(RewardFacts(shown, redact(source), licence or "not known"))
    return tuple(facts)


def _settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    from diffusion_align.secrecy.redaction import redact, redact_value

    yield "reward", redact(shown_name(config.reward))
    yield "model.dtype", config.model.dtype
    if config.lora is None:
        yield "lora", "null"
    for section in _SECTIONS:
        part: Any = getattr(config, section)
        if part is None:
            continue
        values: Mapping[str, Any] = asdict(part)
        if section == "algorithm":
            values = {"name": values["name"], **values["options"]}
        for key, value in values.items():
            if value is None or value == () or (section == "train" and key in _WATCHING):
                continue  # None is left to the model or the family
            shown = shown_name(value) if key == "path" and isinstance(value, str) else value
            yield f"{section}.{key}", str(redact_value(shown, key))
    yield "seed", str(config.seed)
