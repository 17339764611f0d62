"""An attacker in a lab: `python -m ikectx_cli.lab.attacker JSON`, in mn2's network namespace.

JSON is an `Order`. Until its time is over, or SIGTERM, the program sends what its kind says. Then it prints
as JSON what it has sent, what became of that, and what CPU time this took: attackers and their victims share
a machine here. The forgeries are made by this project's own encoders, with keys that nobody else has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import secrets
import select
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

from ikectx.errors import IkectxError
from ikectx.net.credentials import TlsConfig
from ikectx.numbers import IdType
from ikectx.sa.context import Endpoint, Identity, IkeContext, Secret, TrafficSelector
from ikectx.sa.name import SaName
from ikectx.wire.cookies import asked
from ikectx.wire.cxtp import Ctaa, Ctar, Ctd, CtReq, Pctd
from ikectx.wire.profile import TransferHeader, encode
from ikectx.wire.tokens import Purpose, make_ctar

from .config import CXTP_PORT, Tunnel
from .inject import datagram
from .net import GATEWAYS, INNER, OUTER
from .twin import FRESH_OCTETS, TwinNames, twin

TAKEN = 4096
"""Datagrams, or messages, made in advance and sent again and again."""
BURST = 64
"""Datagrams sent in a row, before the next look at the clock."""
LIFE = 300
"""Seconds for which a forged token says it is good."""
PATIENCE = 5.0
"""Seconds to wait for a connection, and for TLS on it."""
ADDRESSES = 32
"""Addresses of the attacker's machine that half-open connections come from; the first is that of a peer."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to do. `kind`: of `lab_attack.KINDS`. `rate`: datagrams, connections or messages a second.

    `seconds`: for how long. `work`: the lab's folder. `spis`: those of the IKE_SA (initiator, responder), in
    hexadecimal. `most`: connections to hold at a time.
    """

    kind: str
    rate: float
    seconds: float
    work: str
    spis: tuple[str, str]
    most: int


class Pace:
    """How many may be sent by now, at so many a second. Nothing is made up for after a pause of a second."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._last = now
        self._owed = 0.0

    def due(self, now: float) -> int:
        self._owed += min(now - self._last, 1.0) * self._rate
        self._last = now
        count = int(self._owed)
        self._owed -= count
        return count


# --- datagrams -------------------------------------------------------------------------------------------


def stranger() -> str:
    """An address that nobody has, somewhere else than all hosts of the lab."""
    return f"10.7.{secrets.randbelow(256)}.{1 + secrets.randbelow(254)}"


def forged(gateway: str, purpose: Purpose, spis: SaName, mn: str) -> Ctar:
    """A CTAR for that gateway with a token whose key is random."""
    other = next(name for name in GATEWAYS if name != gateway)
    psg, nsg = (other, gateway) if purpose is Purpose.ARRIVE else (gateway, other)
    return make_ctar(
        Secret(secrets.token_bytes(32)),
        mn=ip_address(mn),
        router=ip_address(OUTER[other][4]),
        sequence=secrets.randbits(32),
        purpose=purpose,
        spis=spis,
        psg=psg,
        nsg=nsg,
        expiry=int(time.time()) + LIFE,
        care_of=Endpoint(ip_address(stranger()), 4500) if purpose is Purpose.ARRIVE else None,
    )


def bad(number: int, good: bytes) -> bytes:
    """No CTAR: noise, a CTAR cut short or changed, another CXTP message, or one that is far too long."""
    match number % 5:
        case 0:
            return secrets.token_bytes(1 + secrets.randbelow(200))
        case 1:
            return good[: secrets.randbelow(len(good))]
        case 2:
            changed = bytearray(good)
            for _ in range(4):
                changed[secrets.randbelow(len(changed))] = secrets.randbelow(256)
            return bytes(changed)
        case 3:
            return Ctd(IPv4Address(stranger())).serialize()
        case _:
            return good + secrets.token_bytes(1200)


_UNKNOWN = ("ctar-random", "garbage")
"""Attacks that know of no SA."""


def datagrams(order: Order, count: int = TAKEN) -> list[tuple[str, bytes]]:
    """(gateway's address, IP packet) each: to both gateways, announcements and arrivals, by turns."""
    known = SaName.from_key("".join(order.spis))
    made = []
    for number in range(count):
        gateway = GATEWAYS[number % 2]
        purpose = (Purpose.ARRIVE, Purpose.ANNOUNCE)[number // 2 % 2]
        drawn = SaName(secrets.token_bytes(8), secrets.token_bytes(8))
        mn = stranger() if order.kind in _UNKNOWN else OUTER["mn"][4]
        spis = drawn if order.kind in _UNKNOWN else known
        payload = forged(gateway, purpose, spis, mn).serialize()
        if order.kind == "garbage":
            payload = bad(number, payload)
        source = OUTER["mn"][4] if order.kind == "ctar-mn" else stranger()
        to = OUTER[gateway][4]
        port = 1024 + secrets.randbelow(60000)
        made.append((to, datagram(source, port, to, CXTP_PORT, payload)))
    return made


def shoot(order: Order, stopped: Callable[[], bool]) -> Counter[str]:
    """Sends datagrams with sources that are not its own."""
    ammunition, told, number = datagrams(order), Counter[str](), 0
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        end = time.monotonic() + order.seconds
        pace = Pace(order.rate, time.monotonic())
        owed = 0
        while (now := time.monotonic()) < end and not stopped():
            owed += pace.due(now)
            for _ in range(min(owed, BURST)):
                to, octets = ammunition[number % len(ammunition)]
                number += 1
                owed -= 1
                try:
                    raw.sendto(octets, (to, 0))
                except OSError:
                    told["not sent"] += 1
                else:
                    told["sent"] += 1
                    told["octets"] += len(octets)
            if not owed:
                time.sleep(0.002)
    return told


def bearing(cookie: bytes, payload: bytes) -> bytes:
    """A CTAR of IPv4 without a cookie, with one: it goes behind the fixed part (`ikectx.wire.cookies`)."""
    whole = payload[:4] + payload[4:20] + cookie + payload[20:]
    return whole[:2] + len(whole).to_bytes(2) + whole[4:]


def cookie_of(answer: bytes) -> bytes:
    """The block that a CTAA asks its receiver to send back; empty where it asks for none."""
    try:
        block = asked(Ctaa.parse(answer))
    except IkectxError:
        return b""
    return b"" if block is None else block.serialize()


def talk(order: Order, stopped: Callable[[], bool]) -> Counter[str]:
    """Sends CTARs from addresses of its own, and with each the cookie that it was asked for there."""
    told, number = Counter[str](), 0
    ammunition = [(to, octets[28:]) for to, octets in datagrams(order)]
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as waiting:
        socks = []
        for address in sources():
            sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.bind((address, 0))
            waiting.register(sock, selectors.EVENT_READ)
            socks.append(sock)
        cookies: dict[tuple[socket.socket, str], bytes] = {}
        end = time.monotonic() + order.seconds
        pace = Pace(order.rate, time.monotonic())
        while (now := time.monotonic()) < end and not stopped():
            for _ in range(pace.due(now)):
                to, payload = ammunition[number % len(ammunition)]
                sock = socks[number // 4 % len(socks)]
                number += 1
                cookie = cookies.get((sock, to), b"")
                try:
                    sock.sendto(bearing(cookie, payload) if cookie else payload, (to, CXTP_PORT))
                except OSError:
                    told["not sent"] += 1
                else:
                    told["sent"] += 1
                    told["with a cookie"] += bool(cookie)
            for key, _ in waiting.select(0.002):
                with contextlib.suppress(OSError):
                    answer, (source, _port) = key.fileobj.recvfrom(2048)  # type: ignore[union-attr]
                    told["answers"] += 1
                    if cookie := cookie_of(answer):
                        cookies[key.fileobj, source] = cookie  # type: ignore[index]
    return told


# --- connections that say nothing ------------------------------------------------------------------------


def half_open(order: Order, stopped: Callable[[], bool]) -> Counter[str]:
    """Holds up to `order.most` TCP connections to each gateway's port, and opens others for those cut off."""
    told, number = Counter[str](), 0
    waiting = select.epoll()
    held: dict[int, socket.socket] = {}
    up: set[int] = set()
    pace = Pace(order.rate, time.monotonic())
    end = time.monotonic() + order.seconds
    while (now := time.monotonic()) < end and not stopped():
        for _ in range(min(pace.due(now), 2 * order.most - len(held))):
            address = sources()[number % ADDRESSES]
            sock = socket.socket()
            sock.setblocking(False)
            try:
                sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
                sock.bind((address, 0))
                sock.connect_ex((OUTER[GATEWAYS[number % 2]][4], CXTP_PORT))
            except OSError:
                told["not sent"] += 1
                sock.close()
                continue
            number += 1
            told["sent"] += 1
            held[sock.fileno()] = sock
            waiting.register(sock, select.EPOLLOUT | select.EPOLLIN | select.EPOLLRDHUP)
        for fd, events in waiting.poll(0.01):
            if events & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLERR | select.EPOLLHUP):
                told["cut off" if fd in up else "refused"] += 1
                up.discard(fd)
                waiting.unregister(fd)
                held.pop(fd).close()
            elif events & select.EPOLLOUT:
                up.add(fd)
                waiting.modify(fd, select.EPOLLIN | select.EPOLLRDHUP)
        told["held at most"] = max(told["held at most"], len(up))
    for sock in held.values():
        sock.close()
    return told


_BIND_ADDRESS_NO_PORT = 24


def sources() -> list[str]:
    """Addresses in mn2's network, the first of which is mn2's own."""
    first = IPv4Address(OUTER["mn2"][4])
    return [str(first + step) for step in range(ADDRESSES)]


# --- a peer with a certificate of its own ----------------------------------------------------------------


def credentials(work: Path) -> TlsConfig:
    """Those of mn2, which the gateways have as a peer (`Tunnel.rogue`)."""
    pki = work / "pki"
    return TlsConfig(pki / "mn2.pem", pki / "mn2.key", pki / "ca.pem")


async def dial(order: Order) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    tls = credentials(Path(order.work)).context(server=False)
    async with asyncio.timeout(PATIENCE):  # wait_for (3.11) may lose a cancellation that comes as it ends
        return await asyncio.open_connection(
            OUTER["nsg"][4], CXTP_PORT, ssl=tls, local_addr=(OUTER["mn2"][4], 0)
        )


async def links(order: Order, stop: asyncio.Event) -> Counter[str]:
    """Holds up to `order.most` TLS connections with nsg, and says nothing on them."""
    told, held = Counter[str](), set[asyncio.Task[None]]()
    up = 0

    async def hold() -> None:
        nonlocal up
        writer = None
        try:
            reader, writer = await dial(order)
            up += 1
            told["held at most"] = max(told["held at most"], up)
            try:
                await reader.read()
            finally:
                up -= 1
            told["cut off"] += 1
        except (OSError, TimeoutError):
            told["refused" if writer is None else "cut off"] += 1
        finally:
            if writer is not None:
                writer.transport.abort()

    loop = asyncio.get_running_loop()
    pace, end = Pace(order.rate, loop.time()), loop.time() + order.seconds
    while (now := loop.time()) < end and not stop.is_set():
        for _ in range(min(pace.due(now), order.most - len(held))):
            told["sent"] += 1
            task = loop.create_task(hold())
            held.add(task)
            task.add_done_callback(held.discard)
        await asyncio.sleep(0.02)
    for task in held:
        task.cancel()
    await asyncio.gather(*held, return_exceptions=True)
    return told


def offered(order: Order) -> IkeContext:
    """An SA that nsg's connection for mn allows: one more of that mobile node, at another outer address."""
    made = twin(Tunnel(), "ike", TwinNames(*order.spis, "", ""), secrets.token_bytes(FRESH_OCTETS))["nsg"]
    generation = replace(made.current, spi_i=secrets.token_bytes(8), spi_r=secrets.token_bytes(8))
    vip = ip_address(INNER["mn"][4])
    return replace(
        made,
        connection="mn",
        generations=(generation,),
        remote_id=Identity(IdType.FQDN, b"mn.example"),
        remote=Endpoint(ip_address(stranger()), 4500),
        remote_vips=(vip,),
        children=(replace(made.children[0], remote_ts=(TrafficSelector(vip, vip),)),),
    )


def messages(order: Order, count: int = TAKEN) -> Iterator[bytes]:
    """Offers that are empty, to be checked, or of an identity not allowed; contexts that nobody offered;
    requests with a forged token. By turns, each for another mobile node."""
    known = SaName.from_key("".join(order.spis))
    for number in range(count):
        mn = ip_address(stranger())
        header = TransferHeader(secrets.token_bytes(8), "check")
        match number % 5:
            case 0:
                yield Pctd(mn).serialize()
            case 1:
                yield Pctd(mn, encode(offered(order), transfer=header)).serialize()
            case 2:
                evil = replace(offered(order), remote_id=Identity(IdType.FQDN, b"root.evil"))
                yield Pctd(mn, encode(evil, transfer=replace(header, intent="hold"))).serialize()
            case 3:
                yield Ctd(mn, encode(offered(order), transfer=header)).serialize()
            case _:
                ctar = forged("psg", Purpose.ARRIVE, known, OUTER["mn"][4])
                yield CtReq(ctar.mn, ctar.sequence, ctar.token, ctar.blocks).serialize()


async def flood(order: Order, stop: asyncio.Event) -> Counter[str]:
    """Sends messages on one link with nsg, as fast as the rate says and nsg takes them; dials again."""
    told, taken = Counter[str](), list(messages(order))
    secrets.SystemRandom().shuffle(taken)
    loop = asyncio.get_running_loop()
    end = loop.time() + order.seconds

    async def listen(reader: asyncio.StreamReader) -> None:
        while octets := await reader.read(1 << 16):
            told["octets of answers"] += len(octets)

    while loop.time() < end and not stop.is_set():
        try:
            reader, writer = await dial(order)
        except (OSError, TimeoutError):
            told["refused"] += 1
            await asyncio.sleep(0.2)
            continue
        hears, pace = loop.create_task(listen(reader)), Pace(order.rate, loop.time())
        try:
            while (now := loop.time()) < end and not stop.is_set() and not hears.done():
                for _ in range(pace.due(now)):
                    octets = taken[told["sent"] % len(taken)]
                    writer.write(octets)
                    told["sent"] += 1
                    told["octets"] += len(octets)
                    async with asyncio.timeout_at(end):
                        await writer.drain()
                await asyncio.sleep(0.01)
            told["cut off"] += hears.done()
        except TimeoutError:
            told["held up"] += 1
        except OSError:
            told["cut off"] += 1
        finally:
            hears.cancel()
            await asyncio.gather(hears, return_exceptions=True)
            writer.transport.abort()
    return told


# --- the program -----------------------------------------------------------------------------------------


def attack(order: Order) -> dict[str, Any]:
    """Does it, and tells of it: counts, `seconds`, and `cpu_seconds` of this program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard > soft else (soft, hard))
    began, used = time.monotonic(), time.process_time()
    alone = {"half-open": half_open, "ctar-cookie": talk}.get(order.kind, shoot)
    talking = {"links": links, "flood": flood}.get(order.kind)
    if talking is None:
        ended: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
        told = alone(order, lambda: bool(ended))
    else:

        async def run() -> Counter[str]:
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            return await talking(order, stop)

        told = asyncio.run(run())
    seconds = time.monotonic() - began
    cpu = time.process_time() - used
    return {**dict(told), "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


def main(argv: Sequence[str]) -> int:
    told = json.loads(argv[0])
    order = Order(**{**told, "spis": tuple(told["spis"])})
    try:
        found = attack(order)
    except (IkectxError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def words(order: Order) -> list[str]:
    """The command line that carries out an order."""
    return [sys.executable, "-m", "ikectx_cli.lab.attacker", json.dumps(asdict(order))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
