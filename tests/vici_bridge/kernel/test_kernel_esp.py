"""SAs, counters and windows of the live kernel, by packets of chosen numbers between two namespaces."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import pytest

from ikectx.errors import KernelError, RefusedError, StateError, UsageError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import Address, ReplayState, Secret
from tests.netns import namespaces
from vici_bridge.kernel.algorithms import CIPHERS, INTEGRITY, KernelReplay
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm import (
    STATE_ESN,
    Encap,
    KernelLimits,
    KernelPolicy,
    KernelSa,
    Mark,
    Selector,
    Template,
)
from vici_bridge.policy.obstacles import check_kernel

pytestmark = pytest.mark.kernel_esp

V4 = (ip_address("192.0.2.1"), ip_address("192.0.2.2"))
V6 = (ip_address("2001:db8::1"), ip_address("2001:db8::2"))
KEY = bytes(range(0x60, 0x60 + 64))

GCM = ("rfc4106(gcm(aes))", 20, 128, "", 0, 0)
CBC = ("cbc(aes)", 32, 0, "hmac(sha256)", 32, 128)
SHORT = KernelReplay(window=32)
OUT = (33, b"\x02")
"""XFRMA_SA_DIR: the SA only sends."""


def esp_sa(
    addresses: tuple[Address, Address],
    spi: str = "c0ffee01",
    algorithms: tuple[str, int, int, str, int, int] = GCM,
    replay: KernelReplay = SHORT,
) -> KernelSa:
    encr, encr_octets, icv, auth, auth_octets, trunc = algorithms
    return KernelSa(
        addresses[0],
        addresses[1],
        bytes.fromhex(spi),
        reqid=7,
        encr_name=encr,
        encr_key=Secret(KEY[:encr_octets]),
        icv_bits=icv,
        is_aead=bool(icv),
        auth_name=auth,
        auth_key=Secret(KEY[:auth_octets]),
        auth_trunc_bits=trunc,
        replay=replay,
        flags=STATE_ESN if replay.esn else 0,
    )


EXACT = {
    "gcm": esp_sa(V4),
    "counted": esp_sa(V4, replay=KernelReplay(oseq=7, seq=4000, window=32, bitmap=0x80000005)),
    "cbc-v6": esp_sa(V6, algorithms=CBC),
    "encap": replace(esp_sa(V4), encap=Encap(4500, 40123)),
    "marked": replace(esp_sa(V4), mark=Mark(5, 0xFF), if_id=11, sequence=99),
    "limited": replace(
        esp_sa(V4, algorithms=CBC),
        limits=KernelLimits(
            soft_bytes=10**9,
            hard_bytes=2 * 10**9,
            soft_packets=5000,
            hard_packets=6000,
            soft_add=3000,
            hard_add=3600,
        ),
    ),
    "window-100": esp_sa(V4, replay=KernelReplay(0, 5000, 100, 1 << 99 | 0b1011, words=4)),
    "window-4096": esp_sa(V4, replay=KernelReplay(0, 70000, 4096, 1 << 4095 | 5, words=128)),
    "esn-in": esp_sa(V6, replay=KernelReplay(0, (3 << 32) + 17, 128, 1 << 127 | 1, True, 4)),
    "esn-out": esp_sa(V4, replay=KernelReplay((3 << 32) + 17, 0, 1, 0, True, 1)),
    "transport": replace(
        esp_sa(V4),
        mode=0,
        selector=Selector.between(ip_network("192.0.2.1/32"), ip_network("192.0.2.2/32"), 17),
    ),
    "flags": replace(
        esp_sa(V4), flags=1 | 4 | 32, extra=((24, struct.pack("=I", 1)), (22, struct.pack("=I", 0)))
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_sa_is_put_back_exactly(kernel: Kernel, name: str) -> None:
    sa = EXACT[name]
    kernel.batch([sa.add()])
    found = kernel.get_sa(sa.destination, sa.spi, mark=sa.mark)
    assert found is not None
    assert kernel.dump_sas() == [found]
    assert replace(found, usage=sa.usage, selector=sa.selector, extra=sa.extra) == sa
    with pytest.raises(KernelError) as caught:
        kernel.batch([sa.add()])
    assert caught.value.errno == errno.EEXIST
    assert KEY[:16].hex() not in f"{caught.value} {found!r}"

    assert kernel.delete_sa(found)
    assert kernel.dump_sas() == []
    kernel.batch([found.add()])
    (again,) = kernel.dump_sas()
    assert replace(again, usage=found.usage) == found
    kernel.batch([found.delete(), found.add()])
    assert len(kernel.dump_sas()) == 1


def knows_directions(kernel: Kernel) -> bool:
    """Whether the kernel keeps XFRMA_SA_DIR: one before 6.10 passes it over."""
    sa = replace(esp_sa(V4), replay=KernelReplay(), extra=(OUT,))
    kernel.batch([sa.add()])
    (found,) = kernel.dump_sas()
    kernel.delete_sa(sa)
    return OUT in found.extra


def test_an_sa_that_only_sends_has_the_long_form_without_a_bitmap(kernel: Kernel) -> None:
    """What charon 6.0 asks for with ESN; kernels before 6.10 want a window."""
    sa = replace(esp_sa(V4, replay=KernelReplay(17, esn=True, words=0)), extra=(OUT,))
    if not knows_directions(kernel):
        with pytest.raises(KernelError) as caught:
            kernel.batch([sa.add()])
        assert caught.value.errno == errno.EINVAL
        return
    kernel.batch([sa.add()])
    (found,) = kernel.dump_sas()
    assert found.replay == sa.replay and found.outbound is True
    # the other form is answered with 0, and nothing happens
    kernel._xfrm.ask(sa.set_replay(KernelReplay(1000)))
    assert kernel.get_replay(sa)[0].seq == 17
    kernel.set_replay(found, ReplayState(5 << 32, esn=True))
    (raised,) = kernel.dump_sas()
    assert raised.replay == replace(sa.replay, oseq=5 << 32)
    kernel.batch([raised.delete(), raised.add()])
    (again,) = kernel.dump_sas()
    assert replace(again, usage=raised.usage) == raised


def test_an_sa_for_one_cpu_is_seen_to_be_one(kernel: Kernel) -> None:
    kernel.batch([replace(esp_sa(V4), extra=((35, struct.pack("=I", 0)), OUT), replay=KernelReplay()).add()])
    (found,) = kernel.dump_sas()
    if found.cpu is None:  # a kernel before 6.13 passes XFRMA_SA_PCPU over
        assert 35 not in dict(found.extra)
        return
    assert found.cpu == 0
    with pytest.raises(RefusedError, match="for CPU 0 alone"):
        check_kernel("net", found)


LEFT_OUT = {Encr.DES3, Encr.CAMELLIA_CBC}
"""Ciphers that a kernel may have been built without; Debian's has them all."""


@pytest.mark.parametrize("encr", list(CIPHERS))
def test_ciphers_of_the_kernel(kernel: Kernel, encr: Encr) -> None:
    """What an SA is read as is what it was added as; of a cipher that is not there, that is said."""
    cipher = CIPHERS[encr]
    integ = Integ.NONE if cipher.icv else Integ.HMAC_SHA2_256_128
    name, trunc, bits = INTEGRITY.get(integ, ("", 0, 0))
    if encr in LEFT_OUT and not kernel.supports(encr, 0, integ):
        algorithms = (cipher.name, cipher.sizes[0] // 8 + cipher.salt, cipher.icv, name, bits // 8, trunc)
        with pytest.raises(KernelError) as caught:
            kernel.batch([esp_sa(V4, algorithms=algorithms).add()])
        assert caught.value.errno == errno.ENOSYS
        return
    for size in cipher.sizes:
        assert kernel.supports(encr, size, integ), (encr, size)
        octets = size // 8 + cipher.salt
        kernel.batch([esp_sa(V4, algorithms=(cipher.name, octets, cipher.icv, name, bits // 8, trunc)).add()])
        (found,) = kernel.dump_sas()
        assert found.transforms == (encr, size if len(cipher.sizes) > 1 else 0, integ)
        kernel.delete_sa(found)
    assert kernel.supports(encr, 0, integ)


def test_integrity_of_the_kernel(kernel: Kernel) -> None:
    for integ, (name, trunc, bits) in INTEGRITY.items():
        assert kernel.supports(Encr.AES_CBC, 256, integ), integ
        kernel.batch([esp_sa(V4, algorithms=("cbc(aes)", 16, 0, name, bits // 8, trunc)).add()])
        (found,) = kernel.dump_sas()
        assert found.transforms == (Encr.AES_CBC, 128, integ)
        kernel.delete_sa(found)
    assert kernel.dump_sas() == []


@dataclass(frozen=True)
class Link:
    """Two gateways with ESP from a to b: packets of any number, as a replaying attacker sends them, too."""

    a: Kernel
    b: Kernel
    sa: KernelSa
    sender: socket.socket
    target: str

    def arrives(self, number: int) -> bool:
        """Send one packet with this sequence number and wait for b's verdict."""
        now, _ = self.a._counters(self.sa)
        before = KernelReplay(number - 1, window=now.window, esn=self.sa.esn, words=now.words)
        self.a._xfrm.ask(self.sa.set_replay(before))
        was = self.seen()
        self.sender.sendto(b"x", (self.target, 7777))
        for _ in range(400):
            now_seen = self.seen()
            if now_seen != was:
                return now_seen[0] == was[0] + 1
            time.sleep(0.005)
        raise AssertionError("the packet was lost")

    def seen(self) -> tuple[int, int]:
        """(accepted, refused) packets at b."""
        sa = self.b.get_sa(self.sa.destination, self.sa.spi)
        assert sa is not None
        return sa.usage.packets, sum(sa.failures)

    def inbound(self) -> ReplayState:
        return self.b.get_replay(self.sa, outbound=False)[0]


@contextlib.contextmanager
def linked(form: KernelReplay, version: int = 4) -> Iterator[Link]:
    outer = V4 if version == 4 else V6
    inner = ("10.9.0.5", "10.1.0.1") if version == 4 else ("fd00:9::5", "fd00:1::1")
    bits = (24, 32) if version == 4 else (64, 128)
    sa = esp_sa(outer, replay=form)
    with namespaces(2) as (here, there), contextlib.ExitStack() as stack:
        here.ip("link add outer type veth peer name far")
        here.give("far", there)
        there.ip("link set far name outer")
        kernels = []
        for space, own, address, other in (
            (here, outer[0], inner[0], inner[1]),
            (there, outer[1], inner[1], inner[0]),
        ):
            space.ip(
                f"address add {own}/{bits[0]} dev outer" + (" nodad" if version == 6 else ""),
                "link set outer up",
                f"address add {address}/{bits[1]} dev lo",
            )
            space.ip(f"route add {other} dev outer src {address}")  # only now is that address ours
            with space.entered():
                kernels.append(stack.enter_context(Kernel()))
        selector = Selector.between(ip_network(inner[0]), ip_network(inner[1]))
        template = Template(*outer, reqid=sa.reqid)
        # what a gateway sends by has no window, or the smallest the long form allows
        out = replace(form, oseq=0, seq=0, bitmap=0, window=1 if form.words else 0)
        kernels[0].batch(
            [
                replace(sa, replay=out).add(),
                KernelPolicy("out", selector, 100, templates=(template,)).add(),
            ]
        )
        kernels[1].batch(
            [
                sa.add(),
                KernelPolicy("in", selector, 100, templates=(template,)).add(),
                KernelPolicy("fwd", selector, 100, templates=(template,)).add(),
            ]
        )
        with here.entered():
            sender = stack.enter_context(
                socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
            )
            sender.bind((inner[0], 0))
        yield Link(kernels[0], kernels[1], sa, sender, inner[1])


FORMS = {
    "32": (KernelReplay(window=32), 0),
    "20": (KernelReplay(window=20), 7),
    "64 long": (KernelReplay(window=64, words=2), 0),
    "100 long": (KernelReplay(window=100, words=4), 4000),
    "ESN 64": (KernelReplay(window=64, esn=True, words=2), (1 << 32) - 30),
    "ESN 128": (KernelReplay(window=128, esn=True, words=4), (5 << 32) + 4000),
}
AHEAD = (1, 2, 5, 3, 40, 39, 12, 41, 42, 55, 50, 54, 90, 60, 89)


@pytest.mark.parametrize("form", FORMS)
def test_windows_are_those_of_the_kernel(form: str) -> None:
    """Packets in any order: after each the state read is what arrived, and once moved it refuses the same."""
    shape, start = FORMS[form]
    with linked(shape) as link:
        if start:
            # as after an import: everything up to here was received at the other gateway
            link.b.set_replay(
                link.sa, ReplayState(start, shape.window, (1 << shape.window) - 1, shape.esn), outbound=False
            )
        received = set(range(max(start - shape.window + 1, 1), start + 1))
        top = start
        for ahead in AHEAD:
            number = start + ahead
            fresh = number > top - shape.window
            assert link.arrives(number) == fresh, number
            if fresh:
                received.add(number)
                top = max(top, number)
            assert link.inbound() == expected(received, top, shape)

        # the same SA anew, as on another gateway: its state written, it goes on refusing
        state = link.inbound()
        link.b.batch([link.sa.delete(), link.sa.add()])
        link.b.set_replay(link.sa, state, outbound=False)
        assert link.inbound() == state
        oldest = top - shape.window + 1
        for number in [*range(top, max(oldest + 8, 1), -7), oldest + 1, oldest, oldest - 1, top + 1]:
            fresh = number >= oldest and number not in received
            assert link.arrives(number) == fresh, number
            received.add(number)
        assert link.inbound().seq == top + 1


def expected(received: set[int], top: int, shape: KernelReplay) -> ReplayState:
    bitmap = sum(1 << behind for behind in range(shape.window) if top - behind in received)
    return ReplayState(top, shape.window, bitmap, shape.esn)


@pytest.mark.parametrize("shapes", [("32", "64 long"), ("64 long", "32"), ("100 long", "64 long")])
def test_a_window_moves_to_one_of_another_size(shapes: tuple[str, str]) -> None:
    before, after = (FORMS[name][0] for name in shapes)
    with linked(after) as link:
        received = {970, 975, 999, 1000}
        state = expected(received, 1000, before)
        link.b.set_replay(link.sa, state)
        for number in (1000, 999, 975, 970, 1000 - before.window, 1000 - after.window):
            assert not link.arrives(number), number
        assert link.arrives(998)
        assert link.arrives(1001)


def test_joining_a_later_window() -> None:
    """Late packets reached the old gateway meanwhile: neither side's are accepted again."""
    with linked(KernelReplay(window=32)) as link:
        for number in (100, 103, 105):
            assert link.arrives(number)
        link.b.set_replay(link.sa, expected({90, 99, 101}, 101, link.sa.replay))
        assert link.inbound().seq == 105
        for number in (90, 99, 100, 101, 103, 105):
            assert not link.arrives(number), number
        for number in (98, 102, 104):
            assert link.arrives(number)


@pytest.mark.parametrize("form", ["32", "ESN 64"])
def test_outbound_counters_only_grow(form: str) -> None:
    shape, _ = FORMS[form]
    with linked(shape) as link:
        link.a.set_replay(link.sa, ReplayState(1000, esn=shape.esn))
        # it has not sent anything yet, but its number says which way it goes
        assert link.a.get_replay(link.sa)[0] == ReplayState(1000, esn=shape.esn)
        with pytest.raises(StateError, match="cannot go back to 999"):
            link.a.set_replay(link.sa, ReplayState(999))
        link.sender.sendto(b"x", (link.target, 7777))
        state, usage = link.a.get_replay(link.sa)
        assert (state.seq, usage.packets) == (1001, 1)
        state, usage = link.b.get_replay(link.sa)
        assert (state.seq, state.bitmap, usage.packets) == (1001, 1, 1)
        if shape.esn:
            link.a.set_replay(link.sa, ReplayState(7 << 32, esn=True))
            assert link.a.get_replay(link.sa)[0].seq == 7 << 32
        else:
            with pytest.raises(UsageError, match="no ESN"):
                link.a.set_replay(link.sa, ReplayState(7 << 32, esn=True))


def test_b16_what_was_counted_before_counts_towards_the_limits() -> None:
    with linked(KernelReplay(window=32)) as link:
        _, before = link.b.get_replay(link.sa, outbound=False)
        link.b.count_on(link.sa, 123456, 789)
        _, after = link.b.get_replay(link.sa, outbound=False)
        assert after == replace(before, bytes=123456, packets=789)
        # never back, and no further than the soft limits
        limited = replace(
            link.sa, limits=KernelLimits(soft_bytes=200_000, soft_packets=800, hard_packets=900)
        )
        link.b.count_on(limited, 1, 1)
        assert link.b.get_replay(link.sa, outbound=False)[1] == after
        link.b.count_on(limited, 1 << 40, 1 << 40)
        _, most = link.b.get_replay(link.sa, outbound=False)
        assert (most.bytes, most.packets) == (200_000, 800)


@pytest.mark.parametrize("version", [4, 6])
def test_late_packets(version: int) -> None:
    with linked(KernelReplay(window=32), version) as link:
        for number in (1, 2, 5):
            assert link.arrives(number)
        # charon lets go: it deletes SAs and policies
        found, none = link.b.get_sas([(link.sa.destination, spi) for spi in (link.sa.spi, b"gone")])
        assert found is not None and none is None
        snapshot = link.b.snapshot_inbound([found])
        assert [policy.direction for policy in snapshot.policies] in (["in", "fwd"], ["fwd", "in"])
        assert link.b.restore_inbound(snapshot, 2) == 0, "still there: left alone"
        assert link.b.late_sas() == []
        link.b.batch([link.sa.delete(), *(policy.delete() for policy in snapshot.policies)])

        began = time.monotonic()
        assert link.b.restore_inbound(snapshot, 2) == 1
        assert link.b.restore_inbound(snapshot, 2) == 0
        (late,) = link.b.late_sas()
        assert late.limits == KernelLimits(hard_add=2)
        assert link.arrives(3)
        assert link.arrives(6)
        assert not link.arrives(5)
        # and the kernel itself ends it
        while link.b.dump_sas() or link.b.dump_policies():
            assert time.monotonic() - began < 8
            time.sleep(0.1)
        assert time.monotonic() - began > 1

        # the SA comes back before the time is over
        assert link.b.restore_inbound(snapshot, 30) == 1
        assert link.b.drop_late([link.sa]) == 1
        assert link.b.drop_late([link.sa]) == 0
        assert link.b.dump_sas() == []
        assert link.b.dump_policies() == []
        link.b.batch([link.sa.add()])
        assert link.b.drop_late([link.sa]) == 0, "not ours"
        assert len(link.b.dump_sas()) == 1


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with namespaces(1) as (space,), space.entered(), Kernel() as made:
        yield made
