"""Test vectors as text: `[name]`, then lines of hexadecimal octets; `#` begins a comment."""

from __future__ import annotations

from pathlib import Path


def read_vectors(name: str) -> dict[str, bytes]:
    """The octets of each vector of `vectors/<name>`."""
    found: dict[str, bytes] = {}
    label = ""
    for line in (Path(__file__).parent / "vectors" / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("["):
            label = text.strip("[]")
            found[label] = b""
        elif text:
            found[label] += bytes.fromhex(text)
    return found
