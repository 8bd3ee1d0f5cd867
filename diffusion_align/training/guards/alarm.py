"""One alarm: a condition that must hold for a while, and what is done about it then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusion_align.errors import UserError
from diffusion_align.training.guard_options import Action

Say = Callable[[str], None]


@dataclass(frozen=True)
class Finding:
    """What a guard found: what happened, with figures; where; what to do about it."""

    what: str
    where: str
    fix: str


class GuardStop(UserError):
    """A guard ends the run. `guard` is the option that it goes by."""

    def __init__(self, guard: str, finding: Finding, way_on: str = "warn") -> None:
        on = f"\nto go on in spite of it: guards.{guard}={way_on}" if way_on else ""
        super().__init__(finding.what, where=finding.where, fix=finding.fix + on)
        self.guard = guard


class Alarm:
    """Counts how often in a row its condition held, and acts from `patience` on.

    A warning is given the first time, the tenth, the hundredth: often enough to be seen in a long
    log, too rarely to fill it. A stop starts the count again, so that a run that is resumed after
    it gets as long as any other.

    Args:
        guard: the option that chooses `action`.
        about: what exactly is watched, where a guard watches several things.
        patience: how often in a row the condition must hold.
        say: takes a warning.
    """

    def __init__(
        self, guard: str, action: Action, patience: int, say: Say, *, about: str = ""
    ) -> None:
        self.guard, self.about = guard, about
        self._action, self._patience, self._say = action, patience, say
        self._held = 0
        self._told = 0

    @property
    def name(self) -> str:
        """`picture_change/edge_density`."""
        return f"{self.guard}/{self.about}" if self.about else self.guard

    @property
    def held(self) -> int:
        """How often in a row the condition has held."""
        return self._held

    @property
    def is_on(self) -> bool:
        """Whether anything would be done."""
        return self._action != "off"

    @property
    def is_ringing(self) -> bool:
        """Whether the condition has held for long enough."""
        return self.is_on and self._held >= self._patience

    def check(self, holds: bool, finding: Callable[[], Finding]) -> None:
        """Tell it whether the condition holds now; `finding` is asked only when it is needed.

        Raises:
            GuardStop: it has held for long enough, and the action is stop.
        """
        if self.rings(holds, finding) and self._action == "stop":
            found = finding()
            self._held = 0
            raise GuardStop(self.guard, found)

    def rings(self, holds: bool, finding: Callable[[], Finding]) -> bool:
        """As `check`, but a stop is left to the caller: True where the alarm rings."""
        self._held = self._held + 1 if holds else 0
        if not self.is_ringing:
            return False
        self._told += 1
        if self._action == "warn" and _is_power_of_ten(self._told):
            found = finding()
            advice = " ".join(line.strip() for line in found.fix.splitlines())
            again = f", told {self._told} times now" if self._told > 1 else ""
            self._say(f"guard {self.guard}{again}: {found.where}: {found.what}. {advice}")
        return True

    def forgive(self) -> None:
        """Count from the beginning again."""
        self._held = 0

    def state_dict(self) -> dict[str, int]:
        """Its counts."""
        return {"held": self._held, "told": self._told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._held, self._told = int(state["held"]), int(state["told"])


def _is_power_of_ten(number: int) -> bool:
    while number % 10 == 0:
        number //= 10
    return number == 1
