"""Reads strongSwan's settings files (strongswan.conf, swanctl.conf), to the extent that `doctor` needs.

The format: sections `name { ... }`, `key = value` up to the end of the line, `#` comments, quoted values, and
`include PATTERN`, relative to the including file (man strongswan.conf, 5.9). Section references (`name :
other { ... }`) and ~key deletions are skipped. A file that does not follow the format gives could be read,
because this is for advice only.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    [ \t\r\n]+ | \#[^\n]*
  | (?P<close>\})
  | include[ \t]+(?P<include>"[^"\n]*"|[^\s{}#]+)
  | (?P<key>"[^"\n]*"|[^\s={}#":,]+)[ \t]*=[ \t]*(?P<value>"(?:\\.|[^"\\])*"|[^\n#{}]*)
  | (?P<section>"[^"\n]*"|[^\s={}#":,]+)(?:[ \t]*:[^={}\n]*)?\s*\{
    """,
    re.VERBOSE,
)

MAX_DEPTH = 10


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and the file that it is in."""

    value: str
    file: str


def load(path: str, root: str = "") -> dict[str, Setting]:
    """All settings in `path` and what it includes, by dotted names; a later one wins.

    `root` is put before every absolute path: where another process has its root. Errors: OSError for
    `path` itself; included files that cannot be read are left out.
    """
    reader = _SettingsReader(root)
    reader.read(path, [], 0)
    return reader.settings


class _SettingsReader:
    def __init__(self, root: str) -> None:
        self._root = root
        self.settings: dict[str, Setting] = {}

    def read(self, path: str, section: list[str], depth: int) -> None:
        with open(self._root + path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        names = list(section)
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            at = match.end() if match else at + 1
            if match is None:
                continue
            if match["key"] is not None:
                value = match["value"].strip()
                if len(value) > 1 and value[0] == value[-1] == '"':
                    value = value[1:-1]
                self.settings[".".join([*names, match["key"].strip('"')])] = Setting(value, path)
            elif match["section"] is not None:
                names.append(match["section"].strip('"'))
            elif match["include"] is not None and depth < MAX_DEPTH:
                self._include(os.path.join(os.path.dirname(path), match["include"].strip('"')), names, depth)
            elif match["close"] and len(names) > len(section):
                names.pop()

    def _include(self, pattern: str, section: list[str], depth: int) -> None:
        for path in sorted(glob.glob(self._root + pattern)):
            with contextlib.suppress(OSError):
                self.read(path.removeprefix(self._root), section, depth + 1)
