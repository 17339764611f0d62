"""What a mobile node's agent knows of handovers after a restart."""

from __future__ import annotations

from ikectx.sa.name import SaName
from tests.vici_bridge.test_deadlines import MemoryStore
from vici_bridge.mobile.notes import Notes

ONE, TWO = SaName(b"initone.", b"respone."), SaName(b"inittwo.", b"resptwo.")


def test_an_sa_is_in_question_until_its_gateway_is_known() -> None:
    store = MemoryStore()
    Notes(store).asked(ONE, to="nsg", from_="psg", connection="home")
    Notes(store).asked(TWO, to="nsg", from_="psg", connection="work")
    later = Notes(store)
    (first, second) = sorted(later.in_question(), key=lambda note: str(note["connection"]))
    assert (first["to"], first["from"], first["connection"]) == ("nsg", "psg", "home")
    assert (bytes.fromhex(first["spi_i"]), bytes.fromhex(first["spi_r"])) == ONE
    later.answered(ONE)
    assert later.in_question() == [second]
    later.answered(ONE)


def test_an_sa_that_charon_has_no_more_is_no_question() -> None:
    notes = Notes(MemoryStore())
    for sa in (ONE, TWO):
        notes.asked(sa, to="nsg", from_="psg", connection="home")
    notes.only([TWO, SaName(b"anothers", b"an other")])
    assert [bytes.fromhex(note["spi_i"]) for note in notes.in_question()] == [TWO[0]]
    notes.only([])
    assert notes.in_question() == []


def test_the_last_report_outlives_the_agent() -> None:
    store = MemoryStore()
    assert Notes(store).last() is None
    Notes(store).ended({"result": "silent"})
    Notes(store).ended({"result": "moved", "to": "nsg"})
    assert Notes(store).last() == {"result": "moved", "to": "nsg"}
