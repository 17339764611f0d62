"""XFRM messages, replay windows against a model of the kernel's algorithm, and names of algorithms."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ikectx.errors import IkectxError, UsageError, WireError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import ReplayState, Secret
from vici_bridge.kernel import xfrm
from vici_bridge.kernel.algorithms import (
    CIPHERS,
    INTEGRITY,
    KernelReplay,
    encryption_of,
    fit_replay,
    integrity_of,
    merge_replay,
)
from vici_bridge.kernel.xfrm import (
    Encap,
    KernelLimits,
    KernelPolicy,
    KernelSa,
    KernelUsage,
    Mark,
    Selector,
    Template,
    policies_of,
)

BOUNDED = settings(max_examples=200, deadline=None)
U32 = (1 << 32) - 1
KEY = bytes(range(0x40, 0x40 + 20))

# The kernel's replay window, told anew: RFC 4303 A2 on a ring whose bit is (number - 1) modulo the window.


class Kernel:
    """What the kernel does with an inbound sequence number; `seq` and `hi` as in xfrm_replay_state_esn."""

    def __init__(self, window: int, esn: bool = False, start: int = 0) -> None:
        self.window, self.esn = window, esn
        self.seq, self.hi = start & U32, start >> 32
        self.ring = [False] * window

    @property
    def full(self) -> int:
        return self.hi << 32 | self.seq

    def place(self, low: int, behind: int) -> int:
        """Ring index of the number `behind` numbers below the highest, whose low half is `low`."""
        return (((low - 1) & U32) % self.window - behind) % self.window

    def deduced(self, low: int) -> int:
        """The upper half the receiver supplies for a number on the wire (RFC 4303 A2.1)."""
        bottom = (self.seq - self.window + 1) & U32
        if self.seq >= self.window - 1:
            return self.hi + (low < bottom)
        return self.hi - (low >= bottom)

    def accepts(self, number: int) -> bool:
        if number < 1 or not 0 <= number >> 32 <= U32:
            return False
        if self.esn and self.deduced(number & U32) != number >> 32:
            return False
        if number > self.full:
            return True
        behind = self.full - number
        return behind < self.window and not self.ring[self.place(self.seq, behind)]

    def receive(self, number: int) -> None:
        if number > self.full:
            ahead = number - self.full
            here = ((self.seq - 1) & U32) % self.window
            for step in range(1, min(ahead, self.window)):
                self.ring[(here + step) % self.window] = False
            if ahead >= self.window:
                self.ring = [False] * self.window
            self.seq, self.hi = number & U32, number >> 32
            self.ring[(here + ahead) % self.window] = True
        else:
            self.ring[self.place(self.seq, self.full - number)] = True

    def attribute(self, words: int) -> tuple[tuple[int, int, int, int, int, int], bytes]:
        out = [0] * words
        for index, bit in enumerate(self.ring):
            out[index // 32] |= bit << (index % 32)
        return (words, 0, self.seq, 0, self.hi, self.window), struct.pack(f"={words}I", *out)


def short_kernel(window: int, numbers: list[int]) -> tuple[int, int]:
    """(seq, bitmap) of the old 32-bit form after some packets; the map is only cut to 32 bits, as there."""
    seq = bitmap = 0
    for number in numbers:
        if number > seq:
            ahead = number - seq
            bitmap = (bitmap << ahead | 1) & U32 if ahead < window else 1
            seq = number
        elif seq - number < window:
            bitmap |= 1 << (seq - number)
    return seq, bitmap


steps = st.lists(st.integers(-70, 90), max_size=60)
windows = st.sampled_from([32, 33, 48, 64, 100, 128, 1024])


@BOUNDED
@given(
    window=windows,
    esn=st.booleans(),
    start=st.sampled_from([0, 1, U32 - 40, 5 << 32, (7 << 32) + 20]),
    moves=steps,
)
@example(window=64, esn=True, start=U32 - 40, moves=[1, 50, -3])
@example(window=100, esn=True, start=5 << 32, moves=[-3])
def test_ring_is_what_the_kernel_would_refuse(window: int, esn: bool, start: int, moves: list[int]) -> None:
    kernel = Kernel(window, esn, start if esn else start & (U32 >> 1))
    for move in moves:
        number = kernel.full + move
        if number >> 32 and not esn:
            continue
        if kernel.accepts(number):
            kernel.receive(number)
    words = (window + 31) // 32 + 1
    head, ring = kernel.attribute(words)
    state = KernelReplay.from_long(head, ring, esn=esn)
    assert state.seq == kernel.full
    for behind in range(window):
        number = kernel.full - behind
        if number >= 1 and (not esn or kernel.deduced(number & U32) == number >> 32):
            assert (state.bitmap >> behind & 1) == (not kernel.accepts(number)), (behind, number)
    # and back: the kernel would go on refusing and accepting the same
    again = KernelReplay.from_long(state.long_head(), state.ring(), esn=esn)
    assert again == state


@BOUNDED
@given(window=st.integers(1, 32), moves=steps)
def test_short_form(window: int, moves: list[int]) -> None:
    numbers, at = [], 1
    for move in moves:
        at = max(1, at + move)
        numbers.append(at)
    seq, bitmap = short_kernel(window, numbers)
    state = KernelReplay.from_short(3, seq, bitmap, window)
    assert state.inbound.bitmap == bitmap & ((1 << min(window, seq)) - 1)
    assert state.outbound == ReplayState(3)


def test_a_known_ring() -> None:
    """Window 64, highest 66: its bit is at 65 % 64 = 1; 65 at 0, 64 at 63."""
    ring = struct.pack("=2I", 0b11, 1 << 31)
    state = KernelReplay.from_long((2, 9, 66, 0, 0, 64), ring, esn=False)
    assert (state.oseq, state.seq, state.window, state.bitmap) == (9, 66, 64, 0b111)
    assert state.ring() == ring


states = st.builds(
    lambda seq, window, bits: ReplayState(seq, window, bits & ((1 << min(window, seq)) - 1)),
    st.integers(0, 400),
    st.sampled_from([32, 64, 128]),
    st.integers(0, (1 << 128) - 1),
)


def refuses(state: ReplayState, number: int) -> bool:
    behind = state.seq - number
    return behind >= 0 and (behind >= state.window or bool(state.bitmap >> behind & 1))


@BOUNDED
@given(states, states, states)
def test_merge_refuses_what_either_side_refused(a: ReplayState, b: ReplayState, c: ReplayState) -> None:
    merged = merge_replay(a, b)
    for number in range(1, merged.seq + 2):
        wanted = refuses(a, number) or refuses(b, number)
        if merged.seq - number < merged.window:
            assert refuses(merged, number) == wanted
        else:
            assert refuses(merged, number)
    assert merge_replay(b, a) == merged
    assert merge_replay(a, a) == a
    assert merge_replay(merged, b) == merged
    assert merge_replay(merged, c) == merge_replay(a, merge_replay(b, c))


@BOUNDED
@given(states, st.sampled_from([0, 16, 32, 64, 100, 128]))
def test_fit_never_admits_more(state: ReplayState, window: int) -> None:
    fitted = fit_replay(state, window)
    assert fitted.window == window
    for number in range(1, state.seq + 1):
        if refuses(state, number):
            assert refuses(fitted, number)
        elif state.seq - number < window:
            assert not refuses(fitted, number)


def test_merge_with_nothing_and_outbound() -> None:
    state = ReplayState(500, 32, 0b1011)
    assert merge_replay(ReplayState(), state) == state
    assert merge_replay(ReplayState(7), ReplayState(9)) == ReplayState(9)
    assert merge_replay(ReplayState(0, 32), state) == state
    with pytest.raises(UsageError):
        merge_replay(ReplayState(5, 32, 1), ReplayState(5, 32, 1, esn=True))


@pytest.mark.parametrize(
    ("head", "ring"),
    [
        ((129, 0, 0, 0, 0, 32), b"\0" * 516),
        ((2, 0, 0, 0, 0, 65), bytes(8)),
        ((2, 0, 0, 0, 0, 64), bytes(7)),
        ((1, 0, 1, 0, 1, 32), bytes(4)),
    ],
)
def test_bad_rings(head: tuple[int, int, int, int, int, int], ring: bytes) -> None:
    with pytest.raises(WireError):
        KernelReplay.from_long(head, ring, esn=False)


# Algorithms.


@pytest.mark.parametrize("encr", list(CIPHERS))
def test_ciphers_there_and_back(encr: Encr) -> None:
    cipher = CIPHERS[encr]
    for bits in cipher.sizes:
        found = encryption_of(cipher.name, bits // 8 + cipher.salt, cipher.icv)
        assert found == (encr, bits if len(cipher.sizes) > 1 else 0)
    assert encryption_of(cipher.name, 3, cipher.icv) is None


@pytest.mark.parametrize("integ", list(INTEGRITY))
def test_integrity_there_and_back(integ: Integ) -> None:
    name, trunc, _ = INTEGRITY[integ]
    assert integrity_of(name, trunc) is integ
    assert integrity_of(name, trunc + 8) is None
    assert integrity_of("", 0) is Integ.NONE


# Messages.

GCM = KernelSa(
    source=ip_address("192.0.2.1"),
    destination=ip_address("192.0.2.2"),
    spi=bytes.fromhex("c0ffee01"),
    reqid=7,
    encr_name="rfc4106(gcm(aes))",
    encr_key=Secret(KEY),
    icv_bits=128,
    is_aead=True,
    replay=KernelReplay(seq=70, window=32, bitmap=0b101),
    encap=Encap(4500, 40123),
    mark=Mark(0x10, 0xFF),
    if_id=9,
    limits=KernelLimits(hard_bytes=10**9, soft_add=3000, hard_add=3600),
    flags=32,
    extra=((33, b"\x01"),),
)
CBC6 = KernelSa(
    source=ip_address("2001:db8::1"),
    destination=ip_address("2001:db8::2"),
    spi=bytes.fromhex("c0ffee02"),
    reqid=8,
    mode=0,
    encr_name="cbc(aes)",
    encr_key=Secret(KEY[:16]),
    auth_name="hmac(sha256)",
    auth_key=Secret(KEY + KEY[:12]),
    auth_trunc_bits=128,
    flags=xfrm.STATE_ESN,
    replay=KernelReplay(oseq=1 << 33, seq=(1 << 32) + 5, window=100, bitmap=1 << 99 | 1, esn=True, words=4),
    selector=Selector.between(ip_network("2001:db8::1/128"), ip_network("2001:db8::2/128")),
)
SENDING = replace(
    CBC6,
    spi=bytes.fromhex("c0ffee03"),
    replay=KernelReplay(oseq=(3 << 32) + 17, esn=True, words=0),
    extra=((33, b"\x02"),),
)
"""As charon 6.0 has it made where the kernel knows directions: the long form without a bitmap."""
POLICY = KernelPolicy(
    "fwd",
    replace(
        Selector.between(ip_network("10.9.0.5/32"), ip_network("10.1.0.0/16"), 6),
        destination_port=80,
        destination_mask=U32 >> 16,
    ),
    priority=371327,
    templates=(Template(ip_address("192.0.2.1"), ip_address("192.0.2.2"), reqid=7),),
    mark=Mark(1, 1),
    if_id=4,
    index=82,
    limits=KernelLimits(hard_add=5),
    extra=((40, b"abcd"),),
)


@pytest.mark.parametrize("sa", [GCM, CBC6, SENDING])
def test_sa_round_trip(sa: KernelSa) -> None:
    message = sa.add().message.reveal()
    again = KernelSa.parse(message)
    wanted = sa if sa.selector is not None else replace(sa, selector=again.selector)
    assert again == wanted
    assert again.add().message == sa.add().message


def test_sa_layout() -> None:
    """Against linux/xfrm.h: sizes, and a few offsets of xfrm_usersa_info after the 16 of the header."""
    data = CBC6.add().message.reveal()
    assert int.from_bytes(data[:4], "little") == len(data)
    assert struct.unpack_from("=HH", data, 4) == (0x10, 0x605)
    body = data[16:]
    assert body[56:72] == CBC6.destination.packed
    assert body[72:77] == CBC6.spi + b"\x32"
    assert body[80:96] == CBC6.source.packed
    assert struct.unpack_from("=Q", body, 96) == ((1 << 64) - 1,)
    assert struct.unpack_from("=IHBBB", body, 208) == (8, 10, 0, 0, 128)
    assert struct.unpack_from("=HH", body, 224) == (4 + 64 + 4 + 16, 2)
    assert len(CBC6.delete().message) == 16 + 24
    assert len(GCM.delete().message) == 16 + 24 + 12
    assert len(KernelPolicy("in", POLICY.selector).delete().message) == 16 + 64
    assert len(KernelPolicy("in", POLICY.selector).add().message) == 16 + 168
    assert len(CBC6.get_replay().message) == 16 + 48


def test_sa_views() -> None:
    assert GCM.transforms == (Encr.AES_GCM_16, 128, Integ.NONE)
    assert CBC6.transforms == (Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128)
    assert replace(GCM, encr_name="made-up").transforms is None
    assert (GCM.family, CBC6.family) == (2, 10)
    assert (GCM.esn, CBC6.esn) == (False, True)
    assert GCM.outbound is False
    assert CBC6.outbound is None
    assert replace(CBC6, replay=KernelReplay(oseq=4)).outbound is True
    assert replace(CBC6, replay=KernelReplay(seq=4)).outbound is False
    assert str(GCM) == "ESP SA c0ffee01 to 192.0.2.2"


def test_nothing_shows_a_key() -> None:
    shown = " ".join(repr(x) for x in (GCM, CBC6, GCM.add(), CBC6.add(), str(GCM), CBC6.add().what))
    assert KEY.hex() not in shown
    assert repr(KEY)[2:-1] not in shown
    with pytest.raises(WireError) as caught:
        replace(GCM, reqid=-1).add()
    assert KEY.hex() not in str(caught.value)


def test_replay_messages() -> None:
    usage = KernelUsage(1000, 10, 1700000000, 1700000001)
    for sa in (GCM, CBC6, SENDING):
        for request in (sa.set_replay(sa.replay), sa.get_replay()):
            assert request.what.endswith(str(sa))
        state, used = sa.parse_replay(sa.set_replay(sa.replay).message.reveal())
        assert (state, used) == (sa.replay, KernelUsage())
        state, used = sa.parse_replay(sa.set_usage(usage).message.reveal())
        assert used == usage


def test_the_form_of_a_replay_state_is_kept() -> None:
    assert SENDING.outbound is True and SENDING.replay.outbound == ReplayState((3 << 32) + 17, esn=True)
    for form in (KernelReplay(window=0), KernelReplay(words=0), KernelReplay(words=1)):
        again, _ = GCM.parse_replay(GCM.set_replay(form).message.reveal())
        assert again.words == form.words
    for form, kind, octets in (
        (KernelReplay(oseq=5), 10, 12),
        (KernelReplay(oseq=5, words=0), 23, 24),
        (KernelReplay(oseq=5, words=2), 23, 32),
    ):
        _, attributes = parts(SENDING.set_replay(form).message.reveal(), 48)
        assert {number: len(value) for number, value in attributes.items()} == {kind: octets}
    with pytest.raises(ValueError, match="long form"):
        KernelReplay(esn=True)
    for words in (None, 0):
        with pytest.raises(ValueError, match="does not fit"):
            KernelReplay(window=33, words=words)


def test_policy_round_trip() -> None:
    again = KernelPolicy.parse(POLICY.raw)
    assert again == POLICY
    assert str(again) == "policy fwd 10.9.0.5/32 -> 10.1.0.0/16 (priority 371327)"
    assert KernelPolicy.parse(POLICY.put().message.reveal()) == POLICY
    blocking = KernelPolicy.parse(POLICY.blocking().raw)
    assert blocking.action == xfrm.BLOCK
    assert blocking.templates == ()
    assert replace(blocking, action=xfrm.ALLOW, templates=POLICY.templates) == POLICY


def test_policies_of() -> None:
    sa = replace(GCM, if_id=4)
    assert policies_of([POLICY], sa, "in", "fwd") == [POLICY]
    assert policies_of([POLICY], sa, "in", "out") == []
    assert policies_of([POLICY], replace(sa, reqid=6), "fwd") == []
    assert policies_of([POLICY], replace(sa, source=ip_address("192.0.2.9")), "fwd") == []
    assert policies_of([POLICY], GCM, "fwd") == []
    open_template = Template(ip_address("0.0.0.0"), ip_address("0.0.0.0"), reqid=7)
    assert policies_of([replace(POLICY, templates=(open_template,))], sa, "fwd")


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="4 octets"):
        replace(GCM, spi=b"abc")
    for bad in (
        replace(GCM, encap=Encap(70000, 1)),
        replace(GCM, encr_name="x" * 64),
        replace(GCM, limits=KernelLimits(hard_add=1 << 64)),
    ):
        with pytest.raises(WireError):
            bad.add()
    with pytest.raises(WireError):
        replace(POLICY, templates=(replace(POLICY.templates[0], reqid=1 << 32),)).add()


# What a kernel answered.

RECORDED = json.loads((Path(__file__).parent.parent.parent / "vectors" / "xfrm_linux_6_1.json").read_text())[
    "messages"
]
ONLY_TOLD = {15, 27}
"""Attributes the kernel tells but does not take: XFRMA_LASTUSED, XFRMA_PAD."""


def parts(message: bytes, fixed: int) -> tuple[bytes, dict[int, bytes]]:
    """Fixed part and attributes of a message."""
    found = {}
    at = 16 + fixed
    while at < len(message):
        length, number = struct.unpack_from("=HH", message, at)
        found[number] = message[at + 4 : at + length]
        at += (length + 3) & ~3
    return message[16 : 16 + fixed], found


@pytest.mark.parametrize("name", [name for name, entry in RECORDED.items() if "sa" in entry])
def test_recorded_sas(name: str) -> None:
    message = bytes.fromhex(RECORDED[name]["sa"])
    sa = KernelSa.parse(message)
    assert sa.reqid == 7
    assert sa.encr_key.reveal() == bytes(range(0x60, 0x60 + len(sa.encr_key)))
    assert sa.transforms is not None
    fixed, attributes = parts(message, 224)
    again, written = parts(sa.add().message.reveal(), 224)
    told = {number: value for number, value in attributes.items() if number not in ONLY_TOLD}
    assert written == told
    # all but current lifetime, statistics, and the window that the long form brings itself
    assert again[:160] == fixed[:160]
    assert again[204:215] == fixed[204:215]
    assert again[216] == fixed[216]
    state, usage = sa.parse_replay(bytes.fromhex(RECORDED[name]["counters"]))
    assert state == sa.replay
    assert usage.add_time == sa.usage.add_time > 1_700_000_000


def test_recorded_states() -> None:
    found = {
        name: KernelSa.parse(bytes.fromhex(entry["sa"])) for name, entry in RECORDED.items() if "sa" in entry
    }
    assert found["counted"].replay == KernelReplay(7, 4000, 32, 0x80000005)
    assert found["window-4096"].replay == KernelReplay(0, 70000, 4096, 1 << 4095 | 5, words=128)
    assert found["esn-in"].replay == KernelReplay(0, (3 << 32) + 17, 128, 1 << 127 | 1, True, 4)
    assert found["esn-out"].replay.outbound == ReplayState((3 << 32) + 17, esn=True)
    assert found["encap"].encap == Encap(4500, 40123)
    assert (found["marked"].mark, found["marked"].if_id, found["marked"].sequence) == (Mark(5, 0xFF), 11, 99)
    assert found["limited"].limits.hard_packets == 6000
    assert found["cbc-v6"].transforms == (Encr.AES_CBC, 256, Integ.HMAC_SHA2_256_128)
    assert found["gcm"].transforms == (Encr.AES_GCM_16, 128, Integ.NONE)


@pytest.mark.parametrize("direction", ["in", "out", "fwd"])
def test_recorded_policies(direction: str) -> None:
    message = bytes.fromhex(RECORDED[f"policy-{direction}"]["policy"])
    policy = KernelPolicy.parse(message)
    assert (policy.direction, policy.priority, policy.if_id) == (direction, 371327, 9)
    assert str(policy.source) == "10.9.0.5/32"
    assert policy.templates[0].reqid == 7
    fixed, attributes = parts(message, 168)
    again, written = parts(policy.raw, 168)
    assert again[:120] + again[152:164] == fixed[:120] + fixed[152:164]
    # main policies need not say their type
    assert written == {number: value for number, value in attributes.items() if number != 16}
    assert policy.kind == 0


# Foreign bytes.

SAMPLES = [
    GCM.add().message.reveal(),
    CBC6.add().message.reveal(),
    SENDING.add().message.reveal(),
    SENDING.set_replay(SENDING.replay).message.reveal(),
    POLICY.raw,
    CBC6.set_replay(CBC6.replay).message.reveal(),
    *(bytes.fromhex(octets) for entry in RECORDED.values() for octets in entry.values()),
]


def read_all(data: bytes) -> None:
    for read in (KernelSa.parse, KernelPolicy.parse, GCM.parse_replay, CBC6.parse_replay):
        try:
            read(data)
        except WireError as error:
            assert KEY.hex() not in str(error)
        except IkectxError as error:  # pragma: no cover - the assertion is the point
            raise AssertionError(f"not a WireError: {error!r}") from error


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SAMPLES), st.data())
def test_changed_octets(sample: bytes, data: st.DataObject) -> None:
    changed = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    read_all(bytes(changed))
    read_all(bytes(changed[: data.draw(st.integers(0, len(changed)))]))


@BOUNDED
@given(st.binary(max_size=600))
def test_any_octets(body: bytes) -> None:
    read_all(body)
    read_all(struct.pack("=IHHII", 16 + len(body), 0x10, 0, 1, 0) + body)


@BOUNDED
@given(st.sampled_from(SAMPLES), st.binary(max_size=200))
def test_any_attributes(sample: bytes, tail: bytes) -> None:
    fixed = {0x10: 224, 0x13: 168, 0x1E: 48}[struct.unpack_from("=H", sample, 4)[0]]
    data = bytearray(sample[: 16 + fixed]) + tail
    struct.pack_into("=I", data, 0, len(data))
    read_all(bytes(data))


@pytest.mark.parametrize("sample", SAMPLES)
def test_cut_short(sample: bytes) -> None:
    for length in range(0, len(sample), 3):
        with pytest.raises(WireError):
            KernelSa.parse(sample[:length])
