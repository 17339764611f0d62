"""One table of nftables: made by the `nft` program, its sets and maps changed and read over netlink. I/O.

The program makes a table once. Elements are added, removed and read over netlink, because that is done while
an SA is frozen, and a process takes some hundred times as long as a message.

Netlink: linux/netfilter/nf_tables.h, nfnetlink.h (uapi). Errors: KernelError.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ikectx import trace
from ikectx.errors import KernelError
from ikectx.sa.context import Secret

from .netlink import NETFILTER, Netlink, NetlinkOutcome, failure
from .netlink_parts import ACK, CREATE, DUMP, HEADER, NESTED, REQUEST, attribute, attributes
from .xfrm_parts import XfrmRequest

PLAIN = "@th,64,64 . @th,128,64"
"""Both SPIs of an IKE header behind a UDP header (RFC 7296, 3.1)."""
MARKED = "@th,64,32 0 @th,96,64 . @th,160,64"
"""As `PLAIN`, behind four zero octets (RFC 3948, 2.2); the test for them is part of it."""

_INET = 1
_TIMEOUT = 30.0
_SUBSYSTEM = 10
_DELTABLE, _GETCHAIN, _NEWSETELEM, _GETSETELEM, _DELSETELEM = 2, 4, 12, 13, 14
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a set or map. `data`: the map's value, as in the packet; `packets`: its counter."""

    key: bytes
    data: bytes
    packets: int


class NftTable:
    """`inet NAME`, in the network namespace that it is first used in. Not thread-safe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket: Netlink | None = None

    @property
    def port(self) -> int:
        """Netlink's number of the socket, which events of its changes carry; 0: it is not open."""
        return 0 if self._socket is None else self._socket.port

    def close(self) -> None:
        """Close the socket; the table stays."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def rules(self, *chains: str) -> list[int]:
        """Number of each chain's rules; 0 if there is no such chain."""
        requests = []
        for chain in chains:
            message = _message(_GETCHAIN, REQUEST, _text(1, self.name) + _text(3, chain))
            requests.append(XfrmRequest(Secret(message), f"look for chain {chain}"))
        with self._ours():
            return [
                int.from_bytes(dict(attributes(one.answers[0][20:])).get(6, b"")) if one.answers else 0
                for one in self._outcomes(*requests)
            ]

    def elements(self, name: str, key: bytes | None = None) -> list[Element]:
        """The element of that key, or all. Empty if there is no such set."""
        body = _text(1, self.name) + _text(2, name)
        flags = DUMP if key is None else 0
        if key is not None:
            body += _list_of(key)
        request = XfrmRequest(Secret(_message(_GETSETELEM, REQUEST | flags, body)), f"look into set {name}")
        with self._ours():
            (answers,) = self._transact(request, absent_ok=True)
            return [element for answer in answers for element in _read_elements(answer)]

    def held(self, names: Sequence[str], key: bytes) -> list[list[Element]]:
        """The element of that key in each of these sets or maps, asked for at once."""
        requests = []
        for name in names:
            body = _text(1, self.name) + _text(2, name) + _list_of(key)
            message = _message(_GETSETELEM, REQUEST, body)
            requests.append(XfrmRequest(Secret(message), f"look into set {name}"))
        with self._ours():
            return [
                [element for answer in answers for element in _read_elements(answer)]
                for answers in self._transact(*requests, absent_ok=True)
            ]

    @contextlib.contextmanager
    def _ours(self) -> Iterator[None]:
        """While an answer is read: an element that this program does not make becomes a KernelError."""
        try:
            yield
        except (ValueError, KeyError):
            raise KernelError(
                f"nftables' table inet {self.name} holds something that is not ours",
                hint=f"look at `nft list table inet {self.name}`",
            ) from None

    def remove(self, names: Sequence[str], keys: Sequence[bytes]) -> None:
        """Remove the keys from those of these sets that have them."""
        pairs = [(name, key) for key in keys for name in names]
        every = b"".join(
            self._change(_DELSETELEM, ACK if at == len(pairs) else 0, *pair)
            for at, pair in enumerate(pairs, 1)
        )
        each = (self._change(_DELSETELEM, ACK, *pair) for pair in pairs)
        what = f"take {', '.join(key.hex() for key in keys[:8])} out of sets {', '.join(names)}"
        # one transaction for all, unless a key is missing in a set
        for messages in itertools.chain((every,), each):
            (done,) = self._outcomes(XfrmRequest(Secret(_batch(messages)), what))
            if done.errno not in (0, errno.ENOENT):
                raise failure(XfrmRequest(Secret(), what), done)
            if messages is every and done.errno == 0:
                break

    def put(self, elements: Sequence[tuple[str, bytes, bytes]]) -> None:
        """Add elements to maps (name, key, value), or to sets without a value, all at once; the same may be
        there."""
        last = len(elements) - 1
        messages = (
            self._change(_NEWSETELEM, CREATE | (ACK if number == last else 0), name, key, value)
            for number, (name, key, value) in enumerate(elements)
        )
        self._transact(XfrmRequest(Secret(_batch(b"".join(messages))), f"fill maps of table {self.name}"))

    def empty(self, names: Sequence[str]) -> None:
        """Remove all elements from these sets or maps, all at once. If they are gone, that is the same."""
        messages = (self._change(_DELSETELEM, ACK if name == names[-1] else 0, name, b"") for name in names)
        request = XfrmRequest(Secret(_batch(b"".join(messages))), f"empty maps of table {self.name}")
        self._transact(request, absent_ok=True)

    def change(self, gone: Sequence[tuple[str, bytes]], come: Sequence[tuple[str, bytes, bytes]]) -> None:
        """Remove elements of maps (name, key), which must be there, then add others, all at once."""
        parts = [(_DELSETELEM, 0, name, key, b"") for name, key in gone]
        parts += [(_NEWSETELEM, CREATE, *element) for element in come]
        messages = (
            self._change(kind, flags | (ACK if at == len(parts) else 0), name, key, value)
            for at, (kind, flags, name, key, value) in enumerate(parts, 1)
        )
        if parts:
            self._transact(XfrmRequest(Secret(_batch(b"".join(messages))), f"change maps of {self.name}"))

    def drop(self) -> None:
        """Delete the table, if it is there."""
        message = _message(_DELTABLE, REQUEST | ACK, _text(1, self.name))
        self._transact(XfrmRequest(Secret(_batch(message)), f"delete table {self.name}"), absent_ok=True)

    def _change(self, number: int, flags: int, name: str, key: bytes, value: bytes = b"") -> bytes:
        """A part of a transaction; without a key it is about all elements. A refusal is always reported."""
        body = _text(1, self.name) + _text(2, name) + (_list_of(key, value) if key else b"")
        return _message(number, REQUEST | flags, body)

    def _transact(self, *requests: XfrmRequest, absent_ok: bool = False) -> list[list[bytes]]:
        """The answers to each."""
        outcomes = self._outcomes(*requests)
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome.errno and not (absent_ok and outcome.errno == errno.ENOENT):
                raise failure(request, outcome)
        return [outcome.answers for outcome in outcomes]

    def _outcomes(self, *requests: XfrmRequest) -> list[NetlinkOutcome]:
        if self._socket is None:
            self._socket = Netlink(NETFILTER, "nftables")
        return self._socket.transact(requests)


@trace.spanned("nft", "call")
def run_nft(script: str) -> None:
    """Run one transaction. Errors: KernelError."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which("nft", path=path)
    if program is None:
        raise KernelError("the nft program is missing", hint="install the package nftables")
    try:
        done = subprocess.run(
            [program, "-f", "-"],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"nft did not run: {error}") from None
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "rror" in line), "no reason given")
        raise KernelError(
            f"nft refused: {reason.strip()}",
            hint="the agent needs CAP_NET_ADMIN, and the kernel nf_tables (modprobe nf_tables)",
        )


# Messages.


@lru_cache(maxsize=64)
def _text(number: int, text: str) -> bytes:
    """The name of a table, a chain or a set; there are few."""
    return attribute(number, text.encode() + b"\0")


def _message(number: int, flags: int, body: bytes, *, batch_mark: bool = False) -> bytes:
    kind = number if batch_mark else _SUBSYSTEM << 8 | number
    family, resource = (0, _SUBSYSTEM) if batch_mark else (_INET, 0)
    return HEADER.pack(20 + len(body), kind, flags, 0, 0) + bytes((family, 0)) + resource.to_bytes(2) + body


_BEGIN = _message(_BATCH_BEGIN, REQUEST, b"", batch_mark=True)
_END = _message(_BATCH_END, REQUEST, b"", batch_mark=True)


def _batch(message: bytes) -> bytes:
    """A transaction with these changes."""
    return _BEGIN + message + _END


def _list_of(key: bytes, value: bytes = b"") -> bytes:
    """A list of one element."""
    element = attribute(1 | NESTED, attribute(1, key))
    if value:
        element += attribute(2 | NESTED, attribute(1, value))
    return attribute(3 | NESTED, attribute(1 | NESTED, element))


def _value(part: bytes) -> bytes:
    return dict(attributes(part)).get(1, b"")


def _read_elements(answer: bytes) -> Iterator[Element]:
    """Each element in an answer. Errors: ValueError, KeyError (one without a key)."""
    for number, elements in attributes(answer[20:]):
        if number != 3:
            continue
        for _, element in attributes(elements):
            parts = dict(attributes(element))
            # one counter: the element's expression, or the only one of a list
            counter = parts.get(7) or _value(parts.get(11, b""))
            told = dict(attributes(dict(attributes(counter)).get(2, b"")))
            yield Element(_value(parts[1]), _value(parts.get(2, b"")), int.from_bytes(told.get(2, b"")))
