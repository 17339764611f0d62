"""What the audit log says: one line whenever an SA was let go or taken, or a move ended. Pure.

No line holds a key: SPIs, identities, addresses, message IDs and sequence numbers are no secrets.
"""

from __future__ import annotations

from ikectx.sa.context import FinalState, IkeContext

from .journal import JournalEntry


def audit_line(
    entry: JournalEntry,
    own: str,
    asked_by: str,
    before: IkeContext | None,
    after: FinalState | None,
) -> dict[str, object]:
    """The line for a journal entry. `own`: this gateway; `asked_by`: whose wish it was.

    `before`: the SA as it was exported, `after`: its last counters at the old gateway.
    """
    source = entry.role == "source"
    counters = {"before": counters_of(before), "after": counters_of(after)}
    return {
        "at": round(entry.updated, 3),
        "transfer": entry.transfer_id.hex(),
        "role": entry.role,
        "state": entry.state,
        "outcome": entry.result or ("let go" if source else "taken"),
        "asked_by": asked_by,
        "sa": {"spi_i": entry.sa.spi_i.hex(), "spi_r": entry.sa.spi_r.hex()},
        "mn": entry.mn,
        "mn_address": entry.mn_address,
        "connection": "" if before is None else before.connection,
        "gateway_identity": "" if before is None else str(before.local_id),
        "from": own if source else entry.peer,
        "to": entry.peer if source else own,
        "epoch": {"before": None if before is None else before.epoch, "after": entry.epoch},
        "counters": {name: value for name, value in counters.items() if value is not None},
        "status": entry.status.name,
        "reason": entry.detail,
    }


def counters_of(state: IkeContext | FinalState | None) -> dict[str, object] | None:
    """Message IDs, and the ESP sequence numbers of each CHILD_SA by its inbound SPI."""
    if state is None:
        return None
    return {
        "mid_initiator": state.mid_initiator,
        "mid_responder": state.mid_responder,
        "children": {
            child.spi_in.hex(): {"in": child.inbound.seq, "out": child.outbound.seq}
            for child in state.children
        },
    }
