"""Sections and lists in what charon answers over VICI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ikectx.errors import WireError

View = Mapping[str, Any]
"""A section of an answer."""


def sections(view: View, key: str) -> Mapping[str, View]:
    """The sections below a key of charon's, by name; none if the key is missing. Errors: WireError."""
    found = view.get(key, {})
    if not isinstance(found, Mapping) or not all(isinstance(one, Mapping) for one in found.values()):
        raise WireError(f"charon's {key} is no list of sections")
    return found


def texts(view: View, key: str) -> Iterable[str]:
    """A list of texts. Errors: WireError."""
    found = view.get(key, ())
    if isinstance(found, str | Mapping):
        raise WireError(f"charon's {key} is no list")
    return (str(one) for one in found)
