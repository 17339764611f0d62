"""Reads a TOML configuration so that every mistake is one `ConfigError` with file, line and key.

A `ConfigFile` finds, reads and checks one. `value` and `several` of its `TomlTable` take a kind: a function
that returns the value or raises ValueError with the requirement.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ikectx.errors import ConfigError
from ikectx.peer import HostPort
from ikectx.wire.cxtp import PORT

if TYPE_CHECKING:
    from ikectx.sa.context import Address

LONGEST = 1 << 20
"""Octets of a configuration file; one for a thousand connections has some 200 KiB."""

T = TypeVar("T")
_NEEDED: Any = object()


@dataclass(frozen=True, slots=True)
class ConfigFile(Generic[T]):
    """One of the program's configuration files.

    `variable`: the environment variable that names it, in place of `default`. `check`: makes its content from
    its table; the path is for messages and relative names.
    """

    variable: str
    default: str
    check: Callable[[TomlTable, Path], T]

    def path(self, given: str | None) -> Path:
        """The file to read: the given one, that of the environment, or the default."""
        return Path(given or os.environ.get(self.variable) or self.default)

    def load(self, path: Path) -> T:
        """Read and check a file. Errors: ConfigError."""
        return self.parse(self._text(path), path)

    def parse(self, text: str, path: Path) -> T:
        """Check the text of a file. Errors: ConfigError."""
        return self.check(read_table(text, path), path)

    def _text(self, path: Path) -> str:
        try:
            return text_of(path, LONGEST)
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror or error}",
                hint=f"name another file with --config or ${self.variable}",
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at octet {error.start}") from None
        except ValueError as error:  # a NUL in the name
            raise ConfigError(f"{str(path)!r}: {error}") from None


def text_of(path: Path, most: int) -> str:
    """The content of a file, of `most` octets at most, because a device, or a file that grows, has no end.

    Errors: OSError, UnicodeDecodeError, ConfigError for more.
    """
    with path.open("rb") as file:
        octets = file.read(most + 1)
    if len(octets) > most:
        raise ConfigError(f"{path}: it has more than {most} octets", hint="is it the right file?")
    return octets.decode().replace("\r\n", "\n")


def read_table(text: str, path: Path) -> TomlTable:
    """The text as a table; `path` is for messages. Errors: ConfigError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at line (\d+), column \d+\)$|\(at end of document\)$", str(error))
        line = where[1] if where and where[1] else str(text.count("\n") + 1)
        raise ConfigError(f"{path}:{line}: not TOML: {str(error).split(' (at ')[0]}") from None
    except ValueError:  # of `int`, for more than 4300 digits
        raise ConfigError(f"{path}: not TOML: a number has too many digits") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None
    return TomlTable(data, (), _TomlSource(path, _scan(text)))


@dataclass(frozen=True, slots=True)
class _TomlSource:
    path: Path
    lines: Mapping[tuple[str, ...], int]

    def line(self, key: tuple[str, ...]) -> int:
        """The line of the key, or of the nearest surrounding element that has one."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


_HEADER = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_ASSIGNMENT = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[\w-]+|"([^"]*)"|'([^']*)'""")


def _scan(text: str) -> dict[tuple[str, ...], int]:
    """The lines of tables and keys. tomllib does not report them; this is good enough for messages."""
    lines: dict[tuple[str, ...], int] = {}
    counts: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _parts(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            lines.setdefault(table, number)
        elif assignment := _ASSIGNMENT.match(line):
            lines.setdefault((*table, *_parts(assignment[1])), number)
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part[1] or part[2] or part[0].strip("\"'") for part in _PART.finditer(dotted))


class TomlTable:
    """A table of the file that knows its position."""

    def __init__(self, data: dict[str, Any], where: tuple[str, ...], source: _TomlSource) -> None:
        self._data = data
        self._where = where
        self._source = source

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def error(self, key: str, why: str, hint: str = "") -> ConfigError:
        """The error for one of this table's keys (or for the table: key empty)."""
        place = (*self._where, key) if key else self._where
        return ConfigError(
            f"{self._source.path}:{self._source.line(place)}: {_dotted(place)} {why}", hint=hint
        )

    def value(self, key: str, kind: Callable[[Any], T], default: T = _NEEDED) -> T:
        """The key's value through `kind`, which raises ValueError with the requirement."""
        if key not in self._data:
            if default is _NEEDED:
                raise self.error(key, "is missing")
            return default
        try:
            return kind(self._data[key])
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def several(self, key: str, kind: Callable[[Any], T], default: tuple[T, ...] = _NEEDED) -> tuple[T, ...]:
        """A list (one value alone counts as one) of distinct values."""

        def kinds(value: Any) -> tuple[T, ...]:
            values = tuple(kind(item) for item in (value if isinstance(value, list) else [value]))
            for at, item in enumerate(values):
                if item in values[:at]:
                    raise ValueError(f"has {item} twice")
            if not values and default is _NEEDED:
                raise ValueError("must not be empty")
            return values

        return self.value(key, kinds, default)

    def table(self, key: str) -> TomlTable:
        """A table below; an empty one if there is none."""
        return TomlTable(self.value(key, _table, {}), (*self._where, key), self._source)

    def tables(self, key: str) -> list[TomlTable]:
        """An array of tables, [[key]]."""
        none: list[dict[str, Any]] = []
        items = self.value(key, _tables, none)
        return [TomlTable(item, (*self._where, key, str(n)), self._source) for n, item in enumerate(items)]

    def named(self, key: str) -> list[tuple[str, TomlTable]]:
        """Tables with names that the file chooses, [key.NAME]."""
        outer = self.table(key)
        return [(name, outer.table(name)) for name in outer._data]

    def only(self, *known: str) -> None:
        """Refuse all keys but these."""
        for key in self._data:
            if key not in known:
                from difflib import get_close_matches

                near = get_close_matches(key, known, 1, 0.6)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                raise self.error(key, "is not known", hint)


def _dotted(place: tuple[str, ...]) -> str:
    if not place:
        return "the file"
    plain = [part for part in place if not part.isdigit()]
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else f'"{part}"' for part in plain)


# Kinds of values: each returns the value or raises ValueError with "must be ...".


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")
    return value


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be written as [[…]] tables")
    return value


def a_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("must be a text in quotes that is not empty")
    return value


def a_file(beside: Path) -> Callable[[Any], Path]:
    """A file's name; a relative one is relative to the folder of the configuration file `beside` it."""
    return lambda value: beside.parent / a_text(value)


def a_name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", a_text(value)):
        raise ValueError(f"{value!r} must be a name of letters, digits, dots and hyphens")
    return str(value)


def an_integer(low: int, high: int) -> Callable[[Any], int]:
    def kind(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return kind


def a_number(low: float, high: float, what: str = "a number") -> Callable[[Any], float]:
    def kind(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"must be {what} from {low:g} to {high:g}")
        return float(value)

    return kind


def seconds(low: float, high: float) -> Callable[[Any], float]:
    return a_number(low, high, "a number of seconds")


def yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def one_of(*choices: str) -> Callable[[Any], str]:
    def kind(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be {' or '.join(repr(choice) for choice in choices)}")
        return str(value)

    return kind


def an_address(value: Any) -> Address:
    try:
        return ip_address(a_text(value))
    except ValueError:
        raise ValueError(f"{value!r} must be an IP address") from None


_HOST_NAME = re.compile(r"(?=.{1,253}$)(?!.*\.[0-9]+$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")


def an_endpoint(*, names: bool = False) -> Callable[[Any], HostPort]:
    """ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT; with `names` a host name in place of the address."""

    def kind(value: Any) -> HostPort:
        text = a_text(value)
        match = re.fullmatch(r"\[([^\]]*)\](?::(\d{1,5}))?|([^:]*):(\d{1,5})", text)
        host, port = (match[1] or match[3], match[2] or match[4]) if match else (text, None)
        number = int(port) if port else PORT
        try:
            host = str(ip_address(host))
        except ValueError:
            if not names or not _HOST_NAME.fullmatch(host):
                number = 0
        if not 1 <= number <= 65535:
            what = "a host" if names else "an IP address"
            raise ValueError(
                f"{text!r} must be {what} and a port, as in 192.0.2.1:5091 or [2001:db8::1]:5091"
            )
        return HostPort(host, number)

    return kind


def a_vici_uri(value: Any) -> str:
    if not re.fullmatch(r"unix:///.+", a_text(value)):
        raise ValueError(f"{value!r} must be a unix socket, as in unix:///run/charon.vici")
    return str(value)


def an_absolute_path(value: Any) -> str:
    if not os.path.isabs(a_text(value)):
        raise ValueError(f"{value!r} must be an absolute path")
    return str(value)
