"""`HaVersion`: the version of the running charon, and the wire version of its ha plugin, as far as known.
Pure.

charon may be upgraded and restarted while the agent runs, and drops HA messages of any other version than its
own without an answer. So the version that VICI reports is used from each time that charon comes (back), and
each datagram of the HA stream corrects it, because the table of versions ends with the newest strongSwan that
was examined (6.1.0).
"""

from __future__ import annotations

import re

from ikectx.errors import CharonError

from .messages import TABLES


def wire_version(strongswan: str) -> int:
    """The HA wire version of a strongSwan version as VICI `version` names it ("5.9.8", "6.0.2")."""
    # a pre-release has letters behind its last number ("6.0.1dr1", "6.0.1rc1")
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", strongswan)
    numbers = (0,) if found is None else tuple(int(part or 0) for part in found.groups())
    if numbers < (6, 0, 1):
        return 3
    return 4 if numbers < (6, 0, 2) else 5


class HaVersion:
    """`charon`: strongSwan's version as VICI reports it; `number`: the wire version. Empty and None at
    first."""

    def __init__(self) -> None:
        self.charon = ""
        self.number: int | None = None

    def told(self, strongswan: str) -> None:
        """VICI reports a charon of that version, perhaps another one than before."""
        if self.number is None or strongswan != self.charon:
            self.number = wire_version(strongswan)
        self.charon = strongswan

    def heard(self, datagram: bytes) -> bool:
        """A datagram of the HA stream arrived. True if its wire version was not known to be used."""
        before, self.number = self.number, datagram[0] if datagram else self.number
        return before != self.number

    @property
    def problem(self) -> str:
        """A description of the wire version's problem; empty: none is known."""
        if self.number is None or self.number in TABLES:
            return ""
        known = ", ".join(map(str, sorted(TABLES)))
        charon = f"charon {self.charon}" if self.charon else "charon"
        return f"{charon} speaks HA wire version {self.number}, this ikectx knows {known}"

    def check(self) -> None:
        """Errors: CharonError if charon uses a wire version that is not known here."""
        if self.problem:
            raise CharonError(self.problem, hint=UPGRADE)


UPGRADE = "upgrade ikectx: until then no SA can be moved from here or to here"
