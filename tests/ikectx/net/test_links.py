"""Connections: TLS and names on loopback, CXTP on them, and gateways that speak over them."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ikectx.disk.store import SqliteStore
from ikectx.engine.journaled import TransferPolicy
from ikectx.errors import ConfigError, LinkError, StateError
from ikectx.gateway import Gateway
from ikectx.net.credentials import Credentials, TlsConfig
from ikectx.net.links import Link, Links, Stream
from ikectx.net.tls import TlsStream, certificate_names, tls_dial, tls_listen
from ikectx.numbers import Status
from ikectx.peer import PeerConfig
from ikectx.sa.name import SaName
from ikectx.timing import Timing
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, Message, Pctd
from tests import hand_loop
from tests.certs import Authority
from tests.hand_loop import run_bounded as run
from tests.peers import Ether, MemoryGateway, MemoryStream, Network, Wire, a_context
from tests.worlds import KEY

TIMING = Timing(connect=0.5, offer=1.0, idle=0.05, keepalive=1.0, stop=0.3, backoff=0.01)
HERE = [PeerConfig("here", "127.0.0.1")]
PATIENT = replace(TIMING, connect=10.0, offer=10.0, idle=1.0)
"""For transfers that are to succeed, however busy the machine is."""


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


# -- TLS -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def listening(tls: TlsConfig) -> AsyncIterator[tuple[int, asyncio.Queue[Stream]]]:
    """A port, and the streams that were accepted on it."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    servers = await tls_listen(Credentials(tls), TIMING, [("127.0.0.1", 0)], accepted.put, HERE)
    await servers[0].start_serving()
    try:
        yield servers[0].sockets[0].getsockname()[1], accepted
    finally:
        servers[0].close()


async def closed(stream: Stream) -> bool:
    """Has the other side closed, with or without a word?"""
    try:
        return await stream.read() == b""
    except LinkError:
        return True
    finally:
        stream.close()


def test_both_ends_learn_each_other_s_names(ca: Authority) -> None:
    a, b = ca.issue("a", "a.example", "A2.example"), ca.issue("b.example")

    async def scenario() -> None:
        async with listening(b) as (port, accepted):
            near = await tls_dial(Credentials(a), TIMING)(PeerConfig("B.example", "127.0.0.1", port))
            far = await accepted.get()
            assert near.names == {"b.example"}  # no dNSName: the CN counts
            assert far.names == {"a.example", "a2.example"}  # with dNSNames the CN does not
            assert near.label == f"127.0.0.1:{port}"
            await near.write(b"there")
            assert await far.read() == b"there"
            await far.write(b"back")
            assert await near.read() == b"back"
            far.close()
            assert await near.read() == b""
            near.close()
            near.close()

    run(scenario())


def test_a_message_waits_for_no_acknowledgement_of_the_one_before(ca: Authority) -> None:
    a, b = ca.issue("a.example"), ca.issue("b.example")

    async def scenario() -> None:
        async with listening(b) as (port, accepted):
            ends = [
                await tls_dial(Credentials(a), TIMING)(PeerConfig("b.example", "127.0.0.1", port)),
                await accepted.get(),
            ]
            for end in ends:
                assert isinstance(end, TlsStream)
                assert end._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                end.close()

    run(scenario())


def test_a_wrong_name_is_told_to_who_dials(ca: Authority) -> None:
    a, b = ca.issue("a"), ca.issue("b", "b.example", "c.example")

    async def scenario() -> None:
        async with listening(b) as (port, _):
            with pytest.raises(LinkError, match=r"certificate of b\.example, c\.example instead of nsg"):
                await tls_dial(Credentials(a), TIMING)(PeerConfig("nsg", "127.0.0.1", port))
            peer = PeerConfig("nsg", "127.0.0.1", port, certificate_name="C.example")
            (await tls_dial(Credentials(a), TIMING)(peer)).close()

    run(scenario())


def test_a_certificate_of_another_ca_is_refused_by_both(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Authority(tmp_path, "other")
    a, b = ca.issue("a"), ca.issue("b")

    async def scenario() -> None:
        # who dials does not trust
        async with listening(b) as (port, accepted):
            with pytest.raises(LinkError, match="certificate is not accepted"):
                await tls_dial(Credentials(other.issue("a")), TIMING)(PeerConfig("b", "127.0.0.1", port))
            # who accepts does not trust: in TLS 1.3 that comes after the dialler's handshake
            stranger = other.issue("a", trusts=ca.path)
            assert await closed(
                await tls_dial(Credentials(stranger), TIMING)(PeerConfig("b", "127.0.0.1", port))
            )
            assert accepted.empty()
        assert "refused a connection from 127.0.0.1" in caplog.text
        assert "certificate is not accepted" in caplog.text
        expired = ca.issue("late", days=-1)
        async with listening(b) as (port, accepted):
            assert await closed(
                await tls_dial(Credentials(expired), TIMING)(PeerConfig("b", "127.0.0.1", port))
            )
        assert "expired" in caplog.text
        async with listening(expired) as (port, _):
            with pytest.raises(LinkError, match="expired"):
                await tls_dial(Credentials(a), TIMING)(PeerConfig("late", "127.0.0.1", port))

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_only_tls_1_3_with_a_certificate(ca: Authority, caplog: pytest.LogCaptureFixture) -> None:
    b = ca.issue("b")

    async def refused(port: int, context: ssl.SSLContext) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            octets = await reader.read()
            writer.close()
        except OSError:
            return True
        return octets == b""

    async def scenario() -> None:
        async with listening(b) as (port, accepted):
            old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            old.check_hostname = False
            old.load_verify_locations(ca.path)
            old.maximum_version = ssl.TLSVersion.TLSv1_2
            assert await refused(port, old)
            nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            nobody.check_hostname = False
            nobody.load_verify_locations(ca.path)
            assert await refused(port, nobody)
            # and one who says nothing is not waited for
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            writer.close()
            assert accepted.empty()
        assert caplog.text.count("refused a connection") == 3
        assert "unsupported protocol" in caplog.text
        assert "peer did not return a certificate" in caplog.text

    with caplog.at_level(logging.WARNING):
        run(scenario())


def test_nobody_there_is_a_link_error(ca: Authority) -> None:
    a = ca.issue("a")

    async def scenario() -> None:
        dial = tls_dial(Credentials(a), replace(TIMING, connect=0.05))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            with pytest.raises(LinkError, match=r"nsg at 127\.0\.0\.1:\d+: .*(refused|failed)"):
                await dial(PeerConfig("nsg", "127.0.0.1", port))
            free.listen(1)
            with pytest.raises(LinkError, match=r"did not answer within 0\.05 s"):
                await dial(PeerConfig("nsg", "127.0.0.1", port))
        with pytest.raises(LinkError, match="nsg at no such host"):
            await dial(PeerConfig("nsg", "no such host", 1))

    run(scenario())


def test_a_port_in_use_is_a_link_error(ca: Authority) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            where = taken.getsockname()
            with pytest.raises(LinkError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*in use"):
                await tls_listen(
                    Credentials(ca.issue("b")), TIMING, [("127.0.0.1", 0), where], asyncio.sleep, []
                )  # type: ignore[arg-type]

    run(scenario())


def test_unusable_certificates_name_the_file(ca: Authority, tmp_path: Path) -> None:
    good, other = ca.issue("good"), ca.issue("other")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for wrong, names in (
        (replace(good, ca=tmp_path / "no.pem"), r"no\.pem: No such file"),
        (replace(good, cert=tmp_path / "no.pem"), r"no\.pem: No such file"),
        (replace(good, key=tmp_path / "no.pem"), r"no\.pem: No such file"),
        (replace(good, ca=text), r"text\.pem: TLS: no certificate or crl found"),
        (replace(good, cert=text), r"text\.pem with .*good\.key\.pem"),
        (replace(good, key=other.key), r"key values mismatch"),
        (ca.issue("locked", password=b"secret"), r"locked\.key\.pem"),
    ):
        for server in (True, False):
            with pytest.raises(ConfigError, match=names):
                wrong.context(server=server)


def test_secrets_are_logged_only_on_demand(
    ca: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SSLKEYLOGFILE", raising=False)
    assert ca.issue("a").context(server=False).keylog_filename is None
    assert caplog.text == ""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "secrets"))
    assert ca.issue("a").context(server=True).keylog_filename == str(tmp_path / "secrets")
    assert "secrets of TLS connections are written to" in caplog.text
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "none" / "secrets"))
    with pytest.raises(ConfigError, match=r"SSLKEYLOGFILE: .*none/secrets: No such file"):
        ca.issue("a").context(server=True)


def test_names_of_certificates() -> None:
    assert certificate_names(None) == frozenset()
    assert certificate_names({}) == frozenset()
    subject = ((("countryName", "FR"),), (("commonName", "PSG"),))
    assert certificate_names({"subject": subject}) == {"psg"}
    sans = (("IP Address", "192.0.2.1"), ("DNS", "Gw.example"))
    assert certificate_names({"subject": subject, "subjectAltName": sans}) == {"gw.example"}
    assert certificate_names({"subject": subject, "subjectAltName": sans[:1]}) == {"psg"}


# -- links -----------------------------------------------------------------------------------------------


def pair() -> tuple[MemoryStream, MemoryStream]:
    wire = Wire(Network())
    near, far = (MemoryStream(frozenset({name}), name, wire) for name in ("far", "near"))
    near.other, far.other = far, near
    wire.ends = [near, far]
    return near, far


async def nothing(link: Link, message: Message) -> None:
    pass


MN, MN2 = ip_address("198.51.100.7"), ip_address("198.51.100.8")


def test_a_mistake_of_ours_ends_the_link_and_is_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "a key, perhaps"

    async def fails(link: Link, message: Message) -> None:
        raise ValueError(secret)

    async def scenario() -> None:
        near, far = pair()
        link = Link(near, PeerConfig("b", "b"), fails)
        running = asyncio.create_task(link.run())
        await far.write(Ctc(MN).serialize())
        await running
        assert "ValueError" in str(link.error)

    hand_loop.run(scenario())
    assert "ValueError, a mistake in the program" in caplog.text
    assert secret not in caplog.text


def test_messages_come_whole_and_leave_in_their_order() -> None:
    async def scenario() -> None:
        near, far = pair()
        arrived: list[Message] = []

        async def arrive(link: Link, message: Message) -> None:
            arrived.append(message)

        link = Link(near, PeerConfig("far", "far"), arrive)
        reading = asyncio.create_task(link.run())
        messages = [Pctd(MN), Ctc(MN2), Ctd(MN)]
        for message in messages:
            link.send(message)
        assert [await far.read() for _ in messages] == [message.serialize() for message in messages]
        # byte by byte: frames need not arrive whole
        for octet in Ctdr(MN).serialize() + Ctdr(MN2).serialize():
            near.inbox.put_nowait(bytes([octet]))
        await asyncio.sleep(0.01)
        assert arrived == [Ctdr(MN), Ctdr(MN2)]
        gone: list[Link] = []
        link.gone = gone.append
        far.close()
        await reading
        assert gone == [link]
        with pytest.raises(LinkError):
            link.send(Ctc(MN))

    run(scenario())


def test_a_link_serves_whoever_did_not_dial_it_while_it_is_lively() -> None:
    async def scenario() -> None:
        dialled: list[str] = []

        async def dial(peer: PeerConfig) -> Stream:
            dialled.append(peer.name)
            near, far = pair()
            others.append(far)
            return near

        others: list[Stream] = []
        used = asyncio.get_running_loop().time()
        links = Links(
            dial,
            replace(TIMING, idle=0.4),
            nothing,
            unused=lambda name: asyncio.get_running_loop().time() - used,
        )
        far = PeerConfig("far", "far")
        theirs, _ = pair()
        serving = asyncio.create_task(links.serve(theirs, far))
        await asyncio.sleep(0)
        taken = await links.get(far)
        assert taken.label == "far at far"
        assert dialled == []
        await asyncio.sleep(0.21)
        # its dialler may be about to close it
        own = await links.get(far)
        assert own is not taken
        assert dialled == ["far"]
        assert await links.get(far) is own
        for _ in range(10):
            used = asyncio.get_running_loop().time()
            await asyncio.sleep(0.1)
        assert own.error is None
        await asyncio.sleep(0.25)
        own.send(Ctc(MN))
        await asyncio.sleep(0.2)
        assert own.error is None  # something was said on it less than `idle` ago
        await asyncio.sleep(0.5)
        assert "idle" in str(own.error)
        assert taken.error is None
        assert links.connected("far")
        await links.close()
        await serving
        assert not links.connected("far")

    hand_loop.run(scenario())


def test_a_peer_that_has_connected_since_it_was_last_heard_is_reached_by_that_link() -> None:
    """After a loss of its power it knows nothing of the older one: a move that began on that was refused."""

    async def scenario() -> None:
        ends: list[Stream] = []

        async def dial(peer: PeerConfig) -> Stream:
            near, far = pair()
            ends.append(far)
            return near

        links, far = Links(dial, TIMING, nothing), PeerConfig("far", "far")
        own = await links.get(far)
        await asyncio.sleep(0.01)
        serving, found = [], []
        for _ in range(2):
            near, end = pair()
            ends.append(end)
            serving.append(asyncio.create_task(links.serve(near, far)))
            await asyncio.sleep(0.01)
            found.append(links.find("far"))
        assert own not in found
        assert found[0] is not found[1]
        await ends[0].write(Ctdr(MN).serialize())  # it is heard on the first one, too, so that lives
        await asyncio.sleep(0.01)
        assert links.find("far") is own
        await links.close()
        await asyncio.gather(*serving)

    hand_loop.run(scenario())


def test_a_peer_has_two_links_and_a_third_takes_the_place_of_the_quietest() -> None:
    async def scenario() -> None:
        links = Links(never, TIMING, nothing)
        peer, other = PeerConfig("far", "far"), PeerConfig("other", "other")
        ends = []
        serving = []
        for which in (peer, other, peer, peer):
            near, far = pair()
            ends.append(far)
            serving.append(asyncio.create_task(links.serve(near, which)))
            await asyncio.sleep(0.01)
            if len(ends) == 3:
                await ends[0].write(Ctdr(MN).serialize())  # so that the second is quieter
                await asyncio.sleep(0.01)
        assert [task.done() for task in serving] == [False, False, True, False]
        assert await ends[2].read() == b""
        await links.close()
        await asyncio.gather(*serving)

    hand_loop.run(scenario())


def test_a_link_that_is_kept_up_is_dialled_again_but_not_without_end() -> None:
    async def scenario() -> None:
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        dialled: list[float] = []
        far_ends: list[Stream] = []

        async def dial(peer: PeerConfig) -> Stream:
            dialled.append(round(loop.time() - began, 2))
            if len(dialled) <= 3:
                raise LinkError("nobody is there yet")
            near, far = pair()
            far_ends.append(far)
            return near

        links = Links(dial, Timing(idle=10.0, renew=100.0), nothing)
        links.keep([PeerConfig("far", "far")])
        await asyncio.sleep(50)
        assert dialled == [0.0, 0.2, 0.6, 1.4], "it waits longer each time, and an idle link stays"
        assert links.connected("far")
        far_ends[-1].close()
        await asyncio.sleep(1)
        assert dialled[4:] == [50.0]
        await asyncio.sleep(105)
        assert dialled[5:] == [150.0], "certificates are proven again"
        far_ends[-1].close()  # a peer that turns this gateway away does so after the handshake
        await asyncio.sleep(0.5)
        far_ends[-1].close()
        await asyncio.sleep(1)
        assert len(dialled) == 8
        await links.close()

    hand_loop.run(scenario(), seconds=300)


def test_a_mistake_in_dialling_ends_neither_a_wait_nor_a_link_that_is_kept_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        dialled = 0

        async def dial(peer: PeerConfig) -> Stream:
            nonlocal dialled
            dialled += 1
            if dialled <= 2:
                raise UnicodeError("a " + "secret")
            return pair()[0]

        links = Links(dial, Timing(idle=10.0), nothing)
        with pytest.raises(LinkError, match="far: a UnicodeError here"):
            await links.get(PeerConfig("far", "far"))
        links.keep([PeerConfig("far", "far")])
        await asyncio.sleep(1)
        assert links.connected("far")
        await links.close()

    hand_loop.run(scenario())
    assert "a mistake in the program" in caplog.text and "a secret" not in caplog.text


def test_who_keeps_a_link_up_uses_the_peers_while_that_is_lively() -> None:
    async def scenario() -> None:
        began = asyncio.get_running_loop().time()
        dialled: list[float] = []

        async def dial(peer: PeerConfig) -> Stream:
            dialled.append(round(asyncio.get_running_loop().time() - began, 2))
            near, far = pair()
            others.append(far)
            return near

        others: list[Stream] = []
        far, (theirs, end) = PeerConfig("far", "far"), pair()
        links = Links(dial, Timing(idle=10.0), nothing)
        serving = asyncio.create_task(links.serve(theirs, far))
        await asyncio.sleep(0)
        links.keep([far])
        await asyncio.sleep(3)
        await end.write(Ctdr(MN).serialize())
        await asyncio.sleep(7)
        assert dialled == [8.0]
        await links.close()
        await serving

    hand_loop.run(scenario())


async def never(peer: PeerConfig) -> Stream:
    raise LinkError("nobody dials here")


@pytest.mark.parametrize("octets", [b"\x00\x00\x00\x00", b"GET / HTTP/1.1\r\n\r\n", b"\x14\x80\x00\x03"])
def test_what_is_not_cxtp_ends_the_link(octets: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        near, far = pair()
        arrived: list[Message] = []

        async def arrive(link: Link, message: Message) -> None:
            arrived.append(message)

        link = Link(near, PeerConfig("far", "far"), arrive)
        near.inbox.put_nowait(Ctdr(MN).serialize() + octets)
        await link.run()
        assert arrived == [Ctdr(MN)]  # what came before it counts
        assert link.error is not None
        assert "not CXTP" in str(link.error)
        assert "sent what is not CXTP" in caplog.text
        assert await far.read() == b""

    run(scenario())


# -- gateways over TLS -----------------------------------------------------------------------------------


class Site:
    """A gateway with its own certificate, on loopback."""

    def __init__(
        self, name: str, tls: TlsConfig, folder: Path, ether: Ether, timing: Timing = TIMING
    ) -> None:
        self.daemon = MemoryGateway(name, ether)
        self.timing = timing
        self.store = SqliteStore(folder / f"{name}.db", KEY)
        self.tls = tls
        self.name = name
        self.agent: Gateway
        self.port = 0

    async def start(self, *peers: PeerConfig) -> None:
        self.agent = Gateway(
            self.name,
            self.daemon,
            self.daemon,
            self.store,
            peers,
            self.tls,
            policy=TransferPolicy(self.timing),
        )
        await self.agent.start([("127.0.0.1", 0)])
        self.port = self.agent.addresses[0][1]

    async def stop(self) -> None:
        await self.agent.stop()
        self.store.close()


@asynccontextmanager
async def two_sites(
    ca: Authority, folder: Path, *, known_as: str = "a", timing: Timing = TIMING
) -> AsyncIterator[tuple[Site, Site]]:
    """a, which b knows by the name `known_as`, and b."""
    ether = Ether()
    a = Site("a", ca.issue("a"), folder, ether, timing)
    b = Site("b", ca.issue("b-host", "b.example"), folder, ether, timing)
    await b.start(PeerConfig(known_as, "127.0.0.1", 1))
    await a.start(PeerConfig("b", "127.0.0.1", b.port, certificate_name="b.example"))
    try:
        yield a, b
    finally:
        await a.stop()
        await b.stop()


def test_a_transfer_over_tls_and_the_idle_link_is_closed(ca: Authority, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with two_sites(ca, tmp_path, timing=PATIENT) as (a, b):
            sas: list[SaName] = [a.daemon.serve(a_context(number)) for number in (1, 2)]
            reports = await a.agent.transfer_all(sas, "b")
            assert [report.result for report in reports] == ["moved", "moved"]
            assert set(b.daemon.served) == set(sas)
            assert reports[0].phases_ms["connect"] > 0
            assert b.agent.status()["peers"][0]["connected"]  # type: ignore[index]
            while a.agent.status()["peers"][0]["connected"]:  # type: ignore[index]
                await asyncio.sleep(0.01)

    run(scenario())


def test_an_unknown_peer_is_refused_and_both_logs_say_why(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with two_sites(ca, tmp_path, known_as="somebody") as (a, b):
            sa = a.daemon.serve(a_context())
            report = await a.agent.transfer(sa, "b")
            assert (report.result, report.status) == ("kept", Status.UNREACHABLE)
            assert "closed the connection" in report.text
            assert "certificate or name" in report.hint
            assert "its certificate says a" in caplog.text
            assert b.daemon.calls == []
            assert sa in a.daemon.served

    with caplog.at_level(logging.INFO):
        run(scenario())


def test_a_gateway_starts_once_and_only_whole(ca: Authority, tmp_path: Path) -> None:
    async def scenario() -> None:
        site = Site("a", ca.issue("a"), tmp_path, Ether())
        await site.start()
        with pytest.raises(StateError, match="runs already"):
            await site.agent.start()
        with pytest.raises(LinkError, match="in use"):
            other = Gateway("b", site.daemon, site.daemon, site.store, [], site.tls)
            await other.start([("127.0.0.1", site.port)])
        bare = Gateway("b", site.daemon, site.daemon, site.store, [])
        with pytest.raises(ConfigError, match="without TLS"):
            await bare.start([("127.0.0.1", 0)])
        await site.stop()

    run(scenario())


def test_who_asks_while_a_peer_is_dialled_gets_what_comes_of_that() -> None:
    async def scenario() -> None:
        dials: list[float] = []

        async def silent(peer: PeerConfig) -> Stream:
            dials.append(hand_loop.wall())
            await asyncio.sleep(5.0)
            raise LinkError(f"{peer.name} did not answer")

        links = Links(silent, Timing(), nothing)
        began = hand_loop.wall()
        asking = [asyncio.create_task(links.get(PeerConfig("b", "b"))) for _ in range(16)]
        await asyncio.sleep(1.0)
        asking[0].cancel()  # the others have their link all the same
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(one) for one in found[1:]} == {LinkError} and isinstance(
            found[0], asyncio.CancelledError
        )
        assert (len(dials), round(hand_loop.wall() - began)) == (1, 5)
        with pytest.raises(LinkError):
            await links.get(PeerConfig("b", "b"))
        assert len(dials) == 2
        last = asyncio.create_task(links.get(PeerConfig("b", "b")))
        await asyncio.sleep(0)
        await links.close()
        await asyncio.gather(last, return_exceptions=True)
        assert len(asyncio.all_tasks()) == 1

    hand_loop.run(scenario(), 100)


def test_who_asks_late_in_a_dial_that_fails_has_its_own_time() -> None:
    # a link that is kept up is dialled again and again: the SYN that this one sent may be lost, though the
    # peer is there when a transfer asks
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        dials: list[float] = []
        comes: list[float] = []
        ends: list[Stream] = []

        async def dial(peer: PeerConfig) -> Stream:
            dials.append(round(loop.time() - began, 1))
            if dials[-1] in comes:
                await asyncio.sleep(0.5)
                near, there = pair()
                ends.append(there)
                return near
            await asyncio.sleep(5.0)
            raise LinkError(f"{peer.name} did not answer")

        async def ask(after: float) -> Link:
            await asyncio.sleep(after)
            return await links.get(far)

        links, far, began = Links(dial, Timing(), nothing), PeerConfig("far", "far"), loop.time()
        # who asks first is told after 5 s, who asks at 4.5 s at 9.5 s; both of the latter by one dial
        first, *late = (asyncio.create_task(ask(after)) for after in (0.0, 4.5, 4.5))
        with pytest.raises(LinkError, match="did not answer"):
            await first
        assert round(loop.time() - began, 1) == 5.0
        for one in late:
            with pytest.raises(LinkError, match="did not answer"):
                await one
        assert (dials, round(loop.time() - began, 1)) == ([0.0, 5.0], 9.5)
        await asyncio.sleep(1.0)
        # and it has the link if the second attempt comes through
        comes.append(16.0)
        began, dials = loop.time() - 11.0, []
        first, later = (asyncio.create_task(ask(after)) for after in (0.0, 4.5))
        with pytest.raises(LinkError):
            await first
        await later
        assert (dials, round(loop.time() - began, 1)) == ([11.0, 16.0], 16.5)
        await links.close()

    hand_loop.run(scenario(), 100)
