"""Published scores of published pictures: does this installation give the authors' numbers?

One end-to-end figure is known: HPS v2.0 of the demo picture of its repository is about 0.2876
(tgxs002/HPSv2 issue 27). It was printed to four digits by the authors' script, in mixed precision
and with a torchvision that is not told; hence the tolerance. Its resize is antialiased or not by
that version, so both settings are scored, and only one of them can have made the figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reward_models.base import RewardError
from reward_models.catalogue import find, load
from reward_models.weights import WeightFile, locate

_HPS_DEMO = WeightFile(
    name="hps_demo.jpg",
    sha256="798dfb5bc544fca70ea15d21571530c4389a25536d6a511e0b0c915b0aba144d",
    url="https://raw.githubusercontent.com/tgxs002/HPSv2/master/assets/demo_image.jpg",
    megabytes=0.03,
)


@dataclass(frozen=True)
class PublishedScore:
    """A score that somebody printed.

    Args:
        settings: of the scorer (`load(settings=...)`), for figures that depend on one.
        value: None where no figure is published, and ours is shown alone.
        tolerance: the distance from `value` that rounding and precision explain.
    """

    reward: str
    picture: WeightFile
    prompt: str
    value: float | None
    tolerance: float = 0.0
    settings: tuple[tuple[str, object], ...] = ()


_PROMPT = "A cat with two horns on its head"
PUBLISHED = (
    PublishedScore("hpsv2", _HPS_DEMO, _PROMPT, 0.2876, 0.002, (("antialias", True),)),
    PublishedScore("hpsv2", _HPS_DEMO, _PROMPT, 0.2876, 0.002, (("antialias", False),)),
    PublishedScore("hpsv2.1", _HPS_DEMO, _PROMPT, None),
)
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "pillow")


@dataclass(frozen=True)
class Finding:
    """What came of one published score: ours, or why there is none (with what to do)."""

    published: PublishedScore
    value: float | None
    problem: str = ""

    @property
    def agrees(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.value is None or self.published.value is None:
            return None
        return abs(self.value - self.published.value) <= self.published.tolerance


def contradicted(findings: Iterable[Finding]) -> list[str]:
    """The rewards that were compared with a published figure and give it in none of their settings.

    Args:
        findings: all those of `check_published`; what could not be scored does not count.
    """
    compared: dict[str, list[bool]] = {}
    for finding in findings:
        if finding.agrees is not None:
            compared.setdefault(finding.published.reward, []).append(finding.agrees)
    return [reward for reward, agreed in compared.items() if not any(agreed)]


def check_published(
    *, device: str = "cpu", dtype: str = "float32", picture: Path | None = None
) -> Iterator[Finding]:
    """Score every published picture whose weights this machine has; nothing large is downloaded.

    Args:
        picture: the user's own copy of the demo picture; else it is fetched (30 kB).
    """
    import torch

    from reward_models.media import read_image

    for known in PUBLISHED:
        row = find(known.reward)
        if not row.installed:
            commands = [file.fetch_command() for file in row.files]
            yield Finding(known, None, "its weights are not here:  " + " && ".join(commands))
            continue
        try:
            image = read_image(locate(known.picture, picture))[None]
            reward = load(known.reward, device=device, dtype=dtype, settings=dict(known.settings))
            with torch.no_grad():
                value = float(reward.score(image, [known.prompt]).values[0])
        except RewardError as error:
            yield Finding(known, None, str(error))
        else:
            yield Finding(known, value)


def library_versions() -> dict[str, str]:
    """The installed versions of what a score can depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
