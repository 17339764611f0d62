"""The VICI protocol as octets: packets, messages and their framing; no I/O.

Source: strongSwan's "Versatile IKE Configuration Interface" protocol description
(src/libcharon/plugins/vici/README.md, 5.9 to 6.0). A packet travels with a 32 bit
length in front; a message is a tree of sections, lists and values. Values are text
here: UTF-8 is what both charon and this project put into them.

This side is strict where a client library may be lax: unknown elements, text that
is not UTF-8, a key twice in a section, or octets left over are all `WireError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ikectx.errors import WireError
from ikectx.wire.reader import Reader

Message = dict[str, Any]
"""A section: each value is text, a list of texts, or another section."""

MAX_PACKET = 512 * 1024
"""Octets of the longest packet charon takes or sends."""

MAX_DEPTH = 32
"""Sections inside sections; charon's own messages stay below 8."""

MAX_VALUE = 0xFFFF
"""Octets of one value or list item."""

HEADER = 4

LONGEST_PATH = 107
"""Octets of a unix socket's path (unix(7))."""


class PacketType(IntEnum):
    """The type of a packet; CMD_REQUEST, EVENT_REGISTER, EVENT_UNREGISTER and EVENT have a name."""

    CMD_REQUEST = 0
    CMD_RESPONSE = 1
    CMD_UNKNOWN = 2
    EVENT_REGISTER = 3
    EVENT_UNREGISTER = 4
    EVENT_CONFIRM = 5
    EVENT_UNKNOWN = 6
    EVENT = 7


NAMED = frozenset(
    {PacketType.CMD_REQUEST, PacketType.EVENT_REGISTER, PacketType.EVENT_UNREGISTER, PacketType.EVENT}
)
WITH_BODY = frozenset({PacketType.CMD_REQUEST, PacketType.CMD_RESPONSE, PacketType.EVENT})

_SECTION_START, _SECTION_END, _KEY_VALUE, _LIST_START, _LIST_ITEM, _LIST_END = range(1, 7)


@dataclass(frozen=True, slots=True)
class Packet:
    """One packet without its length. `body` is a serialized message, empty if the type has none."""

    type: PacketType
    name: str = ""
    body: bytes = b""

    def __post_init__(self) -> None:
        if bool(self.name) != (self.type in NAMED):
            raise WireError(f"a VICI packet {self.type.name} and its name do not go together")
        if self.body and self.type not in WITH_BODY:
            raise WireError(f"a VICI packet {self.type.name} has no message")

    @classmethod
    def parse(cls, data: bytes) -> Packet:
        """One packet from exactly `data`. Errors: WireError."""
        reader = Reader(data, "VICI packet")
        number = reader.u8("type")
        try:
            kind = PacketType(number)
        except ValueError:
            raise reader.fail(f"type {number} is unknown") from None
        name = _read_name(reader) if kind in NAMED else ""
        return cls(kind, name, reader.rest())

    def serialize(self) -> bytes:
        """Without the length in front; see `framed`."""
        if self.type not in NAMED:
            return bytes((self.type,)) + self.body
        out = bytearray()
        _write_name(out, self.type, self.name)
        return bytes(out) + self.body

    def framed(self, limit: int = MAX_PACKET) -> bytes:
        """With the length in front, as it travels. Errors: WireError for more than `limit` octets."""
        data = self.serialize()
        if len(data) > limit:
            raise WireError(f"a VICI packet of {len(data)} octets, {limit} is the limit")
        return len(data).to_bytes(HEADER) + data

    @property
    def message(self) -> Message:
        """The body, parsed. Errors: WireError."""
        return parse_message(self.body)


class Deframer:
    """Cuts a stream of octets into packets; feed it as the octets come."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, data: bytes) -> list[Packet]:
        """The packets that `data` completes. Errors: WireError; the stream is unusable after it."""
        self._buffer += data
        packets: list[Packet] = []
        at = 0
        while len(self._buffer) - at >= HEADER:
            length = int.from_bytes(self._buffer[at : at + HEADER])
            if not 1 <= length <= MAX_PACKET:
                raise WireError(f"VICI length: {length} octets are not in 1..{MAX_PACKET}")
            if len(self._buffer) - at < HEADER + length:
                break
            packets.append(Packet.parse(bytes(self._buffer[at + HEADER : at + HEADER + length])))
            at += HEADER + length
        del self._buffer[:at]
        return packets

    @property
    def waiting(self) -> int:
        """Octets of a packet that is not complete yet."""
        return len(self._buffer)


def parse_message(data: bytes, *, foreign: bool = False) -> Message:
    """A message's octets as a tree. Errors: WireError.

    `foreign`: charon's message, whose identities may have any octets (those that are not UTF-8 become \\xNN),
    and in which the last of equal names in a section counts. A listing has hundreds of elements for each SA,
    so this loop uses no `Reader`, which takes four times as long.
    """
    root: Message = {}
    stack, section, at, end = [root], root, 0, len(data)
    errors = "backslashreplace" if foreign else "strict"
    try:
        while at < end:
            element = data[at]
            at += 1
            if element == _SECTION_END:
                stack.pop()
                if not stack:
                    raise _fail("a section ends that was not started", at)
                section = stack[-1]
                continue
            if element not in (_SECTION_START, _KEY_VALUE, _LIST_START):
                raise _fail(f"element {element} cannot stand here", at)
            start, at = at + 1, at + 1 + data[at]
            if start == at:
                raise _fail("an empty name", at)
            if at > end:
                raise _short(data, start, at)
            name = data[start:at].decode("utf-8", errors)
            if name in section and not foreign:
                raise _fail(f"{name!r} stands twice in a section", at)
            if element == _KEY_VALUE:
                start, at = at + 2, at + 2 + (data[at] << 8 | data[at + 1])
                if at > end:
                    raise _short(data, start, at)
                section[name] = data[start:at].decode("utf-8", errors)
            elif element == _LIST_START:
                items: list[str] = []
                while (element := data[at]) == _LIST_ITEM:
                    start, at = at + 3, at + 3 + (data[at + 1] << 8 | data[at + 2])
                    if at > end:
                        raise _short(data, start, at)
                    items.append(data[start:at].decode("utf-8", errors))
                if element != _LIST_END:
                    raise _fail(f"element {element} cannot stand in a list", at)
                at += 1
                section[name] = items
            else:
                if len(stack) > MAX_DEPTH:
                    raise _fail("sections are nested too deeply", at)
                section[name] = {}
                section = section[name]
                stack.append(section)
    except IndexError:
        raise _fail("it is cut off", at) from None
    except UnicodeDecodeError:
        raise _fail("text that is not UTF-8", at) from None
    if len(stack) > 1:
        raise _fail("a section does not end", at)
    return root


def _fail(why: str, at: int) -> WireError:
    return WireError(f"VICI message: {why} at octet {at}")


def _short(data: bytes, start: int, end: int) -> WireError:
    return _fail(f"text needs {end - start} octets, {len(data) - start} are left,", start)


def serialize_message(message: Mapping[str, Any]) -> bytes:
    """A tree as octets. bool becomes "yes" or "no", numbers their digits, None is left out.

    Errors: WireError for a name over 255 octets, a value over 65535, sections too deep,
    or a value of a type that has no place in VICI (a `Secret` above all).
    """
    out = bytearray()
    _write_section(out, message, 0)
    return bytes(out)


def _read_name(reader: Reader) -> str:
    length = reader.u8("length of a name")
    if not length:
        raise reader.fail("an empty name")
    return _text(reader, reader.octets(length, "name"))


def _text(reader: Reader, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise reader.fail("text that is not UTF-8") from None


def _write_name(out: bytearray, kind: int, name: str) -> None:
    data = _encode(name)
    if not data:
        raise WireError("a VICI name is empty")
    if len(data) > 255:
        raise WireError(f"length of a VICI name {len(data)} does not fit in 1 octets")
    out.append(kind)
    out.append(len(data))
    out += data


def _write_value(out: bytearray, value: object) -> None:
    data = _encode(value if type(value) is str else _flat(value))
    if len(data) > MAX_VALUE:
        raise WireError(f"length of a VICI value {len(data)} does not fit in 2 octets")
    out += len(data).to_bytes(2)
    out += data


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise WireError("text for VICI is not valid Unicode") from None


def _flat(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise WireError(f"a {type(value).__name__} cannot be a VICI value")


def _write_section(out: bytearray, section: Mapping[str, Any], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise WireError("VICI sections are nested too deeply")
    for name, value in section.items():
        if type(value) is str:
            _write_name(out, _KEY_VALUE, name)
            _write_value(out, value)
        elif value is None:
            continue
        elif isinstance(value, Mapping):
            _write_name(out, _SECTION_START, name)
            _write_section(out, value, depth + 1)
            out.append(_SECTION_END)
        elif isinstance(value, list | tuple):
            _write_name(out, _LIST_START, name)
            for item in value:
                out.append(_LIST_ITEM)
                _write_value(out, item)
            out.append(_LIST_END)
        else:
            _write_name(out, _KEY_VALUE, name)
            _write_value(out, value)


def with_json(obj: object, **flat: Any) -> Message:
    """A message with `obj` as JSON text under `json`, and `flat` values for clients without JSON.

    JSON over one value's 65535 octets goes into a list of pieces; `json_of` joins them. The text
    is ASCII, so that a piece may end anywhere.
    """
    text = json.dumps(obj, separators=(",", ":"), default=_no_json)
    pieces = [text[at : at + MAX_VALUE] for at in range(0, len(text), MAX_VALUE)]
    return {**flat, "json": pieces[0] if len(pieces) == 1 else pieces}


def json_of(message: Mapping[str, Any]) -> Any:
    """The object that `with_json` put in; None if there is none. Errors: WireError."""
    text = message.get("json")
    if text is None:
        return None
    try:
        return json.loads("".join(text))
    except (ValueError, TypeError, RecursionError):
        raise WireError("the JSON in a VICI message does not parse") from None


def _no_json(value: object) -> object:
    """Refuse a value that JSON does not have, above all a `Secret`."""
    raise WireError(f"a {type(value).__name__} cannot go into JSON")
