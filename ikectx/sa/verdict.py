"""What a gateway thinks of one block of a context that it is offered."""

from __future__ import annotations

from dataclasses import dataclass

from ikectx.numbers import Fpt, Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check's outcome for one kind of context; `status` OK: nothing against it."""

    fpt: Fpt
    status: Status
    detail: str = ""
