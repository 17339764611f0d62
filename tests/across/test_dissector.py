"""The Wireshark dissector: captures written here, read by tshark, compared with what was written."""

from __future__ import annotations

import os
import shutil
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest

from ikectx.numbers import Encr, Exchange, Fpt, Integ, Notify, Protocol, Status
from ikectx.sa.context import Address, Endpoint, Secret
from ikectx.sa.keys import SealKey
from ikectx.sa.verdict import Verdict
from ikectx.wire.cookies import with_cookie
from ikectx.wire.cxtp import (
    ContextDataBlock,
    Ctaa,
    Ctar,
    Ctc,
    Ctd,
    Ctdr,
    CtReq,
    Message,
    Pctd,
    StatusBlock,
)
from ikectx.wire.cxtp import TokenAlgorithm as Algorithm
from ikectx.wire.ikev2 import IkeHeader, seal_message
from ikectx.wire.packet_proof import encode
from ikectx.wire.payloads import NotifyPayload
from ikectx.wire.reasons import encode_reasons
from ikectx.wire.tokens import Purpose, make_ctar, seal_ctaa
from ikectx.wire.whereabouts import What, Whereabouts, notice
from tests.certs import Authority

ROOT = Path(__file__).parent.parent.parent
TSHARK = ROOT / "examples/tshark.sh"
PSG, NSG, MN = (ip_address(text) for text in ("192.0.2.1", "198.51.100.2", "203.0.113.7"))
PSG6, NSG6, MN6 = (ip_address(text) for text in ("2001:db8::1", "2001:db8:1::2", "2001:db8:2::7"))
SPIS = (bytes.fromhex("a1a2a3a4a5a6a7a8"), bytes.fromhex("b1b2b3b4b5b6b7b8"))
KEY = Secret(bytes(range(32)))


# -- captures --------------------------------------------------------------------------------------------


def ip_packet(source: Address, destination: Address, protocol: int, body: bytes) -> bytes:
    """Checksums are left 0: tshark does not look at them."""
    if isinstance(source, IPv4Address):
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), protocol, 64)
    return head + source.packed + destination.packed + body


def udp(source: Endpoint, destination: Endpoint, data: bytes) -> bytes:
    head = struct.pack("!HHHH", source.port, destination.port, 8 + len(data), 0)
    return ip_packet(source.address, destination.address, 17, head + data)


class Tcp:
    """One connection's packets, both ways."""

    def __init__(self, near: Endpoint, far: Endpoint) -> None:
        self._ends = (near, far)
        self._sent = [1000, 5000]
        self.packets = [self._segment(0, b"", 0x02), self._segment(1, b"", 0x12), self._segment(0, b"", 0x10)]

    def _segment(self, which: int, data: bytes, flags: int = 0x18) -> bytes:
        source, destination = self._ends[which], self._ends[1 - which]
        acknowledged = 0 if flags == 0x02 else self._sent[1 - which]
        head = struct.pack(
            "!HHIIBBHHH",
            source.port,
            destination.port,
            self._sent[which],
            acknowledged,
            5 << 4,
            flags,
            65535,
            0,
            0,
        )
        self._sent[which] += len(data) + bool(flags & 0x02)
        return ip_packet(source.address, destination.address, 6, head + data)

    def send(self, which: int, data: bytes) -> None:
        self.packets.append(self._segment(which, data))


def write_pcap(path: Path, packets: Iterable[bytes]) -> None:
    out = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 17, 101)  # raw IP
    for number, packet in enumerate(packets):
        out += struct.pack("=IIII", 1_700_000_000 + number, 0, len(packet), len(packet)) + packet
    path.write_bytes(out)


FIELDS = """
frame.number _ws.expert.message _ws.col.Protocol _ws.col.Info cxtp.malformed cxtp.failed cxtp.profile
cxtp.type cxtp.flags.v cxtp.flags.a cxtp.flags.s cxtp.length cxtp.mn cxtp.mn6 cxtp.router cxtp.router6
cxtp.proof cxtp.new_spis.protocol cxtp.new_spis.old cxtp.new_spis.new
cxtp.whereabouts.what cxtp.whereabouts.epoch cxtp.whereabouts.to
cxtp.sequence cxtp.token cxtp.elapsed cxtp.algorithm cxtp.key_length cxtp.key
cxtp.block.fpt cxtp.block.length cxtp.block.p cxtp.block.presence cxtp.block.data cxtp.spi_i cxtp.spi_r
cxtp.status.fpt cxtp.status cxtp.mn_token.purpose cxtp.mn_token.port cxtp.mn_token.expiry
cxtp.mn_token.next_gateway cxtp.mn_token.next_mn cxtp.mn_token.psg
cxtp.mn_token.nsg cxtp.mn_token.care_of cxtp.mn_token.care_of6 cxtp.mn_token.tag
update_spi.notify update_spi.protocol update_spi.old update_spi.new update_spi.choose update_spi.version
update_spi.reason update_spi.malformed
""".split()  # noqa: SIM905 - readable

Row = dict[str, list[str]]
BOOLEANS = {"True": "1", "False": "0"}
"""As Wireshark 4.4 prints them, and as 4.0 did."""


def run(command: Sequence[str] | str, home: Path, *, user: int | None = None) -> str:
    """What a command (or a line for the shell) that runs tshark prints, if it has nothing to complain of."""
    assert shutil.which("tshark"), (
        "tshark is missing: tests/setup.sh installs it (Debian: apt install tshark)"
    )
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=ROOT if user is None else home,
        # not the scripts of whoever runs the test
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def tshark(path: Path, *options: str) -> dict[int, Row]:
    """What the dissector sees, by frame; only fields that are there."""
    command = [str(TSHARK), "-r", str(path), "-T", "fields", "-E", "aggregator=\x1f"]
    command += [part for name in FIELDS for part in ("-e", name)]
    rows = {}
    for line in run([*command, *options], path.parent).splitlines():
        values = dict(zip(FIELDS, line.split("\t"), strict=False))
        row = {
            name: [BOOLEANS.get(one, one) for one in value.split("\x1f")]
            for name, value in values.items()
            if value
        }
        rows[int(row["frame.number"][0])] = row
    return rows


def hexed(data: bytes) -> str:
    return data.hex()


# -- CXTP ------------------------------------------------------------------------------------------------

LARGE = b"\xa2\x00\x01\x01\x59\x10\x00" + bytes(range(256)) * 16  # a CBOR map {0: 1, 1: 4096 octets}


def blocks_of(fpt: Fpt, octets: bytes) -> tuple[ContextDataBlock, ...]:
    return tuple(ContextDataBlock(fpt, octets[at : at + 2036]) for at in range(0, len(octets), 2036))


def a_token(mn: Address, router: Address, care_of: Endpoint | None, purpose: Purpose, **more: int) -> Ctar:
    return make_ctar(
        KEY,
        mn=mn,
        router=router,
        sequence=0x01020304,
        purpose=purpose,
        spis=SPIS,
        psg="psg",
        nsg="nsg-ü",
        expiry=1_700_000_060,
        expects=7,
        care_of=care_of,
        blocks=(ContextDataBlock(Fpt.IKEV2_SA), ContextDataBlock(Fpt.MLD, b"\xde\xad\xbe\xef", 0x80000001)),
    )


PROBE = b"".join(SPIS) + bytes.fromhex("2e2025080000000700000b00") + bytes(2788)  # an IKE header, and SK
NEW_SPIS = (b"\x03\x04" + bytes.fromhex("c0ffee01c0ffee02"), b"\x01\x08" + SPIS[0] + SPIS[1])
COOKIE = ContextDataBlock(Fpt.COOKIE, bytes(range(1, 13)))
REFUSAL = Verdict(Fpt.PAD, Status.NOT_ALLOWED, "the mobile node's identity is root.evil")
STREAM: tuple[tuple[int, Message], ...] = (
    (0, Pctd(MN, blocks_of(Fpt.IKEV2_SA, LARGE) + blocks_of(Fpt.PAD, b"\xa1\x00\x01"), 7)),
    (1, Ctdr(MN, (StatusBlock(Fpt.IKEV2_SA), StatusBlock(Fpt.SAD, Status.ESP_SPI_IN_USE)))),
    (0, Ctd(MN, (ContextDataBlock(Fpt.SAD, b"\xa1\x00\x01"),), 123)),
    (1, Ctdr(MN, (StatusBlock(Fpt.IKEV2_SA),), complete=True)),
    (0, Ctc(MN6)),
    (1, CtReq(MN, 0, 0, (ContextDataBlock(Fpt.IKEV2_SA, b"".join(SPIS)),))),
    (0, Pctd(MN6, (), 1, Algorithm(0xFF01), KEY.reveal(), acknowledge=False)),
    (1, CtReq(MN6, 5, 6, (ContextDataBlock(Fpt(0xFF77), b"1234"),))),
    (1, CtReq(MN, 9, 0, (ContextDataBlock(Fpt.IKEV2_SA), *encode([PROBE, PROBE[:40]])))),
    (1, notice([Whereabouts(SPIS, 5, What.MOVED, "nsg-ü"), Whereabouts(SPIS, 6, What.ENDED)])[0]),
    (1, Ctdr(MN, (StatusBlock(Fpt.PAD, Status.NOT_ALLOWED),), blocks=encode_reasons([REFUSAL]))),
)
AIR: tuple[Message, ...] = (
    a_token(MN, NSG, None, Purpose.ANNOUNCE),
    a_token(MN6, PSG6, Endpoint(ip_address("2001:db8:3::9"), 4500), Purpose.ARRIVE),
    a_token(MN, PSG, Endpoint(ip_address("203.0.113.99"), 4501), Purpose.ARRIVE),
    seal_ctaa(
        KEY,
        MN,
        0x01020304,
        (StatusBlock(Fpt.MLD, Status.BAD_CHECKSUM),),
        purpose=Purpose.ARRIVE,
        expects=9,
    ),
    seal_ctaa(
        KEY,
        MN,
        0x01020304,
        blocks=(ContextDataBlock(Fpt.NEW_SPIS, b"".join(NEW_SPIS)),),
        purpose=Purpose.ARRIVE,
    ),
    Ctaa(MN6, (StatusBlock(Fpt.SAD, Status.BUSY), StatusBlock(Fpt(0x1234), Status(0xEE)))),
    Ctaa(MN, blocks=(COOKIE,)),
    with_cookie(a_token(MN, NSG, None, Purpose.ANNOUNCE), COOKIE),
)
WRONG = (
    b"\x11",
    b"\x21\x80\x00\x08" + MN.packed,
    b"\x19\x80\x00\x08" + MN.packed,
    b"\x16\x80\x00\x02",
    b"\x16\x80\x00\x06\x01\x02",
    b"\x16\x80\x00\x0c" + MN.packed + b"more",
    b"\x16\x80\x00\x09" + MN.packed,
    b"\x13\x80\x00\x10" + bytes(4) + MN.packed + b"\xff\x01\x02\x00",
    b"\x13\x80\x00\x10" + bytes(4) + MN.packed + b"\xff\x01\x00\x80",
    Ctar(MN, NSG, 1, 1, (ContextDataBlock(Fpt.MN_TOKEN, bytes(20)),)).serialize(),
    Ctaa(MN, blocks=(ContextDataBlock(Fpt.NEW_SPIS, b"\x03\x08" + bytes(10)),)).serialize(),
    Ctaa(MN, blocks=(ContextDataBlock(Fpt.NEW_SPIS, b"\x03\x04" + bytes(2)),)).serialize(),
    Ctd(MN, (ContextDataBlock(Fpt.WHEREABOUTS, b"\x02\xff" + bytes(30)),)).serialize(),
    Ctdr(MN, (StatusBlock(Fpt.SAD),)).serialize()[:-1].replace(b"\x00\x0c", b"\x00\x0b", 1),
)


@dataclass(frozen=True)
class Seen:
    rows: dict[int, Row]
    stream: list[Row]
    air: list[Row]
    wrong: list[Row]
    broken: list[Row]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    path = tmp_path_factory.mktemp("pcap") / "cxtp.pcap"
    packets: list[bytes] = []
    ends = []  # the frame in which each message of the stream ends
    tcp = Tcp(Endpoint(PSG, 40000), Endpoint(NSG, 5091))
    for number, (which, message) in enumerate(STREAM):
        data = message.serialize()
        step = (1000, 3, 1400, 7)[number % 4]  # cut in odd places
        for at in range(0, len(data), step):
            tcp.send(which, data[at : at + step])
        ends.append(len(tcp.packets))
    tcp.send(0, b"".join(message.serialize() for which, message in STREAM if which == 0))
    packets += tcp.packets
    together = len(packets)
    at = together
    for message in AIR:
        client, gateway = (
            Endpoint(message.mn, 40001),
            Endpoint(PSG if message.mn.version == 4 else PSG6, 5091),
        )
        ways = (gateway, client) if isinstance(message, Ctaa) else (client, gateway)
        packets.append(udp(*ways, message.serialize()))
    wrong_at = len(packets)
    packets += [udp(Endpoint(MN, 40001), Endpoint(PSG, 5091), data) for data in WRONG]
    broken_at = len(packets)
    lost = Tcp(Endpoint(NSG6, 40002), Endpoint(PSG6, 5091))
    lost.send(0, Ctc(MN).serialize() + b"GET / HTTP/1.1\r\n\r\n")
    packets += lost.packets
    write_pcap(path, packets)
    rows = tshark(path)
    assert len(rows) == len(packets)
    return Seen(
        rows,
        [rows[number] for number in (*ends, together)],
        [rows[at + number] for number in range(1, len(AIR) + 1)],
        [rows[wrong_at + number] for number in range(1, len(WRONG) + 1)],
        [rows[broken_at + 4]],
    )


def expect(row: Row, message: Message) -> None:
    """Every field of the message, as the dissector shows it."""
    four = message.mn.version == 4
    assert row["cxtp.type"] == [str(int(message.TYPE))]
    assert row["cxtp.flags.v"] == [str(int(four))]
    assert row["cxtp.mn" if four else "cxtp.mn6"] == [str(message.mn)]
    assert row["cxtp.length"] == [str(len(message.serialize()))]
    assert row["_ws.col.Protocol"] == ["CXTP"]
    assert "cxtp.malformed" not in row
    if isinstance(message, Ctar | Ctd | Pctd):
        assert row["cxtp.flags.a"] == [str(int(message.acknowledge))]
    if isinstance(message, Ctar):
        assert row["cxtp.router" if four else "cxtp.router6"] == [str(message.router)]
    if isinstance(message, Ctar | CtReq):
        assert row["cxtp.sequence"] == [str(message.sequence)]
        assert row["cxtp.token"] == [f"0x{message.token:08x}"]
    if isinstance(message, Ctd | Pctd):
        assert row["cxtp.elapsed"] == [str(message.elapsed)]
    if isinstance(message, Ctdr):
        assert row["cxtp.flags.s"] == [str(int(message.complete))]
    if isinstance(message, Ctdr | Ctaa):
        assert row.get("cxtp.status.fpt", []) == [f"0x{int(part.fpt):04x}" for part in message.statuses]
        assert row.get("cxtp.status", []) == [f"0x{int(part.status):02x}" for part in message.statuses]
    blocks = getattr(message, "blocks", ())
    assert row.get("cxtp.block.fpt", []) == [f"0x{int(block.fpt):04x}" for block in blocks]
    bare = [block for block in blocks if block.size == 4]
    assert [units == "0" for units in row.get("cxtp.block.length", [])] == [block in bare for block in blocks]
    padded = [
        block.data + bytes(block.size - 4 - len(block.data) - (0 if block.presence is None else 4))
        for block in blocks
        if block not in bare
    ]
    assert row.get("cxtp.block.data", []) == [hexed(data) for data in padded]
    present = [block.presence for block in blocks if block.presence is not None]
    assert row.get("cxtp.block.presence", []) == [f"0x{value:08x}" for value in present]


@pytest.mark.parametrize("number", range(len(STREAM)))
def test_messages_between_gateways(seen: Seen, number: int) -> None:
    expect(seen.stream[number], STREAM[number][1])


def test_parts_of_messages_between_gateways(seen: Seen) -> None:
    push, answer, _, complete, _, pull, keyed, unknown, proof, where, refused, together = seen.stream
    assert (push["cxtp.algorithm"], push["cxtp.key_length"]) == (["0x0000"], ["0"])
    assert push["cxtp.profile"] == ["IKEV2_SA", "PAD"]
    assert answer["cxtp.failed"] == ["SAD ESP_SPI_IN_USE"] or "SAD ESP_SPI_IN_USE" in str(answer)
    assert refused["cxtp.status"] == ["0x82"] and "REASON" in refused["_ws.col.Info"][0]
    assert "all received" in complete["_ws.col.Info"][0]
    assert (pull["cxtp.spi_i"], pull["cxtp.spi_r"]) == ([hexed(SPIS[0])], [hexed(SPIS[1])])
    assert keyed["cxtp.algorithm"] == ["0xff01"]
    assert keyed["cxtp.key"] == [hexed(KEY.reveal())]
    assert "a feature profile type that is not known here" in unknown["_ws.expert.message"]
    assert proof["cxtp.proof"] == [str(len(PROBE)), "40"]
    assert proof["cxtp.spi_i"] == [hexed(SPIS[0])] * 2
    assert proof["_ws.col.Info"][0].endswith("seq 9, IKEV2_SA, PROOF")
    assert where["cxtp.whereabouts.what"] == ["2", "3"]
    assert where["cxtp.whereabouts.epoch"] == ["5", "6"]
    assert where["cxtp.whereabouts.to"] == ["nsg-ü"]
    assert where["cxtp.spi_r"] == [hexed(SPIS[1])] * 2
    assert where["_ws.col.Info"][0].endswith("WHEREABOUTS")
    # several messages in one segment
    assert together["cxtp.type"] == [str(int(message.TYPE)) for which, message in STREAM if which == 0]
    assert together["_ws.col.Info"][0].startswith("PCTD, 203.0.113.7, IKEV2_SA, PAD; CTD, ")


@pytest.mark.parametrize("number", range(len(AIR)))
def test_messages_on_the_air(seen: Seen, number: int) -> None:
    row, message = seen.air[number], AIR[number]
    expect(row, message)
    if not isinstance(message, Ctar):
        return
    assert row["cxtp.mn_token.psg"] == ["psg"]
    assert row["cxtp.mn_token.nsg"] == ["nsg-ü"]
    assert row["cxtp.spi_i"] == [hexed(SPIS[0])]
    assert row["cxtp.mn_token.tag"][0][:8] == row["cxtp.token"][0][2:]
    assert "2023" in row["cxtp.mn_token.expiry"][0]


def test_tokens(seen: Seen) -> None:
    announce, arrive6, arrive, tagged, renamed, plain, asked, shown = seen.air
    assert [row["cxtp.mn_token.purpose"] for row in (announce, arrive6, arrive)] == [["1"], ["2"], ["2"]]
    assert announce["cxtp.mn_token.port"] == ["0"]
    assert not {"cxtp.mn_token.care_of", "cxtp.mn_token.care_of6"} & set(announce)
    assert arrive6["cxtp.mn_token.care_of6"] == ["2001:db8:3::9"]
    assert arrive6["cxtp.mn_token.port"] == ["4500"]
    assert arrive["cxtp.mn_token.care_of"] == ["203.0.113.99"]
    ctaa = AIR[3]
    assert isinstance(ctaa, Ctaa)
    assert tagged["cxtp.mn_token.tag"] == [hexed(ctaa.blocks[0].data[8:24])]
    assert tagged["cxtp.mn_token.next_mn"] == ["9"]
    assert renamed["cxtp.mn_token.next_mn"] == ["4294967295"]
    assert arrive["cxtp.mn_token.next_gateway"] == ["7"]
    assert tagged["cxtp.mn_token.purpose"] == ["2"]
    assert "MLD BAD_CHECKSUM" in tagged["_ws.col.Info"][0]
    assert renamed["cxtp.new_spis.protocol"] == ["3", "1"]
    assert renamed["cxtp.new_spis.old"] == ["c0ffee01", hexed(SPIS[0])]
    assert renamed["cxtp.new_spis.new"] == ["c0ffee02", hexed(SPIS[1])]
    assert "cxtp.mn_token.tag" not in plain
    assert "0x1234 0xee" in plain["_ws.col.Info"][0]
    assert "COOKIE" in asked["_ws.col.Info"][0]
    assert shown["cxtp.block.data"][0] == hexed(COOKIE.data)
    assert shown["cxtp.mn_token.tag"] == announce["cxtp.mn_token.tag"]


SAID = (
    "too short for a header",
    "CXTP version 2",
    "message type 9",
    "length 2 is less than the header",
    "it ends within: MN's previous address",
    "octets behind the end of a CTC",
    "length 9 with 8 octets",
    "the block is longer than the message",
    "no room for its presence vector",
    "the token ends within",
    "an SPI of 8 octets",
    "the list ends within: old SPI",
    "the list ends within: a gateway's name",
    "it ends within: ",
)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_malformed_is_marked(seen: Seen, number: int) -> None:
    row = seen.wrong[number]
    assert any(SAID[number] in message for message in row["_ws.expert.message"]), row
    assert row["_ws.col.Protocol"] == ["CXTP"]


def test_lost_framing_is_marked_once(seen: Seen) -> None:
    (row,) = seen.broken
    assert row["cxtp.type"] == ["6", "7"]  # a CTC, then the "G" of GET
    assert [text for text in row["_ws.expert.message"] if "version" in text] == ["CXTP version 4"]


def test_inside_tls(tmp_path: Path) -> None:
    """The session is real; its secrets come by a key log, as from SSLKEYLOGFILE."""
    authority = Authority(tmp_path)
    contexts = [authority.issue(name).context(server=name == "nsg") for name in ("psg", "nsg")]
    secrets = tmp_path / "keys.txt"
    contexts[0].keylog_filename = str(secrets)
    bios = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    ends = [
        context.wrap_bio(*bio, server_side=number == 1)
        for number, (context, bio) in enumerate(zip(contexts, bios, strict=True))
    ]
    tcp = Tcp(Endpoint(PSG, 40000), Endpoint(NSG, 5091))

    def carry() -> None:
        for which in (0, 1):
            data = bios[which][1].read()
            bios[1 - which][0].write(data)
            for at in range(0, len(data), 1000):
                tcp.send(which, data[at : at + 1000])

    done = [False, False]
    while not all(done):
        for which in (0, 1):
            try:
                ends[which].do_handshake()
                done[which] = True
            except ssl.SSLWantReadError:
                pass
            carry()
    for which, message in STREAM:
        data = message.serialize()
        for at in range(0, len(data), 1500):  # a message in several records, too
            ends[which].write(data[at : at + 1500])
        carry()
    path = tmp_path / "tls.pcap"
    write_pcap(path, tcp.packets)
    rows = tshark(path, "-o", f"tls.keylog_file:{secrets}")
    found = [row for row in rows.values() if "cxtp.type" in row]
    assert [row["cxtp.type"] for row in found] == [[str(int(message.TYPE))] for _, message in STREAM]
    for row, (_, message) in zip(found, STREAM, strict=True):
        expect(row, message)
    # without the secrets it is TLS, and nothing else
    blind = tshark(path)
    assert not any("cxtp.type" in row or "cxtp.malformed" in row for row in blind.values())
    assert any(row["_ws.col.Protocol"] == ["TLSv1.3"] for row in blind.values())


# -- the README ------------------------------------------------------------------------------------------

NOBODY = 65534


@pytest.mark.parametrize("user", ["this one", "nobody"])
def test_the_readmes_commands(user: str) -> None:
    """As they are printed: for who runs the tests (root reads what is closed to others), and for anybody."""
    section = (ROOT / "README.md").read_text().partition("\n## Wireshark\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("examples/")]
    assert len(lines) == 2
    # pytest's own folders are closed to others, and so may be that of this checkout
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        shutil.copytree(ROOT / "examples", home / "examples")
        capture = home / "psg.pcap"
        tcp = Tcp(Endpoint(PSG, 40000), Endpoint(NSG, 5091))
        for which, message in STREAM:
            tcp.send(which, message.serialize())
        write_pcap(capture, tcp.packets)
        capture.chmod(0o600)
        other = None
        if user == "nobody" and os.geteuid() == 0:
            other = NOBODY
            home.chmod(0o755)
            capture.chmod(0o644)
        shown, fields = (run(line.replace("psg.pcap", str(capture)), home, user=other) for line in lines)
    assert shown.count(" CXTP ") == len(STREAM)
    assert [line.split("\t")[0] for line in fields.splitlines()] == [
        str(int(message.TYPE)) for _, message in STREAM
    ]


# -- UPDATE_SPI ------------------------------------------------------------------------------------------

SK_E, SK_A = bytes(range(0x10, 0x20)), bytes(range(0x30, 0x50))
GCM_KEY = bytes(range(0x60, 0x74))


def notify(kind: Notify, protocol: Protocol, spi: bytes, data: bytes) -> NotifyPayload:
    return NotifyPayload(kind, data, protocol, spi)


OLD, NEW = bytes.fromhex("c0ffee01"), bytes.fromhex("c0ffee02")
UPDATE, REFUSED = Notify.UPDATE_SPI, Notify.UPDATE_SPI_REFUSED
NOTIFIES: Sequence[tuple[NotifyPayload, dict[str, str]]] = (
    (
        notify(UPDATE, Protocol.ESP, OLD, bytes(4) + NEW),
        {"notify": "41961", "protocol": "3", "old": OLD.hex(), "choose": "0", "new": NEW.hex()},
    ),
    (
        notify(UPDATE, Protocol.ESP, OLD, b"\x01\0\0\0"),
        {"notify": "41961", "protocol": "3", "old": OLD.hex(), "choose": "1"},
    ),
    (
        notify(UPDATE, Protocol.IKE, SPIS[0], bytes(4) + SPIS[1]),
        {"notify": "41961", "protocol": "1", "old": SPIS[0].hex(), "choose": "0", "new": SPIS[1].hex()},
    ),
    (
        notify(REFUSED, Protocol.AH, OLD, b"\x04"),
        {"notify": "41962", "protocol": "2", "old": OLD.hex(), "reason": "4"},
    ),
    (
        notify(Notify.UPDATE_SPI_SUPPORTED, Protocol.NONE, b"", b"\x01"),
        {"notify": "41960", "protocol": "0", "version": "1"},
    ),
    (notify(UPDATE, Protocol.ESP, SPIS[0], bytes(12)), {"notify": "41961", "protocol": "3"}),
    (notify(UPDATE, Protocol.ESP, OLD, bytes(5)), {"notify": "41961", "protocol": "3", "old": OLD.hex()}),
    (notify(Notify.COOKIE2, Protocol.NONE, b"", bytes(8)), {}),
)


@pytest.mark.parametrize("suite", ["CBC", "GCM"])
def test_update_spi_in_decrypted_ike(tmp_path: Path, suite: str) -> None:
    if suite == "CBC":
        key = SealKey(Encr.AES_CBC, Integ.HMAC_SHA2_256_128, Secret(SK_E), Secret(SK_A))
        hexes = [SK_E.hex(), SK_E.hex(), '"AES-CBC-128 [RFC3602]"']
        hexes += [SK_A.hex(), SK_A.hex(), '"HMAC_SHA2_256_128 [RFC4868]"']
    else:
        key = SealKey(Encr.AES_GCM_16, Integ.NONE, Secret(GCM_KEY))
        hexes = [GCM_KEY.hex(), GCM_KEY.hex(), '"AES-GCM-128 with 16 octet ICV [RFC5282]"']
        hexes += ["", "", '"NONE [RFC4306]"']
    iv = bytes(16 if suite == "CBC" else 8)
    messages = [[payload] for payload, _ in NOTIFIES]
    messages.append([payload for payload, _ in NOTIFIES])
    packets = []
    for number, payloads in enumerate(messages):
        header = IkeHeader(*SPIS, Exchange.INFORMATIONAL, number, initiator=False, response=False)
        data = seal_message(key, header, payloads, iv)
        packets.append(udp(Endpoint(NSG, 4500), Endpoint(MN, 4500), bytes(4) + data))
    path = tmp_path / "ike.pcap"
    write_pcap(path, packets)
    table = f"uat:ikev2_decryption_table:{SPIS[0].hex()},{SPIS[1].hex()}," + ",".join(hexes)
    rows = tshark(path, "-o", table)
    for number, (_, wanted) in enumerate(NOTIFIES, 1):
        row = rows[number]
        got = {name.removeprefix("update_spi."): row[name] for name in row if name.startswith("update_spi.")}
        malformed = got.pop("malformed", None)
        assert got == {name: [value] for name, value in wanted.items()}, number
        assert bool(malformed) == (number in (6, 7))
    # as it is shown: what is added to a column after a message is dissected is not in the field since 4.4
    shown = run([str(TSHARK), "-r", str(path), "-o", table], tmp_path).splitlines()
    assert shown[0].endswith(f" UPDATE_SPI ESP {OLD.hex()} -> {NEW.hex()}")
    assert shown[3].endswith("busy with a rekey")
    every = [values["notify"] for _, values in NOTIFIES if values]
    assert rows[len(messages)]["update_spi.notify"] == every
    assert not any("update_spi.notify" in row for row in tshark(path).values()), (
        "without keys nothing is seen"
    )
