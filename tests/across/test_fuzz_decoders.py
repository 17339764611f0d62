"""Every decoder of foreign octets: what comes out is a value, or the one error that its table row names.

Seeds are made by the real encoders, or recorded from charon and the kernel. `COVERED` says where the decoders
are tried that have more state than one call.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ikectx.disk.store import SqliteStore
from ikectx.engine.journal import JournalEntry
from ikectx.errors import (
    ConfigError,
    IkectxError,
    KernelError,
    RefusedError,
    StoreError,
    UnknownSaError,
    UsageError,
    WireError,
)
from ikectx.numbers import Fpt, Protocol, Status
from ikectx.sa.context import ChildContext, Endpoint, IkeContext, ReplayState, Secret
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from ikectx.wire import cbor, cookies
from ikectx.wire.cookies import with_cookie
from ikectx.wire.cxtp import (
    ContextDataBlock,
    Ctaa,
    Ctar,
    Ctc,
    Ctd,
    CtReq,
    Pctd,
    StreamDecoder,
    parse_message,
)
from ikectx.wire.profile import decode, decode_final, encode, encode_final
from ikectx.wire.reasons import encode_reasons, with_reasons
from ikectx.wire.tokens import Purpose, find, make_ctar, open_ctaa, seal_ctaa
from ikectx.wire.whereabouts import What, Whereabouts, notice, parse_notice
from ikectx_cli import settings as strongswan_conf
from ikectx_cli import updown
from ikectx_cli.lab import bench as lab_bench
from ikectx_cli.mobile import config as mobile_config
from mobike_ext.mirror import Mirror
from mobike_ext.notify import UpdateSpi
from tests.fuzz import damaged, damaged_tree
from tests.profile_samples import RICH, TRANSFER, TYPICAL, TYPICAL_FINAL
from tests.record_world import CONTEXT, REAL, stream
from tests.vici_bridge.away.test_departures import BLOCKING, DEPARTURE
from tests.vici_bridge.policy.test_claims import CONNECTION, POOLS, numbered
from tests.vici_bridge.policy.test_new_names import PLAN
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge.away.behind import Block
from vici_bridge.away.departures import Departure
from vici_bridge.away.origins import Origin
from vici_bridge.effects.mobile_move import ChildMove, MobileMove
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import HaMessage
from vici_bridge.ha.record import Record
from vici_bridge.kernel import detour, nftables, route_events, routes
from vici_bridge.kernel.netlink import Netlink, NetlinkOutcome
from vici_bridge.policy.allowed import AllowedConnection, pool_ranges
from vici_bridge.policy.new_names import Plan
from vici_bridge.policy.proposals import ConfiguredProposal
from vici_bridge.vici.codec import Deframer, Packet, PacketType, json_of, serialize_message, with_json
from vici_bridge.vici.codec import parse_message as parse_vici
from vici_bridge.vici.views import missing_algorithms, peer_context, sa_views

ROOT = Path(__file__).parent.parent.parent
MN, NSG = ip_address("198.51.100.7"), ip_address("192.0.2.1")
KEY = Secret(bytes(range(32)))
FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)


@dataclass(frozen=True)
class Row:
    """A decoder, octets that are good, and the errors that it may raise."""

    decode: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[IkectxError], ...] = (WireError,)


# --- seeds -----------------------------------------------------------------------------------------------

CTAR = make_ctar(
    KEY,
    mn=MN,
    router=NSG,
    sequence=7,
    purpose=Purpose.ARRIVE,
    spis=TYPICAL.spis,
    psg="psg",
    nsg="nsg",
    expiry=1_800_000_000,
    care_of=Endpoint(MN, 4500),
)
CTAA = seal_ctaa(KEY, MN, 7, purpose=Purpose.ARRIVE, expects=3)
NEWS = [Whereabouts(SaName(bytes(range(8)), bytes(range(8, 16))), 3, What.MOVED, "nsg")] * 2
NOTICE, _ = notice(NEWS)
REFUSED = Verdict(Fpt.SAD, Status.NOT_ALLOWED, "SPI 5 is reserved")
MESSAGES = tuple(
    one.serialize()
    for one in (
        CTAR,
        CTAA,
        NOTICE,
        Pctd(MN, encode(TYPICAL, transfer=TRANSFER)),
        Ctd(MN, encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)),
        CtReq(MN, 7, CTAR.token, CTAR.blocks),
        Ctc(MN),
    )
)
PROFILES = tuple(
    Pctd(MN, blocks).serialize()
    for blocks in (
        encode(TYPICAL, transfer=TRANSFER),
        encode(RICH, transfer=TRANSFER),
        encode_final(TYPICAL_FINAL, TRANSFER.transfer_id),
    )
)


def nested(number: int, *parts: bytes) -> bytes:
    return nftables._attribute(number, b"".join(parts))


def element(key: bytes, counter: int) -> bytes:
    count = nested(
        7, nftables._attribute(1, b"counter\0"), nested(2, nftables._attribute(2, counter.to_bytes(8)))
    )
    return nested(1, nested(1, nftables._attribute(1, key)), nested(2, nftables._attribute(1, b"ab")), count)


SETS = nftables._message(
    12, 0, nftables._text(1, "ikectx") + nested(3, element(b"k" * 16, 7), element(b"l" * 16, 9))
)
CHAIN = nftables._message(3, 0, nftables._text(1, "t") + nftables._attribute(6, (3).to_bytes(4)))


def route(kind: int = 24) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, detour.PROTOCOL, 0, 1, 0)
    body += nftables._attribute(1, bytes((10, 4, 0, 0))) + nftables._attribute(4, (3).to_bytes(4, "little"))
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body


def netlink_error(number: int, code: int, text: bytes) -> bytes:
    body = (
        struct.pack("=i", code) + struct.pack("=IHHII", 16, 0x10, 0, number, 0) + nftables._attribute(1, text)
    )
    return struct.pack("=IHHII", 16 + len(body), 2, 0x100 | 0x200, number, 0) + body


SORTED = (
    netlink_error(1, -2, b"no such thing\0"),
    SETS[:8] + (1).to_bytes(4, "little") + SETS[12:],
    struct.pack("=IHHIIi", 20, 3, 0, 1, 0, 0),
)


# --- decoders --------------------------------------------------------------------------------------------


def stream_of(octets: bytes) -> None:
    decoder = StreamDecoder()
    for at in range(0, len(octets), 7):
        decoder.feed(octets[at : at + 7])


def token_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Ctar | CtReq):
        find(message.blocks)
    if type(message) is type(CTAA):
        open_ctaa(KEY, message, 7, purpose=Purpose.ARRIVE)  # type: ignore[arg-type]


def profile_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Pctd | Ctd):
        for read in (decode, decode_final):
            with contextlib.suppress(WireError):
                read(message.blocks)


def notice_of(octets: bytes) -> None:
    message = parse_message(octets)
    if isinstance(message, Ctd):
        parse_notice(message)


def reason_of(octets: bytes) -> None:
    """Raises nothing: words that cannot be read are passed over."""
    with_reasons([], [ContextDataBlock(Fpt.REASON, octets)])


def vici_packets(octets: bytes) -> None:
    for packet in Deframer().receive(octets):
        if packet.body:
            json_of(packet.message)


def table(octets: bytes) -> nftables.NftTable:
    """As if the kernel had answered so."""

    class Answered(nftables.NftTable):
        def _outcome(self, request: Any) -> NetlinkOutcome:
            return NetlinkOutcome(0, "", [octets])

    return Answered("ikectx")


def netlink_datagram(octets: bytes) -> None:
    Netlink._sort(octets, {1: NetlinkOutcome(), 2: NetlinkOutcome()})


def bench_file(octets: bytes) -> None:
    lab_bench.read(octets.decode("latin-1"), "file")


def mobile_file(octets: bytes) -> None:
    mobile_config.parse(octets.decode("utf-8", "replace"), Path("mobile.toml"))


PACKETS = tuple(
    Packet(kind, name, serialize_message(with_json({"a": [1, "x"]}, name="mn", sa={"b": ["c"]}))).framed()
    for kind, name in ((PacketType.CMD_REQUEST, "transfer"), (PacketType.EVENT, "list-sa"))
)
BENCH = tuple(path.read_bytes() for path in sorted((ROOT / "docs" / "benchmarks").glob("drain*.json")))
CBOR = (cbor.dumps([1, b"x" * 20, [True, {1: 2}]]),)

ROWS: dict[str, Row] = {
    "CXTP message": Row(parse_message, MESSAGES),
    "CXTP stream": Row(stream_of, MESSAGES),
    "token": Row(token_of, MESSAGES[:2] + MESSAGES[5:6]),
    "profile": Row(profile_of, PROFILES),
    "whereabouts": Row(notice_of, (NOTICE.serialize(),)),
    "reason": Row(reason_of, tuple(one.data for one in encode_reasons([REFUSED])), ()),
    "CBOR": Row(cbor.loads, CBOR),
    "VICI packet": Row(vici_packets, PACKETS),
    "VICI message of charon": Row(
        lambda octets: parse_vici(octets, foreign=True),
        (serialize_message(VIEW), serialize_message(CONNECTION)),
    ),
    "HA message": Row(
        lambda octets: HaMessage.parse(octets),
        tuple(one.serialize() for name in REAL for one in stream(name)[:12]),
    ),
    "nftables set": Row(lambda octets: table(octets).elements("s"), (SETS,), (KernelError,)),
    "nftables chain": Row(lambda octets: table(octets).rules("c"), (CHAIN,), (KernelError,)),
    "netlink datagram": Row(netlink_datagram, SORTED, (KernelError,)),
    "netlink route": Row(routes.KernelRoute.parse, (route(),), (KernelError,)),
    "netlink route event": Row(lambda octets: route_events.matters(octets, 7), (route(25), route(16)), ()),
    "summary of a bench": Row(bench_file, BENCH, (UsageError,)),
    "mobile.toml": Row(
        mobile_file, ((ROOT / "examples" / "config" / "mobile.toml").read_bytes(),), (ConfigError,)
    ),
}

COVERED = {
    "IKE message, decrypted and not": "test_ikev2.py, test_rekey.py",
    "answers and requests of the MN": "test_address_update.py, test_responder.py",
    "notifies": "test_notify.py",
    "names that a MN asks for": "test_naming.py",
    "packets off the wire": "test_watch.py",
    "proofs": "test_packet_proof.py",
    "XFRM messages": "test_xfrm.py",
    "ikectx.toml": "test_config.py",
    "control requests": "test_control_places.py",
    "lab.json": "test_state.py",
    "record of SAs": "test_record_kept.py",
    "ledger of moving SAs": "test_ledger.py",
}


@pytest.mark.parametrize("name", ROWS)
def test_seeds_are_good(name: str) -> None:
    for seed in ROWS[name].seeds:
        ROWS[name].decode(seed)


@pytest.mark.parametrize("length", [16, 17, 19, 20, 23])
def test_an_answer_of_netlink_that_is_cut_short(length: int) -> None:
    octets = struct.pack("=IHHII", length, 2, 0x200, 1, 0) + bytes(length - 16)
    with contextlib.suppress(KernelError):
        netlink_datagram(octets)


@pytest.mark.parametrize("name", ROWS)
@FUZZ
@given(st.data())
def test_damage_is_one_error(name: str, data: st.DataObject) -> None:
    row = ROWS[name]
    octets = data.draw(damaged(row.seeds))
    try:
        row.decode(octets)
    except row.errors as error:
        assert str(error)
        assert KEY.reveal().hex() not in str(error)


@pytest.mark.parametrize("file", sorted({one for files in COVERED.values() for one in files.split(", ")}))
def test_the_others_have_their_fuzz_tests(file: str) -> None:
    assert any("@given(" in path.read_text() for path in Path(__file__).parent.parent.rglob(file))


# --- trees of charon's -----------------------------------------------------------------------------------

TREES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], object]]] = {
    "list-sas": (VIEW, lambda tree: sa_views([tree])),
    "list-conns": (CONNECTION, lambda tree: AllowedConnection.read("mn", tree, numbered)),
    "list-conns for the PAD": (CONNECTION, lambda tree: peer_context("mn", tree)),
    "get-pools": (POOLS, pool_ranges),
    "get-algorithms": (
        {
            "encryption": {"AES_CBC": "aes"},
            "aead": {"AES_GCM_16": "gcm"},
            "prf": {"PRF_HMAC_SHA2_256": "hmac"},
        },
        lambda tree: missing_algorithms(CONTEXT, tree),
    ),
}


@pytest.mark.parametrize("name", TREES)
@FUZZ
@given(st.data())
def test_damaged_trees_of_charon_are_wire_errors(name: str, data: st.DataObject) -> None:
    tree, read = TREES[name]
    try:
        read(data.draw(damaged_tree(tree)))
    except WireError as error:
        assert str(error)


@FUZZ
@given(st.text(max_size=40) | st.from_regex(r"[a-z0-9-]{0,40}"))
def test_a_proposal_is_one_or_a_value_error(text: str) -> None:
    try:
        ConfiguredProposal.parse(text)
    except ValueError as error:  # whoever reads a configuration names file and key
        assert str(error)


# --- the record ------------------------------------------------------------------------------------------

STREAMS = [one for name in REAL for one in stream(name)]
DATAGRAMS = [one.serialize() for one in STREAMS]


def heard(data: st.DataObject) -> list[HaMessage]:
    """Recorded messages, some damaged, some in another version's form."""
    found = []
    for _ in range(data.draw(st.integers(1, 12))):
        octets = bytearray(data.draw(st.sampled_from(DATAGRAMS) | damaged(DATAGRAMS)))
        if octets and data.draw(st.integers(0, 3)) == 0:
            octets[0] = data.draw(st.integers(2, 6))
        try:
            found.append(HaMessage.parse(bytes(octets)))
        except WireError:
            continue
    return found


@FUZZ
@given(st.data())
def test_a_record_of_anything_raises_only_what_it_says(data: st.DataObject) -> None:
    record = Record()
    for message in heard(data):
        record.feed(message)
    for name in record.names():
        try:
            assert isinstance(record.context(name), IkeContext)
        except (UnknownSaError, RefusedError) as error:
            assert str(error)
    kept = record.dump(everything=True)
    again = Record()
    again.load((key, value) for key, value in kept if value is not None)
    assert set(again._sas) == set(record._sas)


def test_a_context_whose_ends_are_of_different_families_is_refused() -> None:
    record = Record()
    record.feed(ha.ike_add(5, CONTEXT.generations[0], CONTEXT.remote))
    ike = IkeId.of(CONTEXT.generations[0])
    record.feed(
        ha.ike_update(
            5,
            ike,
            name="mn",
            local_id=CONTEXT.local_id,
            remote_id=CONTEXT.remote_id,
            local=Endpoint.of("2001:db8::1", 4500),
            remote=CONTEXT.remote,
        )
    )
    (name,) = record.names()
    with pytest.raises(RefusedError, match=r"cannot be: .*different families"):
        record.context(name)


def test_an_sa_of_two_wire_versions_does_not_keep_the_others_from_the_store() -> None:
    record = Record()
    first, second = CONTEXT.generations
    record.feed(ha.ike_add(3, first, CONTEXT.remote))
    (child,) = [one for one in CONTEXT.children if isinstance(one, ChildContext)][:1]
    more = replace(child, add_secret=Secret(b"s" * 32), add_kes=b"\0\x24")
    record.feed(ha.child_add(5, IkeId.of(first), more))
    record.feed(ha.ike_add(5, second, CONTEXT.remote))
    assert len(record.dump()) == 2


# --- the store -------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
    st.sampled_from(["[" * 100_000, "[1]", '{"a": "b"}', "null", "nan", "1e999", "9" * 5000]),
)
COLUMNS = (
    *(
        "transfer_id",
        "role",
        "peer",
        "spi_i",
        "spi_r",
        "mn",
        "mn_address",
        "state",
        "epoch",
        "context",
        "final",
    ),
    *("started", "updated", "detail", "result", "status", "phases", "moved"),
)


@FUZZ
@given(st.sampled_from(COLUMNS), VALUES, st.booleans())
def test_a_damaged_row_is_a_store_error(column: str, value: object, strict: bool) -> None:
    with SqliteStore(":memory:", bytes(32)) as store:
        sa = SaName(b"initiato", b"responde")
        store.write(
            JournalEntry(
                b"transfer", "source", "nsg", sa, "mn", "198.51.100.7", "released", 1, 1.0, 1.0, b"x", b"y"
            )
        )
        store.put("record", "a", b"value")
        try:
            store._db.execute("PRAGMA ignore_check_constraints = ON")
            store._db.execute(f"UPDATE journal SET {column} = ?", (value,))
        except sqlite3.IntegrityError:
            return
        for ask in (
            store.open_transfers,
            store.history,
            lambda: store.epochs(sa),
            lambda: store.latest(sa),
            lambda: store.owned_from("nsg", "198.51.100.7"),
            lambda: store.find("source", b"transfer"),
            lambda: store.prune(5.0),
        ):
            try:
                found = ask()
            except StoreError as error:
                assert str(error)
            else:
                json.dumps(found, default=repr)


@FUZZ
@given(VALUES, VALUES)
def test_a_damaged_item_is_a_store_error(value: object, check: object) -> None:
    with SqliteStore(":memory:", bytes(32)) as store:
        store.put("record", "a", b"value")
        try:
            store._db.execute("UPDATE items SET value = ?", (value,))
            store._db.execute("UPDATE meta SET value = ?", (check,))
        except sqlite3.IntegrityError:
            return
        with pytest.raises(StoreError):
            store.get("record", "a")
        assert store.items("record") == []  # it is set aside: the agent starts without it
        assert store.get("record", "a") is None
        with pytest.raises(StoreError):
            store._set_up("x")


# --- notes in the store ------------------------------------------------------------------------------------

SPIS = SaName(b"initiato", b"responde")
ENDS = Endpoint(MN, 4500), Endpoint(NSG, 4500)
ORIGIN = Origin("psg", SPIS, 3, SPIS, "mn.example", ("10.4.0.10/32",), 1e9)
MOVE = MobileMove(
    *ENDS, *ENDS, (ChildMove(b"abcd", b"efgh", b"ijkl", b"mnop", 7, 99, ReplayState(9, 64, 5)),), ENDS
)
MIRROR = Mirror(7, *ENDS, (UpdateSpi(Protocol.ESP, b"\xc9\0\0\1", b"\xc9\0\0\2"),), b"i" * 64, b"f" * 512)
COOKIE = with_cookie(CTAR, ContextDataBlock(Fpt.COOKIE, bytes(12))).serialize()

NOTES: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "departure": (DEPARTURE.dumps(), lambda raw: Departure.loads("k", raw)),
    "origin": (ORIGIN.dumps(), lambda raw: Origin.loads("k", raw)),
    "block": (Block(SPIS, "mn.example", BLOCKING).dumps(), lambda raw: Block.loads("k", raw)),
    "move": (MOVE.dumps(), MobileMove.loads),
    "UPDATE_SPI": (MIRROR.dumps(), Mirror.loads),
    "plan": (PLAN.dumps(), Plan.loads),
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(("", "zz", "::%x", "0" * 16, "9" * 5000)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", NOTES)
@FUZZ
@given(st.data())
def test_a_damaged_note_is_a_store_error(name: str, data: st.DataObject) -> None:
    good, read = NOTES[name]
    read(good)
    raw = data.draw(damaged([good, b"[" * 50_000]))
    if good[:1] == b"{" and data.draw(st.booleans()):
        raw = json.dumps(data.draw(damaged_tree(json.loads(good), JSON))).encode()
    try:
        read(raw)
    except StoreError as error:
        assert str(error)


@FUZZ
@given(damaged([COOKIE, CTAR.serialize()]))
def test_any_datagram_is_split_from_its_cookie(octets: bytes) -> None:
    fixed = cookies.fixed_part(octets)
    if fixed:
        cookie, rest = cookies.split(octets, fixed)
        assert len(cookie) + len(rest) <= len(octets)
        answer = cookies.ask(octets, fixed, bytes(12))
        assert len(answer) <= len(octets)
        if answer:
            assert cookies.asked(Ctaa.parse(answer)) is not None


# --- files of the command line ---------------------------------------------------------------------------

STRONGSWAN = b'charon {\n  plugins { ha { local = 127.0.0.1\n } }\n "a b" = "c"\n}\ninclude x*.conf # y\n'


@FUZZ
@given(damaged([STRONGSWAN]))
def test_any_strongswan_conf_is_read(tmp_path: Path, octets: bytes) -> None:
    (tmp_path / "x.conf").write_bytes(octets)
    strongswan_conf.load(str(tmp_path / "x.conf"))


@FUZZ
@given(damaged([b'[control]\nsocket = "/run/x"\n', b"a = " + b"[" * 2000]))
def test_any_file_gives_the_hook_a_socket(tmp_path: Path, octets: bytes) -> None:
    (tmp_path / "c.toml").write_bytes(octets)
    assert isinstance(updown.socket_path({"config": str(tmp_path / "c.toml")}), str)
