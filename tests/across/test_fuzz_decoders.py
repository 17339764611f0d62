"""Everything that comes from outside, damaged: what comes out is a value, or the one error of its decoder.

The decoders and their errors are in `tests.fuzz.targets`; `python -m tests.fuzz` tries each a million times.
Here each is tried for a moment, and so is what is more than one call.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sqlite3
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import _lru_cache_wrapper
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ikectx.disk.store import SqliteStore
from ikectx.engine.journal import JournalEntry
from ikectx.errors import KernelError, RefusedError, StoreError, WireError
from ikectx.sa.context import ChildContext, Endpoint, Secret
from ikectx.sa.name import SaName
from ikectx_cli import settings as strongswan_conf
from ikectx_cli import updown
from tests.fuzz import changed, damaged, damaged_tree
from tests.fuzz.host import NOTES, netlink_datagram
from tests.fuzz.target import KEY
from tests.fuzz.targets import TARGETS
from tests.record_world import CONTEXT
from tests.vici_bridge.policy.test_claims import CONNECTION, POOLS, numbered
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.record import Record
from vici_bridge.policy.allowed import AllowedConnection, pool_ranges
from vici_bridge.vici.views import missing_algorithms, peer_context, sa_views

FUZZ = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)
INPUTS = 200
FOUND: dict[str, tuple[str, ...]] = {
    # the new SPI of another SA is the old one of the SA that was asked about
    "names in an answer": (
        "29290000140304a3e9c124000100000000c1000001000000140204a3e9c200000201004000c9000002",
    ),
}
"""Octets that some run of `python -m tests.fuzz` found, by target."""


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_good(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].decode(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_one_error(name: str) -> None:
    target, dice = TARGETS[name], Random(name)
    damage = (changed(dice, target.seeds) for _ in range(INPUTS))
    for octets in (*map(bytes.fromhex, FOUND.get(name, ())), *damage):
        try:
            target.decode(octets)
        except target.errors as error:
            assert str(error) and str(error).isprintable()
            assert KEY.reveal().hex() not in str(error)


ROOT = Path(__file__).parents[2]
PACKAGES = ("ikectx", "mobike_ext", "vici_bridge", "cli")
OURS = ("ikectx", "mobike_ext", "vici_bridge", "ikectx_cli")
READS = frozenset({"from_bytes", "unpack", "unpack_from", "iter_unpack"})
NO_TARGET = {
    "arguments and files of the operator": "reach.request reach._ip settings.pid_behind updown.parse",
    "said by a child of this process": "strangers.as_nobody",
    "of the store, which is sealed": "audit.lines ledger._framed ledger._let_go ledger._import"
    " ledger._old_relay ledger._old_names deadlines.__init__ known_agents._shown notes.in_question notes.last"
    " rekey_after_move.__init__ traps.__init__",
    "numbers that the kernel gives in a fixed structure": "place._ours_by_acl plain._one_address_each"
    " sockets._look_for_losses control._user nat_relay.answered ike_queue._configure",
    "of octets made here": "core._show requests.pull packet_io.udp_datagram packet_io.bpf_program"
    " watch.request_filter netlink._exchange netlink._numbered xfrm.cpu cxtp.compute_token"
    " kernel_events._word",
    "fixed fields of what is parsed already": "claims.check_spis message_ids._after packet_io._read",
    "any octets are a number, whose range `test_dh.py` tries": "dh._modp_shared dh._modp_power",
    "the answer of the helper, which is root's": "updown_helper.ask",
}
"""Functions that read octets without a target, as module.function, by the reason."""


def readers() -> dict[tuple[str, int], str]:
    """Functions of the product that take octets apart, by file and first line: by their name, or because
    they read numbers or JSON."""
    found = {}
    for path in (one for package in PACKAGES for one in (ROOT / package).rglob("*.py")):
        if (ROOT / "cli" / "lab") in path.parents:
            continue
        for each in ast.walk(ast.parse(path.read_text())):
            if not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            calls = [one.func for one in ast.walk(each) if isinstance(one, ast.Call)]
            called = [one for one in calls if isinstance(one, ast.Attribute)]
            reads = any(one.attr in READS or ast.unparse(one) == "json.loads" for one in called)
            if reads or re.fullmatch(r"(parse|decode)(_\w+)?|loads|read_generation|read_child", each.name):
                first = min([each.lineno, *(one.lineno for one in each.decorator_list)])
                found[str(path.resolve()), first] = f"{path.stem}.{each.name}"
    return found


def test_whatever_reads_octets_has_a_target() -> None:
    called: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    for module in [one for name, one in sys.modules.items() if name.partition(".")[0] in OURS]:
        for each in vars(module).values():
            if isinstance(each, _lru_cache_wrapper):  # another test may have had it read
                each.cache_clear()
    sys.setprofile(note)
    try:
        for target in TARGETS.values():
            for seed in target.seeds:
                target.decode(seed)
    finally:
        sys.setprofile(None)
    reached = {(str(Path(file).resolve()), line) for file, line in called}
    left = {name for at, name in readers().items() if at not in reached}
    assert left == {name for names in NO_TARGET.values() for name in names.split()}


@pytest.mark.parametrize("length", [16, 17, 19, 20, 23])
def test_an_answer_of_netlink_that_is_cut_short(length: int) -> None:
    octets = struct.pack("=IHHII", length, 2, 0x200, 1, 0) + bytes(length - 16)
    with contextlib.suppress(KernelError):
        netlink_datagram(octets)


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


# --- the record ------------------------------------------------------------------------------------------


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
