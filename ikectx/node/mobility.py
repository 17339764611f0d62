"""The mobile node's side of a handover that it asks for (RFC 4067, mobile controlled) as a sans-IO machine.

Predictive: while it is still attached to the old gateway, the mobile node announces the move to it (CTAR,
purpose announce), and the old gateway sends the context ahead. At its new place the mobile node reports to
the new gateway (CTAR, purpose arrive, the same sequence number). Reactive: the mobile node is there already,
and only sends the arrival. AUTO announces too, but goes on if the announcement fails: the mobile node moves
and arrives as in the reactive mode.

The CTAA decides:

- a CTAA with a good tag (`tokens.open_ctaa`) for the present CTAR counts, as success or refusal;
- a CTAA without a tag never counts as a success, because anybody could then cut a mobile node off by making
  it believe in a move that did not happen. As a refusal it counts after it answered two sendings, because the
  new gateway has no key when the old gateway refuses it; about an arrival it leaves the mobile node in doubt.

In doubt: the arrival was sent, and no authentic answer came. The new gateway may own the SA, or the old one;
the mobile node must find out by IKE itself. As long as no arrival was sent, the SA is where it was.

Under load a gateway asks for a cookie (`cookies`): the CTAR is sent once more, at once, with the cookie in
front. Anybody can ask so; more than `COOKIES` requests for one sending are ignored.

Retransmissions repeat the octets, after 2 s doubling to 15 s (CT_REQUEST_RETRY, CT_RETRY_MAX).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Never

from ikectx.errors import UsageError, WireError
from ikectx.machine import Table, Talker
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, Endpoint, IkeGeneration
from ikectx.wire.cookies import asked, with_cookie
from ikectx.wire.cxtp import ContextDataBlock, Ctaa, Ctar, StatusBlock
from ikectx.wire.tokens import MAX_LIFETIME, Purpose, expected_by, make_ctar, open_ctaa, token_key


class HandoverMode(StrEnum):
    """How the mobile node hands over. AUTO: predictive if possible, else reactive."""

    PREDICTIVE = "predictive"
    REACTIVE = "reactive"
    AUTO = "auto"


class MobileState(StrEnum):
    """NEW: nothing was sent. UNPREPARED: the announcement failed, and the mobile node will arrive without it.

    The last four are final.
    """

    NEW = "new"
    ANNOUNCING = "announcing"
    PREPARED = "prepared"
    UNPREPARED = "unprepared"
    ARRIVING = "arriving"
    ACTIVATED = "activated"
    REFUSED = "refused"
    SILENT = "silent"
    CANCELLED = "cancelled"


class MobileInput(StrEnum):
    """ACCEPT, REJECT: a CTAA that counts. FALL_BACK: the announcement failed, in AUTO.

    GIVE_UP: time is over. MOVED: the mobile node is at its new place.
    """

    ANNOUNCE = "announce"
    MOVED = "moved"
    ACCEPT = "accept"
    REJECT = "reject"
    FALL_BACK = "fall-back"
    GIVE_UP = "give-up"
    CANCEL = "cancel"


_S, _I = MobileState, MobileInput

MOBILE_TABLE: Table[MobileState, MobileInput, Never] = {
    (_S.NEW, _I.ANNOUNCE): (_S.ANNOUNCING,),
    (_S.NEW, _I.MOVED): (_S.ARRIVING,),
    (_S.NEW, _I.CANCEL): (_S.CANCELLED,),
    # The CTAR to the old gateway was sent. The mobile node may move before its answer arrives: the new
    # gateway then has the context already or asks for it.
    (_S.ANNOUNCING, _I.MOVED): (_S.ARRIVING,),
    (_S.ANNOUNCING, _I.ACCEPT): (_S.PREPARED,),
    (_S.ANNOUNCING, _I.REJECT): (_S.REFUSED,),
    (_S.ANNOUNCING, _I.FALL_BACK): (_S.UNPREPARED,),
    (_S.ANNOUNCING, _I.GIVE_UP): (_S.SILENT,),
    (_S.ANNOUNCING, _I.CANCEL): (_S.CANCELLED,),
    # the new gateway has the context; both gateways forget it if the mobile node does not come
    (_S.PREPARED, _I.MOVED): (_S.ARRIVING,),
    (_S.PREPARED, _I.FALL_BACK): (_S.UNPREPARED,),
    (_S.PREPARED, _I.GIVE_UP): (_S.SILENT,),
    (_S.PREPARED, _I.CANCEL): (_S.CANCELLED,),
    # waits for the move as long as the caller does
    (_S.UNPREPARED, _I.MOVED): (_S.ARRIVING,),
    (_S.UNPREPARED, _I.CANCEL): (_S.CANCELLED,),
    # the CTAR to the new gateway was sent, and may take effect whatever happens here
    (_S.ARRIVING, _I.ACCEPT): (_S.ACTIVATED,),
    (_S.ARRIVING, _I.REJECT): (_S.REFUSED,),
    (_S.ARRIVING, _I.GIVE_UP): (_S.SILENT,),
    (_S.ARRIVING, _I.CANCEL): (_S.SILENT,),
}

NO_ROUTE = 0.02
"""Seconds until a CTAR that could not leave this machine is sent again: an address comes a moment before the
routes that lead from it."""

MOBILE_FINAL = frozenset({_S.ACTIVATED, _S.REFUSED, _S.SILENT, _S.CANCELLED})

COOKIES = 3
"""Copies with a cookie that one sending may cause."""
OURS = 0xFF00
"""From this FPT on a failure concerns the IKE_SA, which moves with all of its contexts or not at all; a
failure of another context (multicast listeners, say) does not."""


# --- what the machine is told, and tells -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retry:
    """Retransmission of a CTAR, in seconds: `first` doubles to `longest`; `give_up` after the first sending.

    Source: RFC 4067, 3 (CT_REQUEST_RETRY, CT_RETRY_MAX).
    """

    first: float = 2.0
    longest: float = 15.0
    give_up: float = 45.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.longest or self.give_up <= 0:
            raise UsageError("retransmission times are positive, and the first is not above the longest")

    def wait(self, sent: int) -> float:
        """Seconds to wait after the `sent`-th sending (1 is the first)."""
        return min(self.longest, self.first * 2.0 ** min(sent - 1, 30))


@dataclass(frozen=True, slots=True)
class Router:
    """A gateway as the MN knows it.

    name: its configured name. address: its outer IKE address. cxtp: the endpoint for CTARs (UDP).
    """

    name: str
    address: Address
    cxtp: Endpoint


@dataclass(frozen=True, slots=True)
class Route:
    """A handover's ends. Errors: UsageError.

    mn: the mobile node's outer address as the old gateway knows it. psg, nsg: the old and the new gateway.
    """

    mn: Address
    psg: Router
    nsg: Router

    def __post_init__(self) -> None:
        if self.psg.name == self.nsg.name:
            raise UsageError(f"the MN cannot move from {self.psg.name!r} to itself")


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of a handover, in seconds.

    lifetime: of a token. hold: how long the gateways keep an announced context. Errors: UsageError.
    """

    retry: Retry = Retry()
    lifetime: int = 60
    hold: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.lifetime <= MAX_LIFETIME:
            raise UsageError(f"a token lives 1 to {MAX_LIFETIME} s, not {self.lifetime}")


@dataclass(frozen=True, slots=True)
class HandoverPrepared:
    """The old gateway has sent the context ahead: the mobile node may move."""

    ctaa: Ctaa


@dataclass(frozen=True, slots=True)
class Unprepared:
    """The announcement failed: the mobile node will arrive without it. No statuses: no answer came."""

    statuses: tuple[StatusBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class Activated:
    """The new gateway serves the SA. `ctaa` may have new SPIs (`Fpt.NEW_SPIS`) and failures of other
    contexts."""

    ctaa: Ctaa


@dataclass(frozen=True, slots=True)
class HandoverRefused:
    """A gateway refused. `authentic`: its tag was right. `in_doubt`: anybody may have sent it, see above."""

    statuses: tuple[StatusBlock, ...]
    authentic: bool
    in_doubt: bool


@dataclass(frozen=True, slots=True)
class GaveUp:
    """`sent` sendings had no answer that counts; or the mobile node did not move in time; or `cancel` came
    after the arrival."""

    sent: int
    in_doubt: bool


@dataclass(frozen=True, slots=True)
class HandoverCancelled:
    """`cancel` before the arrival: the SA is where it was, and the gateways forget what was prepared."""


HandoverEvent = HandoverPrepared | Unprepared | Activated | HandoverRefused | GaveUp | HandoverCancelled


@dataclass(frozen=True, slots=True)
class HandoverOutcome:
    """How a handover ended. `state` is one of `MOBILE_FINAL`.

    in_doubt: the new gateway may own the SA all the same (never for ACTIVATED). announced: the old gateway
    had prepared it. expected: message ID of the mobile node's next request as the new gateway expects it,
    None: not said. messages, octets: CTARs and CTAAs on the wire, UDP payload; retransmissions: of CTARs.
    """

    state: MobileState
    statuses: tuple[StatusBlock, ...] = ()
    blocks: tuple[ContextDataBlock, ...] = ()
    in_doubt: bool = False
    authentic: bool = False
    announced: bool = False
    expected: int | None = None
    messages: int = 0
    octets: int = 0
    retransmissions: int = 0

    @property
    def text(self) -> str:
        """One line for the operator."""
        if self.state is MobileState.ACTIVATED:
            return "the new gateway serves the SA"
        if self.state is MobileState.CANCELLED:
            return "cancelled before the arrival: the old gateway serves the SA"
        said = {
            MobileState.REFUSED: "refused" if self.authentic else "refused, by an answer without proof",
            MobileState.SILENT: "no answer",
        }[self.state]
        where = (
            "which gateway serves the SA is not known" if self.in_doubt else "the old gateway serves the SA"
        )
        return f"{said}: {where}"


_LEAVING = (ContextDataBlock(Fpt.LEAVING, b""),)


# --- the machine -------------------------------------------------------------------------------------------


class Handover(Talker[MobileState, MobileInput, Never, HandoverEvent]):
    """Moves the mobile node's IKE_SA `generation` along `route`; the first `to_send` starts it.

    sequence: 32 fresh random bits, of this handover alone. unix: seconds since 1970 when `now` is 0. care_of:
    the mobile node's outer IKE endpoint at its new place, in REACTIVE; else `moved` sets it. expects: message
    ID of the next request that the mobile node expects of its gateway; it may be set until the token that
    carries it is made (`moved`). Errors: RefusedError for an algorithm not known here.
    """

    def __init__(
        self,
        generation: IkeGeneration,
        mode: HandoverMode,
        route: Route,
        *,
        sequence: int,
        unix: float,
        care_of: Endpoint | None = None,
        limits: Limits | None = None,
        expects: int | None = None,
    ) -> None:
        super().__init__(MOBILE_TABLE, MobileState.NEW)
        self.mode = mode
        self.mn = route.mn
        self.psg = route.psg
        self.nsg = route.nsg
        self.sequence = sequence
        self.spis = generation.spis
        self.expects = expects
        self.leaves = False
        """True if it goes as soon as its announcement is answered; set before the first sending.

        Packets for it may then be held at the new gateway until it arrives.
        """
        self.ignored = 0
        """Datagrams that were no answer to this handover: forged, damaged, late, from elsewhere."""
        self._key = token_key(generation, sequence)
        self.unix = unix
        """May be set again: the clock of `now` stands still while the host sleeps."""
        self._care_of = care_of
        limits = limits or Limits()
        self._retry = limits.retry
        self._lifetime = limits.lifetime
        self._hold = limits.hold
        self._octets = b""
        self._cookies = 0
        """Cookies that were asked for since the last sending by timer."""
        self._send_now = False
        self._sent = 0
        self._deadline: float | None = None
        self._untagged_after = 0
        """The sending (1 is the first) after which a refusal without a tag came."""
        self._outcome = HandoverOutcome(MobileState.NEW)

    @property
    def care_of(self) -> Endpoint | None:
        """The mobile node's present endpoint as it reported it; None: it did not (yet)."""
        return self._care_of

    @property
    def outcome(self) -> HandoverOutcome:
        """The result, or the progress so far."""
        return replace(self._outcome, state=self.state)

    # the verbs

    def to_send(self, now: float) -> list[tuple[bytes, Endpoint]]:
        if self.state is MobileState.NEW:
            if self.mode is HandoverMode.REACTIVE:
                self.moved(self._care_of, now)
            else:
                self._enter(MobileInput.ANNOUNCE)
                self._ask(Purpose.ANNOUNCE, None, now)
        if not (self._send_now and self._waits):
            return []
        self._send_now = False
        if self._cookies:
            self._count(self._octets)
            return [(self._octets, self._to.cxtp)]
        self._sent += 1
        self._count(self._octets, again=self._sent > 1)
        if self._deadline is None:
            self._deadline = now + self._retry.give_up
        self._due = min(now + self._retry.wait(self._sent), self._deadline)
        return [(self._octets, self._to.cxtp)]

    def not_sent(self, now: float) -> None:
        """What `to_send` gave did not leave this machine, which has no route from its new place yet: it is
        given again soon, and is none of the tries."""
        if not self._waits or self._deadline is None:
            return
        tried = not self._cookies
        seen = self._outcome
        self._know(
            messages=seen.messages - 1,
            octets=seen.octets - len(self._octets),
            retransmissions=seen.retransmissions - (tried and self._sent > 1),
        )
        self._sent -= tried
        self._due = min(now + NO_ROUTE, self._deadline)

    def handle_timer(self, now: float) -> None:
        if self._due is None or now < self._due:
            return
        self._due = None
        if self._waits and self._deadline is not None and now < self._deadline:
            self._send_now, self._cookies = True, 0
        elif self.state is MobileState.ARRIVING or self.mode is not HandoverMode.AUTO:
            self._give_up(MobileInput.GIVE_UP)
        else:
            self._fall_back(())

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        if not self._waits:
            self.ignored += 1
            return
        try:
            ctaa = Ctaa.parse(datagram)
        except WireError:
            self.ignored += 1
            return
        cookie = asked(ctaa)
        if cookie is not None:
            self._show(cookie, ctaa, source, datagram)
            return
        failed = tuple(s for s in ctaa.statuses if s.fpt >= OURS and s.status != Status.OK)
        authentic = ctaa.mn == self.mn and open_ctaa(self._key, ctaa, self.sequence, purpose=self._purpose)
        if not authentic and not self._refused_twice(ctaa, source, failed):
            return
        self._count(datagram)
        if failed:
            self._refuse(failed, authentic)
        elif self.state is MobileState.ANNOUNCING:
            self._know(announced=True)
            self._enter(MobileInput.ACCEPT, HandoverPrepared(ctaa))
            self._due = now + self._hold
        else:
            expected = expected_by(ctaa)
            self._know(statuses=ctaa.statuses, blocks=ctaa.blocks, authentic=True, expected=expected)
            self._enter(MobileInput.ACCEPT, Activated(ctaa))

    def moved(self, care_of: Endpoint | None, now: float) -> None:
        """The MN is at its new place, `care_of` its outer IKE endpoint there (None: it does not know it).

        While the arrival is under way a further move changes nothing: its token names one place. Do not go
        on. The result is in doubt if the arrival was sent already.
        """
        if self.state in (MobileState.ARRIVING, *MOBILE_FINAL):
            return
        self._care_of = care_of
        self._enter(MobileInput.MOVED)
        self._ask(Purpose.ARRIVE, care_of, now)

    def cancel(self) -> None:
        """Do not go on. In doubt when the arrival was sent already."""
        if self.state is MobileState.ARRIVING:
            self._give_up(MobileInput.CANCEL)
        elif not self.done:
            self._enter(MobileInput.CANCEL, HandoverCancelled())

    # inside

    @property
    def _waits(self) -> bool:
        """A CTAR was sent, or is to be sent."""
        return self.state in (MobileState.ANNOUNCING, MobileState.ARRIVING)

    @property
    def _purpose(self) -> Purpose:
        return Purpose.ARRIVE if self.state is MobileState.ARRIVING else Purpose.ANNOUNCE

    @property
    def _to(self) -> Router:
        return self.nsg if self.state is MobileState.ARRIVING else self.psg

    def _ask(self, purpose: Purpose, care_of: Endpoint | None, now: float) -> None:
        other = self.psg if purpose is Purpose.ARRIVE else self.nsg
        made = make_ctar(
            self._key,
            mn=self.mn,
            router=_in_family(other.address, self.mn),
            sequence=self.sequence,
            purpose=purpose,
            spis=self.spis,
            psg=self.psg.name,
            nsg=self.nsg.name,
            expiry=int(self.unix + now) + self._lifetime,
            care_of=care_of,
            blocks=_LEAVING if self.leaves and purpose is Purpose.ANNOUNCE else (),
            expects=self.expects,
        )
        self._octets = made.serialize()
        self._send_now, self._sent, self._deadline, self._due = True, 0, None, None
        self._untagged_after, self._cookies = 0, 0

    def _show(self, cookie: ContextDataBlock, ctaa: Ctaa, source: Endpoint, datagram: bytes) -> None:
        """The gateway asks for a cookie, to see that this address receives: send the CTAR with it."""
        if ctaa.mn != self.mn or source != self._to.cxtp or not self._sent or self._cookies >= COOKIES:
            self.ignored += 1
            return
        self._count(datagram)
        self._octets = with_cookie(Ctar.parse(self._octets), cookie).serialize()
        self._cookies += 1
        self._send_now = True

    def _refused_twice(self, ctaa: Ctaa, source: Endpoint, failed: tuple[StatusBlock, ...]) -> bool:
        """True if this is a refusal without a tag for the second sending that got one.

        An answer with a tag, even a wrong one, does not count here, and duplicates of one answer count once.
        """
        if ctaa.blocks or not failed or ctaa.mn != self.mn or source != self._to.cxtp or not self._sent:
            self.ignored += 1
            return False
        if self._untagged_after in (0, self._sent):
            self._untagged_after = self._sent
            return False
        return True

    def _refuse(self, failed: tuple[StatusBlock, ...], authentic: bool) -> None:
        if self.state is MobileState.ANNOUNCING and self.mode is HandoverMode.AUTO:
            self._fall_back(failed)
            return
        in_doubt = self.state is MobileState.ARRIVING and not authentic
        self._know(statuses=failed, in_doubt=in_doubt, authentic=authentic)
        self._enter(MobileInput.REJECT, HandoverRefused(failed, authentic, in_doubt))

    def _fall_back(self, failed: tuple[StatusBlock, ...]) -> None:
        self._know(announced=False)
        self._enter(MobileInput.FALL_BACK, Unprepared(failed))

    def _give_up(self, what: MobileInput) -> None:
        in_doubt = self.state is MobileState.ARRIVING and self._sent > 0
        self._know(in_doubt=in_doubt)
        self._enter(what, GaveUp(self._sent, in_doubt))

    def _know(self, **facts: Any) -> None:
        self._outcome = replace(self._outcome, **facts)

    def _count(self, octets: bytes, *, again: bool = False) -> None:
        seen = self._outcome
        self._know(
            messages=seen.messages + 1,
            octets=seen.octets + len(octets),
            retransmissions=seen.retransmissions + again,
        )


def _in_family(address: Address, mn: Address) -> Address:
    """A CTAR has addresses of one family only. The names in the token say which gateways are meant."""
    if address.version == mn.version:
        return address
    return IPv4Address(0) if mn.version == 4 else IPv6Address(0)


__all__ = [
    "MOBILE_FINAL",
    "MOBILE_TABLE",
    "Activated",
    "GaveUp",
    "Handover",
    "HandoverCancelled",
    "HandoverEvent",
    "HandoverMode",
    "HandoverOutcome",
    "HandoverPrepared",
    "HandoverRefused",
    "MobileInput",
    "MobileState",
    "Retry",
    "Router",
    "Unprepared",
]
