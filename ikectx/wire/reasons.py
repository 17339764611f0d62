"""Why a context was refused, in words: from the new gateway's verdicts to the blocks of a CTDR and back. No
I/O.

A status is one octet of a fixed list. The reason is sent beside it in words, so that the operator of the old
gateway need not read the new gateway's log. A block of FPT REASON has u16 the FPT that was refused, u16
length, UTF-8 text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ikectx.errors import WireError
from ikectx.escape import escaped
from ikectx.numbers import Fpt, Status
from ikectx.sa.verdict import Verdict

from .cxtp import ContextDataBlock
from .reader import Reader, Writer

REASONS = 5
"""Reasons that are sent; of further ones only the number is, so that a refused peer does not fill a log."""
REASON_OCTETS = 1000
"""Octets of text in one block; the rest is cut off."""


def refusals(verdicts: Iterable[Verdict]) -> str:
    """The words of the verdicts that refuse, as one text."""
    return _joined([verdict.detail for verdict in verdicts if verdict.status is not Status.OK])


def _joined(said: Sequence[str]) -> str:
    more = f"; and {len(said) - REASONS} more" if len(said) > REASONS else ""
    return "; ".join(said[:REASONS]) + more


def encode_reasons(verdicts: Iterable[Verdict]) -> tuple[ContextDataBlock, ...]:
    """One block for each FPT that is refused with words."""
    words: dict[Fpt, list[str]] = {}
    for verdict in verdicts:
        if verdict.status is not Status.OK and verdict.detail:
            words.setdefault(verdict.fpt, []).append(verdict.detail)
    return tuple(_block(fpt, _joined(said)) for fpt, said in words.items())


def _block(fpt: Fpt, text: str) -> ContextDataBlock:
    octets = text.encode(errors="replace")[:REASON_OCTETS].decode(errors="ignore").encode()
    return ContextDataBlock(Fpt.REASON, Writer().u16(fpt).u16(len(octets)).octets(octets).done())


def with_reasons(verdicts: Iterable[Verdict], blocks: Iterable[ContextDataBlock]) -> tuple[Verdict, ...]:
    """The verdicts of a CTDR's statuses with the other gateway's words, if it sent any, escaped."""
    words = dict(_reasons(blocks))
    return tuple(
        replace(verdict, detail=words.get(verdict.fpt) or verdict.detail) if verdict.status else verdict
        for verdict in verdicts
    )


def _reasons(blocks: Iterable[ContextDataBlock]) -> Iterator[tuple[Fpt, str]]:
    """Unreadable words are passed over, because a refusal without words is a refusal, too."""
    for block in blocks:
        reader = Reader(block.data, "reason")
        with contextlib.suppress(WireError):
            if block.fpt == Fpt.REASON:
                fpt = Fpt(reader.u16())
                yield fpt, escaped(reader.octets(reader.u16()).decode(errors="replace"))
