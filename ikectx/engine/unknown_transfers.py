"""What a new gateway answers about a transfer that its journal does not have.

The old gateway has let the SA go. If nobody here has it, the old gateway is told so, and serves it again. If
charon or the kernel has it, the journal was lost or is an old copy, and denying the SA would give it two
owners.

So would a denial by a gateway that had the SA before its store was lost, and has given it away since. An old
gateway that waits for an answer asks again soon after each new connection (`Timing.backoff_max`). So where
the journal lacks transfers, what is asked for in the first time of a connection may be older than the loss,
and is left in doubt; what is asked for later for the first time is not.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace as changed

from ikectx.errors import RefusedError
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address, FinalState
from ikectx.sa.name import SaName

from .audit_line import audit_line
from .effects import FindLatest, Write
from .journal import JournalEntry
from .journaled import Parts
from .lines import Line
from .new_gateway import Incoming, answer, doubt, refusal
from .ports import Evidence
from .procedures import Steps, log
from .tables import MAX_EPOCH, TargetState

DENIED = 1024
"""Denied transfers of one peer that are remembered. A late copy can only arrive over a link that is still
open."""

LOST = "its store was lost, or an older copy was restored, and may lack the transfer that brought the SA"


class Denied:
    """Transfers that a peer let go of, and that were denied because nobody here knew them.

    A late copy of a message must not revive one, because the other gateway has taken its SA back. They are
    kept in memory only: a peer could fill the journal with them, and no copy outlives the links of this
    process.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, transfer_id: bytes) -> bool:
        return transfer_id in self._known

    def add(self, transfer_id: bytes) -> None:
        """Remember a transfer. If there are more than `DENIED`, the oldest is forgotten."""
        self._known[transfer_id] = None
        if len(self._known) > DENIED:
            self._known.popitem(last=False)


class UnknownTransfers:
    """Those of one peer. `adopted`: SAs that were found to be served here, whoever had brought them."""

    def __init__(self, parts: Parts, peer: PeerConfig, adopted: set[SaName]) -> None:
        self.denied = Denied()
        self._lost = Denied()
        """Transfers that the journal may have lost. Each process is asked for them anew."""
        self._idle = Denied()
        """Transfers of SAs that were here, and that nobody served."""
        self._parts = parts
        self._peer = peer
        self._adopted = adopted

    def deny(self, line: Line, mn: Address, transfer_id: bytes) -> None:
        """Answer that nobody here knows that transfer, and keep to it. Nothing is written to the journal."""
        self.denied.add(transfer_id)
        log.warning("%s let go of an SA for %s that it had not offered", line.label, mn)
        answer(line, mn, refusal(Status.UNKNOWN_TRANSFER, "nobody offered it"))

    def doubted(
        self,
        line: Line,
        run: Incoming | None,
        mn: Address,
        final: FinalState,
        transfer_id: bytes,
        who: str = "",
    ) -> Steps[bool]:
        """Answer a CTD whose transfer is not known, or was in doubt before, if the SA is here. False: it is
        not, and nothing was answered.

        If the journal lacks transfers, and charon certainly serves the SA, the transfer is written down again
        as owned, once for each SA, and the other gateway is told so. Else the answer is IN_DOUBT and nothing
        is written, so that the next copy of the CTD is denied when the operator has ended the SA here; the
        other gateway then serves it again.
        """
        if run is not None and not (run.ended and run.status is Status.IN_DOUBT):
            return False
        found = yield from doubt(final, mn, who)
        sa = SaName(final.spi_i, final.spi_r)
        lost = self._parts.config.journal != "whole"  # else there was no such transfer
        # an epoch may be anything that the peer says, and later ones must have room above it
        new = lost and final.epoch <= MAX_EPOCH // 2 and sa not in self._adopted
        if found.serves and "push" in self._peer.rights and new:
            yield from self._adopt(mn, final, transfer_id, found)
            self._adopted.add(sa)
            answer(line, mn, ())
            return True
        if found.idle:
            self._idle.add(transfer_id)
        if not found.words and (yield from self._may_be_lost(line, sa, transfer_id)):
            found = Evidence(LOST)
        if not found.words:
            if run is not None:
                run.error = RefusedError("the SA has been ended here", status=Status.UNKNOWN_TRANSFER)
            return False
        log.error(
            "%s let go of an SA in a transfer that is not in the journal here, but %s. "
            "It serves the SA again only when that has been ended here, or by `ikectx resolve` there",
            *(self._peer.name, found.words),
        )
        answer(line, mn, refusal(Status.IN_DOUBT, found.words))
        return True

    def _may_be_lost(self, line: Line, sa: SaName, transfer_id: bytes) -> Steps[bool]:
        """Whether the journal may have lost a transfer that brought an SA which has gone on since.

        One that was idle here cannot have gone on: somebody has ended it.
        """
        if self._parts.config.journal == "whole":
            return False
        if transfer_id in self._idle and (yield FindLatest(sa)) is None:
            return False
        timing, connected = self._parts.timing, self._parts.now - line.since
        known = transfer_id in self._lost or len(self._lost) >= DENIED
        if known or connected < 2 * timing.backoff_max + timing.connect:
            self._lost.add(transfer_id)
            return True
        return False

    def _adopt(self, mn: Address, final: FinalState, transfer_id: bytes, found: Evidence) -> Steps[None]:
        """Write down that a transfer which the journal does not have has brought an SA here. Errors:
        StoreError."""
        now, config = self._parts.scheduler.unix, self._parts.config
        entry = JournalEntry(
            transfer_id=transfer_id,
            role="target",
            peer=self._peer.name,
            sa=SaName(final.spi_i, final.spi_r),
            mn=found.mn,
            mn_address=str(mn),
            state=str(TargetState.OWNED),
            epoch=final.epoch,
            started=now,
            updated=now,
            detail=f"the store did not know the transfer any more, but {found.words}",
            result="moved",
        )
        line = audit_line(entry, config.name, f"gateway {self._peer.name}", None, final)
        yield Write(changed(entry, audit=line), durable=config.policy.durable)
        log.warning(
            "transfer %s of %s: %s. It serves that SA, and %s is told so",
            *(transfer_id.hex(), found.mn, entry.detail, self._peer.name),
        )
