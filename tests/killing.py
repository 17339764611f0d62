"""Agents that are killed in the middle of a step: before an effect, or when it has happened and is not noted.

The places are taken from the steps' own lists, so that none is forgotten when a list changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from vici_bridge.effects.runner import LedgerStep, StepEffect


class Killed(BaseException):
    """The agent's process is gone."""


@dataclass
class Assassin:
    """Kills at one effect of one step, `after` it has happened or before. `ran`: what was done."""

    effect: str = ""
    after: bool = False
    ran: list[str] = field(default_factory=list)
    struck: bool = False

    def waits_in(self, step: LedgerStep[Any]) -> LedgerStep[Any]:
        """The same step, in which it waits."""
        return replace(step, effects=tuple(self._watched(effect) for effect in step.effects))

    def _watched(self, effect: StepEffect[Any]) -> StepEffect[Any]:
        async def do(work: Any) -> Any:
            self.ran.append(effect.name)
            strikes = effect.name == self.effect and not self.struck
            if strikes and not self.after:
                self.struck = True
                raise Killed
            facts = await effect.do(work)
            if strikes:
                self.struck = True
                raise Killed
            return facts

        return replace(effect, do=do)


Places = list[tuple[str, bool]]


def places(ran: list[str]) -> Places:
    """Before and after each effect that was done."""
    return [(name, after) for name in dict.fromkeys(ran) for after in (False, True)]


def names(step: LedgerStep[Any]) -> set[str]:
    """Of all its effects."""
    return {effect.name for effect in step.effects}


Patch = Callable[[Assassin], None]
