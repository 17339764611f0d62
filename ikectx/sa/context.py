"""The context of an SA: everything that a gateway must know to serve an IKE_SA that it did not set up.

Frozen dataclasses with invariants and no behaviour. "Local" is the gateway, "remote" the mobile node (MN),
"inbound" is towards the gateway. Lengths are in octets, key sizes in bits, times in seconds relative to the
moment of export.

Sources: RFC 7296 for the names, RFC 4301 (4.4) for SAD, SPD and PAD, MobiArch'08 for the list of what a
context holds, strongSwan's ha plugin for what charon needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

from ikectx.mac import equal
from ikectx.numbers import Encr, IdType, Integ, KeMethod, Mode, Prf, Protocol

from .name import SaName
from .printed import printed

Address = IPv4Address | IPv6Address


class Secret:
    """Octets that must not be shown: short repr, constant-time compare, no pickling.

    `reveal()` is the only way to the octets.
    """

    __slots__ = ("_octets",)

    def __init__(self, octets: bytes = b"") -> None:
        self._octets = bytes(octets)

    def reveal(self) -> bytes:
        """The octets themselves; never pass them to a log, an exception or JSON."""
        return self._octets

    def __len__(self) -> int:
        return len(self._octets)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return equal(self._octets, other._octets)

    def __hash__(self) -> int:
        raise TypeError("a Secret is not hashable")

    def __repr__(self) -> str:
        return f"<secret, {len(self._octets)} octets>"

    def __reduce__(self) -> str:
        raise TypeError("a Secret cannot be pickled")


NO_SECRET = Secret()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An outer address and UDP port."""

    address: Address
    port: int = 500

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is not in 0..65535")

    @classmethod
    def of(cls, address: str, port: int = 500) -> Endpoint:
        return cls(ip_address(address), port)

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Identity:
    """An IKEv2 identification: type and data as in the ID payload (RFC 7296, 3.5)."""

    type: IdType
    data: bytes

    def __str__(self) -> str:
        """As strongSwan prints it, in printable ASCII (`ikectx.sa.printed`)."""
        return printed(self.type, self.data)


@dataclass(frozen=True, slots=True)
class TrafficSelector:
    """One traffic selector (RFC 7296, 3.13.1). `dynamic` is strongSwan's "follows the host"."""

    start: Address
    end: Address
    protocol: int = 0
    start_port: int = 0
    end_port: int = 65535
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.start.version != self.end.version:
            raise ValueError("a traffic selector mixes address families")
        if not 0 <= self.protocol <= 255:
            raise ValueError(f"protocol {self.protocol} is not in 0..255")
        if not (0 <= self.start_port <= 65535 and 0 <= self.end_port <= 65535):
            raise ValueError("a port of a traffic selector is not in 0..65535")


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Remaining lifetime of an SA; None: no such limit.

    rekey, reauth, hard: seconds left. bytes_limit, packets_limit: hard limits; bytes_used, packets_used: what
    counts towards them so far.
    """

    rekey: int | None = None
    reauth: int | None = None
    hard: int | None = None
    bytes_limit: int | None = None
    packets_limit: int | None = None
    bytes_used: int = 0
    packets_used: int = 0


@dataclass(frozen=True, slots=True)
class ReplayState:
    """Sequence number and anti-replay window of one ESP SA.

    `seq` is the last number sent (outbound) or the highest received (inbound), up
    to 64 bits with ESN. `window` is the window's size in packets, 0 where there is
    none. `bitmap` has bit n set when `seq - n` was received.
    """

    seq: int = 0
    window: int = 0
    bitmap: int = 0
    esn: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seq < (1 << (64 if self.esn else 32)):
            raise ValueError(f"sequence number {self.seq} does not fit")
        if not 0 <= self.window <= 4096:
            raise ValueError(f"replay window {self.window} is not in 0..4096")
        if self.bitmap < 0 or self.bitmap >> max(self.window, 0):
            raise ValueError("the bitmap is wider than the window")


Mark = tuple[int, int]
"""Value and mask of a packet mark."""


@dataclass(frozen=True, slots=True)
class Tags:
    """What the kernel of a gateway tells an SA's ESP SAs and policies from others of the same selectors by.

    Marks, and the IDs of XFRM interfaces; zero: none. They come from the gateway's own connection and may
    differ at the next gateway.
    """

    mark_in: Mark = (0, 0)
    mark_out: Mark = (0, 0)
    if_id_in: int = 0
    if_id_out: int = 0

    def __post_init__(self) -> None:
        for number in (*self.mark_in, *self.mark_out, self.if_id_in, self.if_id_out):
            if not 0 <= number < 1 << 32:
                raise ValueError(f"mark or if_id {number} does not fit in 32 bits")

    @property
    def inbound(self) -> tuple[Mark, int]:
        """(mark, if_id) of the policies for packets that arrive."""
        return self.mark_in, self.if_id_in

    @property
    def outbound(self) -> tuple[Mark, int]:
        """(mark, if_id) of the policies for packets that leave."""
        return self.mark_out, self.if_id_out

    def __str__(self) -> str:
        """As swanctl.conf has them: mark_in=42 if_id_in=7."""
        marks = (("mark_in", self.mark_in), ("mark_out", self.mark_out))
        ids = (("if_id_in", self.if_id_in), ("if_id_out", self.if_id_out))
        words = [
            f"{name}={value:#x}" + ("" if mask == 0xFFFFFFFF else f"/{mask:#x}")
            for name, (value, mask) in marks
            if value or mask
        ]
        return " ".join([*words, *(f"{name}={number}" for name, number in ids if number)]) or "none"


NO_TAGS = Tags()


@dataclass(frozen=True, slots=True)
class IkeGeneration:
    """One IKE_SA of a chain of rekeys: what its keys are derived from.

    spi_i, spi_r: 8 octets. `initiator`: the gateway is the original initiator of this
    generation. `secret` is g^ir, `add_secret` that of additional key exchanges
    (RFC 9370). `old_skd` (with `old_prf`) is SK_d of the generation before; None for one set
    up by IKE_SA_INIT. `encr_bits` 0: the cipher has one key size.
    """

    spi_i: bytes
    spi_r: bytes
    initiator: bool
    nonce_i: bytes
    nonce_r: bytes
    secret: Secret
    prf: Prf
    encr: Encr
    encr_bits: int = 0
    integ: Integ = Integ.NONE
    ke: KeMethod = KeMethod.NONE
    add_secret: Secret = NO_SECRET
    add_kes: bytes = b""
    old_skd: Secret | None = None
    old_prf: Prf | None = None

    def __post_init__(self) -> None:
        if len(self.spi_i) != 8 or len(self.spi_r) != 8:
            raise ValueError("an IKE SPI has 8 octets")
        if not (16 <= len(self.nonce_i) <= 256 and 16 <= len(self.nonce_r) <= 256):
            raise ValueError("a nonce has 16 to 256 octets (RFC 7296, 3.9)")
        if (self.old_skd is None) != (self.old_prf is None):
            raise ValueError("old_skd and old_prf go together")

    @property
    def spis(self) -> SaName:
        """The name of this IKE_SA."""
        return SaName(self.spi_i, self.spi_r)


@dataclass(frozen=True, slots=True)
class ChildContext:
    """One CHILD_SA: the pair of ESP SAs and what charon needs to own it.

    `generation` is the index in `IkeContext.generations` of the IKE_SA whose SK_d its keys
    stem from. `initiator`: the gateway started the exchange that made it. spi_in: 4
    octets, chosen by the gateway; spi_out: chosen by the MN. `secret` is g^ir of a PFS
    exchange, empty without. CPIs are 0 without IPComp. `tags`: those of the gateway that has the SA.
    """

    name: str
    generation: int
    initiator: bool
    spi_in: bytes
    spi_out: bytes
    nonce_i: bytes
    nonce_r: bytes
    encr: Encr
    local_ts: tuple[TrafficSelector, ...]
    remote_ts: tuple[TrafficSelector, ...]
    encr_bits: int = 0
    integ: Integ = Integ.NONE
    ke: KeMethod = KeMethod.NONE
    secret: Secret = NO_SECRET
    add_secret: Secret = NO_SECRET
    add_kes: bytes = b""
    protocol: Protocol = Protocol.ESP
    mode: Mode = Mode.TUNNEL
    esn: bool = False
    ipcomp: int = 0
    cpi_in: int = 0
    cpi_out: int = 0
    inbound: ReplayState = ReplayState()
    outbound: ReplayState = ReplayState()
    lifetime: Lifetime = Lifetime()
    tags: Tags = NO_TAGS

    def __post_init__(self) -> None:
        if len(self.spi_in) != 4 or len(self.spi_out) != 4:
            raise ValueError("an ESP SPI has 4 octets")
        if not self.local_ts or not self.remote_ts:
            raise ValueError("a CHILD_SA has at least one traffic selector on each side")


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """One SPD entry of a CHILD_SA as the kernel holds it (RFC 4301, 4.4.1).

    `child`: index in `IkeContext.children`. `direction`: "in", "out" or "fwd". `local_ts` and
    `remote_ts`: indices of the child's selectors. `priority` is the kernel's.
    """

    child: int
    direction: str
    local_ts: int = 0
    remote_ts: int = 0
    priority: int = 0

    def __post_init__(self) -> None:
        if self.direction not in ("in", "out", "fwd"):
            raise ValueError(f"policy direction {self.direction!r}")


@dataclass(frozen=True, slots=True)
class AuthRound:
    """One authentication round of a connection, as VICI `list-conns` names it.

    `method`: "psk", "pubkey", "eap-mschapv2", ...; identities as configured, empty: any.
    """

    method: str
    id: str = ""
    eap_id: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerContext:
    """The PAD entry: the connection that admitted the MN (RFC 4301, 4.4.3)."""

    connection: str
    local_auth: tuple[AuthRound, ...] = ()
    remote_auth: tuple[AuthRound, ...] = ()
    children: tuple[str, ...] = ()
    proposals: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IkeContext:
    """A whole IKE_SA with its CHILD_SAs, policies and peer entry, as seen by the gateway.

    `generations`: oldest ancestor that a living child still needs first, the IKE_SA itself
    last. `mid_initiator`: message ID of the next request the gateway sends;
    `mid_responder`: of the next request it expects. `conditions`, `extensions`: charon's bits;
    the `private_` ones exist on HA wire version 5. `epoch` counts owners and only grows.
    `unsure`: the gateway's last request had the ID `mid_initiator` and is unanswered, so its next one has
    that ID or one more.
    """

    connection: str
    generations: tuple[IkeGeneration, ...]
    local_id: Identity
    remote_id: Identity
    local: Endpoint
    remote: Endpoint
    children: tuple[ChildContext, ...] = ()
    remote_eap_id: Identity | None = None
    local_vips: tuple[Address, ...] = ()
    remote_vips: tuple[Address, ...] = ()
    peer_addresses: tuple[Endpoint, ...] = ()
    conditions: int = 0
    extensions: int = 0
    private_conditions: int = 0
    private_extensions: int = 0
    mid_initiator: int = 0
    mid_responder: int = 0
    lifetime: Lifetime = Lifetime()
    policies: tuple[PolicyContext, ...] = ()
    peer: PeerContext | None = None
    epoch: int = 0
    update_spi: bool = False
    unsure: bool = False
    unknown: tuple[tuple[int, int, bytes], ...] = field(default=(), repr=False)
    """(FPT, key, CBOR) of entries this version does not know: kept, and sent on."""

    def __post_init__(self) -> None:
        if not self.generations:
            raise ValueError("an IKE_SA has at least one generation")
        if self.local.address.version != self.remote.address.version:
            raise ValueError("the outer addresses are of different families")
        for child in self.children:
            if not 0 <= child.generation < len(self.generations):
                raise ValueError(f"child {child.name!r} names a generation that is not there")
        for policy in self.policies:
            if not 0 <= policy.child < len(self.children):
                raise ValueError("a policy names a child that is not there")

    @property
    def current(self) -> IkeGeneration:
        """The living generation: its SPIs are the IKE_SA's."""
        return self.generations[-1]

    @property
    def spis(self) -> SaName:
        """(initiator SPI, responder SPI), 8 octets each."""
        current = self.generations[-1]
        return SaName(current.spi_i, current.spi_r)


@dataclass(frozen=True, slots=True)
class FinalChild:
    """Last counters of a CHILD_SA at the old gateway; named by its inbound SPI."""

    spi_in: bytes
    inbound: ReplayState
    outbound: ReplayState


@dataclass(frozen=True, slots=True)
class FinalState:
    """The part of the context that changes between export and letting go: message IDs and ESP counters (CTD).

    `unsure`: as in `IkeContext`.
    """

    spi_i: bytes
    spi_r: bytes
    mid_initiator: int
    mid_responder: int
    epoch: int
    children: tuple[FinalChild, ...] = ()
    unsure: bool = False
