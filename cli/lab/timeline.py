"""Draws time lines (`lab_trace.TimeLine`) as SVG: a lane for each host, messages between the lanes. Pure.

    traffic    when probe packets arrived, up and down, and the gaps between them
    mn         steps of its agent, under them parts of steps, under them questions to charon and the kernel
      |        messages between mn and the gateways
    nSG        ...
      |        messages between the gateways, and those of mn and pSG, which pass nSG's lane
    pSG        ...

Every text has a place of its own: what would overlap goes a row further down. What is too short to be named
(`NAMED` pixels) is drawn, and named where a pointer rests on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from .trace import CXTP, HOSTS, IKE, TLS, Arrow, ProbeFlow, Span, TimeLine

WIDTH = 1200
LEFT, RIGHT = 96, 24
"""Pixels beside the time axis: names of lanes, and air."""
MARGIN = 0.04
"""Of the time that is drawn, before the beginning and after the end."""
NAMED = 1.0
"""Pixels a part of a step must be wide to have its name written beside it."""
TICKS = 10
"""About so many marks on the time axis."""
ROW, PART, CALL = 19, 15, 7
"""Heights of rows of steps, parts and calls."""
NARROW = 0.61
"""Width of a letter in heights of its font, the mean of sans-serif fonts with something to spare."""
ROWS = (3, 4, 5, 6, 8, 12, 24)
"""Rows of names between two lanes that are tried."""
LABEL = 14
"""Height of such a row."""

TITLES = {"mn": "MN", "nsg": "nSG", "psg": "pSG"}
COLOURS = {"mn": ("#2f6db5", "#eaf1fa"), "nsg": ("#2a7a4b", "#e9f4ed"), "psg": ("#b5651d", "#faf0e6")}
"""Of bars and of lanes, by host."""
MESSAGES = {IKE: "#7a2a8f", CXTP: "#c2185b", TLS: "#455a64"}
NAMES = {IKE: "IKE", CXTP: "CXTP of MN and gateway", TLS: "CXTP between gateways (TLS)"}
ARRIVAL, LOST, GAP, CHANGE, GREY = "#2a7a4b", "#d32f2f", "#f4c7c3", "#d32f2f", "#667"
DARK = "#c9b8c4"
"""Of the part of a gap in which the link itself let nothing through."""


BOLD = ' font-weight="bold"'
HALO = ' paint-order="stroke" stroke="#fff" stroke-width="2.5" stroke-linejoin="round"'


@dataclass(frozen=True, slots=True)
class Text:
    """Words at a place: `x`, `y` of the baseline; `anchor` is start, middle or end."""

    x: float
    y: float
    words: str
    size: float = 11
    anchor: str = "start"
    colour: str = "#222"
    bold: bool = False
    halo: bool = True
    """A white edge, so that a line behind the words does not make them illegible."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of what it covers."""
        width = wide(self.words, self.size, bold=self.bold)
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - 0.8 * self.size, left + width, self.y + 0.2 * self.size


def wide(words: str, size: float, *, bold: bool = False) -> float:
    """About how many pixels words take."""
    return len(words) * size * NARROW * (1.08 if bold else 1.0)


@dataclass(slots=True)
class Canvas:
    """What is drawn: `ground` under `grid` under `shapes` under `texts`, each in the order it came."""

    ground: list[str] = field(default_factory=list)
    grid: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        tip: str = "",
        edge: str = "",
        ground: bool = False,
    ) -> None:
        stroke = f' stroke="{edge}"' if edge else ""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        (self.ground if ground else self.shapes).append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{stroke}>'
            f"{inside}</rect>"
        )

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str,
        *,
        width: float = 1.0,
        dash: str = "",
        head: bool = False,
        tip: str = "",
        grid: bool = False,
    ) -> None:
        style = f' stroke-dasharray="{dash}"' if dash else ""
        arrow = f' marker-end="url(#head{colour.removeprefix("#")})"' if head else ""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        (self.grid if grid else self.shapes).append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" '
            f'stroke="{colour}" stroke-width="{width}"{style}{arrow}>{inside}</line>'
        )

    def svg(self, height: float) -> str:
        """All of it as a document."""
        heads = "".join(
            f'<marker id="head{colour.removeprefix("#")}" viewBox="0 0 8 8" refX="8" refY="4" '
            f'markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{colour}"/></marker>'
            for colour in dict.fromkeys(MESSAGES.values())
        )
        words = [
            f'<text x="{one.x:.1f}" y="{one.y:.1f}" font-size="{one.size:g}" text-anchor="{one.anchor}" '
            f'fill="{one.colour}"{BOLD if one.bold else ""}{HALO if one.halo else ""}>'
            f"{escape(one.words)}</text>"
            for one in self.texts
        ]
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
                f'viewBox="0 0 {WIDTH} {height:.0f}" '
                'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">',
                f"<defs>{heads}</defs>",
                f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>',
                *self.ground,
                *self.grid,
                *self.shapes,
                *words,
                "</svg>\n",
            ]
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """Milliseconds to pixels."""

    begin: float
    end: float

    def x(self, ms: float) -> float:
        return LEFT + (ms - self.begin) / (self.end - self.begin) * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> list[float]:
        """Round numbers, about `TICKS` of them."""
        least = (self.end - self.begin) / TICKS
        power = 10.0 ** len(str(int(least))) / 10 if least >= 1 else 0.1
        step = next(one * power for one in (1, 2, 5, 10, 20) if one * power >= least)
        first = int(self.begin // step) + 1
        return [n * step for n in range(first, int(self.end // step) + 1)]


class Rows:
    """Puts what lies side by side into as few rows as there may be without an overlap."""

    def __init__(self, air: float = 5.0) -> None:
        self._air = air
        self.taken: list[list[tuple[float, float]]] = []

    def place(self, left: float, right: float) -> int:
        """The number of the first row that is free there."""
        for number, row in enumerate(self.taken):
            if all(right + self._air <= one or two + self._air <= left for one, two in row):
                row.append((left, right))
                return number
        self.taken.append([(left, right)])
        return len(self.taken) - 1


def picture(lines: Iterable[TimeLine], where: str = "", dark_ms: Mapping[str, float] | None = None) -> str:
    """An SVG document of these handovers, one below the other.

    `where` says what they ran on. `dark_ms`: how long the mobile node's link lets nothing through when it
    changes its access network, `up` and `down`; None where that was not measured.
    """
    canvas, top = Canvas(), 0.0
    for line in lines:
        canvas.texts.append(Text(WIDTH - RIGHT, top + 22, where, 10, "end", GREY))
        top = draw(canvas, line, top, (line.changes and dark_ms) or {}) + 30
    return canvas.svg(max(top, 40.0))


def draw(canvas: Canvas, line: TimeLine, top: float, dark_ms: Mapping[str, float]) -> float:
    """Draws one handover from there on downwards; says where it ends."""
    firsts = [0.0, *(one.last for one in (line.up, line.down) if one.last is not None)]
    length = line.end - min(firsts)
    pad = max(1.0, MARGIN * length)
    axis = Axis(min(firsts) - pad, line.end + pad)
    canvas.texts.append(Text(12, top + 22, line.name, 15, bold=True))
    y = _legend(canvas, line, top + 42, dark=any(dark_ms.values()))
    y += 14 * len(line.changes)
    frame = y + 18
    y = _flow(canvas, axis, frame + 4, "up: MN to server", line.up, dark_ms.get("up", 0.0))
    y = _flow(canvas, axis, y, "down: server to MN", line.down, dark_ms.get("down", 0.0)) + 6
    bottom = _lanes(canvas, axis, line, y)
    for tick in axis.ticks():
        x = axis.x(tick)
        canvas.line((x, frame), (x, bottom), "#d5d8e0", width=1, grid=True)
        label = f"{tick:g} ms" if tick == axis.ticks()[-1] else f"{tick:g}"
        canvas.texts.append(Text(x, frame - 4, label, 10, "middle", GREY))
        canvas.texts.append(Text(x, bottom + 13, label, 10, "middle", GREY))
    for number, change in enumerate(line.changes):
        x, height = axis.x(change.begin), frame - 18 - 14 * (len(line.changes) - 1 - number)
        canvas.line((x, height - 10), (x, bottom), CHANGE, width=1.5, dash="5 3", grid=True)
        side = "end" if x > WIDTH / 2 else "start"
        canvas.texts.append(Text(x + (-5 if side == "end" else 5), height, change.what, 11, side, CHANGE))
    return bottom + 18


def _legend(canvas: Canvas, line: TimeLine, y: float, *, dark: bool) -> float:
    """What the colours mean; the bottom of it."""
    x = 12.0
    step, _ = COLOURS["mn"]
    for fill, words in (
        (step, "step, ms"),
        (_mixed(step), "part of it"),
        (GREY, "call of charon or kernel"),
    ):
        canvas.box(x, y - 8, 14, 9, fill)
        canvas.texts.append(Text(x + 18, y, words, 10))
        x += 34 + wide(words, 10)
    for over in dict.fromkeys(arrow.over for arrow in line.arrows):
        canvas.line((x, y - 4), (x + 18, y - 4), MESSAGES[over], width=1.5, head=True)
        canvas.texts.append(Text(x + 22, y, NAMES[over], 10, colour=MESSAGES[over]))
        x += 38 + wide(NAMES[over], 10)
    canvas.box(x, y - 9, 14, 11, GAP)
    canvas.texts.append(Text(x + 18, y, "no packet arrived", 10))
    x += 34 + wide("no packet arrived", 10)
    if dark:
        canvas.box(x, y - 9, 14, 11, DARK)
        canvas.texts.append(Text(x + 18, y, "link dark", 10))
        x += 34 + wide("link dark", 10)
    canvas.line((x, y - 9), (x, y), ARRIVAL, width=1.2)
    canvas.line((x + 52, y - 9), (x + 52, y), LOST)
    canvas.texts += [Text(x + 5, y, "arrived", 10), Text(x + 57, y, "sent and lost", 10)]
    return y + 12


def _flow(canvas: Canvas, axis: Axis, y: float, name: str, flow: ProbeFlow, dark: float) -> float:
    """One direction of the traffic; the bottom of its track. `dark`: ms that are the link's own."""
    canvas.texts.append(Text(LEFT - 8, y + 12, name.partition(":")[0], 10, "end", GREY))
    canvas.line((LEFT, y + 16), (WIDTH - RIGHT, y + 16), "#ccd")
    if flow.last is not None and flow.first is not None and flow.gap is not None:
        left, right = axis.x(flow.last), axis.x(flow.first)
        tip = f"last {flow.last:.1f} ms, first {flow.first:.1f} ms"
        canvas.box(left, y + 1, right - left, 15, GAP, tip=tip)
        words = f"{flow.gap:.1f} ms without a packet from {name.split(': ')[1]}"
        if dark:
            canvas.box(left, y + 1, min(axis.x(flow.last + dark), right) - left, 15, DARK)
            words += f", {dark:.1f} of them the link's own"
        if wide(words, 10) > right - left:
            words = f"{flow.gap:.1f} ms"
        canvas.texts.append(Text((left + right) / 2, y + 12, words, 10, "middle", "#8c1d18"))
    for ms in flow.arrived:
        if axis.begin <= ms <= axis.end:
            canvas.line(
                (axis.x(ms), y + 5), (axis.x(ms), y + 16), ARRIVAL, width=1.2, tip=f"arrived {ms:.1f}"
            )
    for ms in flow.lost:
        if axis.begin <= ms <= axis.end:
            canvas.line((axis.x(ms), y + 13), (axis.x(ms), y + 19), LOST, tip=f"sent {ms:.1f}, lost")
    return y + 21


# --- lanes -------------------------------------------------------------------------------------------------


def _mixed(colour: str) -> str:
    """The colour, half of it white."""
    values = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{(value + 255) // 2:02x}" for value in values)


@dataclass(slots=True)
class _Lane:
    """A host's bars, in rows: pixels from the lane's top, to be moved to where the lane will be."""

    host: str
    bars: list[tuple[float, float, float, float, Span]] = field(default_factory=list)
    """Left, top, width, height."""
    texts: list[Text] = field(default_factory=list)
    height: float = 26.0


def _lane(axis: Axis, host: str, spans: Sequence[Span]) -> _Lane:
    lane, y = _Lane(host), 5.0
    own = [span for span in spans if span.host == host and span.begin <= axis.end]
    for kind, height, size in (("step", ROW, 11), ("part", PART, 9.5), ("call", CALL, 0)):
        rows = Rows()
        for span in own:
            if span.kind != kind:
                continue
            left = axis.x(span.begin)
            width = axis.x(min(span.end, axis.end)) - left
            named = kind == "step" or (kind == "part" and width >= NAMED)
            width = max(1.5, width)
            text = _beside(left, width, _words(span), size) if named else None
            if text is None:
                reach = (left, left + width)
            else:
                reach = (min(left, text.box[0]), max(left + width, text.box[2]))
            row = 0 if kind == "call" or not named else rows.place(*reach)
            at = y + row * height
            lane.bars.append((left, at, width, height - 3, span))
            if text is not None:
                lane.texts.append(
                    replace(
                        text, y=at + height - 7, colour="#fff" if kind == "step" and not text.halo else "#222"
                    )
                )
        if any(span.kind == kind for span in own):
            y += height * max(1, len(rows.taken)) + 1
    lane.height = max(lane.height, y + 3)
    return lane


def _words(span: Span) -> str:
    ms = span.end - span.begin
    took = "<0.1" if ms < 0.05 else f"{ms:.1f}" if ms < 99.95 else f"{ms:.0f}"
    return f"{span.step} {took}" + (f" ({span.failed})" if span.failed else "")


def _beside(left: float, width: float, words: str, size: float) -> Text:
    """Words in a bar that is wide enough, else behind it, at the right edge before it."""
    needed = wide(words, size)
    if needed + 8 <= width:
        return Text(left + 4, 0, words, size, halo=False)
    if left + width + 4 + needed > WIDTH - 2:
        return Text(left - 4, 0, words, size, "end")
    return Text(left + width + 4, 0, words, size)


def _lanes(canvas: Canvas, axis: Axis, line: TimeLine, y: float) -> float:
    """Lanes and what goes between them; the bottom of the last lane."""
    lanes = [_lane(axis, host, line.spans) for host in HOSTS]
    arrows = [arrow for arrow in line.arrows if arrow.source in HOSTS and arrow.sent <= axis.end]
    tries = [_Between(axis, lanes, y, arrows, rows) for rows in ROWS]
    # one that has each name beside all arrows, else beside all names
    clear = [one for one in tries if one.clear]
    between = [*clear, *(one for one in tries if one.free), tries[-1]][0]
    between.draw(canvas)
    for lane, top in zip(lanes, between.tops, strict=True):
        dark, light = COLOURS[lane.host]
        canvas.box(LEFT - 4, top, WIDTH - LEFT - RIGHT + 8, lane.height, light, ground=True)
        canvas.texts.append(Text(LEFT - 12, top + 18, TITLES[lane.host], 13, "end", dark, bold=True))
        for left, at, width, height, span in lane.bars:
            fill = {"step": dark, "part": _mixed(dark)}.get(span.kind, GREY)
            tip = f"{span.step} {span.begin:.3f} to {span.end:.3f} ms {span.failed}"
            canvas.box(left, top + at, width, height, fill, tip=tip, edge=LOST if span.failed else "")
        canvas.texts += [replace(text, y=top + text.y) for text in lane.texts]
    return between.bottom


@dataclass(frozen=True, slots=True)
class _Path:
    """Where an arrow is drawn: from `x`, `y` at one lane's edge to `to_x`, `to_y` at another's."""

    x: float
    y: float
    to_x: float
    to_y: float
    arrow: Arrow
    count: int

    @property
    def words(self) -> str:
        times = f", {self.count} times" if self.count > 1 else ""
        return self.arrow.message + times + (" (lost)" if self.arrow.received is None else "")

    def at(self, y: float) -> float | None:
        """Its x at that height, None above and below it."""
        upper, lower = sorted((self.y, self.to_y))
        if not upper <= y <= lower or upper == lower:
            return None
        return self.x + (y - self.y) / (self.to_y - self.y) * (self.to_x - self.x)


class _Between:
    """The arrows between lanes, and places for their names: so many rows of them in each space."""

    def __init__(
        self, axis: Axis, lanes: Sequence[_Lane], top: float, arrows: Sequence[Arrow], rows: int
    ) -> None:
        self.tops: list[float] = []
        """Where the lanes begin."""
        self.bottom = top
        """Where the last lane ends."""
        for lane in lanes:
            self.tops.append(top)
            self.bottom = top + lane.height
            top = self.bottom + rows * LABEL + 14
        self._edges = [(upper, upper + lane.height) for lane, upper in zip(lanes, self.tops, strict=True)]
        self._spaces = [(one[1], two[0]) for one, two in itertools.pairwise(self._edges)]
        self._paths = [self._path(axis, arrow, count) for arrow, count in _grouped(arrows)]
        self._texts: list[Text] = []
        self.free = self.clear = True
        """Has each name a place of its own, and one that no arrow goes through?"""
        for path in self._paths:
            places = self._places(path)
            free = [text for text in places if self._is_free(text)]
            clear = [text for text in free if not self._crossed(text)]
            self.free &= bool(free)
            self.clear &= bool(clear)
            self._texts.append([*clear, *free, *places][0])

    def _path(self, axis: Axis, arrow: Arrow, count: int) -> _Path:
        """What is lost comes half the way."""
        here = HOSTS.index(arrow.source)
        there = HOSTS.index(arrow.target) if arrow.target in HOSTS else (1 if here != 1 else 0)
        down = there > here
        x, y = axis.x(arrow.sent), self._edges[here][1 if down else 0]
        if arrow.received is None:
            return _Path(x, y, x + 6, sum(self._spaces[here if down else here - 1]) / 2, arrow, count)
        return _Path(x, y, axis.x(arrow.received), self._edges[there][0 if down else 1], arrow, count)

    def _places(self, path: _Path) -> list[Text]:
        """Where its name may stand, beside the arrow: the nearer to its beginning, the better."""
        colour, places = MESSAGES[path.arrow.over], []
        for top, bottom in self._spaces:
            for row in range(int((bottom - top - 8) // LABEL)):
                middle = top + 10 + LABEL * row
                # beside all of the arrow that is as high as the words
                found = [x for y in (middle - 5, middle, middle + 5) if (x := path.at(y)) is not None]
                if found and path.at(middle) is not None:
                    places.append(Text(max(found) + 5, middle + 4, path.words, 10, "start", colour))
                    places.append(Text(min(found) - 5, middle + 4, path.words, 10, "end", colour))
        if not places:  # shorter than a row
            places = [Text(path.x + 6, (path.y + path.to_y) / 2 + 4, path.words, 10, "start", colour)]
        return sorted(places, key=lambda text: abs(text.y - path.y))

    def _is_free(self, text: Text) -> bool:
        left, top, right, bottom = text.box
        if left < LEFT or right > WIDTH - 2:
            return False
        boxes = (one.box for one in self._texts)
        return all(right + 4 <= a or c + 4 <= left or bottom <= b or d <= top for a, b, c, d in boxes)

    def _crossed(self, text: Text) -> bool:
        """Does an arrow go through it? Its own passes beside it, unless it is flat."""
        left, top, right, bottom = text.box
        for path in self._paths:
            found = [x for y in (top, (top + bottom) / 2, bottom) if (x := path.at(y)) is not None]
            if found and min(found) <= right and max(found) >= left:
                return True
        return False

    def draw(self, canvas: Canvas) -> None:
        for path in self._paths:
            arrow, colour = path.arrow, MESSAGES[path.arrow.over]
            came = "lost" if arrow.received is None else f"received {arrow.received:.3f} ms"
            tip = f"{arrow.message} ({arrow.over}), {arrow.octets} octets: sent {arrow.sent:.3f}, {came}"
            x, y = path.to_x, path.to_y
            canvas.line((path.x, path.y), (x, y), colour, width=1.4, head=arrow.received is not None, tip=tip)
            if arrow.received is None:
                canvas.line((x - 3, y - 3), (x + 3, y + 3), LOST, width=1.6)
                canvas.line((x - 3, y + 3), (x + 3, y - 3), LOST, width=1.6)
        canvas.texts += self._texts


def _grouped(arrows: Iterable[Arrow]) -> list[tuple[Arrow, int]]:
    """Messages lost at one moment count as one, many times: charon asks at all addresses at once."""

    def key(arrow: Arrow) -> tuple[object, ...]:
        if arrow.received is not None:
            return (id(arrow),)
        return arrow.source, arrow.message, round(arrow.sent)

    found = [list(group) for _, group in itertools.groupby(arrows, key=key)]
    return [(group[0], len(group)) for group in found]
