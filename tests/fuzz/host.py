"""What charon, the kernel, the operator and the disk of this host say, and its files."""

from __future__ import annotations

import contextlib
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ikectx.disk import journal_rows
from ikectx.engine import ledger
from ikectx.engine.ledger import MobileFacts, Relayed, Row, SourceFacts, TargetFacts
from ikectx.errors import (
    ConfigError,
    KernelError,
    RefusedError,
    StoreError,
    UnknownSaError,
    UsageError,
    WireError,
)
from ikectx.numbers import Protocol
from ikectx.sa.context import ReplayState
from ikectx_cli.lab import bench as lab_bench
from ikectx_cli.mobile import config as mobile_config
from ikectx_cli.requests import GATEWAY, MOBILE
from mobike_ext.mirror import Mirror
from mobike_ext.notify import UpdateSpi
from tests.record_world import REAL, stream
from tests.vici_bridge.away.test_departures import BLOCKING, DEPARTURE
from tests.vici_bridge.kernel.test_xfrm import RECORDED as XFRM
from tests.vici_bridge.policy.test_claims import CONNECTION, POOLS, numbered
from tests.vici_bridge.policy.test_new_names import PLAN
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge import updown_helper
from vici_bridge.away.behind import Block
from vici_bridge.away.departures import Departure
from vici_bridge.away.origins import Origin
from vici_bridge.effects.mobile_move import ChildMove, MobileMove
from vici_bridge.ha.messages import HaMessage
from vici_bridge.ha.record import Record
from vici_bridge.kernel import addresses, detour, ike_queue, kernel_events, nftables, routes, xfrm
from vici_bridge.kernel import xfrm_wire as wire
from vici_bridge.kernel.nat_relay import places_of
from vici_bridge.kernel.netlink import Netlink, NetlinkOutcome
from vici_bridge.kernel.netlink_parts import HEADER, attribute, messages
from vici_bridge.kernel.spd_index import SpdIndex
from vici_bridge.kernel.spd_lookup import Flow, may_concern
from vici_bridge.mobile import held
from vici_bridge.policy.allowed import AllowedConnection, pool_ranges
from vici_bridge.policy.new_names import Plan
from vici_bridge.policy.proposals import ConfiguredProposal
from vici_bridge.vici.codec import Deframer, Packet, PacketType, json_of, serialize_message, with_json
from vici_bridge.vici.codec import parse_message as parse_vici
from vici_bridge.vici.request_keys import check
from vici_bridge.vici.views import peer_context, sa_views

from .target import ENDS, NSG, SPIS, Target

ROOT = Path(__file__).parent.parent.parent


# --- charon ------------------------------------------------------------------------------------------------


def told_by_charon(read: Callable[[dict[str, Any]], object], octets: bytes) -> None:
    """Messages of charon's, whose texts may be anybody's."""
    for name, section in parse_vici(octets, foreign=True).items():
        if isinstance(section, dict):
            read({**section, "name": name})


def views_of(section: dict[str, Any]) -> None:
    sa_views([section])
    peer_context("mn", section)


def connection_of(section: dict[str, Any]) -> None:
    AllowedConnection.read("mn", section, numbered)


def charon(read: Callable[[dict[str, Any]], object], *trees: dict[str, Any]) -> Target:
    seeds = tuple(serialize_message({"mn": tree}) for tree in trees)
    return Target(partial(told_by_charon, read), seeds)


def pools_of(octets: bytes) -> None:
    pool_ranges(parse_vici(octets, foreign=True))


def ha_message_of(octets: bytes) -> None:
    message = HaMessage.parse(octets)
    assert message.serialize() == octets


DATAGRAMS = tuple(one.serialize() for name in REAL for one in stream(name)[:12])


def ha_stream_of(octets: bytes) -> None:
    """Datagrams, each behind its length in two octets, into a record that is then kept and read again."""
    record, at = Record(), 0
    while at + 2 <= len(octets):
        size = int.from_bytes(octets[at : at + 2])
        with contextlib.suppress(WireError):
            record.feed(HaMessage.parse(octets[at + 2 : at + 2 + size]))
        at += 2 + size
    for name in record.names():
        with contextlib.suppress(UnknownSaError, RefusedError):
            record.context(name)
    again = Record()
    again.load((key, value) for key, value in record.dump(everything=True) if value is not None)
    assert set(again.names()) == set(record.names())


def joined(datagrams: tuple[bytes, ...]) -> bytes:
    return b"".join(len(one).to_bytes(2) + one for one in datagrams)


# --- the control socket ------------------------------------------------------------------------------------


def request_of(octets: bytes) -> None:
    """Until the command sees it, as `control.ControlServer` and the agents' handlers read it."""
    for packet in Deframer().receive(octets):
        if packet.type is PacketType.CMD_REQUEST:
            message = packet.message
            for takes in (GATEWAY, MOBILE):
                if packet.name in takes:
                    check(packet.name, message, takes[packet.name])


def script_of(octets: bytes) -> None:
    """A call of the updown helper, as `_answer` reads it."""
    with contextlib.suppress(*updown_helper._UNREADABLE):
        connection, env = updown_helper._read(octets)
        {"mn": "script"}.get(connection)
        assert all(map(str.isprintable, env))


def answer_of(octets: bytes) -> None:
    for packet in Deframer().receive(octets):
        if packet.body:
            assert serialize_message(packet.message) == packet.body
            json_of(packet.message)


def request(name: str, message: Mapping[str, Any]) -> bytes:
    return Packet(PacketType.CMD_REQUEST, name, serialize_message(message)).framed()


REQUESTS = (
    request("transfer", {"ike": "mn", "to": "nsg", "dry-run": "yes", "address": "auto"}),
    request("updown", {"verb": "up", "PLUTO_VERB": "up-client", "reqid": "1"}),
    request("handover", {"to": "nsg", "anew": "no"}),
    request("history", {"limit": "5"}) + request("status", {}),
)
ANSWERS = tuple(
    Packet(kind, name, serialize_message(with_json({"a": [1, "x"]}, name="mn", sa={"b": ["c"]}))).framed()
    for kind, name in ((PacketType.CMD_REQUEST, "transfer"), (PacketType.EVENT, "list-sa"))
)


# --- the kernel --------------------------------------------------------------------------------------------


def nested(number: int, *parts: bytes) -> bytes:
    return attribute(number, b"".join(parts))


def element(key: bytes, counter: int) -> bytes:
    value = attribute(2, counter.to_bytes(8))
    count = nested(7, attribute(1, b"counter\0"), nested(2, value))
    return nested(1, nested(1, attribute(1, key)), nested(2, attribute(1, b"ab")), count)


SETS = nftables._message(
    12, 0, nftables._text(1, "ikectx") + nested(3, element(b"k" * 16, 7), element(b"l" * 16, 9))
)
CHAIN = nftables._message(3, 0, nftables._text(1, "t") + attribute(6, (3).to_bytes(4)))


def route(kind: int = 24) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, detour.PROTOCOL, 0, 1, 0)
    body += attribute(1, bytes((10, 4, 0, 0))) + attribute(4, (3).to_bytes(4, "little"))
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def own_address() -> bytes:
    body = struct.pack("=BBBBI", 2, 24, 0x80, 0, 2) + attribute(2, bytes((192, 0, 2, 1)))
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


def removal() -> bytes:
    body = bytes((1, 0, 0, 0)) + attribute(1, b"ikectx\0")
    return struct.pack("=IHHII", 16 + len(body), 10 << 8 | 2, 0, 1, 0) + body


def netlink_error(number: int, code: int, text: bytes) -> bytes:
    body = struct.pack("=i", code) + struct.pack("=IHHII", 16, 0x10, 0, number, 0)
    body += attribute(1, text)
    return struct.pack("=IHHII", 16 + len(body), 2, 0x100 | 0x200, number, 0) + body


SORTED = (
    netlink_error(1, -2, b"no such thing\0"),
    SETS[:8] + (1).to_bytes(4, "little") + SETS[12:],
    struct.pack("=IHHIIi", 20, 3, 0, 1, 0, 0),
)


def queued(datagram: bytes) -> bytes:
    """A packet that waits for the agent."""
    udp = struct.pack("!HHHH", 4500, 4500, 8 + len(datagram), 0) + datagram
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), bytes(4))
    body = bytes((2, 0, 0, 1)) + attribute(1, bytes((0, 0, 0, 7, 8, 0, 1, 0))) + attribute(10, ip + udp)
    return HEADER.pack(HEADER.size + len(body), 3 << 8, 0, 0, 0) + body


IKE_HEADER = bytes(range(16)) + bytes((46, 0x20, 37, 0)) + bytes(4) + (28).to_bytes(4)
QUEUED = (queued(bytes(4) + IKE_HEADER), queued(b"no IKE"), b"")


def table(octets: bytes) -> nftables.NftTable:
    """As if the kernel had answered so."""

    class Answered(nftables.NftTable):
        def _outcomes(self, *requests: Any) -> list[NetlinkOutcome]:
            return [NetlinkOutcome(0, "", [octets])]

    return Answered("ikectx")


class Heard(SpdIndex):
    """Has dumped the policies, and hears no events but those it is given."""

    def __init__(self) -> None:
        self._known, self._indexes = {}, defaultdict(set)


def policy_events_of(octets: bytes) -> None:
    """A datagram of the kernel's about its policies."""
    index = Heard()
    for message in messages(octets):
        may_concern(message, FLOW)
        with contextlib.suppress(struct.error, ValueError, KeyError):  # the policies are dumped anew
            index._hear(message)


def policy_event(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def netlink_datagram(octets: bytes) -> None:
    Netlink._sort(octets, {1: NetlinkOutcome(), 2: NetlinkOutcome()})


SAS = tuple(bytes.fromhex(each["sa"]) for each in XFRM.values() if "sa" in each)
COUNTERS = tuple(bytes.fromhex(each["counters"]) for each in XFRM.values() if "counters" in each)
POLICIES = tuple(bytes.fromhex(each["policy"]) for each in XFRM.values() if "policy" in each)
FLOW = Flow(*ENDS)
EVENTS = (
    *(policy_event(wire.NEWPOLICY, policy[HEADER.size :]) for policy in POLICIES[:2]),
    policy_event(wire.DELPOLICY, bytes(64) + attribute(7, POLICIES[0][HEADER.size :][:168])),
    policy_event(0x1B, POLICIES[0][HEADER.size :][:168] + b"\1" + bytes(7)),
)
PLAIN_SA = xfrm.KernelSa.parse(bytes.fromhex(XFRM["gcm"]["sa"]))
ESN_SA = xfrm.KernelSa.parse(bytes.fromhex(XFRM["esn-in"]["sa"]))


def sa_of(octets: bytes) -> None:
    """What is read can be written, where its fields are those of an SA."""
    sa = xfrm.KernelSa.parse(octets)
    assert str(sa).isprintable()
    with contextlib.suppress(WireError):
        sa.add()


def counters_of(octets: bytes) -> None:
    with contextlib.suppress(WireError):
        PLAIN_SA.parse_replay(octets)
    ESN_SA.parse_replay(octets)


def policy_of(octets: bytes) -> None:
    policy = xfrm.KernelPolicy.parse(octets)
    assert str(policy).isprintable()
    with contextlib.suppress(WireError):
        assert policy.raw


# --- the store ---------------------------------------------------------------------------------------------

ORIGIN = Origin("psg", SPIS, 3, SPIS, "mn.example", ("10.4.0.10/32",), 1e9)
MOVE = MobileMove(
    *ENDS, *ENDS, (ChildMove(b"abcd", b"efgh", b"ijkl", b"mnop", 7, 99, ReplayState(9, 64, 5)),), ENDS
)
MIRROR = Mirror(7, *ENDS, (UpdateSpi(Protocol.ESP, b"\xc9\0\0\1", b"\xc9\0\0\2"),), b"i" * 64, b"f" * 512)
NOTES: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "departure": (DEPARTURE.dumps(), lambda raw: Departure.loads("k", raw)),
    "origin": (ORIGIN.dumps(), lambda raw: Origin.loads("k", raw)),
    "block": (Block(SPIS, "mn.example", BLOCKING).dumps(), lambda raw: Block.loads("k", raw)),
    "move": (MOVE.dumps(), MobileMove.loads),
    "UPDATE_SPI": (MIRROR.dumps(), Mirror.loads),
    "plan": (PLAN.dumps(), Plan.loads),
}
ROWS: dict[ledger.Role, Row[Any]] = {
    "source": Row(
        SPIS,
        SourceFacts(policies=(b"policy",), request=3, unique_id=5),
        bytes(8),
        "freeze",
        ("mute", "block"),
    ),
    "target": Row(
        SPIS,
        TargetFacts(
            stage="active", plan=b"plan", guards=(b"guard",), relay=Relayed(ENDS[0], (b"abcd",), NSG)
        ),
    ),
    "mobile": Row(SPIS, MobileFacts(quiet=True, move=b"move", mirror=b"mirror")),
}


def row_of(octets: bytes) -> None:
    """A row that is read is written as it was, whichever role it has."""
    for role in ROWS:
        with contextlib.suppress(StoreError):
            row = ledger.loads(role, octets)
            assert ledger.loads(role, ledger.dumps(row)) == row


def column(octets: bytes) -> object:
    """What SQLite may have in a column: text, unless the first octet says otherwise."""
    match octets[:1]:
        case b"n":
            return None
        case b"x":
            return octets[1:]
        case b"i":
            return int.from_bytes(octets[1:9], signed=True)
        case b"f":
            return struct.unpack("=d", octets[1:9].ljust(8, b"\0"))[0]
        case _:
            return octets[1:].decode("utf-8", "replace")


def journal_row_of(octets: bytes) -> None:
    """The columns of a row of the journal, with a bar between them."""
    row = tuple(map(column, octets.split(b"|")))
    if len(row) == len(JOURNAL_ROW):
        with contextlib.suppress(StoreError, ValueError, TypeError, RecursionError):  # as `SqliteStore` does
            journal_rows.parse(row, None)


JOURNAL_ROW = (
    *(b"x" + bytes(8), b"ssource", b"snsg", b"x" + bytes(8), b"x" + bytes(8), b"smn", b"s198.51.100.7"),
    *(b"sreleased", b"i\1", b"n", b"n", b"f" + bytes(8), b"f" + bytes(8), b"s", b"s", b"i\0"),
    *(b's{"freeze": 1.5}', b"s{}"),
)


def record_of(octets: bytes) -> None:
    Record().load([(SA_KEY, octets)])


KEPT = Record()
for _one in stream(REAL[0]):
    KEPT.feed(_one)
SA_KEY, KEPT_SA = next((key, value) for key, value in KEPT.dump(everything=True) if value is not None)


# --- files -------------------------------------------------------------------------------------------------


def bench_file(octets: bytes) -> None:
    lab_bench.read(octets.decode("latin-1"), "file")


def mobile_file(octets: bytes) -> None:
    mobile_config.parse(octets.decode("utf-8", "replace"), Path("mobile.toml"))


def proposal(octets: bytes) -> None:
    with contextlib.suppress(ValueError):  # whoever reads a configuration names file and key
        ConfiguredProposal.parse(octets.decode("latin-1"))


BENCH = tuple(path.read_bytes() for path in sorted((ROOT / "docs" / "benchmarks").glob("drain*.json")))

TARGETS = {
    "HA message": Target(ha_message_of, DATAGRAMS),
    "HA stream": Target(ha_stream_of, tuple(joined(DATAGRAMS[at : at + 6]) for at in range(0, 60, 6)), ()),
    "VICI list-sas": charon(views_of, VIEW),
    "VICI list-conns": charon(connection_of, CONNECTION),
    "VICI get-pools": Target(pools_of, (serialize_message(POOLS),)),
    "control request": Target(request_of, REQUESTS, (WireError, UsageError)),
    "control answer": Target(answer_of, ANSWERS),
    "updown helper": Target(script_of, (b'{"connection": "mn", "env": {"PLUTO_VERB": "up-client"}}',), ()),
    "XFRM SA": Target(sa_of, SAS),
    "XFRM counters": Target(counters_of, COUNTERS),
    "XFRM policy": Target(policy_of, POLICIES),
    "nftables set": Target(lambda octets: table(octets).elements("s"), (SETS,), (KernelError,)),
    "nftables place": Target(
        places_of, (bytes(range(16)), bytes(range(40)), bytes(range(1, 17))), (KernelError,)
    ),
    "nftables chain": Target(lambda octets: table(octets).rules("c"), (CHAIN,), (KernelError,)),
    "XFRM policy events": Target(policy_events_of, EVENTS, ()),
    "netlink datagram": Target(netlink_datagram, SORTED, (KernelError,)),
    "netlink route": Target(routes.KernelRoute.parse, (route(),), (KernelError,)),
    "netlink address": Target(addresses._address, (own_address(),), ()),
    "netlink route event": Target(
        lambda octets: kernel_events.changes_ways(octets, 7), (route(25), route(16)), ()
    ),
    "netlink nftables event": Target(
        lambda octets: kernel_events.removes_table(octets, ("ikectx",), (7,)), (removal(), removal() * 2), ()
    ),
    "netlink queue": Target(lambda octets: held.name_of(ike_queue.waiting_of(octets)), QUEUED, ()),
    "journal row": Target(journal_row_of, (b"|".join(JOURNAL_ROW),), ()),
    "ledger row": Target(row_of, tuple(ledger.dumps(row) for row in ROWS.values()), ()),
    "record of an SA": Target(record_of, (KEPT_SA,), (StoreError,)),
    **{f"note: {name}": Target(read, (good,), (StoreError,)) for name, (good, read) in NOTES.items()},
    "summary of a bench": Target(bench_file, BENCH, (UsageError,)),
    "mobile.toml": Target(
        mobile_file, ((ROOT / "examples" / "config" / "mobile.toml").read_bytes(),), (ConfigError,)
    ),
    "proposal": Target(proposal, (b"aes256gcm16-prfsha256-x25519", b"aes128-sha256!"), ()),
}
