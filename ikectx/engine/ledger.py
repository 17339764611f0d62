"""The ledger: an agent's changes to an IKE_SA that leaves, comes or moves, and how far they are. Pure.

There is one row for each IKE_SA and role. It has the step that runs, the effects of the step that are done,
and the facts that the rest of the step, its undoing, or the next start of the agent needs and that neither
charon nor the kernel have any more. A row is written before an effect begins, and its last change of a step
goes to the disk in one transaction with the journal's next state, because a crash between the two would leave
a row that is never used again.

    source   this gateway gives the SA to another one (freeze, thaw, release)
    target   this gateway takes the SA in (prepare, take, activate, undo)
    mobile   this mobile node gives its SA other addresses or SPIs (quiet, readdress, loud)

Rows are CBOR (`ikectx.wire.cbor`) and parsed strictly: a row with anything unknown is set aside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any, Generic, Literal, TypeVar

from ikectx.errors import StoreError, WireError
from ikectx.sa.context import Address, Endpoint, Tags
from ikectx.sa.name import SaName
from ikectx.wire import cbor

from .ports import Store

FORMAT = 1
"""First item of each row. A row of another format is not read."""
MOST = 1 << 16
"""Items of a list, at most: an SA has a policy for each pair of its selectors."""
LARGEST = 1 << 20
"""Octets of one value, at most."""

Role = Literal["source", "target", "mobile"]
Stage = Literal["", "installing", "active", "imported"]
"""How far an SA that comes is: nothing is installed; it may be undone; charon has its message IDs, which must
not be set back; all is done, and an SA of that name no longer belongs to this transfer."""
Drawn = Literal["", "begun", "done"]
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """The facts about an SA that leaves.

    policies: outbound policies that were removed from the kernel, as octets (`KernelPolicy.raw`); None:
    none was removed yet. diverted: they were removed before the freeze, because the mobile node was
    leaving. sends_to: the gateway to which ESP of this SA is still sent while it is frozen, empty if it
    is not. request: message ID of our next request, given to the other gateway; None: the freeze was not
    complete. unsure: the mobile node may have received requests from that on already. renaming: the mobile
    node may be given other SPIs. ended: somebody had charon delete the SA while it left, and no Delete has
    left this host. unique_id: that of charon, reqids, tags: reqid, marks and if_ids of each CHILD_SA by
    inbound SPI (4 octets), for the updown script. counters: the outbound sequence number of each CHILD_SA at
    the freeze, by inbound SPI. numbers: those from which it goes on after a thaw, by outbound SPI; None: they
    are not determined yet.
    """

    policies: tuple[bytes, ...] | None = field(default=None, repr=False)
    diverted: bool = False
    sends_to: str = ""
    request: int | None = None
    unsure: bool = False
    renaming: bool = False
    ended: bool = False
    unique_id: int = 0
    reqids: tuple[tuple[bytes, int], ...] = ()
    tags: tuple[tuple[bytes, Tags], ...] = ()
    counters: tuple[tuple[bytes, int], ...] = ()
    numbers: tuple[tuple[bytes, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Relayed:
    """ESP of the mobile node at `mn` under SPIs that are taken here is sent on to the gateway at `to`."""

    mn: Endpoint
    spis: tuple[bytes, ...]
    to: Address


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The facts about an SA that comes.

    stage: see `Stage`. since: when it became "imported", seconds since 1970. plan: the names that it gets
    here (`vici_bridge.policy.new_names.Plan`), empty if it keeps its own; has keys once the mobile node has
    agreed.
    guards: policies that drop outbound packets until charon's SA has its numbers, or keep them on the
    placeholder pair (`KernelPolicy.raw`). relay: packets that are sent on to the other gateway. drawn:
    whether the updown script is being called with "up" ("begun"), or has ended ("done"). new_names: block of
    the answer to the mobile node (`spis.serialize_new_spis`), empty if it knows all names. named: when that
    was noted. reqids, tags: reqid, marks and if_ids here of each CHILD_SA by inbound SPI, for the updown
    script after the SA has gone.
    relayed: the mobile node stays at the other gateway's address, and is not told of this one.
    """

    stage: Stage = ""
    since: int = 0
    plan: bytes = field(default=b"", repr=False)
    guards: tuple[bytes, ...] = field(default=(), repr=False)
    relay: Relayed | None = None
    drawn: Drawn = ""
    new_names: bytes = b""
    named: int = 0
    reqids: tuple[tuple[bytes, int], ...] = ()
    tags: tuple[tuple[bytes, Tags], ...] = ()
    unique_id: int = 0
    relayed: bool = False


@dataclass(frozen=True, slots=True)
class MobileFacts:
    """The facts about a mobile node's own SA.

    quiet: this agent made it PASSIVE, so it must become active again. move: its change of addresses
    (`vici_bridge.effects.mobile_move.MobileMove`), empty if none is open. mirror: the open request of this
    node's own (UPDATE_SPI); has fresh octets.
    """

    quiet: bool = False
    move: bytes = field(default=b"", repr=False)
    mirror: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Row(Generic[F]):
    """One IKE_SA in one role.

    transfer_id: the transfer of the last step, empty if it is not known. step: the open step, empty if there
    is none. done: its effects that were seen done, or that are left for later. begun: the effect that has
    begun and whose end was not noted. later: effects that may be done at any later time; for them context has
    the SA as it was (`profile.encode`).
    """

    sa: SaName
    facts: F
    transfer_id: bytes = b""
    step: str = ""
    done: tuple[str, ...] = ()
    begun: str = ""
    later: tuple[str, ...] = ()
    context: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)

    # `replace` takes twice as long, and an SA has dozens of these

    def begins(self, step: str, transfer_id: bytes) -> Row[F]:
        """The row when this step begins: nothing of it is done, and nothing is left of the step before."""
        return Row(self.sa, self.facts, transfer_id, step)

    def finished(self, effect: str, facts: Mapping[str, Any]) -> Row[F]:
        """The same row, with this effect done, and the facts that it found."""
        done, now = (*self.done, effect), replace(self.facts, **facts) if facts else self.facts  # type: ignore[type-var]
        return Row(self.sa, now, self.transfer_id, self.step, done, "", self.later, self.context)

    def ended(self) -> Row[F]:
        """The same row without a step."""
        return Row(self.sa, self.facts, self.transfer_id, later=self.later, context=self.context)

    def knows(self, **facts: Any) -> Row[F]:
        """The same row with other facts."""
        return replace(self, facts=replace(self.facts, **facts))  # type: ignore[type-var]


# --- octets ---------------------------------------------------------------------------------------------

_blob = cbor.octets(most=LARGEST)
_blobs = cbor.array(_blob, most=MOST)
_SPI = cbor.octets(4)
_words = cbor.array(cbor.text, most=MOST)
_numbers = cbor.array(cbor.row((_SPI, cbor.u64)), most=MOST)


def _pairs(value: Any, where: str) -> tuple[tuple[bytes, int], ...]:
    return tuple((spi, number) for spi, number in _numbers(value, where))


_tag_rows = cbor.array(cbor.row((_SPI, *(cbor.u32,) * 6)), most=MOST)


def _tags(value: Any, where: str) -> tuple[tuple[bytes, Tags], ...]:
    return tuple(
        (spi, Tags((mark_in, mask_in), (mark_out, mask_out), if_in, if_out))
        for spi, mark_in, mask_in, mark_out, mask_out, if_in, if_out in _tag_rows(value, where)
    )


def _tagged(pairs: Iterable[tuple[bytes, Tags]]) -> list[list[object]]:
    return [[spi, *tags.mark_in, *tags.mark_out, tags.if_id_in, tags.if_id_out] for spi, tags in pairs]


def _blocks(value: Any, where: str) -> tuple[tuple[int, bytes], ...]:
    return tuple((fpt, octets) for fpt, octets in cbor.array(cbor.row((cbor.u16, _blob)))(value, where))


def _endpoint(value: Any, where: str) -> Endpoint:
    address, port = cbor.row((cbor.octets(4, 16), cbor.u16))(value, where)
    return Endpoint(ip_address(address), port)


def _relay(value: Any, where: str) -> Relayed:
    mn, spis, to = cbor.row((_endpoint, cbor.array(_SPI), cbor.octets(4, 16)))(value, where)
    return Relayed(mn, spis, ip_address(to))


def _stage(value: Any, where: str) -> Stage:
    text = cbor.text(value, where)
    if text not in ("", "installing", "active", "imported"):
        raise WireError(f"{where}: not a stage of an SA that comes")
    return text  # type: ignore[return-value]


def _drawn(value: Any, where: str) -> Drawn:
    text = cbor.text(value, where)
    if text not in ("", "begun", "done"):
        raise WireError(f"{where}: not how far an updown script is")
    return text  # type: ignore[return-value]


def _end(end: Endpoint) -> list[object]:
    return [end.address.packed, end.port]


def _listed(pairs: Iterable[tuple[bytes, int]]) -> list[list[object]]:
    return [[spi, number] for spi, number in pairs]


@dataclass(frozen=True, slots=True)
class _Fact:
    """One fact of a row: its key in the map, its reader, and its value in CBOR."""

    key: int
    read: Callable[[Any, str], Any]
    write: Callable[[Any], object] = lambda value: value


_KEYS: Mapping[type, Mapping[str, _Fact]] = {
    SourceFacts: {
        "policies": _Fact(1, _blobs, list),
        "sends_to": _Fact(2, cbor.text),
        "request": _Fact(3, cbor.u32),
        "unsure": _Fact(4, cbor.boolean),
        "renaming": _Fact(5, cbor.boolean),
        "ended": _Fact(6, cbor.boolean),
        "counters": _Fact(7, _pairs, _listed),
        "numbers": _Fact(8, _pairs, _listed),
        "reqids": _Fact(9, _pairs, _listed),
        "unique_id": _Fact(10, cbor.u64),
        "tags": _Fact(11, _tags, _tagged),
    },
    TargetFacts: {
        "stage": _Fact(1, _stage),
        "since": _Fact(2, cbor.u64),
        "plan": _Fact(3, _blob),
        "guards": _Fact(4, _blobs, list),
        "relay": _Fact(5, _relay, lambda one: [_end(one.mn), list(one.spis), one.to.packed]),
        "drawn": _Fact(6, _drawn),
        "new_names": _Fact(7, _blob),
        "named": _Fact(8, cbor.u64),
        "reqids": _Fact(9, _pairs, _listed),
        "unique_id": _Fact(10, cbor.u64),
        "tags": _Fact(11, _tags, _tagged),
        "relayed": _Fact(12, cbor.boolean),
    },
    MobileFacts: {
        "quiet": _Fact(1, cbor.boolean),
        "move": _Fact(2, _blob),
        "mirror": _Fact(3, _blob),
    },
}
_LAYOUT: Mapping[type, Sequence[tuple[str, object, _Fact]]] = {
    kind: [(name, getattr(kind(), name), fact) for name, fact in facts.items()]
    for kind, facts in _KEYS.items()
}
"""Each fact with its default."""
FACTS: Mapping[Role, type] = {"source": SourceFacts, "target": TargetFacts, "mobile": MobileFacts}
"""The facts in a row of each role."""


def dumps(row: Row[Any]) -> bytes:
    """The row as octets: for an encrypted store only. A fact with its default is left out."""
    facts = {}
    for name, default, fact in _LAYOUT[type(row.facts)]:
        value = getattr(row.facts, name)
        if value != default:
            facts[fact.key] = fact.write(value)
    head = [FORMAT, row.sa.octets, row.transfer_id, row.step, list(row.done), row.begun, list(row.later)]
    head.append([[fpt, octets] for fpt, octets in row.context])
    return cbor.dumps([*head, facts], "a row of the ledger", own=True)


def loads(role: Role, data: bytes) -> Row[Any]:
    """Read what `dumps` wrote. Errors: StoreError, which has the place and no value."""
    try:
        octets = cbor.octets
        layout = (cbor.u8, octets(16), octets(0, 8), cbor.text, _words, cbor.text, _words, _blocks, _anything)
        found = cbor.row(layout)(cbor.loads(data, "row"), "row")
        number, name, transfer_id, step, done, begun, later, context, facts = found
        if number != FORMAT:
            raise WireError(f"row: format {number}, and this version reads {FORMAT}")
        kind = FACTS[role]
        reader = cbor.MapReader(facts, "facts")
        blank = kind()
        known = {
            fact_name: reader.take(fact.key, fact.read, getattr(blank, fact_name))
            for fact_name, fact in _KEYS[kind].items()
        }
        if reader.rest():
            raise WireError(f"facts: {len(reader.rest())} that this version does not know")
    except WireError as error:
        raise StoreError(f"a row of the ledger ({role}) cannot be read: {error}") from None
    return Row(SaName(name[:8], name[8:]), kind(**known), transfer_id, step, done, begun, later, context)


def _anything(value: Any, where: str) -> Any:
    return value


# --- the rows of one role -------------------------------------------------------------------------------


class Ledger(Generic[F]):
    """All rows of one role, in memory and in the store; those of the store are read at once.

    Errors of methods that change a row: StoreError; the row is then as it was.
    """

    def __init__(self, store: Store, role: Role) -> None:
        self._store = store
        self._role: Role = role
        self._rows: dict[SaName, Row[F]] = {}
        self._held: set[SaName] = set()
        """Rows whose last changes are not in the store."""
        for key, data in store.rows(role):
            try:
                row: Row[F] = loads(role, data)
                if row.sa.key != key:
                    raise StoreError(f"a row of the ledger ({role}) stands under the name of another SA")
            except StoreError as error:
                store.set_aside(f"ledger|{role}", key, str(error))
                continue
            self._rows[row.sa] = row

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, sa: SaName) -> Row[F] | None:
        """The row of that SA, None where it has none."""
        return self._rows.get(sa)

    def of(self, sa: SaName) -> Row[F]:
        """The row of that SA, or an empty one, which is not in the store yet."""
        found = self._rows.get(sa)
        return Row(sa, FACTS[self._role]()) if found is None else found

    def all(self) -> Sequence[Row[F]]:
        """All rows, in the order of their SAs' names."""
        return [self._rows[sa] for sa in sorted(self._rows)]

    def put(self, row: Row[F], *, soon: bool = False) -> None:
        """Keep the row. `soon`: it goes to the disk with the next write, because nothing before that depends
        on it."""
        if self._rows.get(row.sa) != row or row.sa in self._held:
            self._store.keep(self._role, row.sa.key, dumps(row), soon=soon)
            self._rows[row.sa] = row
            self._held.discard(row.sa)

    def hold(self, row: Row[F]) -> None:
        """Keep the row in memory, until it is put with more, because its change can be found out again."""
        self._rows[row.sa] = row
        self._held.add(row.sa)

    def note(self, sa: SaName, *, soon: bool = False, **facts: Any) -> Row[F]:
        """Keep these facts of the SA, in its row or in a new one, and return it. An empty row is dropped."""
        row = self.of(sa).knows(**facts)
        if row == Row(sa, FACTS[self._role](), row.transfer_id):
            self.drop(sa, soon=soon)
        else:
            self.put(row, soon=soon)
        return row

    def drop(self, sa: SaName, *, soon: bool = False) -> None:
        """Forget the row; it need not exist. `soon`: as for `put`."""
        if sa in self._rows:
            self._store.keep(self._role, sa.key, None, soon=soon)
            del self._rows[sa]
            self._held.discard(sa)

    def set_aside(self, sa: SaName, why: str) -> None:
        """Set the row of that SA aside, because its user could not interpret it. Errors: StoreError."""
        self._store.set_aside(f"ledger|{self._role}", sa.key, why)
        self._rows.pop(sa, None)


# --- stores of before -----------------------------------------------------------------------------------


def _framed(data: bytes) -> tuple[bytes, ...]:
    """Octet strings that each have a length of 4 octets before them. Errors: ValueError."""
    found = []
    while data:
        size = int.from_bytes(data[:4])
        if len(data) < 4 + size or not size:
            raise ValueError("a list of policies is cut off")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return tuple(found)


def _let_go(data: bytes) -> dict[str, Any]:
    if len(data) not in (4, 5):
        raise ValueError("a message ID has 4 octets")
    return {"request": int.from_bytes(data[:4]), "unsure": len(data) == 5}


def _import(data: bytes) -> dict[str, Any]:
    if data.startswith(b"imported ") and len(data) == 17:
        return {"stage": "imported", "since": int.from_bytes(data[9:])}
    stages = {b"1": "installing", b"active": "active"}
    if data not in stages:
        raise ValueError("not a note of an import")
    return {"stage": stages[data]}


def _old_relay(data: bytes) -> dict[str, Any]:
    address, port, spis, to = json.loads(data)
    mn = Endpoint(ip_address(address), int(port))
    return {"relay": Relayed(mn, tuple(bytes.fromhex(spi) for spi in spis), ip_address(to))}


def _old_names(data: bytes) -> dict[str, Any]:
    if len(data) <= 8:
        raise ValueError("new names without names")
    return {"named": int.from_bytes(data[:8]), "new_names": data[8:]}


NOTES: Mapping[str, tuple[Role, Callable[[bytes], dict[str, Any]]]] = {
    "frozen": ("source", lambda data: {"policies": _framed(data)}),
    "let-go": ("source", _let_go),
    "sending": ("source", lambda data: {"sends_to": data.decode()}),
    "renamed": ("source", lambda data: {"renaming": True}),
    "ended": ("source", lambda data: {"ended": True}),
    "import": ("target", _import),
    "taken": ("target", lambda data: {"drawn": "done" if data else "begun"}),
    "new-names": ("target", _old_names),
    "plan": ("target", lambda data: {"plan": data}),
    "plan-guards": ("target", lambda data: {"guards": _framed(data)}),
    "relay": ("target", _old_relay),
    "quiet": ("mobile", lambda data: {"quiet": True}),
    "move": ("mobile", lambda data: {"move": data}),
    "mirror": ("mobile", lambda data: {"mirror": data}),
}
"""Kinds of notes of schema 1 that are facts of a row now: the row's role, and the note's reader."""


def from_notes(
    notes: Iterable[tuple[str, str, bytes]],
) -> tuple[list[tuple[Role, Row[Any]]], list[tuple[str, str, str]]]:
    """Rows from the notes of a store with schema 1, given as (kind, key, value) of the kinds in `NOTES`.

    Second: (kind, key, reason) of each note that cannot be read.
    """
    facts: dict[tuple[Role, SaName], dict[str, Any]] = {}
    bad: list[tuple[str, str, str]] = []
    for kind, key, value in notes:
        role, read = NOTES[kind]
        try:
            found = read(value)
            facts.setdefault((role, SaName.from_key(key)), {}).update(found)
        except (ValueError, TypeError) as error:
            bad.append((kind, key, f"the note cannot be read: {type(error).__name__}"))
    for (role, _), known in facts.items():
        if role == "target":
            known.setdefault("stage", "imported")  # without the note of an import nothing may be undone
    return [(role, Row(sa, FACTS[role](**known))) for (role, sa), known in facts.items()], bad
