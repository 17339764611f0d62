"""A gateway's agent that answers from a table, on a control socket, and the command line before it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

from ikectx.errors import BusyError, UnknownSaError
from ikectx_cli import commands
from vici_bridge.vici.codec import Message, with_json
from vici_bridge.vici.control import ControlServer, Response

SA = {
    "ike_id": 7,
    "name": "home",
    "state": "ESTABLISHED",
    "spi_i": "11" * 8,
    "spi_r": "22" * 8,
    "remote": "203.0.113.5:4500",
    "remote_id": "mn@example.org",
    "remote_eap_id": "",
    "vips": ["10.9.0.1"],
    "established": 4000,
    "movable": True,
    "children": [{"name": "net", "spi_in": "c0ffee00"}],
}

REPORT = {
    "transfer_id": "t1",
    "mn": "mn@example.org",
    "result": "moved",
    "phases_ms": {"export": 1.5, "freeze": 20.0},
    "cxtp_octets": 600,
    "exit_code": 0,
    "verdicts": [],
}
REFUSED = {
    **REPORT,
    "transfer_id": "t2",
    "mn": "other@example.org",
    "result": "refused",
    "text": "nsg refused",
    "hint": "load the connection",
    "state_here": "serves the MN",
    "exit_code": 4,
    "verdicts": [
        {"context": "PAD", "status": {"code": 0x83, "text": "no such connection"}, "detail": "home"},
        {"context": "SAD", "status": {"code": 0, "text": "fine"}, "detail": ""},
    ],
}


class StandIn:
    """Serves commands on a control socket, in a thread of its own; `asked` is what they note."""

    def __init__(self, path: Path, commands: dict[str, Any], streamed: dict[str, str]) -> None:
        self.path = str(path)
        self.asked: list[tuple[str, Message]] = []
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(self.path, commands, streamed)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.start(), self.loop).result(5)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.close(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()


LEFT = {
    "sa": ["00" * 7 + "01", "00" * 7 + "02"],
    "mn": "mn@example.org",
    "stage": "away",
    "at": "nsg",
    "given_to": "nsg",
    "epoch": 1,
    "since": 1700000000.0,
    "prefixes": ["10.4.0.10/32"],
    "via": ["10.3.0.3"],
    "blocked": ["10.3.0.0/24 -> 10.4.0.10/32"],
}


DOUBT = {
    "name": "t1",
    "transfer": "t1",
    "sa": "01:02",
    "mn": "mn@example.org",
    "here": {
        "gateway": "psg",
        "state": "has let go",
        "epoch": 0,
        "charon": "home #1",
        "kernel": "IKE is dropped",
    },
    "there": {
        "gateway": "nsg",
        "state": "may own it",
        "epoch": 1,
        "connected": False,
        "last_heard": 1700000000.0,
        "said": "",
    },
    "advice": "bring nsg back",
    "decisions": ["reclaim", "give-up"],
}


class Agent(StandIn):
    """A gateway's agent."""

    def __init__(self, path: Path) -> None:
        self.reports: list[dict[str, Any]] = [REPORT]
        self.sas: list[dict[str, Any]] = [SA]
        self.told = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        super().__init__(
            path,
            {
                "list-contexts": self.list_contexts,
                "show-context": self.show,
                "transfer": self.transfer,
                "history": self.history,
                "verify-history": self.verify,
                "status": self.status,
                "resync": self.resync,
                "cancel": self.cancel,
                "resolve": self.resolve,
                "updown": self.updown,
                "detours": self.detours,
            },
            {
                "list-contexts": "list-context",
                "transfer": "transfer-progress",
                "history": "history-entry",
            },
        )

    async def list_contexts(self, request: Message) -> AsyncIterator[Message]:
        for sa in self.sas:
            yield with_json(sa)

    async def show(self, request: Message) -> Message:
        self.asked.append(("show-context", request))
        if request.get("spi") == "dead":
            raise UnknownSaError("no IKE_SA answers to spi dead", hint="`ikectx list` shows those there are")
        return with_json({"connection": "home", "children": [{"name": "net"}], "lifetime": {"rekey": None}})

    async def transfer(self, request: Message) -> AsyncIterator[Message]:
        self.asked.append(("transfer", request))
        if request.get("to") == "busy":
            raise BusyError("a rekey is in flight")
        yield with_json({"transfer": "t1", "phase": "offered", "mn": "mn@example.org", "ms": 1.0})
        yield Response(with_json({"reports": self.reports}))

    async def history(self, request: Message) -> AsyncIterator[Message]:
        self.asked.append(("history", request))
        yield with_json({"started": 1700000000, "role": "source", "peer": "nsg", "result": "moved"})

    async def verify(self, request: Message) -> Message:
        self.asked.append(("verify-history", request))
        changed = ["row 2 was changed"] if request.get("head") else []
        return with_json({"ok": not changed, "rows": 3, "pruned": 1, "head": "4:ab", "findings": changed})

    async def resolve(self, request: Message) -> Message:
        self.asked.append(("resolve", request))
        report = {"report": self.reports[0]} if request.get("decision") else {}
        return with_json({"in_doubt": [DOUBT], **report})

    async def status(self, request: Message) -> Message:
        return with_json({"name": "psg", "charon": {"reachable": True}, "open": []})

    async def resync(self, request: Message) -> Message:
        self.asked.append(("resync", request))
        return {}

    async def cancel(self, request: Message) -> Message:
        self.asked.append(("cancel", request))
        return {}

    async def detours(self, request: Message) -> Message:
        self.asked.append(("detours", request))
        return with_json({"detours": [LEFT], "behind": [{"mn": "mn2@example.org"}]})

    async def updown(self, request: Message) -> Message:
        self.asked.append(("updown", request))
        self.told.set()
        while not self.may_answer.is_set():
            await asyncio.sleep(0.005)
        return {}


A = TypeVar("A", bound=StandIn)


class Cli(Generic[A]):
    """`ikectx`, or with `group` those commands of it, before an agent; gives exit code, output and errors."""

    def __init__(self, agent: A, capsys: pytest.CaptureFixture[str], *group: str) -> None:
        self.agent = agent
        self._before = [*group, "--socket", agent.path]
        self._capsys = capsys

    def __call__(self, *args: str) -> tuple[int, str, str]:
        code = commands.run([*self._before, *args])
        out, err = self._capsys.readouterr()
        return code, out, err

    def json(self, *args: str) -> tuple[int, Any]:
        code, out, _ = self(*args, "--json")
        return code, json.loads(out)
