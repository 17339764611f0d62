"""VICI on the event loop: round trips are counted, and what does not come whole ends the connection."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ikectx.errors import CharonError, WireError
from tests.hand_loop import run_bounded as run
from tests.vici_bridge.vici.test_client import StandIn, like_charon, response
from vici_bridge.vici.charon import MOMENT, MOST, PIECE, Charon
from vici_bridge.vici.codec import Deframer, Packet, PacketType, parse_message, serialize_message

SAS = [{"mn": {"uniqueid": str(number), "initiator-spi": f"{number:016x}"}} for number in (1, 2, 3)]


class Telling:
    """A charon with three SAs and a connection, which notes what it is asked."""

    def __init__(self) -> None:
        self.heard: list[tuple[PacketType, str]] = []
        self.pool = {"mobile": {"size": "9"}}
        self.sas = SAS
        self.refused: str | None = None
        """The unique ID of an SA that is not listed."""

    def __call__(self, packet: Packet) -> bytes | None:
        self.heard.append((packet.type, packet.name))
        if packet.type is PacketType.CMD_REQUEST:
            match packet.name:
                case "list-sas":
                    wanted = packet.message.get("ike-id")
                    if wanted is not None and wanted == self.refused:
                        return response(success="no", errmsg="not now")
                    sas = [sa for sa in self.sas if wanted in (None, sa["mn"]["uniqueid"])]
                    return _events("list-sa", sas) + response()
                case "list-conns":
                    wanted = packet.message.get("ike", "home")
                    return _events("list-conn", [{"home": {}}] * (wanted == "home")) + response()
                case "get-pools":
                    leases = {"leases": {"0": {"address": "10.3.0.1"}}}
                    if packet.message.get("leases") != "yes":
                        return response(**self.pool)
                    return response(**{name: {**pool, **leases} for name, pool in self.pool.items()})
                case "stats":
                    return response(ikesas={"total": "7", "half-open": "2"})
        return like_charon(packet)


def _events(name: str, trees: list[dict[str, Any]]) -> bytes:
    return b"".join(Packet(PacketType.EVENT, name, serialize_message(tree)).framed() for tree in trees)


@pytest.fixture
def telling(tmp_path: Path) -> Iterator[tuple[Telling, StandIn]]:
    answers = Telling()
    stand_in = StandIn(tmp_path / "charon.vici", answers)
    yield answers, stand_in
    stand_in.close()


async def soon(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_a_listing_is_one_round_trip_once_the_event_is_registered(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        charon = Charon("unix://" + stand_in.path)
        told = await charon.read_sas(bytes)
        assert [parse_message(octets)["mn"]["uniqueid"] for octets in told] == ["1", "2", "3"]
        assert [kind.name for kind, _ in answers.heard] == ["EVENT_REGISTER", "CMD_REQUEST"]
        answers.heard.clear()
        assert await charon.read_sas(lambda octets: b"0000000000000002" in octets) == [False, True, False]
        assert answers.heard == [(PacketType.CMD_REQUEST, "list-sas")]
        assert len(await charon.read_sas(bytes, ike_ids=[2])) == 1
        answers.heard.clear()
        assert len(await charon.read_sas(bytes, ike_ids=[2])) == 1
        assert answers.heard == [(PacketType.CMD_REQUEST, "list-sas")]
        await charon.close()

    asyncio.run(scenario())


def test_an_answer_with_the_same_octets_is_not_parsed_again(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        charon = Charon(stand_in.path)
        pools, connections = await charon.pools(), await charon.connections()
        assert connections == {"home": {"name": "home"}}
        assert await charon.pools() is pools and await charon.connections() is connections
        assert await charon.connections(["home"]) is await charon.connections(["home"])
        answers.pool = {"mobile": {"size": "8"}}
        assert (await charon.pools())["mobile"]["size"] == "8"
        found = (await charon.pools(leases=True))["mobile"]
        assert found == {"size": "8", "leases": {"0": {"address": "10.3.0.1"}}}
        assert await charon.half_open() == 2
        await charon.close()

    asyncio.run(scenario())


def test_a_few_connections_are_asked_for_by_name(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        charon = Charon(stand_in.path)
        for names, requests in ((["home", "none"], 2), ([], 0), ([f"c{number}" for number in range(9)], 1)):
            answers.heard.clear()
            assert (await charon.connections(names)).keys() == ({"home"} if names else set())
            assert answers.heard.count((PacketType.CMD_REQUEST, "list-conns")) == requests
        await charon.close()

    asyncio.run(scenario())


def test_many_who_ask_at_once_get_their_own_answers(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        charon = Charon(telling[1].path)
        asked = [charon.read_sas(bytes, ike_ids=[1 + number % 3]) for number in range(30)]
        told = await asyncio.gather(*asked)
        ids = [parse_message(octets)["mn"]["uniqueid"] for (octets,) in told]
        assert ids == [str(1 + number % 3) for number in range(30)]
        await charon.close()

    asyncio.run(scenario())


def test_a_refusal_keeps_the_connection(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        _, stand_in = telling
        charon = Charon(stand_in.path)
        with pytest.raises(CharonError, match="refused terminate: no matching"):
            await charon.terminate(9, 1000)
        with pytest.raises(CharonError, match="refused terminate: no matching"):
            await charon.terminate(9, 1000)
        assert len(stand_in.conns) == 1
        with pytest.raises(CharonError, match="does not know the command nonsense"):
            await charon.request("nonsense")
        assert (await charon.version())["version"] == "5.9.8"
        assert len(stand_in.conns) == 2
        await charon.close()

    asyncio.run(scenario())


def test_answers_behind_a_refusal_are_nobody_else_s(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        charon = Charon(stand_in.path)
        answers.refused = "1"
        with pytest.raises(CharonError, match="refused list-sas"):
            await charon.read_sas(bytes, ike_ids=[1, 2])
        (told,) = await charon.read_sas(bytes, ike_ids=[3])
        assert parse_message(told)["mn"]["uniqueid"] == "3"
        await charon.close()

    asyncio.run(scenario())


def test_what_the_caller_cannot_read_leaves_nothing_for_the_next_answer(
    telling: tuple[Telling, StandIn],
) -> None:
    async def scenario() -> None:
        charon = Charon(telling[1].path)
        with pytest.raises(WireError, match="answer to list-sas does not parse"):
            await charon.read_sas(lambda octets: parse_message(octets[1:]))
        assert (await charon.version())["daemon"] == "charon-systemd"
        await charon.close()

    asyncio.run(scenario())


class Held(Telling):
    """A charon with an SA that a thread of it works on until `ended`: it tells all SAs after that only."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def __call__(self, packet: Packet) -> bytes | None:
        if packet.name == "list-sas" and "ike-id" not in packet.message:
            self.ended.wait(100)
        return super().__call__(packet)


def test_b27_a_listing_that_waits_for_an_sa_holds_up_no_other_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        answers = Held()
        stand_in = StandIn(tmp_path / "c", answers)
        charon = Charon(stand_in.path)
        try:
            waiting = [asyncio.create_task(charon.read_sas(bytes)) for _ in range(MOST - 1)]
            await soon(lambda: len(stand_in.conns) == MOST - 1)
            assert (await charon.pools())["mobile"] == {"size": "9"}
            assert list(await charon.connections()) == ["home"]
            assert await charon.rekey(ike_id=3) == 1
            for _ in range(3):
                assert len(await charon.read_sas(bytes, ike_ids=[2])) == 1
            # one for what charon answers at once, one for rekeying, one for single SAs, the listings'
            assert len(stand_in.conns) == MOST + 2 and not any(task.done() for task in waiting)
            more = [asyncio.create_task(charon.read_sas(bytes)) for _ in range(5)]
            await asyncio.sleep(3 * MOMENT)
            assert await charon.half_open() == 2
            answers.ended.set()
            assert [len(told) for told in await asyncio.gather(*waiting, *more)] == [3] * (MOST + 4)
            assert len(stand_in.conns) == MOST + 3
        finally:
            answers.ended.set()
            await charon.close()
            stand_in.close()

    asyncio.run(scenario())


def test_while_many_sas_are_read_something_else_comes_between(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        answers.sas = [{"mn": {"uniqueid": str(number)}} for number in range(1, 1001)]
        charon = Charon(stand_in.path)
        read, most = [0], 0

        def count(octets: bytes) -> None:
            read[0] += 1

        listing = asyncio.create_task(charon.read_sas(count))
        while not listing.done():
            before = read[0]
            await asyncio.sleep(0)
            most = max(most, read[0] - before)
        assert read == [1000] and most <= PIECE
        await charon.close()

    run(scenario())


@pytest.mark.parametrize(
    "octets", ["00000000", "ffffffff", "000000020900", "0000000201ff", "00000004070a6100"]
)
def test_nonsense_is_an_error_of_the_request(tmp_path: Path, octets: str) -> None:
    async def scenario() -> None:
        stand_in = StandIn(tmp_path / "c", lambda packet: bytes.fromhex(octets))
        charon = Charon(stand_in.path, timeout=0.3)
        with pytest.raises((WireError, CharonError)):
            await charon.version()
        await charon.close()
        stand_in.close()

    asyncio.run(scenario())


def test_an_answer_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    async def scenario() -> None:
        stand_in = StandIn(tmp_path / "c", lambda packet: b"\0\0\0\x10\x01")
        charon = Charon(stand_in.path, timeout=0.3)
        started = time.monotonic()
        with pytest.raises(CharonError, match="in time"):
            await charon.version()
        assert time.monotonic() - started < 3
        await charon.close()
        stand_in.close()

    asyncio.run(scenario())


def test_who_does_not_wait_any_longer_leaves_the_answer_to_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        silent = True
        stand_in = StandIn(tmp_path / "c", lambda packet: b"" if silent else like_charon(packet))
        charon = Charon(stand_in.path)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await charon.version()
        silent = False
        assert (await charon.version())["version"] == "5.9.8"
        assert len(stand_in.conns) == 2
        await charon.close()
        stand_in.close()

    asyncio.run(scenario())


def test_charon_tells_of_new_addresses_and_of_nothing_else(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        answers, stand_in = telling
        charon, states, moves, ups = Charon(stand_in.path), list[bool](), list[Any](), list[Any]()
        charon.watch(states.append, {"ike-update": moves.append, "ike-updown": ups.append})
        await soon(lambda: states == [True])
        assert (PacketType.EVENT_REGISTER, "ike-update") in answers.heard
        event = {"remote-host": "192.0.2.9", "mn": {"uniqueid": "1"}}
        unreadable = Packet(PacketType.EVENT, "ike-update", b"\xff").framed()
        stand_in.conns[-1].sendall(unreadable + _events("ike-update", [event, event]))
        await soon(lambda: moves == [event, event])
        stand_in.conns[-1].sendall(_events("ike-updown", [{"up": "yes"}]))
        await soon(lambda: ups == [{"up": "yes"}])
        stand_in.conns[-1].sendall(b"\0\0\0\1\x63")  # not VICI: charon counts as gone, and is asked again
        await soon(lambda: states == [True, False, True])
        await charon.close()

    run(scenario())


def test_a_charon_that_goes_before_it_tells_of_addresses_is_asked_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        def goes(packet: Packet) -> bytes | None:
            if packet.type is PacketType.EVENT_REGISTER and not gone:
                return gone.append(packet)
            return like_charon(packet)

        gone, states = list[Packet](), list[bool]()
        stand_in = StandIn(tmp_path / "c", goes)
        charon = Charon(stand_in.path)
        charon.watch(states.append, {"ike-update": lambda told: None})
        await soon(lambda: states == [True])
        assert gone
        await charon.close()
        stand_in.close()

    run(scenario())


def test_charon_comes_and_goes(telling: tuple[Telling, StandIn]) -> None:
    async def scenario() -> None:
        _, stand_in = telling
        charon = Charon(stand_in.path)
        states: list[bool] = []
        charon.watch(states.append)
        await soon(lambda: states == [True])
        await charon.version()
        stand_in.close()
        await soon(lambda: states == [True, False])
        with pytest.raises(CharonError, match="cannot be used"):
            await charon.version()
        stand_in.open()
        await soon(lambda: states == [True, False, True])
        assert (await charon.version())["version"] == "5.9.8"
        await charon.close()

    asyncio.run(scenario())


def test_an_event_between_two_registrations_is_heard_and_ends_nothing(tmp_path: Path) -> None:
    """It was taken for "charon does not know the event", and what followed ended the watch without a word."""
    path, writers = str(tmp_path / "vici"), list[asyncio.StreamWriter]()

    async def charon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        deframer = Deframer()
        while data := await reader.read(65536):
            for packet in deframer.receive(data):
                if packet.name == "second":
                    body = serialize_message({"x": "1"})
                    writer.write(Packet(PacketType.EVENT, "first", body).framed())
                if packet.type is PacketType.EVENT_REGISTER:
                    writer.write(Packet(PacketType.EVENT_CONFIRM).framed())
                else:
                    writer.write(Packet(PacketType.CMD_RESPONSE, body=serialize_message({})).framed())

    async def scenario() -> None:
        server = await asyncio.start_unix_server(charon, path)
        told, heard = list[bool](), list[Any]()
        watched = Charon(path)
        watched.watch(told.append, dict.fromkeys(("first", "second", "third"), heard.append))
        await soon(lambda: bool(heard))
        assert told == [True]
        for writer in writers:
            writer.transport.abort()
        await soon(lambda: told == [True, False, True])
        await watched.close()
        server.close()

    run(scenario())


def test_charon_may_wait_for_a_mobile_node_before_it_answers(tmp_path: Path) -> None:
    """A Delete: charon answers when the mobile node has."""

    async def charon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames = Deframer()
        while octets := await reader.read(65536):
            for _ in frames.receive(octets):
                await asyncio.sleep(0.2)
                body = serialize_message({"success": "yes", "terminated": "1"})
                writer.write(Packet(PacketType.CMD_RESPONSE, body=body).framed())

    async def scenario() -> None:
        path = str(tmp_path / "vici")
        server = await asyncio.start_unix_server(charon, path)
        assert await Charon(path, timeout=0.1).terminate(1, 300) == 1
        with pytest.raises(CharonError):
            await Charon(path, timeout=0.1).terminate(1, -1)
        server.close()

    asyncio.run(scenario())
