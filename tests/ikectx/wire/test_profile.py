"""Profiles: size, exact round trips, unknown keys, splitting, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import cbor2
import pytest

from ikectx.errors import WireError
from ikectx.numbers import STATUS_TEXT, Fpt, IdType, Status
from ikectx.sa.context import (
    Endpoint,
    FinalState,
    Identity,
    IkeContext,
    Lifetime,
    PeerContext,
    PolicyContext,
)
from ikectx.sa.verdict import Verdict
from ikectx.wire import cbor
from ikectx.wire.cxtp import (
    MAX_BLOCK_DATA,
    ContextDataBlock,
    Ctd,
    Ctdr,
    Pctd,
    StatusBlock,
    parse_message,
)
from ikectx.wire.profile import (
    PROFILES,
    TransferHeader,
    decode,
    decode_final,
    decode_verdicts,
    encode,
    encode_final,
    encode_verdicts,
)
from tests.profile_samples import PROFILE_VECTORS, RICH, TRANSFER, TYPICAL, TYPICAL_FINAL, UNKNOWN, rewrite


def test_no_side_has_more_than_sixteen_virtual_ips() -> None:
    """Each is a selector of each child without others: 1024 of each took a gateway minutes to check."""
    most = tuple(ip_address(f"10.9.0.{last}") for last in range(1, 17))
    allowed = replace(TYPICAL, remote_vips=most)
    assert decode(encode(allowed, transfer=TRANSFER))[0].remote_vips == most
    with pytest.raises(WireError, match="at most 16"):
        decode(encode(replace(TYPICAL, remote_vips=(*most, ip_address("10.9.0.17"))), transfer=TRANSFER))


def size_of(context: IkeContext, final: FinalState) -> list[int]:
    """Octets of PCTD, CTDR, CTD, CTDR."""
    mn = context.remote.address
    everything = tuple(encode_verdicts(()))
    return [
        len(message.serialize())
        for message in (
            Pctd(mn, encode(context, transfer=TRANSFER)),
            Ctdr(mn, everything, complete=True),
            Ctd(mn, encode_final(final, TRANSFER.transfer_id)),
            Ctdr(mn, everything, complete=True),
        )
    ]


def test_a_typical_transfer_takes_at_most_480_octets() -> None:
    assert sum(size_of(TYPICAL, TYPICAL_FINAL)) <= 480


def test_a_transfer_over_ipv6_takes_at_most_600_octets() -> None:
    context = replace(
        TYPICAL,
        local=RICH.local,
        remote=RICH.remote,
        remote_vips=RICH.remote_vips,
        peer_addresses=RICH.peer_addresses,
    )
    assert sum(size_of(context, TYPICAL_FINAL)) <= 600


# Round trips.


@pytest.mark.parametrize("context", [TYPICAL, RICH, replace(RICH, children=(), policies=())])
@pytest.mark.parametrize(
    "transfer",
    [
        *(TRANSFER, replace(TRANSFER, intent="check"), replace(TRANSFER, address="keep")),
        *(replace(TRANSFER, intent="hold", address="mn"), replace(TRANSFER, intent="check", address="mn")),
    ],
)
def test_through_a_message_and_back(context: IkeContext, transfer: TransferHeader) -> None:
    sent = Pctd(context.remote.address, encode(context, transfer=transfer))
    got = parse_message(sent.serialize())
    assert isinstance(got, Pctd)
    assert decode(got.blocks) == (context, transfer)
    assert encode(context, transfer=transfer) == sent.blocks


def test_what_is_empty_is_not_sent() -> None:
    bare = replace(TYPICAL, policies=(), peer=None)
    assert [block.fpt for block in encode(bare, transfer=TRANSFER)] == [Fpt.IKEV2_SA, Fpt.SAD]
    assert [block.fpt for block in encode(TYPICAL, transfer=TRANSFER)] == list(PROFILES)


def test_a_peer_entry_without_content_is_not_no_peer_entry() -> None:
    context = replace(TYPICAL, peer=PeerContext("mn"))
    assert decode(encode(context, transfer=TRANSFER))[0].peer == PeerContext("mn")


def test_final_state_through_a_message_and_back() -> None:
    sent = Ctd(ip_address("198.51.100.7"), encode_final(TYPICAL_FINAL, TRANSFER.transfer_id))
    got = parse_message(sent.serialize())
    assert isinstance(got, Ctd)
    assert decode_final(got.blocks) == (TYPICAL_FINAL, TRANSFER.transfer_id)
    childless = replace(TYPICAL_FINAL, children=())
    assert decode_final(encode_final(childless, b"12345678")) == (childless, b"12345678")


def test_nothing_derived_is_sent() -> None:
    """The keys follow from secret and nonces: a context of a secret has no place for SKEYSEED or SK_*."""
    data = b"".join(block.data for block in encode(TYPICAL, transfer=TRANSFER))
    assert data.count(TYPICAL.current.nonce_i) == 1  # the first child's are those of the IKE_SA
    assert data.count(TYPICAL.current.secret.reveal()) == 1


# Vectors: taken apart CBOR item by CBOR item.


@pytest.mark.parametrize(("name", "context"), [("typical", TYPICAL), ("rich", RICH)])
def test_profile_vectors(name: str, context: IkeContext) -> None:
    assert decode(PROFILE_VECTORS[name]) == (context, TRANSFER)
    assert encode(context, transfer=TRANSFER) == tuple(PROFILE_VECTORS[name])


def test_final_vector() -> None:
    assert decode_final(PROFILE_VECTORS["final"]) == (TYPICAL_FINAL, TRANSFER.transfer_id)
    assert encode_final(TYPICAL_FINAL, TRANSFER.transfer_id) == tuple(PROFILE_VECTORS["final"])


# Splitting over blocks.


@pytest.mark.parametrize("extra", [0, 1, 3, 4, 5, 7, 8, 2032, 2036, 2037, 6000])
def test_split_over_blocks(extra: int) -> None:
    """An unknown entry blows the profile up to just below, at and above the limits of a block."""
    plain = sum(len(b.data) for b in encode(TYPICAL, transfer=TRANSFER) if b.fpt is Fpt.IKEV2_SA)
    filler = cbor.dumps(bytes(max(MAX_BLOCK_DATA - plain - 2 - 4 + extra, 0)))
    context = replace(TYPICAL, unknown=((Fpt.IKEV2_SA, 99, filler),))
    sent = Pctd(context.remote.address, encode(context, transfer=TRANSFER))
    parts = [b for b in sent.blocks if b.fpt is Fpt.IKEV2_SA]
    assert all(len(b.data) == MAX_BLOCK_DATA for b in parts[:-1])
    got = parse_message(sent.serialize())
    assert isinstance(got, Pctd)
    assert decode(got.blocks) == (context, TRANSFER)


def test_many_children_in_one_message_and_too_many() -> None:
    def with_children(count: int) -> IkeContext:
        child = TYPICAL.children[0]
        more = tuple(replace(child, name=f"net{n}", spi_in=n.to_bytes(4)) for n in range(count))
        return replace(TYPICAL, children=more)

    context = with_children(600)
    sent = Pctd(context.remote.address, encode(context, transfer=TRANSFER)).serialize()
    got = parse_message(sent)
    assert isinstance(got, Pctd)
    assert decode(got.blocks)[0] == context
    with pytest.raises(WireError, match="does not fit in one CXTP message"):
        encode(with_children(1100), transfer=TRANSFER)


def blocks_of(fpt: Fpt, *sizes: int) -> list[ContextDataBlock]:
    return [ContextDataBlock(fpt, bytes(size)) for size in sizes]


def test_blocks_out_of_order() -> None:
    good = list(encode(TYPICAL, transfer=TRANSFER))
    for blocks in (
        [],
        good[1:],
        [*good, good[0]],
        [good[0], good[0], *good[1:]],
        [replace(good[0], presence=0), *good[1:]],
        [good[0], *blocks_of(Fpt.SAD, MAX_BLOCK_DATA), good[2], *blocks_of(Fpt.SAD, 8)],
        [good[0], *blocks_of(Fpt.SAD, *[MAX_BLOCK_DATA] * 40)],
    ):
        with pytest.raises(WireError):
            decode(blocks)
        with pytest.raises(WireError):
            decode_final(blocks)


def test_foreign_blocks_are_passed_over_and_order_of_profiles_does_not_matter() -> None:
    foreign = ContextDataBlock(Fpt.MLD, b"\xff" * 12, 7)
    good = encode(TYPICAL, transfer=TRANSFER)
    assert decode([foreign, *reversed(good), foreign]) == (TYPICAL, TRANSFER)


def test_padding_is_zero_and_short() -> None:
    first, *rest = encode(TYPICAL, transfer=TRANSFER)
    assert decode([replace(first, data=first.data + bytes(7)), *rest])[0] == TYPICAL
    for tail in (bytes(8), b"\0\0\1", b"\xf6"):
        with pytest.raises(WireError, match="no padding"):
            decode([replace(first, data=first.data + tail), *rest])


# Unknown keys.


def test_unknown_keys_are_kept_and_sent_on() -> None:
    context = replace(RICH, unknown=UNKNOWN)
    blocks = encode(context, transfer=TRANSFER)
    got, _ = decode(blocks)
    assert got.unknown == UNKNOWN
    assert encode(got, transfer=TRANSFER) == blocks
    assert encode(replace(context, unknown=UNKNOWN[::-1]), transfer=TRANSFER) == blocks

    blocks = rewrite(RICH, Fpt.SAD, lambda profile: profile[1][1].update({31: True}))  # type: ignore[assignment]
    assert decode(blocks)[0].unknown == (UNKNOWN[4],)


def test_unknown_keys_of_a_child_that_is_gone_go_with_it() -> None:
    context = replace(RICH, unknown=UNKNOWN, children=RICH.children[:1], policies=())
    assert UNKNOWN[4] not in decode(encode(context, transfer=TRANSFER))[0].unknown


def test_unknown_keys_without_peer_entry_and_policies() -> None:
    context = replace(TYPICAL, peer=None, policies=(), unknown=UNKNOWN[-2:])
    assert decode(encode(context, transfer=TRANSFER))[0] == context


@pytest.mark.parametrize(
    "entry",
    [
        (0x1234, 40, b"\xf6"),
        (int(Fpt.SAD), -1, b"\xf6"),
        (int(Fpt.IKEV2_SA), 4, b"\xf6"),
        (int(Fpt.IKEV2_SA), 8, b"\xf6"),
        (int(Fpt.SAD), 1 << 16 | 4, b"\xf6"),
        (int(Fpt.SAD), 40, b"\xf6\xf6"),
        (int(Fpt.SAD), 40, b"\xc1\x00"),
        (int(Fpt.SAD), 40, b""),
    ],
)
def test_unknown_entries_that_are_none(entry: tuple[int, int, bytes]) -> None:
    with pytest.raises(WireError):
        encode(replace(TYPICAL, unknown=(entry,)), transfer=TRANSFER)


# Refusals.


def change(*path: Any) -> Callable[[Any], None]:
    """Set what the path leads to: the last element is the value, `...` deletes."""

    def apply(value: Any) -> None:
        *steps, last, new = path
        for step in steps:
            value = value[step]
        if new is ...:
            del value[last]
        else:
            value[last] = new

    return apply


BAD: list[tuple[Fpt, tuple[Any, ...]]] = [
    (Fpt.IKEV2_SA, (0, 2)),  # a later version
    (Fpt.IKEV2_SA, (0, ...)),
    (Fpt.IKEV2_SA, (0, True)),  # a boolean is no number
    (Fpt.IKEV2_SA, (1, b"short")),
    (Fpt.IKEV2_SA, (3, 1 << 64)),
    (Fpt.IKEV2_SA, (3, -1)),
    (Fpt.IKEV2_SA, (4, ...)),
    (Fpt.IKEV2_SA, (4, b"mn")),
    (Fpt.IKEV2_SA, (4, "x" * 513)),
    (Fpt.IKEV2_SA, (5, [])),
    (Fpt.IKEV2_SA, (5, {})),
    (Fpt.IKEV2_SA, (5, 0, [])),
    (Fpt.IKEV2_SA, (5, 0, 1, bytes(15))),
    (Fpt.IKEV2_SA, (5, 0, 2, 1)),
    (Fpt.IKEV2_SA, (5, 0, 3, bytes(30))),  # nonces of 15 octets
    (Fpt.IKEV2_SA, (5, 0, 3, bytes(33))),
    (Fpt.IKEV2_SA, (5, 0, 3, [bytes(16), bytes(257)])),
    (Fpt.IKEV2_SA, (5, 0, 4, ...)),
    (Fpt.IKEV2_SA, (5, 0, 4, bytes(16385))),
    (Fpt.IKEV2_SA, (5, 0, 5, [5])),
    (Fpt.IKEV2_SA, (5, 0, 5, [5, 20, 65536])),
    (Fpt.IKEV2_SA, (5, 0, 5, [5, 20, 128, 0, 31, 1])),
    (Fpt.IKEV2_SA, (5, 0, 8, [b"skd"])),
    (Fpt.IKEV2_SA, (5, 0, 8, None)),
    (Fpt.IKEV2_SA, (6, b"")),
    (Fpt.IKEV2_SA, (9, bytes(5))),
    (Fpt.IKEV2_SA, (9, bytes(16))),  # not the family of the remote
    (Fpt.IKEV2_SA, (11, [bytes(6)])),
    (Fpt.IKEV2_SA, (11, [bytes(4)] * 1025)),
    (Fpt.IKEV2_SA, (14, 1.5)),
    (Fpt.IKEV2_SA, (18, [1])),
    (Fpt.IKEV2_SA, (18, [1 << 32, 0])),
    (Fpt.IKEV2_SA, (19, [0] * 8)),
    (Fpt.IKEV2_SA, (19, [1 << 63])),
    (Fpt.IKEV2_SA, (19, [None, None, None, -1])),
    (Fpt.IKEV2_SA, (20, None)),
    (Fpt.IKEV2_SA, ("text", 1)),  # keys are numbers
    (Fpt.IKEV2_SA, (65536, 1)),
    (Fpt.SAD, (1, 0, 2, 1)),  # no such generation
    (Fpt.SAD, (1, 0, 4, bytes(9))),
    (Fpt.SAD, (1, 0, 6, [])),
    *((Fpt.IKEV2_SA, (2, flags)) for flags in (5, 10, 18, 7, 15, 32)),  # two intents, two addresses, unknown
    (Fpt.SAD, (1, 0, 7, [])),
    (Fpt.SAD, (1, 0, 7, [bytes(6)])),
    (Fpt.SAD, (1, 0, 7, [bytes([10, 1, 0, 1, 16])])),  # host bits set
    (Fpt.SAD, (1, 0, 7, [bytes([0, 0, 0, 0, 33])])),
    (Fpt.SAD, (1, 0, 7, [bytes(16) + b"\x81"])),
    (Fpt.SAD, (1, 0, 7, [[bytes(4), 256]])),
    (Fpt.SAD, (1, 0, 7, [[bytes(4), 0, 65536]])),
    (Fpt.SAD, (1, 0, 7, ["10.0.0.0/8"])),
    (Fpt.SAD, (1, 0, 12, 256)),
    (Fpt.SAD, (1, 0, 15, [1, 2])),
    (Fpt.SAD, (1, 0, 16, [1 << 32, 32])),  # no ESN
    (Fpt.SAD, (1, 0, 16, [1, 4097])),
    (Fpt.SAD, (1, 0, 16, [9, 8, False, b"\1\0"])),  # wider than the window
    (Fpt.SAD, (1, 0, 16, [9, 8, False, b"\0\1"])),
    (Fpt.SAD, (1, 0, 16, [9, 4096, False, bytes(513)])),
    (Fpt.SPD, (1, 0, 0, -1)),
    (Fpt.SPD, (1, 0, [])),
    (Fpt.SPD, (1, 0, [1, "x"])),
    (Fpt.SPD, (1, 0, [1, "iox"])),
    (Fpt.SPD, (1, 0, [1, ""])),
    (Fpt.SPD, (1, 0, [1, "i", 1])),  # no such child
    (Fpt.SPD, (1, 0, [1, "i", 0, 1])),  # no such selector
    (Fpt.SPD, (1, 0, [1, "i", 0, 0, 1])),
    (Fpt.SPD, (1, [[1, "iof" * 100]] * 20)),
    (Fpt.PAD, (1, 5)),
    (Fpt.PAD, (2, [["psk", False]])),
    (Fpt.PAD, (2, [[]])),
    (Fpt.PAD, (2, [["psk", "", "", ["g", 1]]])),
    (Fpt.PAD, (4, "net")),
]


@pytest.mark.parametrize(("fpt", "path"), BAD)
def test_bad_profile(fpt: Fpt, path: tuple[Any, ...]) -> None:
    with pytest.raises(WireError) as caught:
        decode(rewrite(TYPICAL, fpt, change(*path)))
    assert caught.value.status is Status.MALFORMED


def test_an_identity_that_is_no_text_cannot_stand_for_an_id() -> None:
    context = replace(TYPICAL, local_id=Identity(IdType.KEY_ID, b"\xff\xfe"))
    with pytest.raises(WireError, match="no text"):
        decode(rewrite(context, Fpt.PAD, change(2, [["psk", True]])))


@pytest.mark.parametrize(
    "path",
    [(1, bytes(8)), (1, ...), (3, "1"), (18, [0]), (18, {})],
)
def test_bad_final_ike(path: tuple[Any, ...]) -> None:
    first, *rest = encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)
    value = cbor2.loads(first.data)
    change(*path)(value)
    with pytest.raises(WireError):
        decode_final([ContextDataBlock(first.fpt, cbor2.dumps(value, canonical=True)), *rest])


@pytest.mark.parametrize(
    "rows", [5, [[bytes(4), [1]]], [[bytes(3), [1], [1]]], [[bytes(4), [1], [1]]] * 2, [[bytes(4), 1, [1]]]]
)
def test_bad_final_sad(rows: Any) -> None:
    first, *_ = encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)
    with pytest.raises(WireError):
        decode_final([first, ContextDataBlock(Fpt.SAD, cbor.dumps({0: 1, 2: rows}))])


def test_a_later_version_may_add_keys_to_a_final_state() -> None:
    first, *rest = encode_final(TYPICAL_FINAL, TRANSFER.transfer_id)
    value = cbor2.loads(first.data)
    value[50] = "new"
    blocks = [ContextDataBlock(first.fpt, cbor.dumps(value)), *rest]
    assert decode_final(blocks) == (TYPICAL_FINAL, TRANSFER.transfer_id)


@pytest.mark.parametrize(
    "context",
    [
        replace(TYPICAL, mid_initiator=1 << 32),
        replace(TYPICAL, epoch=-1),
        replace(TYPICAL, connection="x" * 513),
        replace(TYPICAL, connection="\ud800"),
        replace(TYPICAL, local_id=Identity(IdType(256), b"")),
        replace(TYPICAL, lifetime=Lifetime(rekey=1 << 70)),
        replace(TYPICAL, policies=(PolicyContext(0, "in", 3),)),
        replace(TYPICAL, conditions=1.5),  # type: ignore[arg-type]
        replace(TYPICAL, remote=Endpoint.of("fe80::1%eth0"), local=Endpoint.of("fe80::2")),
    ],
)
def test_what_would_not_arrive_is_not_sent(context: IkeContext) -> None:
    with pytest.raises(WireError):
        encode(context, transfer=TRANSFER)


def test_a_final_state_that_would_not_arrive_is_not_sent() -> None:
    with pytest.raises(WireError):
        encode_final(TYPICAL_FINAL, b"short")
    with pytest.raises(WireError):
        encode_final(replace(TYPICAL_FINAL, mid_responder=1 << 32), TRANSFER.transfer_id)


def test_transfer_header_is_checked() -> None:
    with pytest.raises(ValueError, match="8 octets"):
        TransferHeader(b"1")
    with pytest.raises(ValueError, match="intent"):
        TransferHeader(bytes(8), "maybe")  # type: ignore[arg-type]


def test_errors_and_reprs_show_no_key_material() -> None:
    secret = TYPICAL.current.secret.reveal()
    first, *rest = encode(TYPICAL, transfer=TRANSFER)
    assert secret.hex() not in repr(first)
    for cut in range(len(first.data)):
        with pytest.raises(WireError) as caught:
            decode([replace(first, data=first.data[:cut]), *rest])
        assert caught.value.__cause__ is None
        assert not any(secret[n : n + 4].hex() in repr(caught.value) for n in range(28))


# Statuses.


def test_verdicts_become_the_first_refusal_of_each_profile() -> None:
    verdicts = [
        Verdict(Fpt.PAD, Status.OK),
        Verdict(Fpt.SAD, Status.ESP_SPI_IN_USE, "c0ffee"),
        Verdict(Fpt.SAD, Status.ALGORITHM),
        Verdict(Fpt.PAD, Status.NO_CONNECTION),
        Verdict(Fpt.MLD, Status.FAILED),
    ]
    statuses = encode_verdicts(verdicts)
    assert statuses == (
        StatusBlock(Fpt.IKEV2_SA),
        StatusBlock(Fpt.SAD, Status.ESP_SPI_IN_USE),
        StatusBlock(Fpt.SPD),
        StatusBlock(Fpt.PAD, Status.NO_CONNECTION),
        StatusBlock(Fpt.MLD, Status.FAILED),
    )
    back = decode_verdicts(statuses)
    assert [v.status for v in back] == [s.status for s in statuses]
    assert back[0].detail == ""
    assert back[1].detail == STATUS_TEXT[Status.ESP_SPI_IN_USE]
    assert "0xfe" in decode_verdicts((StatusBlock(Fpt.SAD, Status(0xFE)),))[0].detail


def test_verdicts_that_are_all_fine_need_no_status() -> None:
    assert encode_verdicts(()) == ()
    assert encode_verdicts([Verdict(fpt, Status.OK) for fpt in PROFILES]) == ()
    refused = encode_verdicts([Verdict(Fpt.SAD, Status.BUSY)])
    assert [one.fpt for one in refused] == list(PROFILES)
    assert [one.fpt for one in refused if one.status is not Status.OK] == [Fpt.SAD]
