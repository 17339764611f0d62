"""Words of peers and mobile nodes steer neither a terminal nor a log."""

from __future__ import annotations

import io
import logging

import pytest

from ikectx.escape import Escaping, OurText, escaped
from ikectx.mistakes import log_mistake
from ikectx.numbers import IdType
from ikectx.sa.context import Identity

FORGED = "a\nERROR ikectx: forged line\x1b[31m\rb"
"""An identity that stock charon accepts of a mobile node where the connection's remote id is %any."""


@pytest.fixture
def log() -> logging.Logger:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(Escaping())
    made = logging.Logger("test")
    made.addHandler(handler)
    made.stream = stream  # type: ignore[attr-defined]
    return made


def written(log: logging.Logger) -> str:
    return str(log.stream.getvalue())  # type: ignore[attr-defined]


def test_the_words_of_an_identity_are_escaped() -> None:
    shown = str(Identity(IdType.FQDN, FORGED.encode()))
    assert shown == "a?ERROR ikectx: forged line?[31m?b"  # as strongSwan prints it
    assert str(Identity(IdType.RFC822_ADDR, b"mn\xff\0@example.org")) == "mn??@example.org"


def test_what_is_printable_stays() -> None:
    for text in ("mn@example.org", "DOMAIN\\user", "jürgen@example.org", ""):
        assert escaped(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x9b31m", "\\x9b31m"), ("\u202egro.live", "\\u202egro.live"), ("\u2028x", "\\u2028x")],
)
def test_what_steers_by_unicode(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_every_line_of_the_log_is_the_programs(log: logging.Logger) -> None:
    log.warning("%s offered %s: %d", FORGED, Identity(IdType.FQDN, FORGED.encode()), 5)
    log.warning("%(who)s", {"who": FORGED})
    log.error("the other end: %s", OSError(FORGED))
    log.error("ready-made \x1b[31m")
    lines = written(log).splitlines()
    assert len(lines) == 4
    assert not [line for line in lines if "\x1b" in line or line.startswith("ERROR ikectx")]
    assert lines[0].endswith("b: 5")


def test_the_words_of_an_exception_are_no_line_of_the_log(log: logging.Logger) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("failed")
    first, *others = written(log).splitlines()
    assert first == "ERROR failed" and "\x1b" not in "".join(others)
    assert len(others) > 3 and all(line.startswith("    ") for line in others)


def test_where_a_mistake_came_up_keeps_its_lines(log: logging.Logger) -> None:
    log.error("%s", OurText("one\ntwo"))
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        log_mistake(log, FORGED, error)
    lines = written(log).splitlines()
    assert lines[:2] == ["ERROR one", "two"]
    assert lines[2].startswith("ERROR a\\x0aERROR ikectx: forged")
    assert any(line.startswith("  File ") for line in lines)
