"""The live kernel without ESP: netlink, policies, nftables, routes. With ESP: test_kernel_esp.py."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ikectx.errors import KernelError, UsageError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import ReplayState
from ikectx.sa.name import SaName
from tests.netns import JOINED, Namespace, join, namespaces
from vici_bridge.kernel import netlink
from vici_bridge.kernel import xfrm_wire as wire
from vici_bridge.kernel.algorithms import KernelReplay
from vici_bridge.kernel.kernel import Detour, Kernel, Mute
from vici_bridge.kernel.mute import Muted
from vici_bridge.kernel.xfrm import (
    BLOCK,
    STATE_ESN,
    KernelPolicy,
    KernelSa,
    Mark,
    Selector,
    Template,
    XfrmRequest,
)

SPIS = SaName(bytes.fromhex("f102030405060708"), bytes.fromhex("1112131415161718"))
OTHER = SaName(SPIS[0], bytes.fromhex("1112131415161719"))


# The netlink socket.


def test_refusals_name_what_was_asked(kernel: Kernel) -> None:
    policy = KernelPolicy("in", Selector.between(ip_network("10.0.0.0/8"), ip_network("10.1.0.0/16")))
    kernel.batch([policy.add()])
    with pytest.raises(KernelError, match=r"add policy in 10.0.0.0/8 -> 10.1.0.0/16") as caught:
        kernel.batch([policy.add()])
    assert caught.value.errno == errno.EEXIST


def test_answers_are_matched_by_number() -> None:
    def message(kind: int, number: int, body: bytes, flags: int = 0) -> bytes:
        return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body + bytes(-len(body) % 4)

    waiting = {5: netlink.NetlinkOutcome(), 6: netlink.NetlinkOutcome(), 7: netlink.NetlinkOutcome()}
    first, second, third = waiting.values()
    words = struct.pack("=HH", 4 + 9, 1) + b"no luck.\0" + bytes(3)
    data = (
        message(16, 4, b"late answer to an earlier one")
        + message(16, 5, b"body")
        + message(2, 5, struct.pack("=i", 0) + bytes(16), 0x100)
        + message(2, 6, struct.pack("=i", -errno.EINVAL) + bytes(16) + words, 0x300)
        + message(16, 7, b"part", 0x10)
        + message(3, 7, struct.pack("=i", 0))
        + b"\1\2\3"
    )
    netlink.Netlink._sort(data, waiting)
    assert not waiting
    assert (first.errno, [a[16:] for a in first.answers]) == (0, [b"body"])
    assert (second.errno, second.text) == (errno.EINVAL, "no luck.")
    assert third.torn
    netlink.Netlink._sort(struct.pack("=IHHII", 8, 2, 0, 5, 0), {5: netlink.NetlinkOutcome()})


def test_many_at_once(kernel: Kernel) -> None:
    """More than fits one batch: all are answered."""
    policies = [
        KernelPolicy(
            "out", Selector.between(ip_network("10.0.0.0/8"), ip_network(f"10.1.{n // 250}.{n % 250}/32"))
        )
        for n in range(600)
    ]
    kernel.batch([policy.add() for policy in policies])
    found = kernel.dump_policies()
    assert {str(policy) for policy in found} == {str(policy) for policy in policies}
    with pytest.raises(KernelError):
        kernel.batch([policies[0].add(), policies[1].delete()])
    assert len(kernel.dump_policies()) == 599


# Policies need no ESP.

V4 = (ip_address("192.0.2.1"), ip_address("192.0.2.2"))
V6 = (ip_address("2001:db8::1"), ip_address("2001:db8::2"))


@pytest.mark.parametrize("addresses", [V4, V6])
@pytest.mark.parametrize("direction", ["in", "out", "fwd"])
def test_policy_there_and_back(kernel: Kernel, addresses: tuple[object, ...], direction: str) -> None:
    source, destination = addresses
    inner = ("10.9.0.5/32", "10.1.0.0/16") if addresses is V4 else ("fd00:9::5/128", "fd00:1::/64")
    policy = KernelPolicy(
        direction,
        replace(
            Selector.between(ip_network(inner[0]), ip_network(inner[1]), 17),
            destination_port=53,
            destination_mask=0xFFFF,
        ),
        priority=371327,
        templates=(Template(source, destination, reqid=7),),  # type: ignore[arg-type]
        mark=Mark(3, 0xFF),
        if_id=9,
    )
    kernel.batch([policy.add()])
    (found,) = kernel.dump_policies()
    assert replace(found, index=0, usage=policy.usage) == policy
    assert found.usage.add_time > 0

    kernel.replace_policy(found.blocking())
    (blocked,) = kernel.dump_policies()
    assert blocked.action == BLOCK
    kernel.replace_policy(KernelPolicy.parse(found.raw))
    (again,) = kernel.dump_policies()
    assert replace(again, index=0, usage=policy.usage) == policy

    assert kernel.delete_policy(found)
    assert not kernel.delete_policy(found)
    assert kernel.dump_policies() == []


def test_socket_policies_are_left_out(kernel: Kernel) -> None:
    """charon's own sockets have bypass policies; nobody but the socket can delete them."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        nowhere = ip_address("0.0.0.0")
        bypass = KernelPolicy("in", Selector(nowhere, 0, nowhere, 0))
        sock.setsockopt(socket.IPPROTO_IP, 17, bypass.raw[16 : 16 + 168])
        assert kernel.dump_policies() == []


def test_no_sa_is_none(kernel: Kernel) -> None:
    assert kernel.get_sa(V4[0], bytes.fromhex("c0ffee00")) is None
    assert kernel.get_sa(V6[0], bytes.fromhex("c0ffee00")) is None
    assert kernel.dump_sas() == []
    sa = KernelSa(*V4, bytes.fromhex("c0ffee00"))
    assert not kernel.delete_sa(sa)
    with pytest.raises(KernelError) as caught:
        kernel.get_replay(sa)
    assert caught.value.errno == errno.ESRCH
    assert kernel.restore_inbound(kernel.snapshot_inbound([]), 5) == 0
    assert kernel.drop_late([sa]) == 0


def test_probe_of_unknown_transforms(kernel: Kernel) -> None:
    assert not kernel.supports(Encr.CAMELLIA_CTR, 128, Integ.HMAC_SHA1_96)
    assert not kernel.supports(Encr.AES_CBC, 129, Integ.HMAC_SHA1_96)
    assert not kernel.supports(Encr.AES_CBC, 128, Integ.NONE)
    assert not kernel.supports(Encr.AES_CBC, 128, Integ(99))
    assert kernel.dump_sas() == []


class Answering:
    """An XFRM socket with one SA, made by an older or newer kernel; `deaf`: counters are not taken."""

    def __init__(self, sa: KernelSa, *others: bytes, deaf: bool = False) -> None:
        self.sa = sa
        self.others = others
        self.deaf = deaf

    def ask(self, request: XfrmRequest) -> list[bytes]:
        message = request.message.reveal()
        match struct.unpack_from("=H", message, 4)[0]:
            case wire.GETSA:
                return [*self.others, self.sa.add().message.reveal()]
            case wire.GETAE:
                return [self.sa.set_replay(self.sa.replay).message.reveal()]
            case wire.NEWAE if not self.deaf:
                self.sa = replace(self.sa, replay=self.sa.parse_replay(message)[0])
        return []

    def transact(self, requests: Sequence[XfrmRequest]) -> list[netlink.NetlinkOutcome]:
        return [netlink.NetlinkOutcome(0, answers=self.ask(request)) for request in requests]

    def attempt(self, requests: Sequence[XfrmRequest], but: int) -> list[netlink.NetlinkOutcome]:
        return self.transact(requests)


ESN_OUT = KernelSa(
    ip_address("192.0.2.1"),
    ip_address("192.0.2.2"),
    b"esn!",
    flags=STATE_ESN,
    replay=KernelReplay(oseq=7, esn=True, words=0),
    extra=((33, b"\x02"),),
)
INBOUND = replace(ESN_OUT, flags=0, replay=KernelReplay(seq=9, window=32, bitmap=1), extra=((33, b"\x01"),))


@pytest.mark.parametrize(
    ("sa", "state"), [(ESN_OUT, ReplayState(5 << 32, esn=True)), (INBOUND, ReplayState(40, 32, 5))]
)
def test_counters_are_read_back(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, sa: KernelSa, state: ReplayState
) -> None:
    monkeypatch.setattr(kernel, "_xfrm", Answering(sa))
    kernel.set_replay(sa, state)
    assert kernel.get_replay(sa)[0].seq == state.seq
    monkeypatch.setattr(kernel, "_xfrm", Answering(sa, deaf=True))
    with pytest.raises(KernelError, match=f"took no notice .*{sa.spi.hex()}"):
        kernel.set_replay(sa, state)


def test_both_sas_of_a_child_are_read_and_written_in_one_datagram_each(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    xfrm, datagrams = Answering(INBOUND), list[int]()
    transact = xfrm.transact

    def counted(requests: Sequence[XfrmRequest]) -> list[netlink.NetlinkOutcome]:
        datagrams.append(len(requests))
        return transact(requests)

    monkeypatch.setattr(xfrm, "transact", counted)
    monkeypatch.setattr(kernel, "_xfrm", xfrm)
    pair = kernel.get_sas([(INBOUND.destination, INBOUND.spi), (INBOUND.source, INBOUND.spi)])
    assert datagrams == [2] and pair[0] is not None and pair[0].replay.seq == 9
    kernel.set_replays([(pair[0], ReplayState(40, 32, 5), False), (pair[0], ReplayState(41, 32, 7), False)])
    assert datagrams == [2, 4], "each is read back"


def test_an_sa_that_cannot_be_read_hides_no_other(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strange = bytearray(replace(ESN_OUT, spi=bytes.fromhex("5712a79e")).add().message.reveal())
    struct.pack_into("=H", strange, 16 + 212, 99)  # the address family
    monkeypatch.setattr(kernel, "_xfrm", Answering(ESN_OUT, bytes(strange), bytes(strange[:40])))
    for _ in range(2):
        assert [sa.spi for sa in kernel.dump_sas()] == [ESN_OUT.spi]
    assert kernel.late_sas() == []
    # one that is asked for is the kernel's matter, not that of a context from another gateway
    with pytest.raises(KernelError, match=r"5712a79e to 192.0.2.2 cannot be read: address family 99"):
        kernel.get_sa(ESN_OUT.destination, bytes.fromhex("5712a79e"))
    assert caplog.text.count("5712a79e is left out: address family 99") == 1


@pytest.mark.usefixtures("as_root")
def test_refused_without_rights() -> None:
    """Reading the SAD without CAP_NET_ADMIN: EPERM becomes a hint."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        answer = "nothing raised"
        try:
            os.setresuid(65534, 65534, 65534)
            Kernel().dump_sas()
        except KernelError as error:
            answer = f"{error.errno} {error.hint}"
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 200).decode().startswith(f"{errno.EPERM} the agent needs CAP_NET_ADMIN")


# nftables.


THAT_WAS_ALL = b"that was all"


@contextmanager
def on_one_cpu() -> Iterator[None]:
    """Each CPU has a queue of its own for what this machine sends to itself, so only one keeps the order."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Udp:
    """A bound UDP socket that says whether a datagram got through: whether it came before another one that
    nobody keeps back, however long that takes."""

    def __init__(self, address: str, port: int) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((address, port))
        self.sock.settimeout(30)

    def reaches(self, other: Udp, data: bytes) -> bool:
        with on_one_cpu():
            try:
                self.sock.sendto(data, other.sock.getsockname())
            except PermissionError:
                return False
            self.sock.sendto(THAT_WAS_ALL, other.sock.getsockname())
        found = False
        while (came := other.sock.recv(100)) != THAT_WAS_ALL:
            found = found or came == data
        return found


IKE = SPIS[0] + SPIS[1] + b"\x2e\x20\x25\x08" + bytes(12)
STRANGER = OTHER[0] + OTHER[1] + b"\x2e\x20\x25\x08" + bytes(12)
MARKER = bytes(4)


@pytest.fixture
def far(space: Namespace) -> Iterator[Namespace]:
    """A host beside `space`, because a message on a loopback interface is both inbound and outbound."""
    with namespaces(1) as (made,):
        join(space, made)
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_mute(space: Namespace, far: Namespace, version: int) -> None:
    mute = Mute()
    here, there = JOINED[version]
    gateway, gateway_natt = Udp(here, 500), Udp(here, 4500)
    with far.entered():
        natted = Udp(there, 40123)
    mute.unmute(SPIS)
    assert mute.listing() == []

    mute.mute_in(SPIS)
    mute.mute_in(SPIS)
    assert not natted.reaches(gateway, IKE)
    assert not natted.reaches(gateway_natt, MARKER + IKE)
    assert natted.reaches(gateway, STRANGER)
    assert natted.reaches(gateway_natt, MARKER + STRANGER)
    assert natted.reaches(gateway_natt, b"\xc0\xff\xee\x01" + IKE), "ESP in UDP flows on"
    assert gateway.reaches(natted, IKE)
    assert gateway_natt.reaches(natted, MARKER + IKE)
    assert mute.listing() == [Muted(SPIS, "in", 2)]

    mute.mute_out(SPIS)
    assert not gateway.reaches(natted, IKE)
    assert not gateway_natt.reaches(natted, MARKER + IKE)
    assert gateway_natt.reaches(natted, MARKER + STRANGER)
    assert gateway_natt.reaches(natted, b"\xc0\xff\xee\x01" + IKE)
    assert (mute.dropped(SPIS), mute.dropped(OTHER)) == (2, 0)
    assert sorted(mute.listing(), key=str) == [Muted(SPIS, "in", 2), Muted(SPIS, "out", 2)]

    mute.mute_in(OTHER)
    mute.unmute(SPIS)
    mute.unmute(SPIS)
    assert natted.reaches(gateway, IKE)
    assert gateway_natt.reaches(natted, MARKER + IKE)
    assert not natted.reaches(gateway, STRANGER)
    assert mute.dropped(SPIS) == 0
    mute.close()
    assert not natted.reaches(gateway, STRANGER), "what is muted stays so"
    Mute().unmute(OTHER)
    assert natted.reaches(gateway, STRANGER)
    Mute().close()
    assert space.run("nft list tables") == ""


def test_nothing_is_removed_of_what_is_not_mute(space: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes the kernel long, and it holds up the agent."""
    with space.entered():
        mute = Mute()
        mute.mute(SPIS)
        removed: list[Sequence[bytes]] = []
        monkeypatch.setattr(mute._table, "remove", lambda names, keys: removed.append(keys))
        mute.unmute(OTHER, SPIS)
        mute.unmute(OTHER)
        assert removed == [[SPIS.octets]]
        monkeypatch.undo()
        Mute().unmute(SPIS)  # one that does not know what another has muted
        assert Mute().listing() == []


def test_one_that_only_answers(space: Namespace, far: Namespace) -> None:
    """The peer's requests pass, and the answers to them."""
    request, answer = (IKE[:19] + bytes([flags]) + IKE[20:] for flags in (0x08, 0x28))
    mute, gateway, natted = Mute(), Udp(JOINED[4][0], 500), Udp(JOINED[4][0], 4500)
    with far.entered():
        peer = Udp(JOINED[4][1], 40123)
    mute.mute(SPIS)
    mute.only_answer(SPIS)
    for marker, at in ((b"", gateway), (MARKER, natted)):
        assert peer.reaches(at, marker + request) and not peer.reaches(at, marker + answer)
        assert at.reaches(peer, marker + answer) and not at.reaches(peer, marker + request)
    assert mute.listing() == [] and mute.dropped(SPIS) == 0
    mute.close()
    again = Mute()
    assert again.prepare() and not peer.reaches(gateway, answer), "it outlives the agent"
    space.run("nft flush set inet ikectx answers_in")
    assert not again.prepare() and not peer.reaches(gateway, answer), "it is put back"
    again.unmute(SPIS)
    assert peer.reaches(gateway, answer) and gateway.reaches(peer, request)
    again.close()
    assert space.run("nft list tables") == ""


def test_mute_outlives_its_maker_and_a_flush(space: Namespace) -> None:
    Mute().mute_in(SPIS)
    assert [entry.spis for entry in Mute().listing()] == [SPIS]
    peer, gateway = Udp("127.0.0.1", 40123), Udp("127.0.0.1", 500)
    mute = Mute()
    for flush in ("nft flush ruleset", "nft flush table inet ikectx", "nft flush set inet ikectx muted_in"):
        space.run(flush)
        assert peer.reaches(gateway, IKE)
        mute.mute_in(SPIS)
        assert not peer.reaches(gateway, IKE)
    assert mute.listing() == [Muted(SPIS, "in", 1)]
    for _ in range(2):
        mute.unmute(SPIS)
        mute.close()
    assert space.run("nft list tables") == ""


def test_mute_other_ports(space: Namespace) -> None:
    Mute().mute_in(SPIS)
    peer, gateway = Udp("127.0.0.1", 40123), Udp("127.0.0.1", 4511)
    assert not peer.reaches(gateway, IKE)
    assert not peer.reaches(Udp("127.0.0.1", 500), IKE)
    assert peer.reaches(gateway, STRANGER)
    mute = Mute()
    mute.prepare()
    began = time.process_time()
    pairs = [SaName(struct.pack(">Q", n), SPIS.spi_r) for n in range(500)]
    for pair in pairs:
        mute.mute_in(pair)
    assert {entry.spis for entry in mute.listing()} == {*pairs, SPIS}
    assert time.process_time() - began < 5
    with pytest.raises(UsageError):
        Mute().mute_in(SaName(b"short", SPIS.spi_r))


def test_mute_without_nft(space: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    with pytest.raises(KernelError) as caught:
        Mute().mute_in(SPIS)
    assert "nftables" in caught.value.hint
    broken = tmp_path / "nft"
    broken.write_text("#!/bin/sh\necho '/dev/stdin:1:1-2: Error: Could not process rule' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name, path=None: str(broken))
    with pytest.raises(KernelError, match="Could not process rule"):
        Mute().mute_in(SPIS)
    broken.write_text("#!/bin/nowhere\n")
    with pytest.raises(KernelError, match="did not run"):
        Mute().prepare()
    monkeypatch.undo()
    space.run(
        "nft add table inet ikectx",
        "nft add set inet ikectx muted_in {type inet_service;elements={7};}",
    )
    with pytest.raises(KernelError, match="not ours"):
        Mute().listing()


# Routes.


@pytest.fixture
def inner(space: Namespace) -> Namespace:
    """pSG's inner side: 10.1.0.1 and fd00:1::1; nSG would be 10.1.0.2 and fd00:1::2."""
    space.ip(
        "link add inner type veth peer name far",
        "link set inner up",
        "link set far up",
        "address add 10.1.0.1/24 dev inner",
        "address add fd00:1::1/64 dev inner nodad",
    )
    return space


VIA = (ip_address("fd00:1::2"), ip_address("10.1.0.2"))


def test_detour(inner: Namespace) -> None:
    detour = Detour()
    detour.remove(["10.9.0.5/32"])
    assert detour.add(["10.9.0.5/32", ip_network("10.9.4.0/22"), "fd00:9::5/128"], VIA) == []
    assert detour.add(["10.9.0.5/32"], [ip_address("10.1.0.2")]) == []
    assert "via 10.1.0.2 dev inner" in inner.run("ip route get 10.9.0.5")
    assert "via 10.1.0.2 dev inner" in inner.run("ip route get 10.9.7.1")
    assert "via fd00:1::2 dev inner" in inner.run("ip route get fd00:9::5")
    assert {str(net) for net in Detour().listing()} == {"10.9.0.5/32", "10.9.4.0/22", "fd00:9::5/128"}

    detour.remove(["10.9.0.5/32", "10.66.0.0/16"])
    assert {str(net) for net in detour.listing()} == {"10.9.4.0/22", "fd00:9::5/128"}
    detour.remove(["10.9.4.0/22"])
    Detour().remove(["10.9.4.0/22", "fd00:9::5/128"])
    assert detour.listing() == []


def test_a_detour_leaves_this_hosts_own_packets_their_source(inner: Namespace) -> None:
    """With another one the SA would not protect them at the other gateway."""
    inner.ip("address add 10.3.0.2/24 dev lo", "address add fd03::2/64 dev lo nodad")
    inner.ip(
        "route add 10.9.0.5/32 via 10.1.0.9 src 10.3.0.2 table 220",
        "rule add lookup 220 priority 220",
        "route add fd00:9::5/128 via fd00:1::9 src fd03::2",
        "route add default via 10.1.0.9",
    )
    detour, addresses = Detour(), ["10.9.0.5/32", "10.9.0.6/32", "fd00:9::5/128"]
    for _ in range(2):  # the second time the route is there already
        detour.add(addresses, VIA, [ip_network("10.3.0.0/24"), ip_network("fd03::/64")])
        assert "via 10.1.0.2 dev inner table local src 10.3.0.2" in inner.run("ip route get 10.9.0.5")
        assert "via 10.1.0.2 dev inner table local src 10.1.0.1" in inner.run("ip route get 10.9.0.6")
        assert "src fd03::2" in inner.run("ip route get fd00:9::5")
    inner.ip("address del 10.3.0.2/24 dev lo")  # the kernel removes the route, too
    detour.add(addresses, VIA, [ip_network("10.3.0.0/24")])
    assert "via 10.1.0.2 dev inner table local src 10.1.0.1" in inner.run("ip route get 10.9.0.5")
    detour.remove(addresses)
    assert detour.listing() == []


def test_detour_touches_no_other_route_of_its_table(inner: Namespace) -> None:
    """Not even where this host has the mobile node's address itself."""
    inner.ip("route add 10.9.0.9/32 via 10.1.0.9 table local")
    before = inner.run("ip route show table local", "ip -6 route show table local")
    detour = Detour()
    addresses = ["10.1.0.1/32", "fd00:1::1/128", "10.9.0.9/32"]
    for change in (detour.add, lambda prefixes, _: detour.shut(prefixes)):
        change(addresses, VIA)
        assert "dev lo" in inner.run("ip route get 10.1.0.1")
        assert "dev lo" in inner.run("ip route get fd00:1::1")
        assert "via 10.1.0.9" in inner.run("ip route get 10.9.0.9")
    for undo in (detour.remove, detour.open_up, detour.remove, detour.open_up):
        undo(addresses)
    assert inner.run("ip route show table local", "ip -6 route show table local") == before


def test_detour_changes_no_route_that_charon_heeds(inner: Namespace) -> None:
    """charon passes over what it is told of table `local` (struct rtmsg, 255), and over nothing else."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, netlink.ROUTE) as events:
        events.bind((0, 0))
        for group in (7, 8, 11, 19):  # routes and rules of IPv4 and IPv6
            events.setsockopt(270, 1, group)
        detour = Detour()
        detour.add(["10.9.0.5/32", "fd00:9::5/128"], VIA)
        detour.shut(["10.9.0.5/32", "fd00:9::5/128"])
        detour.remove(["10.9.0.5/32", "fd00:9::5/128"])
        detour.open_up(["10.9.0.5/32", "fd00:9::5/128"])
        told: list[tuple[int, int]] = []
        while select.select([events], [], [], 0.2)[0]:
            data = events.recv(1 << 16)
            told.append((struct.unpack_from("=H", data, 4)[0], data[20]))
    assert [kind for kind, _ in told].count(24) == [kind for kind, _ in told].count(25) == 4
    assert set(told) == {(24, 255), (25, 255)}


def test_detour_leaves_out(inner: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    detour = Detour()
    skipped = detour.add(["0.0.0.0/0", "::/0", "10.0.0.0/8", "10.9.0.5/32"], VIA)
    assert [str(net) for net in skipped] == ["0.0.0.0/0", "::/0", "10.0.0.0/8"]
    assert "everything" in caplog.text
    assert "is inside" in caplog.text
    assert [str(net) for net in detour.listing()] == ["10.9.0.5/32"]
    detour.remove(["0.0.0.0/0", "10.9.0.5/32"])
    assert [str(net) for net in detour.add(["fd00:9::5/128"], VIA[1:])] == ["fd00:9::5/128"]
    assert detour.add(["10.9.0.5/32"], VIA[:1]) == []
    assert "via inet6 fd00:1::2" in inner.run("ip route get 10.9.0.5")
    with pytest.raises(KernelError, match=r"route 10.9.0.6/32 via 203.0.113.9") as caught:
        detour.add(["10.9.0.6/32"], [ip_address("203.0.113.9")])
    assert caught.value.errno in (errno.ENETUNREACH, errno.EINVAL)


def test_which_way_an_sa_leads(inner: Namespace, kernel: Kernel) -> None:
    here, there = ip_address("10.1.0.1"), ip_address("10.1.0.2")
    assert kernel.is_outbound(KernelSa(here, there, b"abcd"))
    assert not kernel.is_outbound(KernelSa(there, here, b"abcd"))
    assert kernel.is_outbound(KernelSa(ip_address("fd00:1::1"), ip_address("fd00:1::2"), b"abcd"))
    assert not kernel.is_outbound(KernelSa(ip_address("fd00:1::2"), ip_address("fd00:1::1"), b"abcd"))
    assert kernel.is_outbound(KernelSa(here, ip_address("203.0.113.9"), b"abcd"))
    # what it did counts more than where it leads
    assert not kernel.is_outbound(KernelSa(here, there, b"abcd", replay=KernelReplay(seq=4)))
