"""What the kernel notes of IKE messages that leave (`MessageIds`), and what the agent makes of it."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing
from dataclasses import replace

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.errors import KernelError, UnknownSaError, UsageError
from ikectx.sa.name import SaName
from tests.netns import Namespace
from tests.peers import a_context
from tests.vici_bridge.test_host import KEY, Vici, hear, host_of, nobody
from vici_bridge.effects.source import CharonSource
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import ike_mid
from vici_bridge.kernel import message_ids
from vici_bridge.kernel.message_ids import MessageIds
from vici_bridge.kernel.mute import MARK, Mute
from vici_bridge.kernel.nftables import run_nft

SPIS = SaName(bytes.fromhex("f102030405060708"), bytes.fromhex("1112131415161718"))
OTHER = SaName(SPIS[0], bytes.fromhex("1112131415161719"))
AUTH, CREATE, INFORMATIONAL = 35, 36, 37
ANSWER = 0x20


def ike(
    message_id: int,
    flags: int = 0x08,
    *,
    spis: SaName = SPIS,
    exchange: int = INFORMATIONAL,
    version: int = 0x20,
) -> bytes:
    header = spis[0] + spis[1] + bytes((46, version, exchange, flags))
    return header + message_id.to_bytes(4) + (60).to_bytes(4) + bytes(32)


def send(
    datagram: bytes, host: str = "127.0.0.1", port: int = 500, *, marker: bool = False, mark: int = 0
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        sock.bind((host, port))
        sock.sendto(bytes(4) * marker + datagram, (host, 40123))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_last_request_and_the_last_answer_count(space: Namespace, host: str) -> None:
    with closing(MessageIds()) as noted:
        assert noted.prepare() is False
        assert noted.prepare() is True
        assert noted.after(SPIS) == (0, 0)
        for message_id in (0, 1, 2):
            send(ike(message_id), host)
        assert noted.after(SPIS) == (3, 0)
        send(ike(6, ANSWER), host, 4500, marker=True)
        send(ike(0x01020304, ANSWER | 0x08), host, 4500, marker=True)
        assert noted.after(SPIS) == (3, 0x01020305)
        send(ike(9, exchange=CREATE), host, 4500, marker=True)
        send(ike(1, exchange=AUTH, spis=OTHER), host)
        assert noted.after(SPIS) == (10, 0x01020305)
        assert noted.after(OTHER) == (2, 0)
        send(ike(11), host, mark=MARK)
        assert noted.after(SPIS) == (10, 0x01020305), "the agent's own"


def test_what_is_no_message_of_an_sa_is_not_noted(space: Namespace) -> None:
    with closing(MessageIds()) as noted:
        noted.prepare()
        send(ike(7), port=4500)  # ESP in UDP that looks like it
        send(ike(7), port=501)
        send(ike(7, exchange=34))
        send(ike(7, version=0x10))
        assert noted.after(SPIS) == (0, 0)


def test_what_is_kept_back_has_been_used_all_the_same(space: Namespace) -> None:
    mute = Mute()
    mute.mute_out(SPIS)
    with closing(MessageIds()) as noted:
        noted.prepare()
        with pytest.raises(PermissionError):
            send(ike(7))
        assert mute.dropped(SPIS) == 1
        assert noted.after(SPIS) == (8, 0)
    mute.unmute(SPIS)
    mute.close()


def test_notes_outlive_whoever_began_them(space: Namespace) -> None:
    with closing(MessageIds()) as noted:
        noted.prepare()
        send(ike(7))
    send(ike(8))
    with closing(MessageIds()) as noted:
        assert noted.prepare() is True
        assert noted.after(SPIS) == (9, 0)
        space.run("nft flush chain inet ikectx_ids output")
        send(ike(9))
        assert noted.prepare() is False
        assert noted.after(SPIS) == (0, 0), "what stood there was older than the last message"
        send(ike(10))
        space.run("nft flush ruleset")
        assert noted.after(SPIS) == (0, 0)


OLDER = """
add table inet ikectx_ids
add map inet ikectx_ids requests { typeof @th,64,64 . @th,128,64 : meta mark; flags dynamic,timeout; }
add map inet ikectx_ids responses { typeof @th,64,64 . @th,128,64 : meta mark; flags dynamic,timeout; }
add chain inet ikectx_ids output { type filter hook output priority -310; policy accept; }
"""
"""The table as agents before made it: nft 1.0 keeps such a value as it is, nft 1.1 turns its octets round."""


def older_table(shift: int = 0) -> str:
    """That table with its rules. `shift`: bits by which they miss the message ID."""
    script = OLDER
    for port, test, at in ((500, "", 64), (4500, "@th,64,32 0 ", 96)):
        for name, flag in (("requests", 0), ("responses", ANSWER)):
            note = f"{{ @th,{at},64 . @th,{at + 64},64 : @th,{at + 160 + shift},32 }}"
            script += (
                f"add rule inet ikectx_ids output meta mark != {MARK:#x} udp sport {port} {test}"
                f"@th,{at + 136},8 0x20 @th,{at + 144},8 35-37 @th,{at + 152},8 & 0x20 == {flag:#x}"
                f" delete @{name} {note} add @{name} {note}\n"
            )
    return script


@pytest.mark.parametrize("shift", [0, 8])
def test_an_older_agents_table_counts_only_where_it_notes_what_left(space: Namespace, shift: int) -> None:
    run_nft(older_table(shift))
    send(ike(1))
    send(ike(2, ANSWER), port=4500, marker=True)
    with closing(MessageIds()) as noted:
        right = noted.after(SPIS) == (2, 3)  # with nft 1.0; never where the rules miss the number
        assert not (right and shift)
        assert noted.prepare() is right
        assert noted.after(SPIS) == ((2, 3) if right else (0, 0))
        send(ike(4))
        send(ike(5, ANSWER), port=4500, marker=True)
        assert noted.after(SPIS) == (5, 6)
        assert noted.prepare() is True


def test_what_was_sent_to_try_the_rules_leaves_no_note(space: Namespace) -> None:
    with closing(MessageIds()) as noted:
        assert noted.right() is None
        noted.prepare()
        assert noted.right() is True
    assert "elements" not in space.run("nft list table inet ikectx_ids")


def test_what_nft_shows_is_what_left_and_a_saved_ruleset_brings_it_back(space: Namespace) -> None:
    with closing(MessageIds()) as noted:
        noted.prepare()
        send(ike(0x01020304))
        saved = space.run("nft list table inet ikectx_ids")
        assert saved.count("0xf102030405060708 . 0x1112131415161718") == saved.count(": 0x1020304 ") == 1
        space.run("nft flush ruleset")
        run_nft(saved)
        assert noted.after(SPIS) == (0x01020305, 0)
        assert noted.prepare() is True


def test_rules_that_never_note_what_left_are_not_used(
    space: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(script: str) -> None:
        run_nft(script.replace(",32 }", ",32 & 0xffffff }"))

    monkeypatch.setattr(message_ids, "run_nft", other)
    with closing(MessageIds()) as noted:
        with pytest.raises(KernelError, match="reads back") as caught:
            noted.prepare()
        assert "nft --version" in caught.value.hint
        send(ike(0x01020304))
        assert noted.after(SPIS) == (0, 0)
    assert "ikectx_ids" not in space.run("nft list ruleset")


def test_rules_that_cannot_be_tried_are_told(space: Namespace) -> None:
    space.ip("addr flush dev lo")
    with closing(MessageIds()) as noted, pytest.raises(KernelError, match="loopback"):
        noted.prepare()


def test_a_firewall_that_drops_what_is_sent_to_try_the_rules_comes_after_them(space: Namespace) -> None:
    space.run(
        "nft add table inet firewall",
        "nft add chain inet firewall out {type filter hook output priority 0;policy drop;}",
    )
    with closing(MessageIds()) as noted:
        assert noted.prepare() is False
        assert noted.prepare() is True


def test_other_ports_and_bad_ones(space: Namespace) -> None:
    with closing(MessageIds((4510, 4511))) as noted:
        noted.prepare()
        send(ike(1), port=4510)
        send(ike(2, ANSWER), port=4511, marker=True)
        send(ike(5))
        assert noted.after(SPIS) == (2, 3)
    for ports in ((500,), (500, 4500, 1), (0, 4500)):
        with pytest.raises(UsageError):
            MessageIds(ports)
    with pytest.raises(UsageError), closing(MessageIds()) as noted:
        noted.after(SaName(b"short", SPIS.spi_r))


def test_somebody_elses_table(space: Namespace) -> None:
    space.run(
        "nft add table inet ikectx_ids",
        "nft add map inet ikectx_ids requests {type inet_service:verdict;elements={7:drop};}",
    )
    with closing(MessageIds()) as noted, pytest.raises(KernelError):
        noted.after(SPIS)


# --- what the agent makes of it ------------------------------------------------------------------------


class Noted:
    """The kernel's notes, told by the test."""

    def __init__(self, stands: bool = True) -> None:
        self.stands = stands
        self.ids = (0, 0)
        self.broken = False

    def prepare(self) -> bool:
        if self.broken:
            raise KernelError("no nftables")
        return self.stands

    def after(self, spis: SaName) -> tuple[int, int]:
        if self.broken:
            raise KernelError("no nftables")
        return self.ids

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("noted", "expected"),
    [((0, 0), (5, 7)), ((6, 0), (6, 7)), ((0, 9), (5, 9)), ((4, 7), (5, 7)), ((6, 9), (6, 9))],
)
def test_the_higher_ids_count(noted: tuple[int, int], expected: tuple[int, int]) -> None:
    async def scenario() -> None:
        context = replace(a_context(), mid_initiator=5, mid_responder=7)
        async with host_of(Vici(context), SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            host.doubts.noted = kernel = Noted()  # type: ignore[assignment]
            kernel.ids = noted
            exported = await CharonSource(host, nobody).export(context.spis)
            assert (exported.mid_initiator, exported.mid_responder) == expected
            again = host.record.context(context.spis)
            assert (again.mid_initiator, again.mid_responder) == expected

    asyncio.run(scenario())


def test_without_nftables_what_charon_told_counts(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        context = replace(a_context(), mid_initiator=5, mid_responder=7)
        async with host_of(Vici(context), SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            host.doubts.noted = kernel = Noted()  # type: ignore[assignment]
            kernel.broken = True
            await host.doubts.begin(host.record.names())
            exported = await CharonSource(host, nobody).export(context.spis)
            assert (exported.mid_initiator, exported.mid_responder) == (5, 7)
            assert "will not be known" in caplog.text
            host.doubts._told.clear()  # that was an agent before this one
            await host.doubts.begin(host.record.names())
            with pytest.raises(UnknownSaError, match="message IDs"):
                await CharonSource(host, nobody).export(context.spis)

    asyncio.run(scenario())


def test_an_sa_that_nobody_listened_to_stays_until_it_has_spoken_both_ways() -> None:
    async def scenario() -> None:
        context = replace(a_context(), mid_initiator=5, mid_responder=7)
        store = SqliteStore(":memory:", KEY)
        async with host_of(Vici(context), store) as host:
            hear(host, context)
            host.doubts._told.clear()  # that was an agent before this one
            host.doubts.noted = kernel = Noted(stands=False)  # type: ignore[assignment]
            await host.doubts.begin(host.record.names())
            (view,) = await host.views()
            source = CharonSource(host, nobody)
            for kernel.ids in ((0, 0), (9, 0), (0, 9)):
                with pytest.raises(UnknownSaError, match="message IDs") as caught:
                    await source.export(context.spis)
                assert "resync" in caught.value.hint
                assert not host.knows(view)
            kernel.stands = True
            await host.doubts.begin(host.record.names())  # another agent: the doubt stays
            with pytest.raises(UnknownSaError):
                await source.export(context.spis)
            kernel.ids = (9, 8)
            assert (await source.export(context.spis)).mid_initiator == 9
            assert host.knows(view)
            kernel.ids = (0, 0)  # forgotten after a week: this agent has listened since
            assert (await source.export(context.spis)).mid_initiator == 9

    asyncio.run(scenario())


def test_doubts_end_with_the_sa() -> None:
    async def scenario() -> None:
        context = a_context()
        store = SqliteStore(":memory:", KEY)
        vici = Vici(context)
        async with host_of(vici, store) as host:
            hear(host, context)
            host.doubts.noted = Noted(stands=False)  # type: ignore[assignment]
            await host.doubts.begin(host.record.names())
            assert len(list(store.items("doubt"))) == 1
            vici.contexts.clear()
            await host._reconcile()
            assert list(store.items("doubt")) == []

    asyncio.run(scenario())


@pytest.mark.parametrize("noted", [(0, 0), (9, 0)])
def test_a_resync_tells_message_ids_that_nobody_noted(noted: tuple[int, int]) -> None:
    # what the hint promises: charon repeats what it told of each SA
    async def scenario() -> None:
        context = replace(a_context(), mid_initiator=5, mid_responder=7)
        async with host_of(Vici(context), SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            host.doubts._told.clear()  # that was an agent before this one
            host.doubts.noted = kernel = Noted(stands=False)  # type: ignore[assignment]
            await host.doubts.begin(host.record.names())
            kernel.ids = noted
            source, ike = CharonSource(host, nobody), IkeId.of(context.current)
            for initiator, mid in ((True, 8), (False, 9)):
                with pytest.raises(UnknownSaError):
                    await source.export(context.spis)
                host._hear(ike_mid(3, ike, initiator=initiator, mid=mid).serialize())
            exported = await source.export(context.spis)
            assert (exported.mid_initiator, exported.mid_responder) == (max(8, noted[0]), 9)

    asyncio.run(scenario())
