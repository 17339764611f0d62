"""What a loss of power leaves of a store: of the write-ahead log only a part of what was not synced.

The log is a header of 32 octets and frames of 24 octets and a page (SQLite's file format, section 4). A frame
is valid if it has the header's salt; frames of an earlier round, behind them, have another.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

HEADER, FRAME = 32, 24


def valid_end(log: Path) -> tuple[str, int]:
    """The salt of a log in hexadecimal, and where its last valid frame ends; ("", 0): there is no log."""
    try:
        octets = log.read_bytes()
    except FileNotFoundError:
        return "", 0
    if len(octets) < HEADER:
        return "", 0
    (page,) = struct.unpack_from("!I", octets, 8)
    salt, end = octets[16:24], HEADER
    while octets[end + 8 : end + 16] == salt and end + FRAME + page <= len(octets):
        end += FRAME + page
    return salt.hex(), end


def cut(log: Path, synced: tuple[str, int], draw: random.Random) -> int:
    """Cuts the log off at an arbitrary octet behind what was synced; returns how many octets are lost."""
    salt, end = valid_end(log)
    if not end:
        return 0
    least = synced[1] if synced[0] == salt else HEADER
    keep = draw.randint(min(least, end), end)
    os.truncate(log, keep)
    return end - keep
