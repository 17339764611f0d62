"""The keys that a request on the control socket may have: each is a text, or a yes or no. Pure.

A request is checked before its command sees it, because an ignored key would be dangerous: with a mistyped
`dry-run` every SA would move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ikectx.errors import UsageError

from .codec import Message

Kind = Literal["text", "flag"]
"""text: any text. flag: yes or no."""

Keys = Mapping[str, Kind]
"""The keys of one command. A key that ends with `*` stands for all keys with that beginning."""

SHOWN = 60
"""Characters of an unknown key or value that an error repeats."""


def check(command: str, request: Message, keys: Keys) -> None:
    """Errors: UsageError for a key that the command does not have, and for a value of the wrong kind."""
    for key, value in request.items():
        kind = keys.get(key) or next((keys[one] for one in keys if one[-1] == "*" and _fits(one, key)), None)
        if kind is None:
            known = ", ".join(sorted(keys)) or "none"
            raise UsageError(f"{command} has no key {key[:SHOWN]!r}", hint=f"keys it has: {known}")
        if not isinstance(value, str):
            what = "a list" if isinstance(value, list) else "a section"
            raise UsageError(f"{command}: {key[:SHOWN]} must be a text, not {what}")
        if kind == "flag" and value not in ("yes", "no"):
            raise UsageError(f"{command}: {key} must be yes or no, not {value[:SHOWN]!r}")


def _fits(pattern: str, key: str) -> bool:
    return key.startswith(pattern[:-1])
