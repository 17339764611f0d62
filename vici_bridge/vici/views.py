"""Pure mapping between charon's views (VICI dictionaries) and the context. No I/O.

Sources: strongSwan's VICI documentation (`list-sas`, `list-conns`, `get-algorithms`) and what
charon 5.9.8 and 6.0 send; the environment of updown scripts as charon's updown plugin sets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv6Address,
    ip_address,
    ip_network,
    summarize_address_range,
)

from ikectx.errors import WireError
from ikectx.sa.context import (
    NO_TAGS,
    Address,
    AuthRound,
    Endpoint,
    IkeContext,
    Lifetime,
    Mark,
    PeerContext,
    Tags,
    TrafficSelector,
)
from ikectx.sa.name import SaName

from .answers import View, sections

_REMEMBERED = 1 << 16
"""Addresses and selectors that are cached, because every listing of charon's has the same thousands."""

# charon's condition bits (ike_condition_t): NAT on our side, on the peer's, pretended.
COND_NAT_HERE = 1 << 1
COND_NAT_THERE = 1 << 2
COND_NAT_FAKE = 1 << 3
COND_EAP_AUTHENTICATED = 1 << 4
COND_NAT_ANY = 1 << 0

EXT_MOBIKE = 1 << 1
"""charon's extension bit (ike_extension_t): both sides negotiated MOBIKE."""

_ANY = {"%any": "0.0.0.0", "%any6": "::"}  # noqa: S104  not an address to listen on


@dataclass(frozen=True, slots=True)
class ChildView:
    """A CHILD_SA as `list-sas` shows it. Times in seconds left, None: no timer."""

    name: str
    unique_id: int
    reqid: int
    state: str
    spi_in: bytes
    spi_out: bytes
    encap: bool = False
    rekey: int | None = None
    life: int | None = None
    remote_ts: tuple[str, ...] = ()
    local_ts: tuple[str, ...] = ()
    protocol: str = "ESP"
    per_cpu: bool = False
    """Its connection asks for an SA for each CPU (strongSwan 6.0.2)."""
    tags: Tags = NO_TAGS
    key_exchange: bool = False
    """Its keys had a key exchange of their own."""


@dataclass(frozen=True, slots=True)
class SaView:
    """An IKE_SA as `list-sas` shows it; `tasks` are those active, queued or passive."""

    name: str
    unique_id: int
    state: str
    spi_i: bytes
    spi_r: bytes
    initiator: bool
    local: Endpoint
    remote: Endpoint
    local_id: str
    remote_id: str
    remote_eap_id: str = ""
    local_vips: tuple[Address, ...] = ()
    remote_vips: tuple[Address, ...] = ()
    rekey: int | None = None
    reauth: int | None = None
    established: int | None = None
    tasks: tuple[str, ...] = ()
    waits: bool = False
    """Tasks are queued and none is active: charon begins them with its next exchange, whenever that is."""
    children: tuple[ChildView, ...] = ()
    algorithms: tuple[str, ...] = ()
    ppk: bool = False
    """It was set up with a postquantum preshared key (RFC 8784)."""

    @property
    def spis(self) -> SaName:
        return SaName(self.spi_i, self.spi_r)


Texts = Mapping[str, str]
"""The values of a section that are no lists or sections."""


def _text(view: View, key: str) -> str:
    value = view.get(key, "")
    return value if type(value) is str else ""


def _texts(view: View) -> Texts:
    return {key: value for key, value in view.items() if type(value) is str}


def _list(view: View, key: str) -> tuple[str, ...]:
    value = view.get(key)
    if not value:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value))


def _seconds(texts: Texts, key: str) -> int | None:
    text = texts.get(key, "")
    try:
        return int(text) if text else None
    except ValueError:
        raise WireError(f"charon's {key} is not a number: {text[:40]!r}") from None


def _hex(texts: Texts, key: str, default: int = 0) -> int:
    text = texts.get(key, "")
    try:
        return int(text, 16) if text else default
    except ValueError:
        raise WireError(f"charon's {key} is not hexadecimal: {text[:40]!r}") from None


def _mark(texts: Texts, way: str) -> Mark:
    """charon leaves out a mark of zero, and a mask of all ones."""
    if not texts.get(f"mark-{way}"):
        return 0, 0
    return _hex(texts, f"mark-{way}"), _hex(texts, f"mark-mask-{way}", 0xFFFFFFFF)


def _tags(texts: Texts) -> Tags:
    if "mark-in" in texts or "mark-out" in texts or "if-id-in" in texts or "if-id-out" in texts:
        try:
            return Tags(
                _mark(texts, "in"), _mark(texts, "out"), _hex(texts, "if-id-in"), _hex(texts, "if-id-out")
            )
        except ValueError as error:
            raise WireError(f"charon's marks or if_ids: {error}") from None
    return NO_TAGS


def _octets(texts: Texts, key: str, size: int) -> bytes:
    """A hexadecimal SPI; charon writes leading zeros, but a missing SPI is all zero."""
    text = texts.get(key, "")
    try:
        raw = bytes.fromhex(text.rjust(2 * size, "0"))
    except ValueError:
        raise WireError(f"charon's {key} is not hexadecimal: {text[:40]!r}") from None
    if len(raw) != size:
        raise WireError(f"charon's {key} has {len(raw)} octets instead of {size}")
    return raw


@lru_cache(maxsize=_REMEMBERED)
def _address(text: str) -> Address:
    """Errors: ValueError."""
    return ip_address(text)


def _addresses(items: Iterable[str]) -> tuple[Address, ...]:
    try:
        return tuple(_address(item) for item in items)
    except ValueError as error:
        raise WireError(f"charon names an address that is none: {error}") from None


def _endpoint(texts: Texts, side: str) -> Endpoint:
    host = texts.get(f"{side}-host", "")
    # an SA that is just being set up, or taken in, has no addresses yet
    host = _ANY.get(host) or host.split("%", 1)[0]
    try:
        return Endpoint(_address(host), int(texts.get(f"{side}-port") or 500))
    except ValueError as error:
        raise WireError(f"charon's {side}-host or {side}-port is wrong: {error}") from None


def child_view(view: View) -> ChildView:
    """One entry of `child-sas`. Errors: WireError."""
    texts = _texts(view)
    return ChildView(
        name=texts.get("name", ""),
        unique_id=_seconds(texts, "uniqueid") or 0,
        reqid=_seconds(texts, "reqid") or 0,
        state=texts.get("state", ""),
        spi_in=_octets(texts, "spi-in", 4),
        spi_out=_octets(texts, "spi-out", 4),
        encap=texts.get("encap") == "yes",
        rekey=_seconds(texts, "rekey-time"),
        life=_seconds(texts, "life-time"),
        remote_ts=_list(view, "remote-ts"),
        local_ts=_list(view, "local-ts"),
        protocol=texts.get("protocol") or "ESP",
        per_cpu=texts.get("per-cpu-sas") == "yes" or bool(texts.get("cpu")),
        tags=_tags(texts),
        key_exchange=bool(texts.get("dh-group")),
    )


_ALGORITHMS = ("encr-alg", "encr-keysize", "integ-alg", "prf-alg", "dh-group")


def sa_view(name: str, view: View) -> SaView:
    """One IKE_SA of `list-sas`. Errors: WireError."""
    texts = _texts(view)
    children = sections(view, "child-sas")
    active, queued = _list(view, "tasks-active"), _list(view, "tasks-queued")
    algorithms = tuple(filter(None, (texts.get(key) for key in _ALGORITHMS)))
    return SaView(
        name=name,
        unique_id=_seconds(texts, "uniqueid") or 0,
        state=texts.get("state", ""),
        spi_i=_octets(texts, "initiator-spi", 8),
        spi_r=_octets(texts, "responder-spi", 8),
        initiator=texts.get("initiator") == "yes",
        local=_endpoint(texts, "local"),
        remote=_endpoint(texts, "remote"),
        local_id=texts.get("local-id", ""),
        remote_id=texts.get("remote-id", ""),
        remote_eap_id=texts.get("remote-eap-id", ""),
        local_vips=_addresses(_list(view, "local-vips")),
        remote_vips=_addresses(_list(view, "remote-vips")),
        rekey=_seconds(texts, "rekey-time"),
        reauth=_seconds(texts, "reauth-time"),
        established=_seconds(texts, "established"),
        tasks=(*active, *queued, *_list(view, "tasks-passive")),
        waits=bool(queued) and not active,
        children=tuple(child_view(child) for child in children.values()),
        algorithms=algorithms,
        ppk=texts.get("ppk") == "yes",
    )


def sa_views(listed: Iterable[View]) -> list[SaView]:
    """All of a `list-sas` answer, each with its connection under `name`. IKEv1 SAs are left out."""
    return [sa_view(_text(view, "name"), view) for view in listed if _text(view, "version") != "1"]


def aged(view: SaView, seconds: int) -> SaView:
    """The view, with the times that are left so many seconds later."""
    if not seconds:
        return view

    def left(time: int | None) -> int | None:
        return None if time is None else time - seconds

    return replace(
        view,
        rekey=left(view.rekey),
        reauth=left(view.reauth),
        established=None if view.established is None else view.established + seconds,
        children=tuple(
            replace(child, rekey=left(child.rekey), life=left(child.life)) for child in view.children
        ),
    )


def departing_view(context: IkeContext) -> SaView:
    """The view of an SA that charon is destroying and so does not list, made from the record."""
    children = tuple(
        ChildView(child.name, 0, 0, "INSTALLED", child.spi_in, child.spi_out) for child in context.children
    )
    return SaView(
        name=context.connection,
        unique_id=0,
        state="ESTABLISHED",
        spi_i=context.spis.spi_i,
        spi_r=context.spis.spi_r,
        initiator=context.current.initiator,
        local=context.local,
        remote=context.remote,
        local_id=str(context.local_id),
        remote_id=str(context.remote_id),
        remote_eap_id=str(context.remote_eap_id or ""),
        local_vips=context.local_vips,
        remote_vips=context.remote_vips,
        children=children,
    )


ARRIVING = "ARRIVING"
"""State of an SA that charon is only given, which is none of charon's."""


def arriving_view(context: IkeContext) -> SaView:
    """The view of an SA that charon does not list yet, made from what it is to have."""
    view = departing_view(context)
    children = (
        replace(known, remote_ts=tuple(prefixes(child.remote_ts)), local_ts=tuple(prefixes(child.local_ts)))
        for known, child in zip(view.children, context.children, strict=True)
    )
    return replace(view, state=ARRIVING, children=tuple(children))


def reported_view(context: IkeContext) -> SaView:
    """The view of an SA made from what charon has told of it over HA, because it was not listed yet."""
    return replace(arriving_view(context), state="ESTABLISHED")


def nameless_view(sa: SaName, *, initiator: bool) -> SaView:
    """The view of an SA of which only the name is known."""
    nowhere = Endpoint(_address("0.0.0.0"), 500)  # noqa: S104  not an address to listen on
    return SaView(
        name="",
        unique_id=0,
        state="CONNECTING",
        spi_i=sa.spi_i,
        spi_r=sa.spi_r,
        initiator=initiator,
        local=nowhere,
        remote=nowhere,
        local_id="",
        remote_id="",
    )


_AUTH_CLASS = {
    "pre-shared key": "psk",
    "public key": "pubkey",
    "any": "any",
    "EAP": "eap",
    "XAuth": "xauth",
}


def _auth_rounds(view: View, side: str) -> tuple[AuthRound, ...]:
    rounds = []
    for key in sorted(key for key in view if key.startswith(f"{side}-") and isinstance(view[key], Mapping)):
        entry = view[key]
        kind = _text(entry, "class")
        method = _AUTH_CLASS.get(kind, kind.lower() or "any")
        if method == "eap":
            method = _text(entry, "eap-type").lower().replace("_", "-") or "eap"
            method = method if method.startswith("eap") else f"eap-{method}"
        rounds.append(
            AuthRound(
                method, _text(entry, "id"), _text(entry, "eap_id"), tuple(sorted(_list(entry, "groups")))
            )
        )
    return tuple(rounds)


def peer_context(name: str, view: View) -> PeerContext:
    """The PAD entry from one connection of `list-conns`."""
    return PeerContext(
        connection=name,
        local_auth=_auth_rounds(view, "local"),
        remote_auth=_auth_rounds(view, "remote"),
        children=tuple(sections(view, "children")),
        proposals=_list(view, "proposals"),
        pools=_list(view, "pools"),
    )


def ike_lifetime(view: SaView) -> Lifetime:
    """Remaining lifetime of the IKE_SA by charon's own timers; 0 if one is overdue (charon shows less)."""
    return Lifetime(rekey=_left(view.rekey), reauth=_left(view.reauth))


def child_lifetime(view: ChildView) -> Lifetime:
    """The same of a CHILD_SA."""
    return Lifetime(rekey=_left(view.rekey), hard=_left(view.life))


def _left(seconds: int | None) -> int | None:
    return None if seconds is None else max(0, seconds)


def missing_algorithms(context: IkeContext, algorithms: Mapping[str, View]) -> list[str]:
    """Transforms of the IKE_SA that the charon of a `get-algorithms` answer has not loaded.

    An answer without the section (older charons) counts as if all were loaded.
    """
    lacking = []
    now = context.current
    wanted = (
        ("prf", f"PRF_{now.prf.name}"),
        ("integrity", now.integ.name if now.integ else ""),
    )
    for section, name in wanted:
        loaded = _loaded(algorithms, section)
        if loaded and name and not any(_squash(name) == _squash(have) for have in loaded):
            lacking.append(name)
    loaded = {**_loaded(algorithms, "aead"), **_loaded(algorithms, "encryption")}
    if loaded and not any(_squash(now.encr.name) == _squash(have) for have in loaded):
        lacking.append(now.encr.name)
    return lacking


def _loaded(algorithms: Mapping[str, View], kind: str) -> View:
    """Errors: WireError."""
    found = algorithms.get(kind) or {}
    if not isinstance(found, Mapping):
        raise WireError(f"charon's {kind} algorithms are no section")
    return found


@lru_cache(maxsize=256)
def _squash(name: str) -> str:
    """A form in which 3DES_CBC, PRF_AES128_XCBC and the like are equal whatever the naming style."""
    for prefix in ("PRF_", "AUTH_", "ENCR_"):
        name = name.removeprefix(prefix)
    return name.replace("_", "").replace("DES3", "3DESCBC").upper()


def prefixes(selectors: Iterable[TrafficSelector]) -> list[str]:
    """The selectors' addresses as CIDR prefixes, without duplicates, in order. A selector that ends before it
    begins has none, because it has no address (and is refused: see `policy`)."""
    seen: dict[str, None] = {}
    for selector in selectors:
        seen.update(dict.fromkeys(_summary(selector.start, selector.end)))
    return list(seen)


@lru_cache(maxsize=_REMEMBERED)
def _summary(start: Address, end: Address) -> tuple[str, ...]:
    if int(end) < int(start):
        return ()
    if isinstance(start, IPv4Address):
        return tuple(map(str, summarize_address_range(start, IPv4Address(int(end)))))
    return tuple(map(str, summarize_address_range(start, IPv6Address(int(end)))))


def overlap(a: Iterable[str], b: Iterable[str]) -> bool:
    """Whether two sets of selectors, as text of VICI or as prefixes, share an address.

    VICI writes "10.1.0.0/16[tcp/80]" or "10.0.0.1..10.0.0.9". Protocol and port are ignored on purpose,
    because SAs that differ only there are rare, and refusing them is safe.
    """
    ranges_b = [address_range(text) for text in b]
    for text in a:
        version, low, high = address_range(text)
        for other_version, other_low, other_high in ranges_b:
            if version == other_version and low <= other_high and other_low <= high:
                return True
    return False


@lru_cache(maxsize=_REMEMBERED)
def address_range(text: str) -> tuple[int, int, int]:
    """IP version, first and last address."""
    plain = text.split("[", 1)[0].strip()
    try:
        if ".." in plain:
            first, last = map(ip_address, plain.split("..", 1))
        else:
            net = ip_network(plain, strict=False)
            first, last = net.network_address, net.broadcast_address
    except ValueError:
        raise WireError(f"charon's traffic selector {text[:60]!r} cannot be read") from None
    return first.version, int(first), int(last)
