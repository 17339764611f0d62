"""What an operator is told to do about each status, and that each is written down."""

from __future__ import annotations

import re
from pathlib import Path

from ikectx.engine.hints import HINTS, advice
from ikectx.numbers import STATUS_TEXT, Status

PROJECT = Path(__file__).resolve().parent.parent.parent.parent


def test_every_status_has_words_and_advice() -> None:
    assert set(STATUS_TEXT) == set(Status)
    assert set(HINTS) == set(Status) - {Status.OK, Status.BAD_CHECKSUM, Status.UNKNOWN_SA}


def test_every_status_is_in_the_protocol_and_in_the_dissector() -> None:
    protocol = (PROJECT / "docs" / "protocol.md").read_text()
    table = protocol.partition("### Status")[2].partition("Other values")[0]
    cells = re.findall(r"(?m)^\| (0x[^|]*)\|", table)
    assert {int(code, 16) for cell in cells for code in re.findall(r"0x\w+", cell)} == {
        int(one) for one in Status
    }
    dissector = (PROJECT / "examples" / "ikectx.lua").read_text()
    assert all(f'[0x{int(one):02X}] = "{one.name}"' in dissector for one in Status)


def test_both_ends_are_told_from_where_they_stand() -> None:
    assert advice(Status.NO_CHILD) == "add the child to the connection at the other gateway"
    assert advice(Status.NO_CHILD, refused_here=True) == "add the child to the connection at this gateway"
    assert not any("{" in advice(status, refused_here=here) for status in Status for here in (True, False))
