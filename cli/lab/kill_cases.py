"""The cases of `ikectx lab kills`: a fault at a point of a mode, as the tables and the steps have it.

A mode is what both machines of a transfer are told in turn (`MODES`). Walking their tables by that gives the
states that the journals get, the steps that are carried out, and the messages. So a new effect, state or
message brings its cases along. Pure.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from zlib import crc32

from ikectx.engine.tables import (
    SOURCE_TABLE,
    TARGET_TABLE,
    SourceAction,
    SourceInput,
    SourceState,
    TargetAction,
    TargetInput,
    TargetState,
)
from ikectx.errors import UsageError
from vici_bridge import effects
from vici_bridge.effects.runner import LedgerStep

BEFORE, AFTER = "before", "after"
ANY = "any"
"""In the place of a point's name: whichever comes."""


def _slug(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def effect_point(step: str, effect: str, when: str) -> str:
    """The name of a point at an effect of a step; `step` empty: it was left for after its step."""
    return f"{_slug(step) or 'later'}.{_slug(effect)}.{when}"


def journal_point(state: str, when: str) -> str:
    """The name of a point at a write of the journal."""
    return f"journal.{_slug(state)}.{when}"


def message_point(way: str, name: str) -> str:
    """The name of a point at a message: when it was `sent`, or when it has been `received`."""
    return f"{name.lower()}.{way}"


# -- modes ----------------------------------------------------------------------------------------------

_S, _SI, _SA = SourceState, SourceInput, SourceAction
_T, _TI, _TA = TargetState, TargetInput, TargetAction

STEP_OF: Mapping[SourceAction | TargetAction, str] = {
    _SA.FREEZE: "freeze",
    _SA.RELEASE: "release",
    _SA.THAW: "thaw",
    _SA.DIVERT: "divert",
    _TA.PREPARE: "prepare",
    _TA.TAKE: "take",
    _TA.ACTIVATE: "activate",
    _TA.UNDO: "undo",
}
"""The step of `vici_bridge.effects` that an action is."""

MESSAGE_OF: Mapping[SourceAction | TargetAction, str] = {
    _SA.SEND_PCTD: "Pctd",
    _SA.SEND_CTD: "Ctd",
    _SA.SEND_CTC: "Ctc",
    _TA.ANSWER: "Ctdr",
    _TA.REQUEST: "CtReq",
    _TA.SEND_CTC: "Ctc",
}
"""The message between gateways that an action sends."""

OTHER_ACTIONS = {_SA.RECONNECT, _TA.CHECK, _TA.MOVE}
"""Actions that neither are a step of the ledger nor send something between gateways."""


@dataclass(frozen=True, slots=True)
class MoveMode:
    """A way of an SA to another gateway.

    what: in words. source, target: the inputs of both machines in turn. asks: the request that nsg sends
    before its machine begins. mobile: the steps of a mobile node's agent, if it has one. steps: steps beside
    the machines', at psg. messages: those of a mobile node, by host that sends and host that receives.
    without: effects that an SA does not need which goes this way.
    """

    what: str
    source: tuple[SourceInput, ...]
    target: tuple[TargetInput, ...]
    asks: bool = False
    mobile: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    messages: tuple[tuple[str, str, str], ...] = ()
    without: tuple[str, ...] = ("release.relay", "activate.script-after-the-answer")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts with an agent."""
        return ("psg", "nsg", "mn") if self.mobile else ("psg", "nsg")


_PUSHED = (_SI.OK, _SI.ACCEPTED, _SI.OK, _SI.ACCEPTED, _SI.OK)
_TAKEN = (_TI.OK, _TI.OK, _TI.OK)
_PREPARED = (_TI.PCTD, _TI.OK, _TI.OK)
_AT_ONCE = (_SI.REQUESTED, _SI.OK, _SI.ACCEPTED, _SI.OK)
_WHOLE = (_TI.WHOLE, _TI.OK, _TI.OK, *_TAKEN)
_TOLD = (("nsg", "Ike", "nsg"),)
_ASKED = (("mn", "Ctar", "nsg"), ("nsg", "Ctaa", "mn"))
_NODE = ("ahead", "quiet", "readdress", "loud")
_MOVED = ("release.relay", "take.script-up")
"""Not done for a mobile node that has moved by itself."""
_DIVERTED = ("divert.policies-are-noted", "divert.esp-stops", "divert.that-is-noted")

MODES: Mapping[str, MoveMode] = {
    "push": MoveMode("psg gives the SA away", _PUSHED, (*_PREPARED, _TI.CTD, *_TAKEN), messages=_TOLD),
    "pull": MoveMode(
        "nsg asks for the SA", _PUSHED, (*_PREPARED, _TI.CTD, *_TAKEN), asks=True, messages=_TOLD
    ),
    "drain": MoveMode(
        "psg gives away its SAs, nine of them", _PUSHED, (*_PREPARED, _TI.CTD, *_TAKEN), messages=_TOLD
    ),
    "relay": MoveMode(
        "psg passes its packets on",
        _PUSHED,
        (*_PREPARED, _TI.CTD, *_TAKEN),
        without=("activate.script-after-the-answer",),
    ),
    "silent": MoveMode(
        "the MN does not hear nsg, and psg takes the SA back",
        (_SI.OK, _SI.ACCEPTED, _SI.OK, _SI.REJECTED, _SI.OK),
        (*_PREPARED, _TI.CTD, _TI.OK, _TI.FAILED, _TI.OK),
        messages=(("nsg", "Ike", ""), ("psg", "Ike", "psg")),
    ),
    "predictive": MoveMode(
        "the MN tells psg that it goes, and nsg that it is there",
        (_SI.ANNOUNCE, _SI.ACCEPTED, *_AT_ONCE),
        (_TI.ANNOUNCE, _TI.OK, _TI.ARRIVED, _TI.OK, _TI.CTD, *_TAKEN),
        mobile=_NODE,
        messages=(*_ASKED, ("mn", "Ctar", "psg"), ("psg", "Ctaa", "mn")),
        without=(*_MOVED, *_DIVERTED),
    ),
    "leaving": MoveMode(
        "the MN tells psg that it leaves at once, and nsg that it is there",
        (_SI.ANNOUNCE, _SI.ACCEPTED, *_AT_ONCE),
        (_TI.ANNOUNCE, _TI.OK, _TI.ARRIVED, _TI.OK, _TI.CTD, *_TAKEN),
        mobile=_NODE,
        messages=(*_ASKED, ("mn", "Ctar", "psg"), ("psg", "Ctaa", "mn")),
        without=(*_MOVED, "freeze.policies-are-noted", "freeze.esp-stops"),
    ),
    "reactive": MoveMode(
        "the MN is elsewhere and tells nsg",
        _AT_ONCE,
        _WHOLE,
        asks=True,
        mobile=_NODE,
        messages=_ASKED,
        without=_MOVED,
    ),
    "packet": MoveMode(
        "the MN is elsewhere, and nsg sees a packet of it", _AT_ONCE, _WHOLE, asks=True, without=_MOVED
    ),
    "invited": MoveMode(
        "psg invites the MN, which is behind a NAT, to nsg",
        _AT_ONCE,
        _WHOLE,
        asks=True,
        mobile=("quiet", "readdress", "loud"),  # it has its old address still, so no packet goes ahead
        steps=("invite",),
        messages=_ASKED,
        without=_MOVED,
    ),
    "unheard": MoveMode(
        "psg invites the MN, which does not hear it, and calls it back",
        (),
        (),
        steps=("invite", "unheard"),
        messages=(("psg", "Ike", ""),),
        without=("invite.charon-knows-the-id", "invite.charon-speaks"),
    ),
}


@cache
def steps() -> Mapping[str, LedgerStep[Any]]:
    """Every step in `vici_bridge.effects`, by its name."""
    found: dict[str, LedgerStep[Any]] = {}
    for module in pkgutil.iter_modules(effects.__path__):
        for value in vars(importlib.import_module(f"{effects.__name__}.{module.name}")).values():
            if isinstance(value, LedgerStep):
                found[value.name] = value
    return found


def walk(
    mode: MoveMode,
) -> Iterator[tuple[str, SourceState | TargetState, SourceAction | TargetAction | None]]:
    """Host, state that is entered, and an action of that; None: the state itself."""
    source, target = _S.NEW, _T.NEW
    for asked in mode.source:
        source, *actions = SOURCE_TABLE[source, asked]
        yield "psg", source, None
        yield from (("psg", source, action) for action in actions)
    for told in mode.target:
        target, *did = TARGET_TABLE[target, told]
        yield "nsg", target, None
        yield from (("nsg", target, action) for action in did)


# -- points ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """Where a fault happens: the agent of `host` is there. kind: effect, journal or message."""

    mode: str
    host: str
    name: str
    kind: str

    @property
    def after(self) -> bool:
        """Whether something has happened that is not noted yet."""
        return self.name.endswith(f".{AFTER}")


SELDOM: Mapping[str, str] = {
    "thaw.delete-at-the-mn": "an SA that somebody ended meanwhile",
    "thaw.delete-in-charon": "an SA that somebody ended meanwhile",
    "thaw.script-of-what-was-ended": "an SA that somebody ended meanwhile",
    "thaw.rekey": "an SA that was to get other SPIs",
    "freeze.esp-goes-on": "an SA that is to get other SPIs",
    "release.esp-stops": "an SA that got other SPIs",
    "loud.children-are-rekeyed": "ESP in user space",
    "activate.charon-has-it": "an SA to which no packets could be led before",
    "activate.way": "an SA to which no packets could be led before",
    "activate.script-up": "an SA to which no packets could be led before",
    "home.esp-goes-by-its-sas": "a mobile node that gets no answer",
    "unheard.charon-speaks-again": "a mobile node that was to be invited, and was not",
}
"""Effects that no mode here comes to, and what they are for."""


def points(name: str) -> list[Point]:
    """All points of a mode, in the order of the tables."""
    mode, found = MODES[name], dict[Point, None]()

    def add(host: str, kind: str, *names: str) -> None:
        found.update((Point(name, host, one, kind), None) for one in names)

    def carried_out(host: str, step: str) -> None:
        for effect in steps()[step].effects:
            # what is postponed ends when the mobile node hears again, which is after the fault
            when = (BEFORE,) if effect.postponed else (BEFORE, AFTER)
            both = [effect_point("" if effect.postponed else step, effect.name, one) for one in when]
            if both[0].removesuffix(f".{BEFORE}") not in {*SELDOM, *mode.without}:
                add(host, "effect", *both)

    def sent(message: str, host: str, to: str) -> None:
        add(host, "message", message_point("sent", message))
        if to:
            add(to, "message", message_point("received", message))

    if mode.asks:
        sent("CtReq", "nsg", "psg")
    for step in mode.steps:
        carried_out("psg", step)
    for host, state, action in walk(mode):
        if action is None:
            add(host, "journal", *(journal_point(state, when) for when in (BEFORE, AFTER)))
        elif action in STEP_OF:
            carried_out(host, STEP_OF[action])
        elif action in MESSAGE_OF:
            sent(MESSAGE_OF[action], host, "nsg" if host == "psg" else "psg")
    for step in mode.mobile:
        carried_out("mn", step)
    for host, message, to in mode.messages:
        sent(message, host, to)
    return list(found)


# -- faults ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a point. kind: see `faults`. hosts: to whom; of a cut: between whom, in which direction
    (`mn` is the mobile node at each of its places)."""

    what: str
    kind: str
    hosts: tuple[str, ...]


FAULTS: Mapping[str, Fault] = {
    "agent-psg": Fault("kill -9 of psg's agent", "agent", ("psg",)),
    "agent-nsg": Fault("kill -9 of nsg's agent", "agent", ("nsg",)),
    "agent-mn": Fault("kill -9 of the MN's agent", "agent", ("mn",)),
    "agents": Fault("kill -9 of both gateways' agents", "agent", ("psg", "nsg")),
    "loop-psg": Fault("kill -9 of psg's agent, and again while it recovers", "loop", ("psg",)),
    "loop-nsg": Fault("kill -9 of nsg's agent, and again while it recovers", "loop", ("nsg",)),
    "loop-mn": Fault("kill -9 of the MN's agent, and again while it recovers", "loop", ("mn",)),
    "charon-psg": Fault("kill -9 of psg's charon", "charon", ("psg",)),
    "charon-nsg": Fault("kill -9 of nsg's charon", "charon", ("nsg",)),
    "charon-mn": Fault("kill -9 of the MN's charon", "charon", ("mn",)),
    "power-psg": Fault("loss of power at psg", "power", ("psg",)),
    "power-nsg": Fault("loss of power at nsg", "power", ("nsg",)),
    "cut-gateways": Fault("no way between the gateways", "cut", ("psg", "nsg", "both")),
    "cut-to-nsg": Fault("no way from psg to nsg", "cut", ("psg", "nsg", "one")),
    "cut-to-psg": Fault("no way from nsg to psg", "cut", ("nsg", "psg", "one")),
    "cut-mn": Fault("no way between the MN and both gateways", "cut", ("mn", "all", "both")),
    "cut-mn-nsg": Fault("no way between the MN and nsg", "cut", ("mn", "nsg", "both")),
    "cut-from-mn": Fault("no way from the MN to the gateways", "cut", ("mn", "all", "one")),
    "cut-to-mn": Fault("no way from the gateways to the MN", "cut", ("all", "mn", "one")),
    "disk-psg": Fault("psg's disk is full", "disk", ("psg",)),
    "disk-nsg": Fault("nsg's disk is full", "disk", ("nsg",)),
    "script-psg": Fault("psg's updown script hangs", "script", ("psg",)),
    "script-nsg": Fault("nsg's updown script hangs", "script", ("nsg",)),
    "hang-psg": Fault("psg's charon hangs", "hang", ("psg",)),
    "hang-nsg": Fault("nsg's charon hangs", "hang", ("nsg",)),
    "hang-mn": Fault("the MN's charon hangs", "hang", ("mn",)),
}

SECONDS = (1.0, 20.0, 60.0)
"""How long a fault may last: shorter than anything waits, than some do, and than charon gives a peer up."""


@dataclass(frozen=True, slots=True)
class Case:
    """A fault at a point. `seconds`: how long it lasts. `reverse`: what was killed starts in the other
    order."""

    point: Point
    fault: str

    @property
    def name(self) -> str:
        return ".".join((self.point.mode, self.point.host, self.point.name, self.fault))

    @property
    def _draw(self) -> int:
        return crc32(self.name.encode())

    @property
    def seconds(self) -> float:
        return SECONDS[self._draw % len(SECONDS)]

    @property
    def reverse(self) -> bool:
        return bool(self._draw & 64)

    @property
    def passes(self) -> int:
        """How many SAs come to the point first, without the fault."""
        return (self._draw >> 8) % 6 if self.point.mode == "drain" else 0


def _fits(point: Point, name: str) -> bool:
    """Whether that fault at that point tries something that no other case tries."""
    fault, own = FAULTS[name], point.host
    if point.mode == "drain" and "mn" in fault.hosts:
        return False  # it would be the same as in a push
    hosts = MODES[point.mode].hosts
    if fault.kind in ("agent", "loop"):
        # what is done and not noted makes a difference only to the agent that did it
        return set(fault.hosts) <= set(hosts) and (fault.hosts == (own,) or not point.after)
    if fault.kind == "power":
        return fault.hosts == (own,) or not point.after
    if fault.kind == "disk":
        return fault.hosts == (own,) and point.kind != "message" and not point.after
    if fault.kind == "script":
        return fault.hosts == (own,) and "script" in point.name and not point.after
    return not point.after


def cases(mode: str = "") -> list[Case]:
    """Every case, or those of one mode. Errors: UsageError for a mode that there is not."""
    if mode and mode not in MODES:
        raise UsageError(f"there is no mode {mode}", hint=", ".join(MODES))
    return [
        Case(point, fault)
        for name in ([mode] if mode else MODES)
        for point in points(name)
        for fault in FAULTS
        if _fits(point, fault)
    ]


def case(name: str) -> Case:
    """The case of that name. Errors: UsageError."""
    found = next((one for one in cases(name.partition(".")[0]) if one.name == name), None)
    if found is None:
        raise UsageError(f"there is no case {name}", hint="ikectx lab kills --list prints them")
    return found


def sample(every: Sequence[Case], count: int, seed: int) -> list[Case]:
    """So many of these cases: from each pair of mode and fault in turn, in an order drawn from the seed."""
    draw = random.Random(seed)  # noqa: S311  no secret
    groups: dict[tuple[str, str], list[Case]] = {}
    for one in every:
        groups.setdefault((one.point.mode, one.fault), []).append(one)
    order = list(groups.values())
    draw.shuffle(order)
    for group in order:
        draw.shuffle(group)
    return list(_in_turn(order))[:count]


def _in_turn(groups: Iterable[list[Case]]) -> Iterator[Case]:
    left = [iter(group) for group in groups]
    while left:
        still = []
        for group in left:
            if (one := next(group, None)) is not None:
                yield one
                still.append(group)
        left = still
