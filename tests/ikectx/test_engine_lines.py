"""Which answer is whose: the engine's end of its links."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ikectx.engine.lines import Line, Lost, Question
from ikectx.engine.outputs import Close, Send
from ikectx.engine.procedures import Event, Scheduler, Steps
from ikectx.errors import LinkError
from ikectx.numbers import Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.wire.cxtp import Ctc, Ctd, Ctdr, Pctd, StatusBlock

MN, MN2 = ip_address("198.51.100.7"), ip_address("198.51.100.8")


def a_line() -> Line:
    return Line(Scheduler(), 1, PeerConfig("far", "far"), "192.0.2.2:5091")


def test_answers_are_paired_by_mn_and_order() -> None:
    line = a_line()
    _, first = line.ask(Pctd(MN))
    _, other = line.ask(Pctd(MN2))
    _, second = line.ask(Ctd(MN))
    octets, repeated = line.ask(Ctd(MN), second)
    assert repeated is second
    assert octets == len(Ctd(MN).serialize())
    answers = [Ctdr(MN), Ctdr(MN, complete=True), Ctdr(MN2), Ctdr(MN)]
    assert all(line.answered(answer) for answer in answers)  # the repetition had its answer coming
    assert (first.reply, second.reply, other.reply) == (answers[0], answers[1], answers[2])
    assert not line.answered(Ctdr(MN))  # and this one nobody asked
    _, last = line.ask(Pctd(MN))
    error = LinkError("it is cut")
    line.lost(error)
    line.lost(LinkError("again"))
    assert last.reply is line.error is error
    for send in (lambda: line.send(Ctc(MN)), lambda: line.ask(Ctd(MN))):
        with pytest.raises(LinkError, match="it is cut"):
            send()


def test_a_refusal_of_a_request_answers_no_ctd() -> None:
    line = a_line()
    _, asked = line.ask(Ctd(MN))
    assert not line.answered(Ctdr(MN, (StatusBlock(Fpt.REQUEST, Status.BUSY),)))
    assert not line.answered(Ctdr(MN2))
    assert line.answered(Ctdr(MN, complete=True))
    assert asked.reply == Ctdr(MN, complete=True)


def test_who_asked_and_who_watches_are_told() -> None:
    scheduler = Scheduler()
    line = Line(scheduler, 7, PeerConfig("far", "far"), "192.0.2.2:5091")
    heard: list[object] = []

    def procedure() -> Steps[None]:
        assert scheduler.current is not None
        line.watch(scheduler.current)
        line.ask(Pctd(MN))
        while True:
            heard.append((yield Event()))

    scheduler.spawn(procedure(), "asks")
    scheduler.run()
    assert line.answered(Ctdr(MN))
    scheduler.run()
    line.close(LinkError("enough"))
    scheduler.run()
    assert [type(each) for each in heard] == [Question, Lost]
    assert [type(each) for each in scheduler.outputs] == [Send, Close]
