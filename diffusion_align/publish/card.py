"""The model card of a tuned model: `README.md` with the front matter that the hub reads.

A card is a function of facts: `Card` holds them, `render` writes them. Whatever a person wrote
(prompts, names, paths) passes `markdown.escaped` on its way; only front matter (quoted by the YAML
library) and code (Python literals) are put in as they are. Numbers come from the comparison's
`summary.json` and nowhere else.

Front matter: hub documentation, "Model cards" (base_model, base_model_relation, license,
license_name, library_name, pipeline_tag, tags).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffusion_align.errors import UserError
from diffusion_align.policy.families import Family
from diffusion_align.publish.example import example, loading_from
from diffusion_align.publish.markdown import escaped
from diffusion_align.publish.signature import CARD_FILE, is_untouched, signed

Kind = Literal["lora", "model", "merged"]
MIN_PROMPTS = 20  # below this the comparison gives no verdict

# Names of the catalogue -> identifiers of the hub. Any other licence is "other" there.
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "MIT": "mit",
}


@dataclass(frozen=True)
class Base:
    """The model that was tuned.

    Args:
        name: as the user named it; of a folder, its last part (a path tells of its owner).
        hub_id: `owner/name`; "" where it is not on the hub.
        licence: of its weights; "" where unknown.
        code: the Python expression that `from_pretrained` gets; imports: the lines it needs.
        revision: of the hub id, or None.
    """

    name: str
    hub_id: str
    licence: str
    code: str
    imports: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class RewardFacts:
    """A reward that was trained on: name, where it is from, licence."""

    name: str
    source: str
    licence: str


@dataclass(frozen=True)
class Measure:
    """One row of the comparison; None is a number that does not exist."""

    name: str
    base: float | None
    tuned: float | None
    difference: float | None
    interval: tuple[float | None, float | None]
    win_rate: float | None
    win_interval: tuple[float | None, float | None]


@dataclass(frozen=True)
class Comparison:
    """What `summary.json` says: measures over `pairs` pairs of `prompts` prompts."""

    pairs: int
    prompts: int
    measures: tuple[Measure, ...]


@dataclass(frozen=True)
class Card:
    """The facts of one model card.

    Args:
        name: of the run.
        kind: a LoRA, a fully trained model, or a LoRA merged into its base.
        method, description, citation: name of the algorithm, what it does, its publication.
        rewards: what was trained on, a sum's terms included.
        prompts: in words (a list's name), how many, and a few of them.
        trained_on: names of `rewards`, as the comparison calls them.
        settings: (key, value) of the run's config.
        family: of the pipeline.
        scheduler: class that the example's base comes with; "" where it is not known.
        loads_lora: whether diffusers itself loads a LoRA into this pipeline.
        steps, guidance_scale, eta, height, width, frames: of the sampling in the example; a size or
            length of None is the model's own. Only DDIM has an eta, only clips have frames.
        fps: of the clips; None where it is not known.
        example: its prompt.
        comfyui: whether a LoRA in ComfyUI's layout lies beside.
        check: the self-check in a sentence; "" where none was made.
        version: of this package.
    """

    name: str
    kind: Kind
    base: Base
    family: Family
    scheduler: str
    loads_lora: bool
    method: str
    description: str
    citation: str
    rewards: tuple[RewardFacts, ...]
    prompt_source: str
    prompt_count: int
    prompt_examples: tuple[str, ...]
    trained_on: tuple[str, ...]
    comparison: Comparison | None
    settings: tuple[tuple[str, str], ...]
    steps: int
    guidance_scale: float
    eta: float
    height: int | None
    width: int | None
    frames: int | None
    fps: float | None
    example: str
    comfyui: bool
    check: str
    version: str


def render(card: Card, redact: Callable[[str], str]) -> str:
    """The card as text, signed. Its example loads from ".", the card's own folder.

    Args:
        card: its facts.
        redact: removes secrets from the text.
    """
    template = ENVIRONMENT.get_template("card.md.j2")
    text = template.render(
        card=card,
        front=Trusted(_front_matter(card)),
        snippet=Trusted(example(card)),
        rows=tuple(_row(card, measure) for measure in _measures(card)),
        limits=limits(card),
        licence_id=licence_id(card.base.licence),
    )
    return signed(redact(text.rstrip("\n") + "\n"))


def write_card(folder: Path, text: str) -> bool:
    """Write `README.md`, unless a person has edited the one that is there.

    Returns:
        Whether it was written.

    Raises:
        UserError: it cannot be.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_untouched(path):
        return False
    unfinished = folder / f".{CARD_FILE}"
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from error
    return True


def licence_id(licence: str) -> str:
    """The hub's identifier of a licence; "other" where it has none or the licence is unknown."""
    return LICENCES.get(licence, "other")


def relocated(text: str, where: str) -> str:
    """A card as `render` wrote it, whose example loads from the hub id `where`, signed again."""
    return signed(loading_from(text[: text.rindex("<!--")], where))


def limits(card: Card) -> list[str]:
    """What the evidence does not show, in sentences."""
    found = []
    if card.comparison is None:
        found.append(
            "No comparison with the base model was made: nothing here shows that it is better."
        )
    else:
        if card.comparison.prompts < MIN_PROMPTS:
            found.append(
                f"The comparison has {card.comparison.prompts} prompts; below {MIN_PROMPTS} no "
                "verdict is given."
            )
        measures = card.comparison.measures
        if not any(role(card, m.name) == "held out" for m in measures):
            found.append(
                "No reward was held out: a rise of what was trained on may be overfitting to it."
            )
        fell = [
            m.name
            for m in measures
            if role(card, m.name) != "trained on" and (high := m.interval[1]) is not None
            if high < 0
        ]
        if fell:
            found.append(
                f"What was not trained on fell: {', '.join(fell)} (its interval lies below zero)."
            )
    for key, value in card.settings:
        if key == "lora.path":
            found.append(
                f"Training went on from the LoRA {value}, and the comparison is with that one."
            )
    if not card.check:
        found.append("The files were not loaded again and checked after they were written.")
    elif any(word in card.check for word in ("OTHER PICTURES", "OTHER CLIPS")):
        found.append("The check after writing failed, see above: do not rely on these files.")
    found.append(
        "A reward is a model of taste, not taste, and no person has rated these pictures. What the "
        "base model does wrong (bias, unsafe pictures, bad hands) it may still do; no safety "
        "checker is part of this."
    )
    return found


def role(card: Card, name: str) -> str:
    """What a measure of the comparison is: "trained on", "held out" or "diversity"."""
    if name == "diversity":
        return "diversity"
    known = {name, name.partition("/")[0]}
    return "trained on" if known & set(card.trained_on) else "held out"


def _measures(card: Card) -> tuple[Measure, ...]:
    return card.comparison.measures if card.comparison else ()


def _row(card: Card, measure: Measure) -> tuple[str, ...]:
    low, high = (_number(bound, signed=True) for bound in measure.interval)
    worse, better = (_percent(bound) for bound in measure.win_interval)
    return (
        measure.name,
        role(card, measure.name),
        _number(measure.base),
        _number(measure.tuned),
        f"{_number(measure.difference, signed=True)} ({low} to {high})",
        f"{_percent(measure.win_rate)} ({worse} to {better})",
    )


def _number(value: float | None, signed: bool = False) -> str:
    return "none" if value is None else f"{value:{'+' if signed else ''}.4g}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.0f} %"


def _front_matter(card: Card) -> str:
    """YAML between the two lines of dashes, which it does not contain."""
    known = licence_id(card.base.licence)
    fields: dict[str, Any] = {"license": known}
    if known == "other":
        fields["license_name"] = _slug(card.base.licence) or "unknown"
    fields["library_name"] = "diffusers"
    task = f"text-to-{card.family.modality}"
    fields["pipeline_tag"] = task
    if card.base.hub_id:
        fields["base_model"] = card.base.hub_id
        fields["base_model_relation"] = "adapter" if card.kind == "lora" else "finetune"
    tags = [task, "diffusers", card.family.name, "diffusion-align", card.method]
    if card.kind == "lora":
        tags += ["lora", *(["comfyui"] if card.comfyui else [])]
    fields["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=False).rstrip("\n")


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


class Trusted(str):
    """Text that is put in as it is."""


ENVIRONMENT = Environment(
    loader=PackageLoader("diffusion_align.publish", package_path="."),
    autoescape=False,  # `finalize` escapes every value, for Markdown and HTML at once
    finalize=lambda value: value if isinstance(value, Trusted) else escaped(value),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
