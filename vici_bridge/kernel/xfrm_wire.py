"""XFRM's netlink messages, declared on pyroute2's `nlmsg`: layouts only, no meaning.

pyroute2 has the message machinery but no XFRM messages. Source of every layout:
linux/xfrm.h (uapi), 64-bit alignment, host byte order except where a field is
octets. Keys are `Secret` in a decoded message too, so that no repr shows them.

Stricter than pyroute2's own decoders: lengths are checked against the message
before anything is read, and nothing is logged. All errors are `WireError`.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, ClassVar

from pyroute2.netlink import nla_base, nlmsg
from pyroute2.netlink.exceptions import NetlinkNLADecodeError

from ikectx.errors import WireError
from ikectx.sa.context import Secret

from .netlink_parts import DUMP, HEADER, REQUEST, attribute

Fields = tuple[tuple[str, str], ...]

NEWSA = 0x10
DELSA = 0x11
GETSA = 0x12
NEWPOLICY = 0x13
DELPOLICY = 0x14
GETPOLICY = 0x15
ALLOCSPI = 0x16
UPDPOLICY = 0x19
POLEXPIRE = 0x1B
FLUSHPOLICY = 0x1D
NEWAE = 0x1E
GETAE = 0x1F
MIGRATE = 0x21

_ADDRESS_FILTER = 26


def _prefixed(prefix: str, fields: Fields) -> Fields:
    """`fields` as part of a larger struct; padding keeps its underscore in front."""
    return tuple((f"_{prefix}{name}" if name[0] == "_" else f"{prefix}_{name}", fmt) for name, fmt in fields)


class _Packed:
    """Packs all fields of a message or attribute by one struct call, then attributes or a tail.

    A gateway has thousands of SAs; pyroute2's field-by-field decoder takes several times as long, and IKE
    waits for a dump. `tail` names the octets after the fixed part ("": there are none); `secret` makes them a
    `Secret`.
    """

    fields: ClassVar[Fields] = ()
    tail: ClassVar[str] = ""
    secret: ClassVar[bool] = False
    _layout: ClassVar[struct.Struct]
    _names: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._layout = struct.Struct("=" + "".join(fmt for _, fmt in cls.fields))
        cls._names = tuple(name for name, _ in cls.fields if name[0] != "_")

    def ft_decode(self: Any, offset: int) -> None:
        end = self.offset + self.length
        start = offset + self._layout.size
        if end > len(self.data) or start > end:
            raise WireError(f"{type(self).__name__}: {end - offset} octets are too few")
        self.update(zip(self._names, self._layout.unpack_from(self.data, offset), strict=True))
        if self.tail:
            octets = bytes(self.data[start:end])
            self[self.tail] = Secret(octets) if self.secret else octets
        if self.nla_map:
            self.decode_nlas((start + 3) & ~3)
            for slot in self["attrs"]:
                cell = slot.cell[1]
                (length,) = struct.unpack_from("=H", cell.data, cell.offset)
                if length < 4 or cell.offset + length > end:
                    raise WireError(f"{type(self).__name__}: an attribute is longer than the message")
                cell.decode()

    def ft_encode(self: Any, offset: int) -> tuple[int, int]:
        try:
            self.data += self._layout.pack(
                *(
                    dict.get(self, name, b"" if fmt[-1] == "s" else 0)
                    for name, fmt in self.fields
                    if name[0] != "_"
                )
            )
        except struct.error:
            # The text of struct.error could quote a value, and the field is of no use to an operator.
            raise WireError(f"{type(self).__name__}: a number does not fit its field") from None
        if self.tail:
            octets = dict.get(self, self.tail, b"")
            self.data += octets.reveal() if isinstance(octets, Secret) else octets
        pad = -(len(self.data) - offset) % 4
        self.data += bytes(pad)
        return len(self.data), pad


class _Attribute(_Packed, nla_base):
    """A netlink attribute with a fixed layout."""


_SELECTOR: Fields = (
    ("daddr", "16s"), ("saddr", "16s"), ("dport", "2s"), ("dport_mask", "2s"), ("sport", "2s"),
    ("sport_mask", "2s"), ("family", "H"), ("prefixlen_d", "B"), ("prefixlen_s", "B"), ("proto", "B"),
    ("_pad", "3x"), ("ifindex", "i"), ("user", "I"),
)  # fmt: skip
_LIFETIME_CFG: Fields = (
    ("soft_bytes", "Q"), ("hard_bytes", "Q"), ("soft_packets", "Q"), ("hard_packets", "Q"),
    ("soft_add", "Q"), ("hard_add", "Q"), ("soft_use", "Q"), ("hard_use", "Q"),
)  # fmt: skip
_LIFETIME_CUR: Fields = (("bytes", "Q"), ("packets", "Q"), ("add_time", "Q"), ("use_time", "Q"))
_ID: Fields = (("daddr", "16s"), ("spi", "4s"), ("proto", "B"), ("_pad", "3x"))
_SA_ID: Fields = (("daddr", "16s"), ("spi", "4s"), ("family", "H"), ("proto", "B"), ("_pad", "1x"))
_TMPL: Fields = (
    *_ID, ("family", "H"), ("_pad1", "2x"), ("saddr", "16s"), ("reqid", "I"), ("mode", "B"), ("share", "B"),
    ("optional", "B"), ("_pad2", "1x"), ("aalgos", "I"), ("ealgos", "I"), ("calgos", "I"),
)  # fmt: skip
TMPL_NAMES = tuple(name for name, _ in _TMPL if name[0] != "_")
TMPL = struct.Struct("=" + "".join(fmt for _, fmt in _TMPL))
"""struct xfrm_user_tmpl: attribute XFRMA_TMPL is a row of them."""


class _Attributes:
    """XFRMA_*: the attributes with a meaning here. Others keep number and octets (`other_attributes`)."""

    nla_map = (
        (1, "XFRMA_ALG_AUTH", "algo"),
        (2, "XFRMA_ALG_CRYPT", "algo"),
        (4, "XFRMA_ENCAP", "encap"),
        (5, "XFRMA_TMPL", "octets"),
        (9, "XFRMA_LTIME_VAL", "lifetime_cur"),
        (10, "XFRMA_REPLAY_VAL", "replay_val"),
        (15, "XFRMA_LASTUSED", "octets"),
        (16, "XFRMA_POLICY_TYPE", "policy_type"),
        (18, "XFRMA_ALG_AEAD", "algo_icv"),
        (20, "XFRMA_ALG_AUTH_TRUNC", "algo_icv"),
        (21, "XFRMA_MARK", "mark"),
        (23, "XFRMA_REPLAY_ESN_VAL", "replay_esn_val"),
        (27, "XFRMA_PAD", "octets"),
        (31, "XFRMA_IF_ID", "number"),
    )

    class algo(_Attribute):
        """struct xfrm_algo: name, key length in bits, key."""

        fields = (("name", "64s"), ("key_bits", "I"))
        tail = "key"
        secret = True

    class algo_icv(_Attribute):
        """struct xfrm_algo_aead and xfrm_algo_auth: with the length of the ICV in bits."""

        fields = (("name", "64s"), ("key_bits", "I"), ("icv_bits", "I"))
        tail = "key"
        secret = True

    class encap(_Attribute):
        fields = (("type", "H"), ("sport", "2s"), ("dport", "2s"), ("_pad", "2x"), ("oa", "16s"))

    class lifetime_cur(_Attribute):
        fields = _LIFETIME_CUR

    class replay_val(_Attribute):
        fields = (("oseq", "I"), ("seq", "I"), ("bitmap", "I"))

    class replay_esn_val(_Attribute):
        """struct xfrm_replay_state_esn; `words` holds bmp_len u32s in host byte order."""

        fields = (
            ("bmp_len", "I"), ("oseq", "I"), ("seq", "I"), ("oseq_hi", "I"), ("seq_hi", "I"), ("window", "I"),
        )  # fmt: skip
        tail = "words"

    class policy_type(_Attribute):
        fields = (("type", "B"), ("_pad", "5x"))

    class mark(_Attribute):
        fields = (("value", "I"), ("mask", "I"))

    class number(_Attribute):
        fields = (("number", "I"),)

    class octets(_Attribute):
        fields = ()
        tail = "octets"


class _Message(_Packed, _Attributes, nlmsg):
    """A whole netlink message: header, fixed part, attributes."""


class usersa_info(_Message):
    """NEWSA (also the answer to GETSA)."""

    fields = (
        *_prefixed("sel", _SELECTOR), *_ID, ("saddr", "16s"), *_prefixed("lft", _LIFETIME_CFG),
        *_prefixed("cur", _LIFETIME_CUR), ("stat_window", "I"), ("stat_replay", "I"), ("stat_integrity", "I"),
        ("seq", "I"), ("reqid", "I"), ("family", "H"), ("mode", "B"), ("replay_window", "B"), ("flags", "B"),
        ("_end", "7x"),
    )  # fmt: skip


_SPI_AT = struct.calcsize("=" + "".join(fmt for _, fmt in _SELECTOR)) + 16
"""Offset of the SPI in xfrm_usersa_info: after the selector and the destination address."""


class userspi_info(_Message):
    """ALLOCSPI: what is known of the SA, and the range in host byte order."""

    fields = (*usersa_info.fields, ("min", "I"), ("max", "I"))


class usersa_id(_Message):
    """GETSA, DELSA."""

    fields = _SA_ID


class aevent_id(_Message):
    """GETAE, NEWAE."""

    fields = (*_SA_ID, ("saddr", "16s"), ("flags", "I"), ("reqid", "I"))


class userpolicy_info(_Message):
    """NEWPOLICY, UPDPOLICY (also the answer to GETPOLICY)."""

    fields = (
        *_prefixed("sel", _SELECTOR), *_prefixed("lft", _LIFETIME_CFG), *_prefixed("cur", _LIFETIME_CUR),
        ("priority", "I"), ("index", "I"), ("dir", "B"), ("action", "B"), ("flags", "B"), ("share", "B"),
        ("_end", "4x"),
    )  # fmt: skip


class userpolicy_id(_Message):
    """GETPOLICY, DELPOLICY."""

    fields = (*_prefixed("sel", _SELECTOR), ("index", "I"), ("dir", "B"), ("_end", "3x"))


def parse(kind: type[_Message], data: bytes) -> Any:
    """The message in `data`, which begins with its netlink header. Errors: WireError."""
    if len(data) < HEADER.size:
        raise WireError(f"{kind.__name__}: {len(data)} octets hold no netlink header")
    (length,) = struct.unpack_from("=I", data)
    if not HEADER.size <= length <= len(data):
        raise WireError(f"{kind.__name__}: a length of {length} in {len(data)} octets")
    message = kind(data)
    try:
        message.decode()
    except (struct.error, NetlinkNLADecodeError, ValueError, IndexError, KeyError):
        raise WireError(f"{kind.__name__}: its attributes do not parse") from None
    return message


def build(
    kind: type[_Message],
    number: int,
    flags: int,
    values: dict[str, Any],
    attributes: Sequence[tuple[str, Any]] = (),
    *,
    extra: Sequence[tuple[int, bytes]] = (),
) -> bytes:
    """A message of type `number`, its sequence number 0. `extra` is appended as it is. Errors: WireError."""
    message = kind()
    message.update(values)
    message["attrs"] = [list(pair) for pair in attributes]
    message["header"] = {"type": number, "flags": flags}
    message.encode()
    data = bytearray(message.data)
    for kind_number, octets in extra:
        data += attribute(kind_number, octets)
    struct.pack_into("=I", data, 0, len(data))
    return bytes(data)


def dump_to(number: int, source: bytes, destination: bytes, family: int, bits: int) -> bytes:
    """A dump of the SAs to one address: a bare header and XFRMA_ADDRESS_FILTER (Linux 3.15)."""
    body = source.ljust(16, b"\0") + destination.ljust(16, b"\0") + struct.pack("=HBB", family, 0, bits)
    body = attribute(_ADDRESS_FILTER, body)
    return HEADER.pack(HEADER.size + len(body), number, REQUEST | DUMP, 0, 0) + body


def spi_of(data: bytes) -> bytes:
    """The SPI in a NEWSA message that may be malformed otherwise; fewer octets if it is truncated."""
    return data[HEADER.size + _SPI_AT : HEADER.size + _SPI_AT + 4]


def attributes(message: Any) -> dict[str, Any]:
    """Known attributes by name; if one occurs twice the last counts, as in the kernel."""
    return {slot.cell[0]: slot.cell[1] for slot in message["attrs"] if slot.cell[0] != "UNKNOWN"}


def other_attributes(message: Any) -> tuple[tuple[int, bytes], ...]:
    """(number, octets) of each attribute without a meaning here."""
    found = []
    for slot in message["attrs"]:
        if slot.cell[0] == "UNKNOWN":
            cell = slot.cell[1]
            length, number = struct.unpack_from("=HH", cell.data, cell.offset)
            found.append((number, bytes(cell.data[cell.offset + 4 : cell.offset + length])))
    return tuple(found)
