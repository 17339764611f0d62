"""The common part of `ikectx` and `ikectx mobile`: find the agent, ask it, and show its answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import click

from ikectx.errors import UsageError

from .requests import plain_address

if TYPE_CHECKING:
    from vici_bridge.vici.client import ControlClient

    from .config import ControlConfig

F = TypeVar("F", bound=Callable[..., Any])


class HasControl(Protocol):
    """The part of an agent's configuration that a command needs."""

    @property
    def control(self) -> ControlConfig: ...


C = TypeVar("C", bound=HasControl)


class Setup(Generic[C]):
    """The configuration's path, and the agent that it belongs to.

    `load`: reads the configuration of the given path, or of the default one. `start`: the command that starts
    the agent. `given`: --config and --socket from the command line.
    """

    def __init__(
        self, load: Callable[[str | None], C], start: str, given: tuple[str | None, str | None]
    ) -> None:
        self._load = load
        self._start = start
        self.given = given

    def config(self, path: str | None = None) -> C:
        """The configuration, with the given control socket. Errors: ConfigError."""
        config = self._load(path or self.given[0])
        socket = self.given[1]
        if socket is None:
            return config
        changed: C = replace(config, control=replace(config.control, socket=socket))  # type: ignore[type-var]
        return changed

    def socket(self) -> str:
        """The control socket. Errors: ConfigError, if none was given."""
        return self.given[1] or self._load(self.given[0]).control.socket

    def agent(self, timeout: float | None = 30.0) -> ControlClient:
        """A client of the agent; `timeout` in seconds for each answer."""
        from vici_bridge.vici.client import ControlClient

        return ControlClient(self.socket(), timeout=timeout, start=self._start)

    def ask(self, command: str, query: dict[str, Any] | None = None, timeout: float | None = 30.0) -> Any:
        """Send one request to the agent; returns its answer's JSON, None if it has none. Errors:
        IkectxError."""
        from vici_bridge.vici.client import json_of

        with self.agent(timeout) as agent:
            return json_of(agent.request(command, query))


LONGEST = 4096
"""Octets of a name, an identity or a path on the command line (PATH_MAX of Linux)."""


class _Words(click.ParamType):  # type: ignore[type-arg]
    """The type of a name: not empty, not longer than `LONGEST`, UTF-8 without a NUL octet."""

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


def confirm(yes: bool, question: str) -> None:
    """Ask, unless --yes was given. Errors: UsageError where there is nobody to be asked."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here, because this is no terminal", hint="give --yes")
    click.confirm(question, abort=True)


def json_option(command: F) -> F:
    """--json, for every command that prints."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON value instead.")(command)


@click.command("rotate-key", short_help="Seal the agent's store with another key.")
@click.option(
    "--key",
    type=click.Path(path_type=Path, dir_okay=False, resolve_path=True),
    help="A file with the key from now on, 32 octets; default: the agent makes one in its state_dir.",
)
@json_option
@click.pass_obj
def rotate_key(setup: Setup[Any], key: Path | None, as_json: bool) -> None:
    """Seal everything that the agent keeps on disk with another key, while it runs. It is all or nothing.

    With --key the agent needs that key at its next start: name its file as state_key in the configuration,
    or give it to systemd as the credential ikectx.state-key.
    """
    answer = setup.ask("rotate-key", {"key": None if key is None else str(key)}) or {}
    if as_json:
        show_json(answer)
    else:
        from .render import say

        say(f"{answer.get('sealed')} values are sealed with another key: {answer.get('key')}")


def serve_config_option(command: F) -> F:
    """--config after `serve`, because units and scripts write it there."""
    return click.option("--config", metavar="FILE", type=WORDS, help="The same as before the command.")(
        command
    )


def show_answer(value: Any, as_json: bool) -> None:
    """Print an agent's answer; an empty one as "done"."""
    if as_json:
        show_json({"ok": True} if value is None else value)
        return
    from . import render

    click.echo(render.tree(value) if isinstance(value, dict) else "done")


def show_json(value: object) -> None:
    """One JSON value on standard output; over several lines on a terminal."""
    from .render import dump

    click.echo(dump(value, indent=2 if sys.stdout.isatty() else None))
