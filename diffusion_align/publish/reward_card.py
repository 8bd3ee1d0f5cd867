"""The card of a reward that was trained here. Its facts are those of the reward's own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import yaml

from diffusion_align.publish.card import ENVIRONMENT, Trusted, licence_id
from diffusion_align.publish.signature import signed


@dataclass(frozen=True)
class RewardCard:
    """What a trained reward is.

    Args:
        name, head, tower, attributes, range, licence, source: as in the reward's file.
        trained_on: names of its data.
        validation: (measure, agreement with data held out).
        version: of this package.
    """

    name: str
    head: str
    tower: str
    attributes: tuple[str, ...]
    range: str
    licence: str
    source: str
    trained_on: tuple[str, ...]
    validation: tuple[tuple[str, float], ...]
    version: str


def render_reward(card: RewardCard, redact: Callable[[str], str]) -> str:
    """The card as text, signed; `redact` removes secrets."""
    known = licence_id(card.licence)
    fields: dict[str, object] = {"license": known}
    if known == "other":
        fields["license_name"] = "unknown"
    fields["tags"] = ["reward-model", "diffusion-align", card.head]
    template = ENVIRONMENT.get_template("reward_card.md.j2")
    text = template.render(
        card=card,
        front=Trusted(yaml.safe_dump(fields, sort_keys=False).rstrip("\n")),
        rows=tuple((name.replace("_", " "), f"{value:.4f}") for name, value in card.validation),
    )
    return signed(redact(text.rstrip("\n") + "\n"))
