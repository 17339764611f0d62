"""The agent's record of charon's IKE_SAs, made from the ha stream.

charon reports the nonces, shared secrets and identities of an SA once, when it comes up, and VICI never shows
them; so the agent keeps them from the first message on. `Record` is fed every message that charon sends, is
told which SAs the agent has charon take in, and returns the part of an `IkeContext` that follows from them.
`chain.import_messages` goes the other way.

Generations. After an IKE rekey charon announces the new IKE_SA (IKE_ADD with IKE_REKEY_ID and OLD_SKD),
deletes the old one (IKE_DELETE) and only then reports the new one as up (IKE_UPDATE); the children stay, with
no message, though their keys stem from the old SK_d. So the old IKE_SA is kept as an ancestor of the new one
as long as a child of it lives. If both ends rekey at the same time, two IKE_ADDs name the same old IKE_SA;
the one that gets an IKE_UPDATE has won.

Pure: no clock, no I/O. Read in strongSwan 5.9.8, 6.0.1 and 6.0.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from ikectx.errors import RefusedError, StoreError, UnknownSaError, WireError
from ikectx.numbers import Protocol, Status
from ikectx.sa.context import Endpoint, IkeContext
from ikectx.sa.name import SaName
from ikectx.wire import cbor

from .ike_id import HIDDEN, IkeId
from .messages import Attr, HaMessage, HaType, ike_mid
from .sa_state import (
    SaState,
    adopt,
    further_keys,
    ids_of,
    messages_of,
    only_ids_differ,
    pruned,
    read_child,
    read_generation,
    told,
)

COND_PPK = 1 << 13
"""charon's condition bit: SK_d was mixed with a postquantum preshared key, which no message contains."""


MAX_CHILDREN = 512
"""CHILD_SAs of one IKE_SA that are kept, because each message about it stores all of them anew."""
MAX_COMING = 4096
"""IKE_SAs that have keys and are not up. charon does not report that one of them was given up, and whoever
sends an IKE_SA_INIT makes one. The oldest are forgotten."""
_FRESH = 256
"""SAs whose octets are kept for a while, because most of what follows changes their message IDs alone."""
_FORMAT = 1
_NO_LIMIT = 1 << 16


_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class RecordChange:
    """The effect of a message on the record."""


@dataclass(frozen=True, slots=True)
class Ignored(RecordChange):
    """No effect, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Added(RecordChange):
    """Keys of a new IKE_SA arrived; it is not up yet."""

    sa: SaName


@dataclass(frozen=True, slots=True)
class Updated(RecordChange):
    """Identities, addresses, connection or virtual IPs arrived: the IKE_SA is up."""

    sa: SaName


@dataclass(frozen=True, slots=True)
class Rekeying(RecordChange):
    """`new` has keys and may come to replace `old`."""

    old: SaName
    new: SaName


@dataclass(frozen=True, slots=True)
class Rekeyed(RecordChange):
    """`new` is up in the place of `old` and has its children."""

    old: SaName
    new: SaName


@dataclass(frozen=True, slots=True)
class Deleted(RecordChange):
    """The IKE_SA is gone with its children."""

    sa: SaName


@dataclass(frozen=True, slots=True)
class ChildAdded(RecordChange):
    """A CHILD_SA, named by its inbound SPI, was added (a rekeyed one lives beside its old one)."""

    sa: SaName
    spi_in: bytes


@dataclass(frozen=True, slots=True)
class ChildDeleted(RecordChange):
    """A CHILD_SA is gone."""

    sa: SaName
    spi_in: bytes


@dataclass(frozen=True, slots=True)
class MidChanged(RecordChange):
    """Next message ID: `initiator` of charon's requests, else of those it expects."""

    sa: SaName
    initiator: bool
    mid: int


class Record:
    """All IKE_SAs of one charon, by their SPIs.

    `dirty` has the names that changed since the last `dump`; a caller that could not store the result of
    `dump` adds the names again.
    """

    def __init__(self) -> None:
        self.dirty: set[SaName] = set()
        self._sas: dict[SaName, SaState] = {}
        self._heirs: dict[SaName, set[SaName]] = {}
        """For an old IKE_SA those that have keys to replace it and are not up."""
        self._ends: dict[str, set[SaName]] = {}
        """The IKE_SAs by the identity of their other end, as it is printed."""
        self._born: dict[SaName, int] = {}
        self._count = 0
        self._coming: dict[SaName, None] = {}
        """Those that have keys, are not up and replace none, oldest first."""
        self._frozen: dict[SaName, tuple[SaState, list[bytes]]] = {}
        """The last SAs that were dumped, and their messages as octets but for message IDs."""
        self._handlers: dict[HaType, Callable[[HaMessage, SaName], RecordChange]] = {
            HaType.IKE_ADD: self._ike_add,
            HaType.IKE_UPDATE: self._ike_update,
            HaType.IKE_MID_INITIATOR: self._ike_mid,
            HaType.IKE_MID_RESPONDER: self._ike_mid,
            HaType.IKE_DELETE: self._ike_delete,
            HaType.CHILD_ADD: self._child_add,
            HaType.CHILD_DELETE: self._child_delete,
        }

    # --- the stream in -----------------------------------------------------------------------------

    def feed(self, message: HaMessage) -> RecordChange:
        """Take one message, sent by charon or to it. Raises nothing: a message without sense is Ignored."""
        handler = self._handlers.get(message.type)
        if handler is None:
            return Ignored(f"{message.type.name} is not about an SA")
        try:
            ike = message.need(Attr.IKE_ID, IkeId)
            if ike.version not in (2, HIDDEN):
                return Ignored("not IKEv2")
            change = handler(message, ike.spis)
        except (WireError, ValueError) as error:
            return Ignored(f"{message.type.name} makes no sense: {error}")
        sa = self._sas.get(ike.spis)
        if sa is not None and sa.version < message.version and not isinstance(change, Ignored):
            # only the newest wire version that was received can express everything that was received
            self._put(ike.spis, replace(sa, version=message.version))
        return change

    def _ike_add(self, message: HaMessage, name: SaName) -> RecordChange:
        known = self._sas.get(name)
        same_nonces = known is not None and (
            (known.current.nonce_i, known.current.nonce_r)
            == (message.find(Attr.NONCE_I, bytes), message.find(Attr.NONCE_R, bytes))
        )
        if message.get(Attr.ALG_PRF) is None:
            if known is None:
                return Ignored("further keys for an unknown IKE_SA")
            if known.connection is not None or known.leaving:
                return Ignored("further keys for an IKE_SA that is up: a replay")
            self._put(name, replace(known, generations=(further_keys(known.current, message),)))
            return Updated(name)
        if same_nonces:
            return Ignored("known already: a replay")
        generation = read_generation(message)
        sa = SaState(message.version, (generation,), remote=message.find(Attr.REMOTE_ADDR, Endpoint))
        rekeyed = message.find(Attr.IKE_REKEY_ID, IkeId)
        if rekeyed is not None and rekeyed.spis in self._sas and rekeyed.spis != name:
            self._put(name, replace(sa, replaces=rekeyed.spis), new=True)
            return Rekeying(rekeyed.spis, name)
        self._put(name, sa, new=True)
        while len(self._coming) > MAX_COMING:
            self._drop(next(iter(self._coming)))
        return Added(name)

    def _ike_update(self, message: HaMessage, name: SaName) -> RecordChange:
        sa = self._sas.get(name)
        if sa is None:
            return Ignored("IKE_UPDATE for an unknown IKE_SA")
        old_name = sa.replaces
        old = self._sas.get(old_name) if old_name is not None else None
        if message.get(Attr.CONFIG_NAME) is None:
            old = None
        if old is not None:
            sa = adopt(sa, old)
        sa = told(sa, message)
        if old is None or old_name is None:
            self._put(name, sa)
            return Updated(name)
        for loser in self._successors(old_name):
            self._drop(loser)
        self._drop(old_name)
        self._put(name, sa, new=True)
        return Rekeyed(old_name, name)

    def _ike_mid(self, message: HaMessage, name: SaName) -> RecordChange:
        sa = self._sas.get(name)
        if sa is None:
            return Ignored("message ID of an unknown IKE_SA")
        mid, initiator = message.need(Attr.MID, int), message.type is HaType.IKE_MID_INITIATOR
        if mid == 0:
            return Ignored("a message ID of 0 says nothing")
        if mid != (sa.mid_initiator if initiator else sa.mid_responder):
            self._put(name, replace(sa, mid_initiator=mid) if initiator else replace(sa, mid_responder=mid))
        return MidChanged(name, initiator, mid)

    def _ike_delete(self, message: HaMessage, name: SaName) -> RecordChange:
        sa = self._sas.get(name)
        if sa is None:
            return Ignored("IKE_DELETE for an unknown IKE_SA")
        if self._successors(name):
            # Its successor is reported as up next; until then the old one keeps the children.
            self._put(name, replace(sa, leaving=True))
            return Ignored("IKE_DELETE in the course of a rekey")
        self._drop(name)
        return Deleted(name)

    def _child_add(self, message: HaMessage, name: SaName) -> RecordChange:
        sa = self._sas.get(name)
        if sa is None:
            return Ignored("CHILD_ADD for an unknown IKE_SA")
        spi_in = message.need(Attr.INBOUND_SPI, bytes)
        if message.get(Attr.ALG_ENCR) is None:
            if len(sa.alien) >= MAX_CHILDREN:
                return Ignored(f"more than {MAX_CHILDREN} CHILD_SAs of one IKE_SA")
            sa = replace(sa, alien=(*(spi for spi in sa.alien if spi != spi_in), spi_in))
        else:
            child = read_child(message, len(sa.generations) - 1)
            others = tuple(other for other in sa.children if other.spi_in != spi_in)
            if len(others) >= MAX_CHILDREN:
                return Ignored(f"more than {MAX_CHILDREN} CHILD_SAs of one IKE_SA")
            sa = pruned(replace(sa, children=(*others, child)))
        self._put(name, sa)
        return ChildAdded(name, spi_in)

    def _child_delete(self, message: HaMessage, name: SaName) -> RecordChange:
        sa = self._sas.get(name)
        spi_in = message.need(Attr.INBOUND_SPI, bytes)
        if sa is None:
            return Ignored("CHILD_DELETE for an unknown IKE_SA")
        children = tuple(child for child in sa.children if child.spi_in != spi_in)
        alien = tuple(spi for spi in sa.alien if spi != spi_in)
        if (children, alien) == (sa.children, sa.alien):
            return Ignored("CHILD_DELETE for an unknown CHILD_SA")
        self._put(name, pruned(replace(sa, children=children, alien=alien)))
        return ChildDeleted(name, spi_in)

    def _put(self, name: SaName, sa: SaState, *, new: bool = False) -> None:
        if new:
            self._count += 1
            self._born[name] = self._count
        self._keep(name, sa)
        self.dirty.add(name)

    def _keep(self, name: SaName, sa: SaState) -> None:
        self._disinherit(name)
        if sa.connection is None and sa.replaces is None:
            self._coming[name] = None
        if sa.replaces is not None:
            self._heirs.setdefault(sa.replaces, set()).add(name)
        if sa.remote_id is not None:
            self._ends.setdefault(str(sa.remote_id), set()).add(name)
        self._sas[name] = sa

    def _drop(self, name: SaName) -> None:
        self._disinherit(name)
        self._frozen.pop(name, None)
        del self._sas[name], self._born[name]
        self.dirty.add(name)

    def _disinherit(self, name: SaName) -> None:
        known = self._sas.get(name)
        if known is None:
            return
        self._coming.pop(name, None)
        if known.replaces is not None:
            _discard(self._heirs, known.replaces, name)
        if known.remote_id is not None:
            _discard(self._ends, str(known.remote_id), name)

    def _successors(self, name: SaName) -> tuple[SaName, ...]:
        return tuple(self._heirs.get(name, ()))

    # --- what is known -------------------------------------------------------------------------------

    def names(self) -> tuple[SaName, ...]:
        """The IKE_SAs that are up."""
        return tuple(filter(self._is_up, self._sas))

    def _is_up(self, name: SaName) -> bool:
        sa = self._sas[name]
        return sa.connection is not None and not sa.leaving

    def of(self, mn: str) -> tuple[SaName, ...]:
        """The IKE_SAs that are up and whose other end has this identity, as it is printed."""
        return tuple(filter(self._is_up, sorted(self._ends.get(mn, ()))))

    def alike(self, name: SaName) -> list[SaName]:
        """Other IKE_SAs with the same other end and a CHILD_SA of the same selectors."""
        sa = self._sas[name]
        mine = {(child.local_ts, child.remote_ts) for child in sa.children}
        others = self._ends.get(str(sa.remote_id), set()) if sa.remote_id is not None else set()
        return [
            other
            for other in others
            if other != name
            and self._sas[other].remote_id == sa.remote_id
            and any((child.local_ts, child.remote_ts) in mine for child in self._sas[other].children)
        ]

    def __contains__(self, name: SaName) -> bool:
        return name in self._sas

    def __len__(self) -> int:
        return len(self._sas)

    def context(self, name: SaName) -> IkeContext:
        """The stream's data about an IKE_SA; addresses are those of its IKE_UPDATE, not the current ones.

        Counters, lifetimes, policies and peer are not in it. Children that charon replaced but still lists
        are. UnknownSaError: not known, or known in part. RefusedError with NOT_ESP or NOT_COVERED: it
        cannot be moved.
        """
        sa = self._sas.get(name)
        if sa is None:
            raise UnknownSaError(
                f"no record of IKE_SA {name}: it came up while no agent ran",
                hint="`ikectx resync` learns it, after which charon rekeys all CHILD_SAs; "
                "the agent must run before charon",
            )
        if (
            sa.connection is None
            or sa.local_id is None
            or sa.remote_id is None
            or sa.local is None
            or sa.remote is None
            or sa.leaving
        ):
            raise UnknownSaError(f"the record of IKE_SA {name} is not complete")
        if sa.alien:
            raise RefusedError(
                f"IKE_SA {name} has a CHILD_SA that is AH, and only ESP can be moved",
                status=Status.NOT_ESP,
            )
        try:
            return IkeContext(
                connection=sa.connection,
                generations=sa.generations,
                local_id=sa.local_id,
                remote_id=sa.remote_id,
                local=sa.local,
                remote=sa.remote,
                children=sa.children,
                remote_eap_id=sa.remote_eap_id,
                local_vips=sa.local_vips,
                remote_vips=sa.remote_vips,
                peer_addresses=sa.peer_addresses,
                conditions=sa.conditions[0],
                extensions=sa.extensions[0],
                private_conditions=sa.conditions[1],
                private_extensions=sa.extensions[1],
                mid_initiator=sa.mid_initiator,
                mid_responder=sa.mid_responder,
            )
        except ValueError as error:
            raise RefusedError(
                f"IKE_SA {name} as charon told of it cannot be: {error}", status=Status.NOT_COVERED
            ) from None

    def initiates(self, name: SaName) -> bool:
        """Whether charon is the initiator of this IKE_SA, which is known."""
        return self._sas[name].current.initiator

    def moved(self, name: SaName, context: IkeContext) -> None:
        """Take addresses and children from `context`, which charon has by now, without a message of its own.

        With `feed` a child's keys would count as those of the present IKE_SA; here they keep their
        generation.
        """
        sa = self._sas.get(name)
        if sa is not None:
            changed = replace(
                sa,
                local=context.local,
                remote=context.remote,
                children=context.children,
                peer_addresses=context.peer_addresses,
            )
            self._put(name, changed)

    # --- what charon no longer has --------------------------------------------------------------------

    def mark(self) -> int:
        """A point in time for `retain`: take it before charon is asked for its list."""
        return self._count

    def retain(self, names: Iterable[SaName], mark: int | None = None) -> tuple[Deleted, ...]:
        """Forget SAs that charon does not list. SAs that came after `mark` stay (None: none came).

        The successor in a rekey under way, which charon does not list yet, is kept as long as its old IKE_SA.
        """
        listed = set(names)
        limit = self._count if mark is None else mark
        gone = [
            name
            for name, sa in self._sas.items()
            if name not in listed and self._born[name] <= limit and sa.replaces not in self._sas
        ]
        for name in gone:
            if not any(successor in listed for successor in self._successors(name)):
                self.forget(name)
        return tuple(Deleted(name) for name in gone if name not in self._sas)

    def learn(self, context: IkeContext, version: int) -> None:
        """charon was given this SA, with its ancestors, or was made to change it into this one.

        `feed` cannot be used for it, because an ancestor may have the name of another SA that is here.
        """
        self._put(
            context.spis,
            SaState(
                version,
                context.generations,
                connection=context.connection,
                local_id=context.local_id,
                remote_id=context.remote_id,
                remote_eap_id=context.remote_eap_id,
                local=context.local,
                remote=context.remote,
                conditions=(context.conditions, context.private_conditions),
                extensions=(context.extensions, context.private_extensions),
                local_vips=context.local_vips,
                remote_vips=context.remote_vips,
                peer_addresses=context.peer_addresses,
                mid_initiator=context.mid_initiator,
                mid_responder=context.mid_responder,
                children=context.children,
            ),
            new=True,
        )

    def forget(self, name: SaName) -> None:
        """Drop an IKE_SA and its unfinished successors; nothing happens if it is not known."""
        for successor in self._successors(name):
            self._drop(successor)
        if name in self._sas:
            self._drop(name)

    # --- the record at rest ------------------------------------------------------------------------------

    def dump(self, everything: bool = False) -> list[tuple[str, bytes | None]]:
        """The changes since the last call, by key: octets to store, or None to delete the key.

        The octets have key material in the clear: for an encrypted store only.
        """
        names = self.dirty | set(self._sas) if everything else set(self.dirty)
        out: list[tuple[str, bytes | None]] = []
        for name in sorted(names):
            sa = self._sas.get(name)
            out.append((name.key, None if sa is None else self._freeze(name, sa)))
        self.dirty.clear()
        # after a crash in the middle of a rekey the new IKE_SA must be whole, and the old one may be left
        return sorted(out, key=lambda item: item[1] is None)

    def _freeze(self, name: SaName, sa: SaState) -> bytes:
        known = self._frozen.pop(name, None)
        if known is not None and only_ids_differ(known[0], sa):
            datagrams = known[1]
        else:
            datagrams = [message.serialize(_NO_LIMIT) for message in messages_of(sa)]
        self._frozen[name] = sa, datagrams
        if len(self._frozen) > _FRESH:
            del self._frozen[next(iter(self._frozen))]
        ids = [message.serialize() for message in ids_of(sa)]
        order = [child.spi_in for child in sa.children]
        made = [_FORMAT, datagrams + ids, list(sa.replaces or ()), sa.leaving, list(sa.alien), order]
        return cbor.dumps(made, "record", own=True)

    def load(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Add the result of `dump`. StoreError names the key that cannot be read; nothing of it is added
        then."""
        for key, data in items:
            try:
                sa = _thaw(data)
            except (WireError, ValueError) as error:
                raise StoreError(f"record {key} cannot be read: {type(error).__name__}") from None
            name = sa.current.spis
            if name.key != key:
                raise StoreError(f"record {key} holds another IKE_SA")
            self._keep(name, sa)
            self._born[name] = 0


# --- a context to messages -------------------------------------------------------------------------


def _discard(sets: dict[_Key, set[SaName]], key: _Key, name: SaName) -> None:
    sets[key].discard(name)
    if not sets[key]:
        del sets[key]


def uncovered(context: IkeContext, version: int) -> Status:
    """Why charon with that wire version cannot take the IKE_SA over the ha socket; OK: it can."""
    if context.conditions & COND_PPK:
        return Status.PPK
    if context.local_vips:
        return Status.LOCAL_VIP
    if any(child.protocol is not Protocol.ESP for child in context.children):
        return Status.NOT_ESP
    additional = [bool(one.add_secret or one.add_kes) for one in context.generations]
    additional += [bool(one.add_secret or one.add_kes) for one in context.children]
    if version < 4 and any(additional):
        return Status.KEY_EXCHANGES
    return Status.OK


def mid_messages(context: IkeContext, version: int) -> list[HaMessage]:
    """IKE_MID_* with the message IDs of the context; charon ignores 0, so it is left out."""
    ike = IkeId.of(context.current)
    return [
        ike_mid(version, ike, initiator=is_initiator, mid=mid)
        for is_initiator, mid in ((True, context.mid_initiator), (False, context.mid_responder))
        if mid
    ]


# --- the record at rest -----------------------------------------------------------------------------


def _octets(value: object, where: str) -> tuple[bytes, ...]:
    """Any number of octet strings, because a peer decides how many children it has."""
    if not isinstance(value, list) or not all(isinstance(item, bytes) for item in value):
        raise WireError(f"{where}: not a list of octet strings")
    return tuple(value)


_LAYOUT = cbor.row((cbor.uint(8), _octets, cbor.array(cbor.octets(8)), cbor.boolean, _octets, _octets))


def _thaw(data: bytes) -> SaState:
    """WireError or ValueError if `_freeze` did not make it."""
    kind, datagrams, replaces, leaving, alien, order = _LAYOUT(cbor.loads(data, "record"), "record")
    if kind != _FORMAT:
        raise WireError(f"record of format {kind}")
    record = Record()
    for datagram in datagrams:
        change = record.feed(HaMessage.parse(datagram))
        if isinstance(change, Ignored):
            raise WireError(f"record: {change.reason}")
    (sa,) = record._sas.values()
    return replace(
        sa,
        replaces=SaName(*replaces) if replaces else None,
        leaving=leaving,
        alien=alien,
        children=tuple(sorted(sa.children, key=lambda child: order.index(child.spi_in))),
    )
