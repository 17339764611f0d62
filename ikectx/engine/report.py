"""Reports and events of a transfer for callers, and the words for each state. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from ikectx.errors import IkectxError, LinkError, StateError
from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict

from .hints import advice
from .tables import SourceState, TargetState

if TYPE_CHECKING:
    from .journal import Role

Result = Literal["moved", "kept", "refused", "lost", "in-doubt"]

_S, _T = SourceState, TargetState

SOURCE_STANDS: Mapping[SourceState, tuple[Result, str, str]] = {
    _S.NEW: ("kept", "serves the MN", "knows nothing of it"),
    _S.OFFERED: ("kept", "serves the MN", "may have it prepared, and drops that by itself"),
    _S.ANNOUNCED: ("kept", "serves the MN", "may hold it, and drops that by itself"),
    _S.AWAITING: (
        "kept",
        "serves the MN until it arrives elsewhere",
        "holds it, and drops that by itself",
    ),
    _S.FREEZING: ("kept", "serves the MN", "may have it prepared, and drops that by itself"),
    _S.RELEASED: (
        "in-doubt",
        "has let go and serves it no more",
        "may own it, or still be undoing it",
    ),
    _S.CLEANING: ("moved", "has let go; its clean-up is not finished", "serves the MN"),
    _S.THAWING: ("in-doubt", "owns the SA but could not start serving it again", "does not own it"),
    _S.DONE: ("moved", "has let go", "serves the MN"),
    _S.KEPT: ("kept", "serves the MN", "does not own it"),
    _S.REFUSED: ("refused", "serves the MN", "does not own it"),
    _S.LOST: ("lost", "does not serve the MN: its charon has the SA no more", "does not own it"),
}
"""For each state of the source: the result, the state of the SA at the source, and at the target."""

TARGET_STANDS: Mapping[TargetState, tuple[Result, str, str]] = {
    _T.NEW: ("kept", "knows nothing of it", "serves the MN"),
    _T.ANNOUNCED: ("kept", "is checking it", "serves the MN"),
    _T.HELD: ("kept", "holds it until the MN arrives", "serves the MN"),
    _T.INSTALLING: ("in-doubt", "is preparing it", "serves the MN"),
    _T.ADMITTING: ("in-doubt", "is checking it", "has let go, and takes it back when told no"),
    _T.RECEIVING: ("in-doubt", "is preparing it", "has let go, and takes it back when told no"),
    _T.CHECKING: ("in-doubt", "is checking it", "serves the MN"),
    _T.PREPARING: ("in-doubt", "is preparing it", "serves the MN"),
    _T.PREPARED: ("in-doubt", "has it prepared", "serves the MN, or has let go by now"),
    _T.OWNING: ("in-doubt", "owns it and is taking it over", "has let go"),
    _T.MOVING: ("in-doubt", "owns it and is telling the MN", "has let go"),
    _T.ACTIVATING: ("in-doubt", "owns it and is activating it", "has let go"),
    _T.UNDOING: (
        "in-doubt",
        "could not yet clear away what it had prepared",
        "waits for that, or serves",
    ),
    _T.OWNED: ("moved", "serves the MN", "has let go"),
    _T.ABORTED: ("kept", "does not own it", "serves the MN"),
}
"""For each state of the target: the result, the state of the SA at the target (here), and at the source."""

_SOURCE_PHASES: Mapping[SourceState, str] = {
    SourceState.NEW: "export",
    SourceState.OFFERED: "prepare",
    SourceState.ANNOUNCED: "announce",
    SourceState.AWAITING: "await",
    SourceState.FREEZING: "freeze",
    SourceState.RELEASED: "confirm",
    SourceState.CLEANING: "release",
    SourceState.THAWING: "thaw",
}

_TARGET_PHASES: Mapping[TargetState, str] = {
    TargetState.ANNOUNCED: "check",
    TargetState.HELD: "hold",
    TargetState.INSTALLING: "prepare",
    TargetState.CHECKING: "check",
    TargetState.PREPARING: "prepare",
    TargetState.PREPARED: "wait",
    TargetState.ADMITTING: "check",
    TargetState.RECEIVING: "prepare",
    TargetState.OWNING: "take",
    TargetState.MOVING: "move",
    TargetState.ACTIVATING: "activate",
    TargetState.UNDOING: "undo",
}

_OF_PEER: Mapping[bool, tuple[str, ...]] = {
    True: ("prepare", "announce", "confirm"),
    False: ("request", "wait"),
}
_OF_MN = ("await", "move")
"""Phases in which the source (True) or the target waits for the other gateway, and for the mobile node."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """How a transfer ended at the source; holds no secrets.

    `text` says what happened, `hint` what to do, `state_here` and `state_there` describe each gateway's side.
    `phases_ms`: export, connect, prepare (PCTD to CTDR), freeze, confirm (CTD to CTDR: the target took, moved
    and activated), release or thaw. `cxtp_octets` counts CXTP messages both ways without TLS.
    """

    transfer_id: str
    sa: SaName
    mn: str
    mn_address: str
    from_: str
    to: str
    result: Result
    status: Status
    text: str = ""
    hint: str = ""
    state_here: str = ""
    state_there: str = ""
    verdicts: tuple[Verdict, ...] = ()
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    cxtp_messages: int = 0
    cxtp_octets: int = 0
    attempts: int = 1
    epoch: int = 0
    address: str = "update"
    why: str = ""
    dry_run: bool = False
    exit_code: int = 0

    @property
    def path(self) -> list[dict[str, object]]:
        """The phases one after the other, in ms on the clock of the gateway that reports, with the host that
        was waited for."""
        source = "export" in self.phases_ms
        ours, peer = (self.from_, self.to) if source else (self.to, self.from_)
        found: list[dict[str, object]] = []
        at = 0.0
        for name, took in self.phases_ms.items():
            host = self.mn if name in _OF_MN else peer if name in _OF_PEER[source] else ours
            times = {"start_ms": round(at, 1), "end_ms": round(at + took, 1)}
            found.append({"step": name, "host": host, **times})
            at += took
        return found

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {
            "transfer_id": self.transfer_id,
            "sa": sa_json(self.sa),
            "mn": self.mn,
            "mn_address": self.mn_address,
            "from": self.from_,
            "to": self.to,
            "result": self.result,
            "status": status_json(self.status),
            "text": self.text,
            "hint": self.hint,
            "state_here": self.state_here,
            "state_there": self.state_there,
            "verdicts": [verdict_json(verdict) for verdict in self.verdicts],
            "phases_ms": dict(self.phases_ms),
            "path": self.path,
            "cxtp_messages": self.cxtp_messages,
            "cxtp_octets": self.cxtp_octets,
            "attempts": self.attempts,
            "epoch": self.epoch,
            "address": self.address,
            "why": self.why,
            "dry_run": self.dry_run,
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True, slots=True)
class TransferEvent:
    """A transfer entered `state` (or ended: `report`, source only); `ms` since it began."""

    transfer_id: str
    role: Role
    peer: str
    sa: SaName
    mn: str
    state: str
    ms: float
    detail: str = ""
    report: TransferReport | None = None


def source_phases(spent: Mapping[str, float], connect: float) -> dict[str, float]:
    """Milliseconds by phase, in their order, from those by state; `connect` is no part of `prepare`."""
    found: dict[str, float] = {}
    for state, name in _SOURCE_PHASES.items():
        if state not in spent:
            continue
        took = spent[state]
        if name == "prepare" and connect:
            found["connect"] = round(connect, 3)
            took = round(max(0.0, took - connect), 3)
        found[name] = took
    return found


def target_phases(spent: Mapping[str, float], request: float | None) -> dict[str, float]:
    """The same at the target; `request`: from the CT-Req to the message that answered it, None: not
    requested."""
    found = {} if request is None else {"request": round(request, 3)}
    for state, name in _TARGET_PHASES.items():
        if state in spent:
            found[name] = round(found.get(name, 0.0) + spent[state], 3)
    return found


class GivenUp(StateError):
    """The operator has decided that this gateway does not serve the SA again."""


class Words(NamedTuple):
    """What happened, what to do, and the exit code of a command that ends so."""

    text: str = ""
    hint: str = ""
    exit_code: int = 0


def source_words(
    state: SourceState,
    error: IkectxError | None,
    clean_up: IkectxError | None,
    *,
    mn: str,
    peer: str,
    ident: str,
) -> Words:
    """The words for a transfer in `state` at its source.

    `error`: why it does not go on; `clean_up`: the error of a clean-up that is repeated. `ident`: its ID.
    """
    result = SOURCE_STANDS[state][0]
    text, hint, exit_code = "", "", 0
    error = clean_up or error
    if result == "moved":
        text = f"{peer} serves {mn} now"
        if clean_up is not None:
            text += f"; the clean-up here failed, it is tried again: {clean_up}"
        elif isinstance(error, GivenUp):
            text, hint = str(error), error.hint
    elif error is not None:
        text, hint, exit_code = str(error), error.hint or advice(error.status), error.exit_code
    if result == "in-doubt":
        exit_code = exit_code or LinkError.exit_code
        if state is SourceState.RELEASED and error is not None and error.status is Status.IN_DOUBT:
            return Words(text, f"{hint} (`ikectx resolve {ident} --reclaim` does so at once)", exit_code)
        hint = (
            f"bring {peer} back: this gateway goes on asking it. `ikectx resolve` shows what is known; if"
            f" {peer} has lost the SA for good, `ikectx resolve {ident} --reclaim` serves it here again"
            if state is SourceState.RELEASED
            else "look at charon and the kernel here: it is tried again until it works"
        )
    return Words(text, hint, exit_code)


def mn_label(context: IkeContext) -> str:
    """The mobile node as people know it: its EAP identity if it has one, else its IKE identity."""
    return str(context.remote_eap_id or context.remote_id)


def sa_json(sa: SaName) -> dict[str, str]:
    """An IKE_SA's name in hexadecimal."""
    return {"spi_i": sa.spi_i.hex(), "spi_r": sa.spi_r.hex()}


def status_json(status: Status) -> dict[str, object]:
    """Number, name and words of a status."""
    return {"code": int(status), "name": status.name, "text": STATUS_TEXT.get(status, "not known here")}


def verdict_json(verdict: Verdict) -> dict[str, object]:
    """One verdict as plain JSON values."""
    return {"context": Fpt(verdict.fpt).name, "status": status_json(verdict.status), "detail": verdict.detail}
