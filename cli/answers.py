"""What `ikectx` and `ikectx mobile` share: where their agent is, asking it, and showing what it answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import click

from .requests import plain_address

if TYPE_CHECKING:
    from vici_bridge.vici import ControlClient

    from .config import ControlConfig

F = TypeVar("F", bound=Callable[..., Any])


class HasControl(Protocol):
    """An agent's configuration, as far as a command needs it."""

    @property
    def control(self) -> ControlConfig: ...


C = TypeVar("C", bound=HasControl)


class Setup(Generic[C]):
    """Where the configuration is, and the agent behind it.

    `load`: reads the configuration of the path that was given, or of the default one. `start`: how one
    starts the agent. `given`: --config and --socket, as they stood on the command line.
    """

    def __init__(
        self, load: Callable[[str | None], C], start: str, given: tuple[str | None, str | None]
    ) -> None:
        self._load = load
        self._start = start
        self.given = given

    def config(self, path: str | None = None) -> C:
        """The configuration, with the control socket that was given. Errors: ConfigError."""
        config = self._load(path or self.given[0])
        socket = self.given[1]
        if socket is None:
            return config
        changed: C = replace(config, control=replace(config.control, socket=socket))  # type: ignore[type-var]
        return changed

    def socket(self) -> str:
        """The control socket. Errors: ConfigError, where none was given."""
        return self.given[1] or self._load(self.given[0]).control.socket

    def agent(self, timeout: float | None = 30.0) -> ControlClient:
        """A client of the agent; `timeout` in seconds for each answer."""
        from vici_bridge.vici import ControlClient

        return ControlClient(self.socket(), timeout=timeout, start=self._start)

    def ask(self, command: str, query: dict[str, Any] | None = None, timeout: float | None = 30.0) -> Any:
        """One request to the agent; its answer's JSON, None where it has none. Errors: IkectxError."""
        from vici_bridge.vici import json_of

        with self.agent(timeout) as agent:
            return json_of(agent.request(command, query))


LONGEST = 4096
"""Octets of a name, an identity or a path on the command line (PATH_MAX of Linux)."""


class _Words(click.ParamType):  # type: ignore[type-arg]
    """What something can be called: not empty, not endless, UTF-8 without a NUL octet."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if not text.strip():
            self.fail("it is empty", param, ctx)
        try:
            octets = text.encode()
        except UnicodeEncodeError:
            self.fail(f"{text[:60]!r} is not UTF-8", param, ctx)
        if b"\0" in octets:
            self.fail(f"{text[:60]!r} holds a NUL octet", param, ctx)
        if len(octets) > LONGEST:
            self.fail(f"{text[:60]!r}… has {len(octets)} octets, more than {LONGEST}", param, ctx)
        return text


WORDS = _Words()
"""The type of options that take a name, an identity or a file. Errors: click.BadParameter."""


def an_address(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of options that take an IP address. Errors: click.BadParameter."""
    try:
        return None if value is None else str(plain_address(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IP address", ctx, param) from None


def a_number(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback of options that take a float: `nan` is in every range. Errors: click.BadParameter."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number", ctx, param)
    return value


def json_option(command: F) -> F:
    """--json, of every command that prints."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead.")(command)


def serve_config_option(command: F) -> F:
    """--config behind `serve`, where units and scripts write it."""
    return click.option("--config", metavar="FILE", type=WORDS, help="The same as before the command.")(
        command
    )


def show_answer(value: Any, as_json: bool) -> None:
    """An agent's answer; one that holds nothing is "done"."""
    if as_json:
        show_json({"ok": True} if value is None else value)
        return
    from . import render

    click.echo(render.tree(value) if isinstance(value, dict) else "done")


def show_json(value: object) -> None:
    """One JSON value on standard output; over several lines on a terminal."""
    from .render import dump

    click.echo(dump(value, indent=2 if sys.stdout.isatty() else None))
