"""I/O: runs the machines of this package on a raw socket (see `packet_io`), with this host's clock.

Errors of all: LinkError with UNREACHABLE if the socket is not available, KernelError if descriptors are
lacking.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any

from ikectx.engine.ports import MoveReport
from ikectx.errors import LinkError, RefusedError
from ikectx.numbers import Notify, Status
from ikectx.sa.context import Endpoint

from .address_update import AddressUpdate, Refused
from .farewell import Farewell
from .notify import Reason
from .packet_io import RawLink, open_raw
from .probe import MidProbe
from .rekey import (
    ChildMade,
    ChildRekey,
    ChildRekeyed,
    IkeMade,
    IkeRekey,
    IkeRekeyed,
    RekeyFailed,
    RekeyState,
)
from .requester import RequesterMachine, Silent
from .responder import Asked, SpiResponder
from .spi_update import Renamed, RenameRefused, SpiUpdate, Unsupported

_PROOF_INTERVAL = 0.25
"""Seconds between two checks whether the mobile node's ESP has arrived, or the caller wants an end."""
_ANSWER_OCTETS = 256
"""Fresh octets for the IVs of one answer."""
_NATS = {
    Notify.NAT_DETECTION_DESTINATION_IP: "this gateway is behind a NAT, and the SA's ESP is not in UDP",
    Notify.NAT_DETECTION_SOURCE_IP: "the MN is behind a NAT on its way here, and the SA's ESP is not in UDP",
}
_ENCAP = "`--address relay`; or `encap = yes` in the connection at both gateways, for later SAs"


async def _run(
    machine: RequesterMachine[Any, Any, Any],
    mark: int,
    heard: Callable[[], bool] | None = None,
    seen: Callable[[], None] = lambda: None,
    rest: RekeyState | None = None,
) -> list[object]:
    """Run to the end, or until the caller's turn comes in the state `rest`; returns the events. `seen` is
    called while `heard` is true.

    Errors: LinkError with PEER_SILENT, RefusedError with PEER_REFUSED.
    """
    trouble = ""
    with open_raw(machine.local, machine.remote, machine.spis, mark=mark) as raw:
        while not machine.done and machine.state is not rest:
            trouble = _send(raw, machine.to_send(monotonic())) or trouble
            due = machine.next_timer()
            wait = max(0.0, due - monotonic()) if due is not None else 0.0
            received = await raw.receive(min(wait, _PROOF_INTERVAL) if heard else wait)
            if received is not None:
                machine.receive(*received, monotonic())
            machine.handle_timer(monotonic())
            if heard is not None and not machine.done and heard():
                seen()
        _send(raw, machine.to_send(monotonic()))  # an answer to the peer may still be unsent
    events: list[object] = []
    while (event := machine.next_event()) is not None:
        events.append(event)
    for event in events:
        if isinstance(event, Silent):
            where = f"the MN at {machine.remote} did not answer {event.sent} requests from {machine.local}"
            raise LinkError(
                where + trouble,
                hint="is the way from this gateway to the MN open for UDP (routes, firewall, the MN's NAT)?",
                status=Status.PEER_SILENT,
            )
        if isinstance(event, Refused):
            nat = _NATS.get(event.notify)
            raise RefusedError(
                nat or f"the MN refused the new address: {event.notify.name}",
                hint=_ENCAP if nat else "",
                status=Status.PEER_REFUSED,
            )
    return events


def _send(raw: RawLink, datagrams: list[tuple[bytes, Endpoint]]) -> str:
    """Send; returns the error, for a message to the operator."""
    trouble = ""
    for datagram, to in datagrams:
        try:
            raw.send(datagram, to)
        except OSError as error:  # the same as a loss on the way: the next try may arrive
            trouble = f"; last error: {error.strerror}"
    return trouble


# --- requests ------------------------------------------------------------------------------------------


async def run_address_update(
    machine: AddressUpdate,
    *,
    heard: Callable[[], bool] | None = None,
    mark: int = 0,
) -> MoveReport:
    """Run `machine` to its end from a raw socket at `machine.local`.

    heard: called now and then; true if ESP of the mobile node arrives here, which is then asked twice as
    often. mark: see `open_raw`. Errors: LinkError with PEER_SILENT (no answer; `machine.report` has what was
    sent) or UNREACHABLE (the socket is not available), RefusedError with PEER_REFUSED.
    """
    await _run(machine, mark, heard, machine.traffic_seen)
    return machine.report


async def run_mid_probe(machine: MidProbe, *, mark: int = 0) -> int:
    """Message ID of our next request. Errors: as `run_address_update`."""
    await _run(machine, mark)
    return machine.next_id


async def run_farewell(machine: Farewell, *, mark: int = 0) -> bool:
    """Whether the peer has answered the Delete. Errors: LinkError with UNREACHABLE."""
    try:
        await _run(machine, mark)
    except LinkError as error:
        if error.status is not Status.PEER_SILENT:
            raise
        return False
    return True


@dataclass(frozen=True, slots=True)
class SpiReport:
    """The result of an exchange that changes SPIs; the address update in it succeeded, if there was one."""

    move: MoveReport
    outcome: Renamed | RenameRefused | Unsupported


async def run_spi_update(machine: SpiUpdate, *, mark: int = 0) -> SpiReport:
    """As `run_address_update`.

    Afterwards the peer may still repeat a request that was answered here: `keep_answering`.
    """
    events = await _run(machine, mark)
    outcome = next(e for e in events if isinstance(e, Renamed | RenameRefused | Unsupported))
    return SpiReport(machine.report, outcome)


async def ask_rekey(machine: ChildRekey | IkeRekey, *, mark: int = 0) -> ChildMade | IkeMade:
    """Ask for the new SA. The caller installs it, tells `machine` so (`installed`, or `abandon`), and calls
    `end_rekey`. `machine.report` has the cost.

    Errors: as `run_address_update`; RefusedError with PEER_REFUSED if the peer does not rekey.
    """
    (event,) = await _run(machine, mark, rest=RekeyState.MADE)
    if isinstance(event, RekeyFailed):
        why = f" ({event.why})" if event.why else ""
        raise RefusedError(
            f"the MN did not rekey: {event.notify.name}{why}",
            hint="its log says why; the SA is as it was",
            status=Status.PEER_REFUSED,
        )
    assert isinstance(event, ChildMade | IkeMade)
    return event


async def end_rekey(machine: ChildRekey | IkeRekey, *, mark: int = 0) -> ChildRekeyed | IkeRekeyed | None:
    """Delete the old SA, or the new child if it was abandoned (None). Errors: LinkError with UNREACHABLE."""
    (event,) = await _run(machine, mark)
    return event if isinstance(event, ChildRekeyed | IkeRekeyed) else None


# --- answers -------------------------------------------------------------------------------------------


class Serving:
    """Requests of the peer that come for `machine`. See `serving`."""

    def __init__(self, machine: SpiResponder, raw: RawLink) -> None:
        self._machine = machine
        self._raw = raw

    async def next(self) -> Asked | None:
        """The next request. What must be done before its answer leaves is done before `answer`; nothing is
        received until `next` is called again. None: the machine is done."""
        machine = self._machine
        while not machine.done:
            while (event := machine.next_event()) is not None:
                if isinstance(event, Asked):
                    return event
            received = await self._raw.receive(_PROOF_INTERVAL)
            if received is not None:
                machine.receive(*received, monotonic())
            machine.handle_timer(monotonic())
            _send(self._raw, machine.to_send(monotonic()))
        return None

    def answer(self, refusal: Reason | None = None) -> None:
        """Answer it. A reason refuses the change after all."""
        now = monotonic()
        self._machine.answer(secrets.token_bytes(_ANSWER_OCTETS), now, refusal)
        _send(self._raw, self._machine.to_send(now))


@contextmanager
def serving(machine: SpiResponder, *, mark: int = 0) -> Iterator[Serving]:
    """Receive IKE of the SA at `machine.local` from anywhere."""
    with open_raw(machine.local, None, machine.spis, mark=mark) as raw:
        yield Serving(machine, raw)


async def keep_answering(machine: SpiUpdate, seconds: float, *, mark: int = 0) -> None:
    """Answer repetitions of the peer's own request, which charon, active by now, does not know."""
    end = monotonic() + seconds
    with open_raw(machine.local, machine.remote, machine.spis, mark=mark) as raw:
        while (left := end - monotonic()) > 0:
            received = await raw.receive(left)
            if received is not None:
                machine.receive(*received, monotonic())
            _send(raw, machine.to_send(monotonic()))


__all__ = [
    "Serving",
    "SpiReport",
    "ask_rekey",
    "end_rekey",
    "keep_answering",
    "run_address_update",
    "run_farewell",
    "run_spi_update",
    "serving",
]
