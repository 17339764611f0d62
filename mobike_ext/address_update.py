"""The gateway's address update (RFC 4555) as a sans-IO machine: one INFORMATIONAL exchange with the mobile
node.

The new gateway sends, from its own address and under the SA's own keys and message ID,
N(UPDATE_SA_ADDRESSES), both N(NAT_DETECTION_*), N(COOKIE2) and its further addresses, which replace those of
the old gateway (N(ADDITIONAL_IP*_ADDRESS) or N(NO_ADDITIONAL_ADDRESSES), RFC 4555, 3.6). A stock peer moves
its IKE_SA and CHILD_SAs to the address that the request came from and echoes COOKIE2. charon at the new
gateway has the SA PASSIVE meanwhile and answers nothing. Requests of the mobile node that arrive now stay
unanswered, too: the mobile node retransmits them, and charon answers after its activation, because an answer
of this machine would use up message IDs that only charon can serve.

Return routability (RFC 4555, 3.7): an answer that counts (see `requester`) echoes COOKIE2, 16 fresh octets.

`AddressPart` is the part of this that is used in a request with more content, see `spi_update`.

NAT detection. The mobile node decides about UDP encapsulation by our hashes: if both match it switches it
off, else on, and its CHILD_SAs with it. Those at the new gateway stay as they were at the old one. So ESP in
UDP goes on in UDP, because the source hash is then one that cannot match (as charon's is in IKE_SA_INIT with
`encap = yes`), whichever gateways are behind a NAT. Where the answer tells of a NAT and ESP was not in UDP,
the update counts as refused: the mobile node encapsulates by then, until the old gateway takes it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from ipaddress import IPv4Address
from typing import Never

from ikectx.errors import UsageError
from ikectx.machine import Table
from ikectx.numbers import Exchange, Notify
from ikectx.sa.context import Address, Endpoint
from ikectx.sa.keys import DrawnIvs
from ikectx.sa.name import SaName
from ikectx.wire.ikev2 import IkeMessage, nat_detection_hash
from ikectx.wire.payloads import NotifyPayload

from .requester import Asking, Requester, SaEnd, Silent

COOKIE2_LENGTH = 16
"""RFC 4555, 4.2.5 allows 8 to 64."""

_NOWHERE = Endpoint(IPv4Address(0), 0)
"""No packet comes from here, so its hash tells the peer of a NAT."""


class Condition(IntEnum):
    """charon's condition bits about NAT (ike_condition_t, 5.9.8 to 6.0.x), as in `IkeContext.conditions`."""

    NAT_ANY = 1 << 0
    NAT_HERE = 1 << 1
    NAT_THERE = 1 << 2
    NAT_FAKE = 1 << 3


# --- events ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moved:
    """The mobile node uses our address now: it has answered, with our cookie."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The mobile node refused. `notify` is its error; COOKIE2: the answer lacks our cookie;
    NAT_DETECTION_DESTINATION_IP, NAT_DETECTION_SOURCE_IP: it tells of a NAT before us, or before the mobile
    node, for which ESP would have to be in UDP."""

    notify: Notify


AddressUpdateEvent = Moved | Refused | Silent


# --- the address part ----------------------------------------------------------------------------------


def nat_detection(spis: SaName, local: Endpoint, remote: Endpoint, *, encap: bool) -> list[NotifyPayload]:
    """Both N(NAT_DETECTION_*) of a message from `local` to `remote`. `encap`: ESP is to be in UDP whether
    there is a NAT or not."""
    source = _NOWHERE if encap else local
    return [
        NotifyPayload(Notify.NAT_DETECTION_SOURCE_IP, nat_detection_hash(*spis, source)),
        NotifyPayload(Notify.NAT_DETECTION_DESTINATION_IP, nat_detection_hash(*spis, remote)),
    ]


def nat_conditions(
    message: IkeMessage, spis: SaName, local: Endpoint, source: Endpoint, conditions: int = 0
) -> int:
    """`conditions` after the NAT detection (RFC 7296, 2.23) of a message that came from `source`, as charon
    evaluates it; unchanged if the message has none."""
    theirs = message.notifies(Notify.NAT_DETECTION_SOURCE_IP)
    ours = message.notifies(Notify.NAT_DETECTION_DESTINATION_IP)
    if not theirs or not ours:
        return conditions
    there = nat_detection_hash(*spis, source) not in [n.data for n in theirs]
    here = nat_detection_hash(*spis, local) not in [n.data for n in ours]
    fake = conditions & Condition.NAT_FAKE
    new = conditions & ~(Condition.NAT_ANY | Condition.NAT_HERE | Condition.NAT_THERE)
    new |= (Condition.NAT_HERE if here else 0) | (Condition.NAT_THERE if there else 0)
    return new | (Condition.NAT_ANY if here or there or fake else 0)


@dataclass(frozen=True, slots=True)
class AddressNotice:
    """The content of an address update, besides the address itself.

    cookie2: 16 fresh random octets. conditions: charon's bits of the SA. additional: the new gateway's
    further addresses, so that the mobile node does not try the old gateway's when its path to the new one
    fails; None: none are sent, and it keeps those it has. Errors: UsageError.
    """

    cookie2: bytes
    conditions: int = 0
    additional: Sequence[Address] | None = None

    def __post_init__(self) -> None:
        if len(self.cookie2) != COOKIE2_LENGTH:
            raise UsageError(f"COOKIE2 has {COOKIE2_LENGTH} octets here, not {len(self.cookie2)}")


def further(addresses: Sequence[Address], known: Address | None = None) -> list[NotifyPayload]:
    """The list of a gateway's addresses beside the one that the mobile node uses, which replaces the list
    that it has (RFC 4555, 3.6)."""
    kinds = {4: Notify.ADDITIONAL_IP4_ADDRESS, 6: Notify.ADDITIONAL_IP6_ADDRESS}
    said = [NotifyPayload(kinds[one.version], one.packed) for one in addresses if one != known]
    return said or [NotifyPayload(Notify.NO_ADDITIONAL_ADDRESSES)]


class AddressPart:
    """The gateway's address in a request, and the evaluation of the answer to it."""

    def __init__(self, end: SaEnd, notice: AddressNotice) -> None:
        self._spis = end.generation.spis
        self._local = end.local
        self._remote = end.remote
        self._cookie2 = notice.cookie2
        self._conditions = notice.conditions
        self._additional = notice.additional

    def payloads(self) -> list[NotifyPayload]:
        """The payloads, in the order in which they are sent."""
        return [
            NotifyPayload(Notify.UPDATE_SA_ADDRESSES),
            *nat_detection(
                self._spis, self._local, self._remote, encap=bool(self._conditions & Condition.NAT_ANY)
            ),
            NotifyPayload(Notify.COOKIE2, self._cookie2),
            *(() if self._additional is None else further(self._additional, self._local.address)),
        ]

    def refusal(self, answer: IkeMessage) -> Refused | None:
        """Why the answer does not accept the address; None: it does."""
        if answer.error is not None:
            return Refused(answer.error.notify)
        if [n.data for n in answer.notifies(Notify.COOKIE2)] != [self._cookie2]:
            return Refused(Notify.COOKIE2)
        nat = nat_conditions(answer, self._spis, self._local, self._remote, self._conditions)
        if nat & ~self._conditions & Condition.NAT_ANY:
            here = nat & Condition.NAT_HERE
            return Refused(Notify.NAT_DETECTION_DESTINATION_IP if here else Notify.NAT_DETECTION_SOURCE_IP)
        return None


# --- the machine -------------------------------------------------------------------------------------


class AddressUpdateState(Enum):
    """NEW: nothing was sent. WAITING: for the answer. The rest are final."""

    NEW = "new"
    WAITING = "waiting"
    MOVED = "moved"
    REFUSED = "refused"
    SILENT = "silent"


class AddressUpdateInput(Enum):
    """Inputs of the machine."""

    START = "the first sending"
    ACCEPT = "an answer that accepts"
    REJECT = "an answer with an error, or without our cookie"
    GIVE_UP = "the last timer"


TABLE: Table[AddressUpdateState, AddressUpdateInput, Never] = {
    (AddressUpdateState.NEW, AddressUpdateInput.START): (AddressUpdateState.WAITING,),
    (AddressUpdateState.WAITING, AddressUpdateInput.ACCEPT): (AddressUpdateState.MOVED,),
    (AddressUpdateState.WAITING, AddressUpdateInput.REJECT): (AddressUpdateState.REFUSED,),
    (AddressUpdateState.WAITING, AddressUpdateInput.GIVE_UP): (AddressUpdateState.SILENT,),
}


class AddressUpdate(Requester[AddressUpdateState, AddressUpdateInput, AddressUpdateEvent]):
    """Tells the mobile node that its gateway is at `end.local` now.

    iv: `keys.iv_length` fresh random octets, `DrawnIvs` if they may be used again after a crash.
    """

    def __init__(self, end: SaEnd, notice: AddressNotice, iv: bytes | DrawnIvs) -> None:
        super().__init__(Asking(end), TABLE, AddressUpdateState.NEW)
        self._part = AddressPart(end, notice)
        if len(iv) != self._asking.iv_length:
            raise UsageError(f"an IV of {self._asking.iv_length} octets is needed, not {len(iv)}")
        self._request = self._asking.seal(Exchange.INFORMATIONAL, self._part.payloads(), iv)

    def traffic_seen(self) -> None:
        """ESP of this SA has arrived at `local`: the mobile node seems to have moved, so it is asked twice as
        often.

        That proves nothing, because ESP does not protect the outer addresses: an attacker on the mobile
        node's path to the old gateway can send its packets here instead. Only an answer with our cookie is a
        proof.
        """
        if self.state is AddressUpdateState.WAITING:
            self._asking.insist()

    def _begin(self) -> None:
        self._asking.ask(Exchange.INFORMATIONAL, self._request)
        self._enter(AddressUpdateInput.START)

    def _answered(self, message: IkeMessage, now: float) -> None:
        del now  # an answer starts no timer
        refusal = self._part.refusal(message)
        if refusal is not None:
            self._enter(AddressUpdateInput.REJECT, refusal)
        else:
            self._enter(AddressUpdateInput.ACCEPT, Moved())

    def _unanswered(self) -> None:
        self._enter(AddressUpdateInput.GIVE_UP, Silent(self._asking.sent))
