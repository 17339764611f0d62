"""The SPIs of an SA that comes to a gateway: which are taken here, and which it gets instead. Pure.

A CHILD_SA whose inbound or outbound SPI is taken is never installed under it. Until the mobile node agrees to
new SPIs, a placeholder pair with temporary SPIs is installed (`ChildPlan.hold_in`, `hold_out`). Its policies
block cleartext, and if only the inbound SPI was taken it already sends under the SPI that the mobile node
knows. An IKE_SA whose SPI is taken is installed with another SPI of ours at once, because its keys then are
the final ones: SKEYSEED and nonces stay (design of UPDATE_SPI).

`Plan` is stored before anything is installed, so that an agent that starts anew completes or undoes the work
of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol as Interface

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError, StoreError, WireError
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import Address, IkeContext, IkeGeneration, Secret
from ikectx.sa.name import SaName
from ikectx.wire import cbor
from ikectx.wire.cxtp import ContextDataBlock
from ikectx.wire.profile import TransferHeader, decode, encode

SPI_MIN, SPI_MAX = 0xC0000000, 0xCFFFFFFF
"""charon's own range of ESP SPIs (charon.spi_min, spi_max)."""
SEED_OCTETS = 32
_DRAWS = 200
_SMALL = 1 << 16
_FORMAT = 1
_NOBODY = TransferHeader(bytes(8))

EspName = tuple[Address, bytes]
"""(destination, SPI) of an ESP SA, which must be unique at a host."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Names in use at a gateway. `ike`: the SPIs that its own side chose; `pairs`: whole names."""

    esp: frozenset[EspName] = frozenset()
    ike: frozenset[bytes] = frozenset()
    pairs: frozenset[SaName] = frozenset()

    def __or__(self, other: Taken) -> Taken:
        return Taken(self.esp | other.esp, self.ike | other.ike, self.pairs | other.pairs)


def own_spi(generation: IkeGeneration) -> bytes:
    """The IKE SPI the gateway chose, 8 octets."""
    return generation.spi_i if generation.initiator else generation.spi_r


def with_own_spi(generation: IkeGeneration, spi: bytes) -> IkeGeneration:
    """The same IKE_SA under another SPI of ours: the SK_* change, SKEYSEED does not."""
    return replace(generation, spi_i=spi) if generation.initiator else replace(generation, spi_r=spi)


@dataclass(frozen=True, slots=True)
class Clash:
    """The parts of a context that cannot be installed under their own names; children by their index."""

    ike: bool
    inbound: frozenset[int]
    outbound: frozenset[int]

    def __bool__(self) -> bool:
        return self.ike or bool(self.inbound or self.outbound)


def clash(here: IkeContext, taken: Taken) -> Clash:
    """`here`: the context with this gateway's address. Ancestors have names that are never taken
    (`chain`)."""
    return Clash(
        here.spis in taken.pairs or own_spi(here.current) in taken.ike,
        frozenset(
            place
            for place, child in enumerate(here.children)
            if (here.local.address, child.spi_in) in taken.esp
        ),
        frozenset(
            place
            for place, child in enumerate(here.children)
            if (here.remote.address, child.spi_out) in taken.esp
        ),
    )


@dataclass(frozen=True, slots=True)
class ChildPlan:
    """One CHILD_SA that gets other SPIs. SPIs of 4 octets.

    spi_in, spi_out: as the mobile node knows it. new_in: on which this gateway will receive. hold_in,
    hold_out: the placeholder pair until the mobile node has agreed.
    """

    spi_in: bytes
    spi_out: bytes
    new_in: bytes
    hold_in: bytes
    hold_out: bytes


_NO_REPORT = MoveReport()
_NUMBERS = ("messages", "octets", "retransmissions", "requests", "answered")


@dataclass(frozen=True, slots=True)
class Plan:
    """The names that an SA gets here. It has secrets once `told` is set, so it is for an encrypted store
    only.

    spis: the other gateway's name of the SA. ike: our new IKE SPI of 8 octets, empty if the old one is free.
    seed: source of all fresh octets of the exchange with the mobile node, the same after a crash. told: the
    SA as the mobile node has it now, None: as it came. moved: the mobile node also knows our address. how:
    "", "update", "rekey". later: an answer that the mobile node waits for will tell it everything.
    unfinished: a rekey has one more message, under the next message ID, that may have been sent or not.
    """

    spis: SaName
    ike: bytes
    children: tuple[ChildPlan, ...]
    seed: Secret
    told: IkeContext | None = None
    moved: bool = False
    how: str = ""
    report: MoveReport = _NO_REPORT
    later: bool = False
    unfinished: bool = False

    def child(self, spi_in: bytes) -> ChildPlan | None:
        """The child by the SPI that the mobile node knew at first."""
        return next((child for child in self.children if child.spi_in == spi_in), None)

    def shape(self, here: IkeContext) -> IkeContext:
        """charon's SA for `here`, the context as it came with this gateway's address."""
        now = self.told or here
        children = []
        for old, child in zip(here.children, now.children, strict=True):
            planned = self.child(old.spi_in)
            if planned is not None and (child.spi_in, child.spi_out) == (old.spi_in, old.spi_out):
                children.append(replace(child, spi_in=planned.hold_in, spi_out=planned.hold_out))
            else:
                children.append(child)
        shaped = replace(now, local=here.local, remote=here.remote, children=tuple(children), policies=())
        if self.ike and now.current == here.current:
            renamed = with_own_spi(now.current, self.ike)
            shaped = replace(
                shaped, generations=(*now.generations, renamed), mid_initiator=0, mid_responder=0
            )
        return shaped

    def left(self, here: IkeContext) -> tuple[ChildPlan, ...]:
        """Children whose SPIs the mobile node has not changed yet."""
        if self.told is None:
            return self.children
        same = {
            old.spi_in
            for old, child in zip(here.children, self.told.children, strict=True)
            if (child.spi_in, child.spi_out) == (old.spi_in, old.spi_out)
        }
        return tuple(child for child in self.children if child.spi_in in same)

    def ike_left(self, here: IkeContext) -> bytes:
        """Our new IKE SPI if the mobile node does not use it yet, else empty."""
        return self.ike if self.told is None or self.told.current == here.current else b""

    def reserved(self, here_local: Address, remote: Address) -> Taken:
        """The names that this plan reserves."""
        esp = {(here_local, spi) for child in self.children for spi in (child.new_in, child.hold_in)}
        esp |= {(remote, child.hold_out) for child in self.children}
        return Taken(frozenset(esp), frozenset({self.ike} if self.ike else ()), frozenset())

    def dumps(self) -> bytes:
        """The stored form."""
        blocks = [] if self.told is None else encode(self.told, transfer=_NOBODY)
        report = self.report
        return cbor.dumps(
            [
                _FORMAT,
                [*self.spis],
                self.ike,
                [
                    [child.spi_in, child.spi_out, child.new_in, child.hold_in, child.hold_out]
                    for child in self.children
                ],
                self.seed.reveal(),
                [[int(block.fpt), block.data] for block in blocks],
                self.moved,
                self.how,
                [*(getattr(report, name) for name in _NUMBERS), int(report.proven_by_traffic)],
                self.later,
                self.unfinished,
            ]
        )

    @classmethod
    def loads(cls, data: bytes) -> Plan:
        """Errors: StoreError."""
        try:
            kind, spis, ike, children, seed, blocks, moved, how, report, later, unfinished = _LAYOUT(
                cbor.loads(data, "plan"), "plan"
            )
            if kind != _FORMAT or len(spis) != 2:
                raise WireError("plan: its format")
            told = None
            if blocks:
                told, _ = decode(ContextDataBlock(Fpt(fpt), octets) for fpt, octets in blocks)
            *numbers, proven = report
            reported = MoveReport(**dict(zip(_NUMBERS, numbers, strict=True)), proven_by_traffic=bool(proven))
            plans = tuple(ChildPlan(*names) for names in children)
            parts = (SaName(*spis), ike, plans, Secret(seed), told, moved, how, reported, later, unfinished)
            return cls(*parts)
        except (WireError, ValueError) as error:
            raise StoreError(f"the names planned for an SA cannot be read: {type(error).__name__}") from None


_SPI = cbor.octets(4)
_LAYOUT = cbor.row(
    (
        cbor.uint(8),
        cbor.array(cbor.octets(8)),
        cbor.octets(0, 8),
        cbor.array(cbor.row((_SPI,) * 5)),
        cbor.octets(SEED_OCTETS),
        cbor.array(cbor.row((cbor.u16, cbor.octets()))),
        cbor.boolean,
        cbor.text,
        cbor.row((cbor.u64,) * 6),
        cbor.boolean,
        cbor.boolean,
    ),
    (False,),
)


# --- drawing names ------------------------------------------------------------------------------------


def draw_spi(
    destination: Address, taken: Taken, draw: Callable[[int, int], int], low: int, high: int
) -> bytes:
    """An SPI of low..high that no ESP SA to `destination` has. `draw`: a random number of a range, ends
    included. Errors: RefusedError with ESP_SPI_IN_USE where there is none."""
    low = max(low, 256)
    if high - low < _SMALL:
        free = [
            spi
            for number in range(low, high + 1)
            if (destination, spi := number.to_bytes(4)) not in taken.esp
        ]
        if free:
            return free[draw(0, len(free) - 1)]
    else:
        for _ in range(_DRAWS):
            spi = draw(low, high).to_bytes(4)
            if (destination, spi) not in taken.esp:
                return spi
    raise RefusedError(
        f"no SPI to {destination} is left in {low:#x}..{high:#x}",
        hint="widen charon.spi_min and spi_max, in strongswan.conf and in ikectx.toml",
        status=Status.ESP_SPI_IN_USE,
    )


def draw_ike_spi(taken: Taken, fresh: Callable[[int], bytes]) -> bytes:
    """An IKE SPI of ours that no SA here has. `fresh`: returns so many random octets."""
    used = taken.ike | {spi for pair in taken.pairs for spi in pair}
    while (spi := fresh(8)) in used or spi == bytes(8):
        pass
    return spi


def without_exchange(here: IkeContext, found: Clash) -> str:
    """Why the mobile node's SPIs cannot be changed by an answer that it waits for; empty: they can."""
    if found.outbound:
        child = here.children[min(found.outbound)]
        return f"outbound SPI {child.spi_out.hex()} to {here.remote.address} is taken, and it is the MN's"
    return ""


# --- the exchange, as the bridge sees it ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """The request to the mobile node.

    children: (inbound SPI as it knows it, the new one); the mobile node chooses the outbound one. ike: our
    new IKE SPI or empty. addresses: it is to be told our address, too. update: UPDATE_SPI may be tried, not
    only rekeys. seed: see `Plan`. agent: it is known to have an agent, which may ask back.
    """

    children: tuple[tuple[bytes, bytes], ...]
    ike: bytes
    addresses: bool
    update: bool
    seed: Secret
    agent: bool = False


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the mobile node has agreed to in one exchange.

    now: the SA as the mobile node has it, message IDs included. moved: it knows our address. how: "update" or
    "rekey". report: the cost of exchanges that have ended. unfinished: another message of the same rekey
    follows, under the next message ID. supports: whether it knows UPDATE_SPI, None: it was not asked.
    """

    now: IkeContext
    moved: bool
    how: str
    report: MoveReport = _NO_REPORT
    unfinished: bool = False
    supports: bool | None = None


class SpiTalk(Interface):
    """The exchanges of one wish, one after the other. What each returns is installed here before the next."""

    async def next(self) -> Agreed | None:
        """What the mobile node agrees to next; None: it has everything. Errors: LinkError (silent),
        RefusedError."""

    async def give_up(self, why: str) -> None:
        """What `next` returned could not be installed. Raises nothing."""


class SpiRenamer(Interface):
    """Begins the exchanges that change an SA's SPIs at the mobile node; the first `next` sends something.

    `here`: the SA as the mobile node has it, with this gateway's address and the next message IDs.
    """

    def __call__(self, here: IkeContext, wish: Wish) -> SpiTalk: ...
