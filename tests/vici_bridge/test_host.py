"""What the agent keeps of charon's HA stream, and says of SAs it does not know; charon is a stand-in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.engine.ports import MoveReport
from ikectx.errors import BusyError, CharonError, LinkError, StoreError, UnknownSaError
from ikectx.sa.context import FinalState, IkeContext
from ikectx.sa.name import SaName
from ikectx_cli import service
from tests.listed import listing_of
from tests.peers import a_context
from tests.record_world import stream
from tests.worlds import until
from vici_bridge import due_rekeys
from vici_bridge import host as host_module
from vici_bridge.deadlines import Deadlines
from vici_bridge.due_rekeys import DueRekeys
from vici_bridge.effects import freeze as freeze_module
from vici_bridge.effects.source import CharonSource
from vici_bridge.ha import sockets
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.vici.views import sa_views

KEY = bytes(range(32))


class Vici:
    """What `CharonHost` asks of charon, answered from a list of contexts."""

    def __init__(self, *contexts: IkeContext, state: str = "ESTABLISHED") -> None:
        self.contexts = list(contexts)
        self.state = state
        self.told = "5.9.8"

    async def half_open(self) -> int:
        return 0

    async def version(self) -> dict[str, str]:
        return {"version": self.told}

    def list_sas(self) -> list[dict[str, Any]]:
        return [self._view(context) for context in self.contexts]

    async def traps(self) -> list[tuple[str, str]]:
        return []

    async def connection(self, name: str) -> dict[str, Any] | None:
        return (await self.connections()).get(name)

    async def connections(self, names: object = None) -> dict[str, dict[str, Any]]:
        return {}

    async def close(self) -> None: ...

    def _view(self, context: IkeContext) -> dict[str, Any]:
        children = {
            f"{child.name}-{number}": {
                "name": child.name,
                "uniqueid": str(number),
                "reqid": str(number),
                "state": "INSTALLED",
                "spi-in": child.spi_in.hex(),
                "spi-out": child.spi_out.hex(),
            }
            for number, child in enumerate(context.children, 1)
        }
        return {
            "name": context.connection,
            "uniqueid": "1",
            "version": "2",
            "state": self.state,
            "initiator-spi": context.spis[0].hex(),
            "responder-spi": context.spis[1].hex(),
            "local-host": str(context.local.address),
            "local-port": str(context.local.port),
            "remote-host": str(context.remote.address),
            "remote-port": str(context.remote.port),
            "child-sas": children,
        }


@asynccontextmanager
async def host_of(vici: Vici, store: SqliteStore, *, segments: int = 1) -> AsyncIterator[CharonHost]:
    host = CharonHost(HostConfig((), kernel_esp=False, segments=segments), store)
    host.vici = vici  # type: ignore[assignment]
    host.listing = listing_of(vici.list_sas)
    try:
        yield host
    finally:
        host.detour.close()


async def nobody(*_: object) -> MoveReport:
    raise AssertionError("the MN is not to be asked")


def hear(host: CharonHost, context: IkeContext) -> None:
    """charon tells of the SA on the HA socket."""
    for message in import_messages(context, 3):
        host._hear(message.serialize())


def test_what_charon_tells_is_stored_before_anything_else_happens() -> None:
    async def scenario() -> None:
        store = SqliteStore(":memory:", KEY)
        context = a_context()
        async with host_of(Vici(), store) as host:
            hear(host, context)
            await asyncio.sleep(0)
            # the agent is killed here
        async with host_of(Vici(), store) as host:
            host.record.load(store.items("record"))
            assert host.record.names() == (context.spis,)
            assert [child.spi_in for child in host.record.context(context.spis).children] == [
                child.spi_in for child in context.children
            ]

    asyncio.run(scenario())


def test_what_was_seen_of_an_sa_will_not_do_after_an_order_about_it() -> None:
    async def scenario() -> None:
        context, other = a_context(1), a_context(2)
        async with host_of(Vici(context, other), SqliteStore(":memory:", KEY)) as host:
            ordered: list[bytes] = []

            async def send(datagrams: Iterable[bytes]) -> None:
                ordered.extend(datagrams)

            host.ha_link.send = send  # type: ignore[assignment]
            await host.views()
            await asyncio.sleep(0.001)
            await host.send(import_messages(context, 3))
            assert ordered and host.listing.unchanged(context.spis) is None
            assert host.listing.unchanged(other.spis) is not None

    asyncio.run(scenario())


def test_a_resync_asks_for_all_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        sent: list[HaMessage] = []

        async def send(messages: Iterable[HaMessage]) -> None:
            sent.extend(messages)

        async with host_of(Vici(), SqliteStore(":memory:", KEY), segments=3) as host:
            monkeypatch.setattr(host, "send", send)
            await host.resync()
        (asked,) = sent
        assert asked.type is HaType.RESYNC
        assert [segment for name, segment in asked.attributes if name is Attr.SEGMENT] == [1, 2, 3]

    asyncio.run(scenario())


def test_a_record_that_cannot_be_stored_is_stored_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        store = SqliteStore(":memory:", KEY)
        put = store.put
        full = True

        def fails(kind: str, key: str, value: bytes, *, soon: bool = False) -> None:
            if full:
                raise StoreError("disk full")
            put(kind, key, value)

        monkeypatch.setattr(store, "put", fails)
        monkeypatch.setattr(host_module, "SAVE_AGAIN", 0.01)
        async with host_of(Vici(), store) as host:
            hear(host, a_context())
            await asyncio.sleep(0)
            assert not store.items("record")
            full = False
            await until(lambda: store.items("record"))
            assert len(store.items("record")) == 1
        assert "disk full" in caplog.text

    asyncio.run(scenario())


@pytest.mark.parametrize(("state", "warned"), [("ESTABLISHED", True), ("CONNECTING", False)])
def test_only_sas_that_are_up_can_be_unknown(
    state: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with host_of(Vici(a_context(), state=state), SqliteStore(":memory:", KEY)) as host:
            await host._reconcile()

    asyncio.run(scenario())
    assert ("cannot be moved" in caplog.text) is warned
    assert "0 IKE_SAs known" in caplog.text


@pytest.mark.parametrize("children", [1, 1250])
def test_what_is_told_while_charon_is_down_is_bounded_and_given_back(
    children: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any local user may send from charon's address then: 6,000 SAs took 325 MB, for good. Here a quarter of
    them meet a quarter of the bound."""
    monkeypatch.setattr(sockets, "UNCONFIRMED", sockets.UNCONFIRMED // 4)

    async def scenario() -> None:
        store = SqliteStore(":memory:", KEY)
        async with host_of(Vici(), store) as host:
            for number in range(1500 if children == 1 else 1):
                context = a_context(number)
                spis = [(0xC0000000 + n).to_bytes(4) for n in range(children)]
                child = context.children[0]
                hear(host, replace(context, children=tuple(replace(child, spi_in=spi) for spi in spis)))
                await asyncio.sleep(0)
            host.save()
            known = len(host.record)
            assert 125 < known < 500 if children == 1 else known == 1
            kept = sum(len(value) for _, value in store.items("record"))
            assert kept < sockets.UNCONFIRMED
            if children == 1:
                assert "left unheard" in caplog.text and "127.0.0.1:4510" in caplog.text
            host._charon_state(True)
            await asyncio.gather(*host._tasks)
            assert len(host.record) == 0 and not store.items("record")
            assert not host.heard._spoke
            hear(host, a_context())
            assert len(host.record) == 1

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())


def test_an_agent_that_stops_does_not_miss_charon(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with host_of(Vici(), SqliteStore(":memory:", KEY)) as host:
            await host.close()
            host._charon_state(False)
            host._charon_state(True)
            assert not host._tasks

    asyncio.run(scenario())
    assert "not reachable" not in caplog.text


def test_a_mistake_in_the_background_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(error: Exception) -> None:
        raise error

    async def scenario() -> None:
        async with host_of(Vici(), SqliteStore(":memory:", KEY)) as host:
            host.spawn(fails(ValueError("a key")))
            host.spawn(fails(CharonError("charon is away")))
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert "ValueError" in caplog.text and "a key" not in caplog.text
    assert "a background task failed: charon is away" in caplog.text


def test_a_child_nobody_told_of_is_not_left_behind() -> None:
    # it was made while no agent ran: without its keys the SA must not move, and a retry will not help
    async def scenario() -> None:
        context = a_context()
        child = context.children[0]
        later = replace(context, children=(replace(child, spi_in=b"late", spi_out=b"late"),))
        async with host_of(Vici(later), SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            with pytest.raises(UnknownSaError) as caught:
                await CharonSource(host, nobody).export(context.spis)
            assert "resync" in caught.value.hint
            assert child.name in str(caught.value)
            (before,), (after,) = await host.views(), sa_views(Vici(context).list_sas())
            assert (host.knows(before), host.knows(after)) == (False, True)

    asyncio.run(scenario())


def test_a_child_that_comes_and_goes_makes_the_sa_busy() -> None:
    async def scenario() -> None:
        context = a_context()
        vici = Vici(context)
        vici.state = "REKEYING"
        async with host_of(vici, SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            with pytest.raises(BusyError):
                await CharonSource(host, nobody).export(context.spis)

    asyncio.run(scenario())


# -- an MN that has left ---------------------------------------------------------------------------------


class Mute:
    """Keeps nothing from anybody, and says how much it kept."""

    kept = 0

    def mute_in(self, spis: SaName) -> None: ...

    def mute_out(self, spis: SaName) -> None: ...

    def mute(self, spis: SaName) -> None: ...

    def only_answer(self, spis: SaName) -> None: ...

    def half_muted(self) -> set[SaName]:
        return set()

    def unmute(self, spis: SaName) -> None: ...

    def dropped(self, spis: SaName) -> int:
        return self.kept


class Waiting(Vici):
    """With tasks under way."""

    tasks: tuple[str, ...] = ()

    def _view(self, context: IkeContext) -> dict[str, Any]:
        return {**super()._view(context), "tasks-active": list(self.tasks)}


@asynccontextmanager
async def left(tasks: tuple[str, ...]) -> AsyncIterator[tuple[CharonSource, IkeContext, Mute]]:
    """charon waits for the answer to what these tasks asked; HA told the ID after that request's."""
    context = a_context()
    vici = Waiting(context)
    vici.tasks = tasks
    async with host_of(vici, SqliteStore(":memory:", KEY)) as host:
        host.mute = mute = Mute()  # type: ignore[assignment]
        hear(host, context)
        yield CharonSource(host, nobody), context, mute


@pytest.mark.parametrize("tasks", [("IKE_DPD",), ("IKE_MOBIKE",), ("IKE_MOBIKE", "IKE_DPD")])
def test_an_mn_that_has_left_takes_the_message_id_along_as_a_question(tasks: tuple[str, ...]) -> None:
    async def scenario() -> None:
        async with left(tasks) as (source, context, mute):
            with pytest.raises(BusyError):
                await source.export(context.spis)
            exported = await source.export(context.spis, away=True)
            assert (exported.unsure, exported.mid_initiator) == (True, context.mid_initiator - 1)
            mute.kept = 3  # charon sends it again
            final = await source.freeze(exported, "nsg", away=True)
            assert (final.unsure, final.mid_initiator) == (True, context.mid_initiator - 1)
            assert final.mid_responder == context.mid_responder

    asyncio.run(scenario())


@pytest.mark.parametrize("task", ["IKE_REKEY", "CHILD_REKEY", "IKE_DELETE", "IKE_REAUTH", "CHILD_DELETE"])
def test_what_says_more_than_addresses_keeps_an_sa_where_it_is(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(freeze_module, "IDLE_TIMEOUT", 0.1)

    async def scenario() -> None:
        async with left(("IKE_DPD", task)) as (source, context, _):
            with pytest.raises(BusyError, match=task):
                await source.export(context.spis, away=True)
            with pytest.raises(BusyError, match=task):
                await source.freeze(context, "nsg", away=True)

    asyncio.run(scenario())


def test_without_a_proof_that_the_mn_has_left_the_answer_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(freeze_module, "IDLE_TIMEOUT", 0.1)

    async def scenario() -> None:
        async with left(("IKE_DPD",)) as (source, context, _):
            with pytest.raises(BusyError, match="IKE_DPD"):
                await source.freeze(context, "nsg")

    asyncio.run(scenario())


def test_an_idle_sa_of_an_mn_that_has_left_is_certain() -> None:
    async def scenario() -> None:
        async with left(()) as (source, context, mute):
            exported = await source.export(context.spis, away=True)
            mute.kept = 1  # it began something after the last look
            with pytest.raises(BusyError):
                await source.freeze(exported, "nsg", away=True)
            mute.kept = 0
            final = await source.freeze(exported, "nsg", away=True)
            assert (final.unsure, final.mid_initiator) == (False, context.mid_initiator)

    asyncio.run(scenario())


def test_a_thaw_asks_for_every_id_that_the_mn_may_expect() -> None:
    """m is without an answer; the other gateway may have had one to m, and to m + 1."""
    asked: list[int] = []

    async def silent(here: IkeContext, final: FinalState, arrived: object) -> MoveReport:
        asked.append(final.mid_initiator)
        raise LinkError("silent")

    async def scenario() -> None:
        async with left(("IKE_DPD",)) as (source, context, _):
            source._mover = silent
            exported = await source.export(context.spis, away=True)
            await source.freeze(exported, "nsg", away=True)
            await source.thaw(exported, 1)
            last = context.mid_initiator - 1
            assert asked == [last, last + 1, last + 2, last + 3]

    asyncio.run(scenario())


@pytest.mark.parametrize("taken", [True, False])
def test_a_thaw_after_a_refusal_that_came_first_leaves_routes_and_mn_alone(taken: bool) -> None:
    """The updown script would announce routes anew, although the MN may be served at the other gateway."""
    asked: list[int] = []
    ran: list[bool] = []

    async def silent(here: IkeContext, final: FinalState, arrived: object) -> MoveReport:
        asked.append(final.mid_initiator)
        raise LinkError("silent")

    async def updown(context: IkeContext, *, up: bool, **_: object) -> None:
        ran.append(up)

    async def scenario() -> None:
        async with left(()) as (source, context, _):
            source._mover = silent
            source._host.updown = updown  # type: ignore[method-assign]
            await source.freeze(context, "nsg")
            if not taken:
                source.not_taken(context.spis)
            await source.thaw(context, 1)
            assert (ran, bool(asked)) == (([False, True], True) if taken else ([], False))

    asyncio.run(scenario())


def test_b8_lifetimes_are_watched_on_after_an_error_and_none_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(due_rekeys, "REKEY_AGAIN", 0.01)

    class Rekeying(Vici):
        asked: list[int]

        async def rekey(self, *, ike_id: int | None = None, child_id: int | None = None) -> None:
            self.asked.append(ike_id or 0)
            if len(self.asked) == 1:
                raise CharonError("charon has another exchange under way")

        def _view(self, context: IkeContext) -> dict[str, Any]:
            return {**super()._view(context), "uniqueid": str(self.contexts.index(context) + 1)}

    async def scenario() -> None:
        store = SqliteStore(":memory:", KEY)
        first, second = a_context(1), a_context(2)
        vici = Rekeying(first, second)
        vici.asked = []
        async with host_of(vici, store) as host:
            for context in (first, second):
                host.deadlines.keep(context.spis, None, 1.0)
            fails = [StoreError("the disk is full")]

            def due(*args: Any) -> Any:
                if fails:
                    raise fails.pop()
                return Deadlines.due(host.deadlines, *args)

            monkeypatch.setattr(host.deadlines, "due", due)
            watcher = asyncio.create_task(
                DueRekeys(host.deadlines, host.fresh, host.view, host.known, host._rekey).watch()
            )
            async with asyncio.timeout(5):
                await until(lambda: vici.asked == [1, 2, 1])
            assert host.deadlines.next_due() is None
            watcher.cancel()

    asyncio.run(scenario())


def test_b10_nothing_is_kept_of_sas_that_have_gone() -> None:
    async def scenario() -> None:
        store = SqliteStore(":memory:", KEY)
        async with host_of(Vici(), store) as host:
            await asyncio.sleep(0)
            for message in stream("5.9.8_rekeys"):
                host._hear(message.serialize())
                spi = message.find(Attr.IKE_ID, IkeId)
                if spi is not None:
                    store.put("doubt", spi.spis.key, b"")
                    host.doubts._keys.add(spi.spis.key)
            assert len(host.heard._spoke) > 1
            assert len(host.known._news) > 1
            host.save()  # several IKE_SAs have been rekeyed
            assert set(host.heard._spoke) <= set(host.record.names())
            assert set(host.known._news) <= set(host.record.names())
            assert {sa for sa, _ in host.doubts._told} <= set(host.record.names())
            assert {key for key, _ in store.items("doubt")} <= {sa.key for sa in host.record.names()}
            for name in host.record.names():
                host.record.forget(name)  # moved to another gateway
            host.save()
            assert (host.heard._spoke, host.doubts._told, list(store.items("doubt"))) == ({}, set(), [])
            assert (host.known._news, host.known.present.names()) == ({}, set())

    asyncio.run(scenario())


def test_b20_an_unexpected_error_is_logged_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    secret = bytes(range(1, 9)).hex()

    async def wrong() -> None:
        raise ValueError(secret)

    async def scenario() -> None:
        async with host_of(Vici(), SqliteStore(":memory:", KEY)) as host:
            host.spawn(wrong())
            await asyncio.sleep(0.01)
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(service._mistake)
            loop.call_soon(lambda: int(secret + "x"))
            await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert caplog.text.count("ValueError, a mistake in the program") == 2
    assert secret not in caplog.text
