"""One transfer as the journal keeps it. No I/O: `store` writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ikectx.numbers import Status
from ikectx.sa.name import SaName

JournalHas = Literal["whole", "gaps", "old"]
"""gaps: transfers are missing, because the store was lost or an older copy was restored, of late; old: that
was found at this start, so what the journal has open may be over."""
Role = Literal["source", "target"]
ROLES: tuple[Role, ...] = ("source", "target")


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One transfer in one role. `result` is empty while it is open.

    `context` and `final` are the encoded blocks of PCTD and CTD: in the clear here, sealed on disk, dropped
    when the transfer ends. `epoch`: the highest of this SA that this transfer has made known to us.
    `started`, `updated`: seconds since 1970. `phases`: ms by state; `moved`: what the
    exchange with the MN took; `status`: why it ended as it did. `audit`: what the audit log is to say of this
    write, see `audit_line`; it is no part of the row.
    """

    transfer_id: bytes
    role: Role
    peer: str
    sa: SaName
    mn: str
    mn_address: str
    state: str
    epoch: int
    started: float
    updated: float
    context: bytes | None = field(default=None, repr=False)
    final: bytes | None = field(default=None, repr=False)
    detail: str = ""
    result: str = ""
    status: Status = Status.OK
    phases: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)
    audit: Mapping[str, object] | None = None
