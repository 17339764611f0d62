"""The picture of a time line: every text has a place of its own, and everything is where its time is."""

from __future__ import annotations

import itertools
import random
import xml.etree.ElementTree as ET

import pytest

from ikectx_cli.lab.timeline import LEFT, RIGHT, WIDTH, Axis, Canvas, Rows, Text, draw, picture
from ikectx_cli.lab.trace import CXTP, HOSTS, IKE, TLS, Arrow, LinkChange, ProbeFlow, Span, TimeLine

SVG = "{http://www.w3.org/2000/svg}"


def push() -> TimeLine:
    """About what a push in virtual time looks like."""
    spans = [
        Span("psg", "export", "step", 0.7, 1.9),
        Span("psg", "catch up with charon", "part", 0.8, 1.8),
        Span("nsg", "check", "step", 1.9, 2.0),
        Span("nsg", "prepare", "step", 2.0, 2.2),
        Span("nsg", "netlink xfrm", "call", 2.1, 2.1),
        Span("psg", "freeze", "step", 2.2, 3.4, failed="BusyError"),
        Span("nsg", "take", "step", 3.4, 3.5),
        Span("nsg", "move", "step", 3.5, 43.6),
        Span("nsg", "activate", "step", 43.6, 48.8),
        Span("psg", "release", "step", 48.8, 50.0),
    ]
    arrows = [
        Arrow("psg", "nsg", "PCTD", TLS, 1.9, 1.9, 368),
        Arrow("nsg", "psg", "CTDR", TLS, 2.2, 2.2, 8),
        Arrow("psg", "nsg", "CTD", TLS, 3.4, 3.4, 84),
        Arrow("nsg", "mn", "INFORMATIONAL 0 request", IKE, 3.5, 23.5, 201),
        Arrow("mn", "nsg", "INFORMATIONAL 0 response", IKE, 23.6, 43.6, 169),
        Arrow("nsg", "psg", "CTDR", TLS, 48.8, 48.8, 8),
    ]
    flow = ProbeFlow(tuple(5.0 * n for n in range(11)))
    return TimeLine("handover: transfer psg nsg", 1, 50.0, tuple(spans), tuple(arrows), (), flow, flow)


def drawn(seed: int) -> TimeLine:
    """A handover as no agent makes it."""
    dice = random.Random(seed)
    length = dice.choice([3.0, 120.0, 2500.0])

    def moment() -> float:
        return round(dice.random() * length, 3)

    spans = []
    for _ in range(dice.randrange(25)):
        begin = moment()
        kind = dice.choice(["step", "step", "part", "call"])
        spans.append(
            Span(
                dice.choice(HOSTS), "a step of it"[: dice.randrange(4, 12)], kind, begin, max(begin, moment())
            )
        )
    arrows = []
    for _ in range(dice.randrange(9)):
        source, target = dice.sample(HOSTS, 2)
        sent = moment()
        received = None if dice.random() < 0.2 else sent + dice.choice([0.01, length / 10])
        arrows.append(
            Arrow(source, target, dice.choice(["CTAR", "IKE_AUTH 1 request"]), CXTP, sent, received, 1)
        )
    gap = ProbeFlow((0.0, length / 2), (length / 4,), 0.0, length / 2)
    return TimeLine(
        f"drawn {seed}",
        1,
        length,
        tuple(sorted(spans, key=lambda one: one.begin)),
        tuple(sorted(arrows, key=lambda one: one.sent)),
        tuple(LinkChange("the network changes", length * share, length) for share in (0.2, 0.9)),
        gap,
        ProbeFlow(),
    )


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    found = []
    for one, two in itertools.combinations(texts, 2):
        (a, b, c, d), (e, f, g, h) = one.box, two.box
        if a < g - 0.5 and e < c - 0.5 and b < h - 0.5 and f < d - 0.5:
            found.append((one.words, two.words))
    return found


@pytest.mark.parametrize("line", [push(), *(drawn(seed) for seed in range(40))], ids=lambda line: line.name)
def test_no_text_lies_over_another_and_all_are_on_the_page(line: TimeLine) -> None:
    canvas = Canvas()
    bottom = draw(canvas, line, 0, {"up": line.end / 4})
    assert overlapping(canvas.texts) == []
    for text in canvas.texts:
        left, top, right, lower = text.box
        assert left >= 0 and top >= 0 and right <= WIDTH and lower <= bottom, text


def test_bars_are_where_their_time_is_and_as_long_as_it() -> None:
    root = ET.fromstring(picture([push()]))
    bars = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text is not None:
            bars[title.text.split(" 0.")[0].split(" ")[0]] = rect
    move, activate = bars["move"], bars["activate"]
    scale = (float(activate.attrib["x"]) - float(move.attrib["x"])) / 40.1
    assert float(move.attrib["width"]) == pytest.approx(40.1 * scale, abs=0.2)
    order = ["export", "check", "prepare", "freeze", "take", "move", "activate", "release"]
    places = [float(bars[name].attrib["x"]) for name in order]
    assert places == sorted(places)
    assert bars["freeze"].attrib["stroke"] and "stroke" not in move.attrib


def test_arrows_lead_from_lane_to_lane() -> None:
    root = ET.fromstring(picture([push()]))
    found = [line for line in root.iter(f"{SVG}line") if line.attrib.get("marker-end")]
    named = {
        title.text.split(" (")[0]: line
        for line in found
        if (title := line.find(f"{SVG}title")) is not None and title.text
    }
    request = {key: float(named["INFORMATIONAL 0 request"].attrib[key]) for key in ("x1", "y1", "x2", "y2")}
    assert request["x2"] > request["x1"] and request["y2"] < request["y1"]  # up, from nSG to the MN
    offer = {key: float(named["PCTD"].attrib[key]) for key in ("y1", "y2")}
    assert offer["y2"] < offer["y1"]  # up, from pSG to nSG


def test_what_is_lost_is_said_and_does_not_arrive() -> None:
    lost = [Arrow("mn", "psg", "INFORMATIONAL 2 request", IKE, 10.0 + n / 100, None, 89) for n in range(3)]
    text = picture([TimeLine("by-packet", 1, 50.0, arrows=tuple(lost))])
    assert "INFORMATIONAL 2 request, 3 times (lost)" in text
    assert text.count("marker-end") == 1  # that of the legend


def test_the_links_own_darkness_is_part_of_the_gap() -> None:
    gap = ProbeFlow((0.0, 60.0), (), 0.0, 60.0)
    line = TimeLine("x", 1, 100.0, changes=(LinkChange("mn moves", 1, 2),), up=gap, down=gap)
    text = picture([line], dark_ms={"up": 40.0, "down": 0.0})
    assert "60.0 ms without a packet from MN to server, 40.0 of them the link&#x27;s own" in text
    assert "60.0 ms without a packet from server to MN<" in text
    assert "link dark" in text and "link dark" not in picture([line])
    # where the node stays where it is, its link stays, too
    assert "link dark" not in picture([push()], dark_ms={"up": 40.0, "down": 40.0})


def test_several_handovers_stand_below_each_other() -> None:
    one, two = ET.fromstring(picture([push()])), ET.fromstring(picture([push(), push()]))
    assert float(two.attrib["height"]) >= 1.9 * float(one.attrib["height"])


def test_nothing_to_draw_is_an_empty_page() -> None:
    assert ET.fromstring(picture([])).attrib["width"] == str(WIDTH)
    assert "nothing" in picture([TimeLine("nothing", 1, 0.0)])


def test_names_are_escaped() -> None:
    ET.fromstring(picture([TimeLine('<&"', 1, 1.0, (Span("mn", "<b>", "step", 0, 1),))]))


def test_ticks_are_round_and_few() -> None:
    for length in (0.7, 3, 52, 130, 999, 7200, 123456):
        ticks = Axis(-0.04 * length, length).ticks()
        assert 4 <= len(ticks) <= 12, (length, ticks)
        assert ticks == sorted(ticks)
    assert Axis(-2, 52).ticks() == [0, 10, 20, 30, 40, 50]
    axis = Axis(0, 100)
    assert axis.x(0) == LEFT and axis.x(100) == WIDTH - RIGHT


def test_rows_are_as_few_as_there_may_be() -> None:
    rows = Rows(air=5)
    reaches = ((0, 10), (8, 20), (15, 30), (25, 40), (25, 40))
    assert [rows.place(*reach) for reach in reaches] == [0, 1, 0, 1, 2]
