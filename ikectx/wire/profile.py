"""Contexts to and from Context Data Blocks: four profile types, CBOR inside.

A profile is one CBOR map with small unsigned keys, the version first, defaults left out. Its octets are cut
into consecutive blocks of the same FPT, all but the last full; since a CBOR item knows its own end, the last
block's zero padding needs no length. Keys are listed in docs/protocol.md. Derived values are not sent:
SKEYSEED, SK_* and KEYMAT follow from secret and nonces.

Keys of a later version survive in `IkeContext.unknown` as (FPT, key, CBOR) and are sent on. Those inside
generation or child number n have the key `(n + 1) << 16 | key` there.

Blocks hold key material. Everything decoded is checked; only WireError comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ikectx.errors import WireError
from ikectx.numbers import STATUS_TEXT, Encr, Fpt, Integ, KeMethod, Mode, Prf, Protocol, Status
from ikectx.sa.context import (
    NO_SECRET,
    NO_TAGS,
    Address,
    AuthRound,
    ChildContext,
    FinalChild,
    FinalState,
    Identity,
    IkeContext,
    IkeGeneration,
    Lifetime,
    PeerContext,
    PolicyContext,
    ReplayState,
    TrafficSelector,
)
from ikectx.sa.verdict import Verdict

from . import cbor
from . import profile_parts as entries
from .cxtp import MAX_BLOCK_DATA, MAX_MESSAGE, ContextDataBlock, StatusBlock

Unknown = tuple[tuple[int, int, bytes], ...]

VERSION = 1
PROFILES = (Fpt.IKEV2_SA, Fpt.SAD, Fpt.SPD, Fpt.PAD)
_NAMES = {fpt: fpt.name for fpt in PROFILES}
MAX_PROFILE = MAX_MESSAGE - 28
"""Octets of blocks that fit after the header of a PCTD with IPv6 address and no key."""

_DIRECTIONS = {"i": "in", "o": "out", "f": "fwd"}
_LETTERS = {name: letter for letter, name in _DIRECTIONS.items()}


Intent = Literal["prepare", "check", "hold"]
_INTENTS = {"prepare": 0, "check": 1, "hold": 4}
Told = Literal["update", "keep", "mn", "relay"]
_ADDRESSES = {"update": 0, "keep": 2, "mn": 8, "relay": 16}
"""Bits of the flags: one of each at most."""


@dataclass(frozen=True, slots=True)
class TransferHeader:
    """The part of a PCTD that concerns the transfer itself.

    `transfer_id`: 8 octets, drawn by the old gateway, repeated in the CTD. `intent` "check": only ask whether
    the SA would be taken; "hold": install nothing before the mobile node has arrived. `address` "keep": the
    gateway address moves along, so the mobile node is not told one; "mn": the mobile node moves its SAs
    itself, so the new gateway tells it nothing and serves it at its present address; "relay": the mobile node
    stays at the old gateway's address, which passes on what it sends, and the context has the old gateway's
    endpoint for it. The owner's epoch is in the context.
    """

    transfer_id: bytes
    intent: Intent = "prepare"
    address: Told = "update"

    def __post_init__(self) -> None:
        if len(self.transfer_id) != 8:
            raise ValueError("a transfer id has 8 octets")
        if self.intent not in _INTENTS or self.address not in _ADDRESSES:
            raise ValueError("intent is prepare, check or hold, address is update, keep, mn or relay")


def _rest(entry: cbor.MapReader, fpt: Fpt, item: int = 0) -> Unknown:
    """The entries that were not read, as IkeContext.unknown has them; `item`: 1 + number of generation or
    child."""
    return tuple([(int(fpt), item << 16 | key, data) for key, data in entry.rest()])


def _item(value: Any, where: str) -> tuple[Any, str]:
    return value, where


_ITEMS = cbor.array(_item)


# IKEV2_SA: the IKE_SA and the transfer itself.


def _generation_out(value: IkeGeneration) -> dict[int, Any]:
    out: dict[int, Any] = {1: value.spi_i + value.spi_r}
    cbor.put(out, 2, value.initiator, False)
    out[3] = entries.nonces_out(value.nonce_i, value.nonce_r)
    out[4] = value.secret.reveal()
    suite = [value.prf, value.encr, value.encr_bits, value.integ, value.ke]
    out[5] = [int(n) for n in cbor.trim(suite, (0, 0, 0))]
    cbor.put(out, 6, value.add_secret.reveal(), b"")
    cbor.put(out, 7, value.add_kes, b"")
    if value.old_skd is not None and value.old_prf is not None:
        out[8] = [value.old_skd.reveal(), int(value.old_prf)]
    return out


_SPI_PAIR = cbor.octets(16)
_OLD = cbor.row((entries.secret, cbor.u16))
_GENERATION_SUITE = cbor.row((cbor.u16,) * 5, (0, 0, 0))
_MIDS = cbor.row((cbor.u32, cbor.u32))


def _generation(value: Any, where: str, number: int) -> tuple[IkeGeneration, Unknown]:
    entry = cbor.MapReader(value, where)
    spis = entry.need(1, _SPI_PAIR)
    initiator = entry.take(2, cbor.boolean, False)
    nonce_i, nonce_r = entry.need(3, entries.nonces)
    secret = entry.need(4, entries.secret)
    prf, encr, bits, integ, ke = entry.need(5, _GENERATION_SUITE)
    old_skd, old_prf = entry.take(8, _OLD, (None, None))
    generation = cbor.build(
        IkeGeneration,
        where,
        spis[:8],
        spis[8:],
        initiator,
        nonce_i,
        nonce_r,
        secret,
        Prf(prf),
        Encr(encr),
        bits,
        Integ(integ),
        KeMethod(ke),
        entry.take(6, entries.secret, NO_SECRET),
        entry.take(7, cbor.octets(), b""),
        old_skd,
        None if old_prf is None else Prf(old_prf),
    )
    return generation, _rest(entry, Fpt.IKEV2_SA, number + 1)


_HEADERS: Mapping[int, tuple[Any, Any]] = {
    _INTENTS[intent] | _ADDRESSES[address]: (intent, address) for intent in _INTENTS for address in _ADDRESSES
}


def _ike_out(context: IkeContext, transfer: TransferHeader) -> dict[int, Any]:
    flags = _INTENTS[transfer.intent] | _ADDRESSES[transfer.address]
    out: dict[int, Any] = {0: VERSION, 1: transfer.transfer_id}
    cbor.put(out, 2, flags, 0)
    cbor.put(out, 3, context.epoch, 0)
    out[4] = context.connection
    out[5] = [_generation_out(g) for g in context.generations]
    out[6] = entries.identity_out(context.local_id)
    out[7] = entries.identity_out(context.remote_id)
    cbor.put(out, 8, None if context.remote_eap_id is None else entries.identity_out(context.remote_eap_id))
    out[9] = entries.endpoint_out(context.local)
    out[10] = entries.endpoint_out(context.remote)
    cbor.put(out, 11, [a.packed for a in context.local_vips], [])
    cbor.put(out, 12, [a.packed for a in context.remote_vips], [])
    cbor.put(out, 13, [entries.endpoint_out(e) for e in context.peer_addresses], [])
    cbor.put(out, 14, context.conditions, 0)
    cbor.put(out, 15, context.extensions, 0)
    cbor.put(out, 16, context.private_conditions, 0)
    cbor.put(out, 17, context.private_extensions, 0)
    cbor.put(out, 18, [context.mid_initiator, context.mid_responder], [0, 0])
    cbor.put(out, 19, entries.lifetime_out(context.lifetime), [])
    cbor.put(out, 20, context.update_spi, False)
    cbor.put(out, 21, context.unsure, False)
    return out


def _ike(entry: cbor.MapReader) -> tuple[TransferHeader, dict[str, Any], Unknown]:
    """The transfer header, the arguments of IkeContext that this profile holds, the rest."""
    transfer_id = entry.need(1, cbor.octets(8))
    flags = entry.take(2, cbor.uint(5), 0)
    if flags not in _HEADERS:
        raise WireError(f"IKEV2_SA: flags {flags} contradict each other")
    transfer = TransferHeader(transfer_id, *_HEADERS[flags])
    items = entry.need(5, _ITEMS)
    read = [_generation(value, where, n) for n, (value, where) in enumerate(items)]
    mid_initiator, mid_responder = entry.take(18, _MIDS, (0, 0))
    parts: dict[str, Any] = {
        "epoch": entry.take(3, cbor.u64, 0),
        "connection": entry.need(4, cbor.text),
        "generations": tuple(generation for generation, _ in read),
        "local_id": entry.need(6, entries.identity),
        "remote_id": entry.need(7, entries.identity),
        "remote_eap_id": entry.take(8, entries.identity, None),
        "local": entry.need(9, entries.endpoint),
        "remote": entry.need(10, entries.endpoint),
        "local_vips": entry.take(11, entries.addresses, ()),
        "remote_vips": entry.take(12, entries.addresses, ()),
        "peer_addresses": entry.take(13, entries.endpoints, ()),
        "conditions": entry.take(14, cbor.u64, 0),
        "extensions": entry.take(15, cbor.u64, 0),
        "private_conditions": entry.take(16, cbor.u64, 0),
        "private_extensions": entry.take(17, cbor.u64, 0),
        "mid_initiator": mid_initiator,
        "mid_responder": mid_responder,
        "lifetime": entry.take(19, entries.lifetime, Lifetime()),
        "update_spi": entry.take(20, cbor.boolean, False),
        "unsure": entry.take(21, cbor.boolean, False),
    }
    unknown = _rest(entry, Fpt.IKEV2_SA)
    return transfer, parts, unknown + tuple(u for _, rest in read for u in rest)


# SAD: the CHILD_SAs.


_SUITE = (0, 0, 0)
_SUITE_ROW, _IPCOMP = cbor.row((cbor.u16,) * 4, _SUITE), cbor.row((cbor.u16,) * 3)


def _ike_suite(value: IkeGeneration) -> list[int]:
    """The default of a child's suite: that of its IKE_SA, without key exchange."""
    return [int(n) for n in cbor.trim([value.encr, value.encr_bits, value.integ, 0], _SUITE)]


def _vip_selectors(vips: Sequence[Address]) -> tuple[TrafficSelector, ...]:
    """The default of a child's remote selectors: the mobile node's virtual addresses."""
    return tuple(TrafficSelector(vip, vip) for vip in vips)


def _child_out(child: ChildContext, context: IkeContext) -> dict[int, Any]:
    generation = context.generations[child.generation]
    out: dict[int, Any] = {}
    cbor.put(out, 1, child.name, context.connection)
    cbor.put(out, 2, child.generation, 0)
    cbor.put(out, 3, child.initiator, False)
    out[4] = child.spi_in + child.spi_out
    if (child.nonce_i, child.nonce_r) != (generation.nonce_i, generation.nonce_r):
        out[5] = entries.nonces_out(child.nonce_i, child.nonce_r)
    suite = cbor.trim([child.encr, child.encr_bits, child.integ, child.ke], _SUITE)
    cbor.put(out, 6, [int(n) for n in suite], _ike_suite(generation))
    out[7] = [entries.selector_out(ts) for ts in child.local_ts]
    if child.remote_ts != _vip_selectors(context.remote_vips):
        out[8] = [entries.selector_out(ts) for ts in child.remote_ts]
    cbor.put(out, 9, child.secret.reveal(), b"")
    cbor.put(out, 10, child.add_secret.reveal(), b"")
    cbor.put(out, 11, child.add_kes, b"")
    cbor.put(out, 12, int(child.protocol), int(Protocol.ESP))
    cbor.put(out, 13, int(child.mode), int(Mode.TUNNEL))
    cbor.put(out, 14, child.esn, False)
    cbor.put(out, 15, [child.ipcomp, child.cpi_in, child.cpi_out], [0, 0, 0])
    cbor.put(out, 16, entries.replay_out(child.inbound), [0])
    cbor.put(out, 17, entries.replay_out(child.outbound), [0])
    cbor.put(out, 18, entries.lifetime_out(child.lifetime), [])
    cbor.put(out, 19, entries.tags_out(child.tags), [])
    return out


def _child(value: Any, where: str, number: int, parts: dict[str, Any]) -> tuple[ChildContext, Unknown]:
    entry = cbor.MapReader(value, where)
    number_of = entry.take(2, cbor.u16, 0)
    if number_of >= len(parts["generations"]):
        raise WireError(f"{where}: names a generation that is not there")
    generation: IkeGeneration = parts["generations"][number_of]
    spis = entry.need(4, cbor.octets(8))
    nonce_i, nonce_r = entry.take(5, entries.nonces, (generation.nonce_i, generation.nonce_r))
    suite = entry.take(6, _SUITE_ROW, None) or _SUITE_ROW(_ike_suite(generation), where)
    encr, bits, integ, ke = suite
    ipcomp, cpi_in, cpi_out = entry.take(15, _IPCOMP, [0, 0, 0])
    child = cbor.build(
        ChildContext,
        where,
        name=entry.take(1, cbor.text, parts["connection"]),
        generation=number_of,
        initiator=entry.take(3, cbor.boolean, False),
        spi_in=spis[:4],
        spi_out=spis[4:],
        nonce_i=nonce_i,
        nonce_r=nonce_r,
        encr=Encr(encr),
        local_ts=entry.need(7, entries.selectors),
        remote_ts=entry.take(8, entries.selectors, _vip_selectors(parts["remote_vips"])),
        encr_bits=bits,
        integ=Integ(integ),
        ke=KeMethod(ke),
        secret=entry.take(9, entries.secret, NO_SECRET),
        add_secret=entry.take(10, entries.secret, NO_SECRET),
        add_kes=entry.take(11, cbor.octets(), b""),
        protocol=Protocol(entry.take(12, cbor.u8, int(Protocol.ESP))),
        mode=Mode(entry.take(13, cbor.u8, int(Mode.TUNNEL))),
        esn=entry.take(14, cbor.boolean, False),
        ipcomp=ipcomp,
        cpi_in=cpi_in,
        cpi_out=cpi_out,
        inbound=entry.take(16, entries.replay, ReplayState()),
        outbound=entry.take(17, entries.replay, ReplayState()),
        lifetime=entry.take(18, entries.lifetime, Lifetime()),
        tags=entry.take(19, entries.tags, NO_TAGS),
    )
    return child, _rest(entry, Fpt.SAD, number + 1)


# SPD: policies, runs of them that differ only in the direction as one entry.

_POLICY = ("fio", 0, 0, 0)
_POLICY_ROWS = cbor.array(cbor.row((cbor.u32, cbor.text, cbor.u16, cbor.u16, cbor.u16), _POLICY))


def _policies_out(policies: Iterable[PolicyContext]) -> list[list[Any]]:
    runs: list[list[Any]] = []
    for policy in policies:
        letter = _LETTERS[policy.direction]
        names = [policy.child, policy.local_ts, policy.remote_ts]
        if runs and runs[-1][0] == policy.priority and runs[-1][2:] == names:
            runs[-1][1] += letter
        else:
            runs.append([policy.priority, letter, *names])
    return [cbor.trim(run, _POLICY) for run in runs]


def _policies(value: Any, where: str) -> tuple[PolicyContext, ...]:
    found: list[PolicyContext] = []
    for run in _POLICY_ROWS(value, where):
        priority, letters, child, local_ts, remote_ts = run
        if not letters or len(found) + len(letters) > 4 * cbor.MAX_ITEMS or letters.strip("iof"):
            raise WireError(f"{where}: directions that are not letters of i, o, f, or too many policies")
        found += [PolicyContext(child, _DIRECTIONS[x], local_ts, remote_ts, priority) for x in letters]
    return tuple(found)


# PAD: the connection.

_ROUND: tuple[Any, ...] = ("", "", [])


def _rounds_out(rounds: Iterable[AuthRound], identity: Identity) -> list[Any]:
    """`true` stands for an id whose octets are those of the IKE_SA's identity."""
    out = []
    for item in rounds:
        same = bool(item.id) and item.id.encode("utf-8", "surrogatepass") == identity.data
        out.append(cbor.trim([item.method, same or item.id, item.eap_id, list(item.groups)], _ROUND))
    return out


def _rounds(identity: Identity) -> cbor.Read[tuple[AuthRound, ...]]:
    def read_id(value: Any, where: str) -> str:
        if value is not True:
            return cbor.text(value, where)
        try:
            return cbor.text(identity.data.decode(), where)
        except UnicodeDecodeError:
            raise WireError(f"{where}: stands for an identity that is no text") from None

    read_row = cbor.row((cbor.text, read_id, cbor.text, cbor.texts), _ROUND)

    def read(value: Any, where: str) -> AuthRound:
        method, name, eap_id, groups = read_row(value, where)
        return AuthRound(method, name, eap_id, tuple(groups))

    return cbor.array(read)


def _names(children: Iterable[ChildContext]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(child.name for child in children))


def _peer_out(context: IkeContext) -> dict[int, Any]:
    peer = context.peer
    if peer is None:
        return {0: VERSION, 1: None}
    out: dict[int, Any] = {0: VERSION}
    cbor.put(out, 1, peer.connection, context.connection)
    cbor.put(out, 2, _rounds_out(peer.local_auth, context.local_id), [])
    cbor.put(out, 3, _rounds_out(peer.remote_auth, context.remote_id), [])
    cbor.put(out, 4, list(peer.children), list(_names(context.children)))
    cbor.put(out, 5, list(peer.proposals), [])
    cbor.put(out, 6, list(peer.pools), [])
    return out


def _peer(entry: cbor.MapReader, parts: dict[str, Any]) -> PeerContext | None:
    name = entry.take(1, lambda v, w: None if v is None else cbor.text(v, w), parts["connection"])
    if name is None:
        return None
    return PeerContext(
        name,
        entry.take(2, _rounds(parts["local_id"]), ()),
        entry.take(3, _rounds(parts["remote_id"]), ()),
        entry.take(4, cbor.texts, _names(parts.get("children", ()))),
        entry.take(5, cbor.texts, ()),
        entry.take(6, cbor.texts, ()),
    )


# Blocks.


def _split(fpt: Fpt, data: bytes) -> list[ContextDataBlock]:
    cuts = range(0, len(data), MAX_BLOCK_DATA)
    return [ContextDataBlock(fpt, data[cut : cut + MAX_BLOCK_DATA]) for cut in cuts]


def _join(blocks: Iterable[ContextDataBlock]) -> dict[Fpt, bytes]:
    """The octets of our profiles, each with its padding. Blocks of other types are passed over."""
    found: dict[Fpt, list[ContextDataBlock]] = {}
    last: Fpt | None = None
    for block in blocks:
        if block.fpt in PROFILES:
            earlier = found.setdefault(block.fpt, [])
            if block.presence is not None:
                raise WireError(f"{block.fpt.name}: has a presence vector")
            if earlier and (last is not block.fpt or len(earlier[-1].data) != MAX_BLOCK_DATA):
                raise WireError(f"{block.fpt.name}: a further block though the one before was not full")
            earlier.append(block)
        last = block.fpt
    joined = {fpt: b"".join(block.data for block in parts) for fpt, parts in found.items()}
    if sum(map(len, joined.values())) > MAX_MESSAGE:
        raise WireError("the profiles are larger than a message")
    return joined


def _open(joined: dict[Fpt, bytes], fpt: Fpt, own: bool) -> cbor.MapReader:
    """The profile's map, after its version was checked; an empty one if the profile was not sent. `own`: it
    was made here."""
    name = _NAMES[fpt]
    if fpt not in joined:
        return cbor.MapReader({}, name)
    entry = cbor.MapReader(cbor.loads(joined[fpt], name, padding=7, own=own), name)
    version = entry.need(0, cbor.u64)
    if version != VERSION:
        raise WireError(f"{name}: version {version} is not known")
    return entry


def _close(maps: dict[Fpt, dict[int, Any]]) -> tuple[dict[Fpt, bytes], tuple[ContextDataBlock, ...]]:
    """The octets of each profile, and their blocks."""
    # not checked here: both callers decode what they have encoded
    joined = {fpt: cbor.dumps(out, _NAMES[fpt], own=True) for fpt, out in maps.items()}
    blocks = [block for fpt, data in joined.items() for block in _split(fpt, data)]
    if sum(block.size for block in blocks) > MAX_PROFILE:
        raise WireError("the context does not fit in one CXTP message")
    return joined, tuple(blocks)


def _keep(maps: dict[Fpt, dict[int, Any]], unknown: Unknown) -> Unknown:
    """Put the unknown entries back where they were, except those of items that are gone. Returns the kept
    ones."""
    kept = []
    for number, key, data in sorted(unknown):
        if number not in PROFILES or key < 0:
            raise WireError(f"an unknown entry of FPT {number}, key {key} has no place in a profile")
        fpt, item = Fpt(number), key >> 16
        out = maps[fpt]
        if item:
            items = out.get(5 if fpt is Fpt.IKEV2_SA else 1, [])
            if item > len(items):
                continue
            out = items[item - 1]
        if key & 0xFFFF in out:
            raise WireError(f"{fpt.name}: the unknown key {key} is a known one")
        out[key & 0xFFFF] = cbor.loads(data, f"{fpt.name}: unknown key {key}")
        kept.append((number, key, data))
    return tuple(kept)


def encode(context: IkeContext, *, transfer: TransferHeader) -> tuple[ContextDataBlock, ...]:
    """The blocks of a PCTD. SPD and PAD are left out where the context has none.

    Errors: WireError when the context would not arrive as it is: too large, a number
    outside its field, a policy that names no selector.
    """
    maps: dict[Fpt, dict[int, Any]] = {
        Fpt.IKEV2_SA: _ike_out(context, transfer),
        Fpt.SAD: {0: VERSION, 1: [_child_out(child, context) for child in context.children]},
        Fpt.SPD: {0: VERSION, 1: _policies_out(context.policies)},
        Fpt.PAD: _peer_out(context),
    }
    kept = _keep(maps, context.unknown)
    named = {number for number, _, _ in kept}
    if not context.policies and Fpt.SPD not in named:
        del maps[Fpt.SPD]
    if context.peer is None and Fpt.PAD not in named:
        del maps[Fpt.PAD]
    joined, blocks = _close(maps)
    expected = context if kept == context.unknown else replace(context, unknown=kept)
    if _context(joined, own=True) != (expected, transfer):
        raise WireError("the context holds something that has no place in its profile")
    return blocks


def decode(blocks: Iterable[ContextDataBlock]) -> tuple[IkeContext, TransferHeader]:
    """The context in the blocks of a PCTD. Blocks of other FPTs are passed over. Errors: WireError."""
    return _context(_join(blocks))


def _context(joined: dict[Fpt, bytes], own: bool = False) -> tuple[IkeContext, TransferHeader]:
    if Fpt.IKEV2_SA not in joined:
        raise WireError("no IKEV2_SA profile")
    transfer, parts, unknown = _ike(_open(joined, Fpt.IKEV2_SA, own))

    sad = _open(joined, Fpt.SAD, own)
    items = sad.take(1, _ITEMS, ())
    read = [_child(value, where, n, parts) for n, (value, where) in enumerate(items)]
    parts["children"] = tuple(child for child, _ in read)
    unknown += _rest(sad, Fpt.SAD) + tuple(u for _, rest in read for u in rest)

    spd = _open(joined, Fpt.SPD, own)
    parts["policies"] = spd.take(1, _policies, ())
    unknown += _rest(spd, Fpt.SPD)

    pad = _open(joined, Fpt.PAD, own)
    if Fpt.PAD in joined:
        parts["peer"] = _peer(pad, parts)
    unknown += _rest(pad, Fpt.PAD)

    context = cbor.build(IkeContext, "context", unknown=unknown, **parts)
    for policy in context.policies:
        child = context.children[policy.child]
        if policy.local_ts >= len(child.local_ts) or policy.remote_ts >= len(child.remote_ts):
            raise WireError("SPD: a policy names a selector that is not there")
    return context, transfer


# The final state in a CTD: the same profiles with other keys.


_FINAL_ROWS = cbor.array(cbor.row((cbor.octets(4), entries.replay, entries.replay)))


def encode_final(final: FinalState, transfer_id: bytes) -> tuple[ContextDataBlock, ...]:
    """The blocks of the CTD that lets go. Errors: WireError."""
    ike: dict[int, Any] = {0: VERSION, 1: transfer_id + final.spi_i + final.spi_r}
    cbor.put(ike, 3, final.epoch, 0)
    cbor.put(ike, 18, [final.mid_initiator, final.mid_responder], [0, 0])
    cbor.put(ike, 21, final.unsure, False)
    maps = {Fpt.IKEV2_SA: ike}
    rows = [[c.spi_in, entries.replay_out(c.inbound), entries.replay_out(c.outbound)] for c in final.children]
    if rows:
        maps[Fpt.SAD] = {0: VERSION, 2: rows}
    joined, blocks = _close(maps)
    if _final(joined, own=True) != (final, transfer_id):
        raise WireError("the final state holds something that has no place in its profile")
    return blocks


def decode_final(blocks: Iterable[ContextDataBlock]) -> tuple[FinalState, bytes]:
    """(final state, transfer id) of a CTD. Unknown keys and FPTs are passed over. Errors: WireError."""
    return _final(_join(blocks))


def _final(joined: dict[Fpt, bytes], own: bool = False) -> tuple[FinalState, bytes]:
    if Fpt.IKEV2_SA not in joined:
        raise WireError("no IKEV2_SA profile")
    ike, sad = _open(joined, Fpt.IKEV2_SA, own), _open(joined, Fpt.SAD, own)
    names = ike.need(1, cbor.octets(24))
    mid_initiator, mid_responder = ike.take(18, _MIDS, (0, 0))
    rows = sad.take(2, _FINAL_ROWS, ())
    children = tuple(FinalChild(*row) for row in rows)
    if len({child.spi_in for child in children}) != len(children):
        raise WireError("SAD: an SPI twice")
    epoch = ike.take(3, cbor.u64, 0)
    unsure = ike.take(21, cbor.boolean, False)
    final = FinalState(names[8:16], names[16:], mid_initiator, mid_responder, epoch, children, unsure)
    return final, names[:8]


# Statuses.


def encode_verdicts(verdicts: Iterable[Verdict]) -> tuple[StatusBlock, ...]:
    """The statuses of a CTDR. If nothing was refused its S bit is enough, except for FPTs that a verdict
    names beside `PROFILES`.

    Else there is one for each of `PROFILES` and each other FPT that a verdict names. If several verdicts
    refuse one FPT the first is sent, because checks come in the order of their gravity.
    """
    worst = dict.fromkeys(PROFILES, Status.OK)
    for verdict in verdicts:
        if worst.setdefault(verdict.fpt, Status.OK) is Status.OK:
            worst[verdict.fpt] = verdict.status
    if not any(worst.values()):
        worst = {fpt: status for fpt, status in worst.items() if fpt not in PROFILES}
    return tuple(StatusBlock(fpt, status) for fpt, status in worst.items())


def decode_verdicts(statuses: Iterable[StatusBlock]) -> tuple[Verdict, ...]:
    """The verdicts that a CTDR carries, with a text for each refusal."""
    return tuple(
        Verdict(s.fpt, s.status, "" if s.status is Status.OK else _status_text(s.status)) for s in statuses
    )


def _status_text(status: Status) -> str:
    return STATUS_TEXT.get(status, f"refused with the unknown status 0x{status:02x}")
