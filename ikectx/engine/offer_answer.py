"""The other gateway's answer to an offer (CTDR), as a status and in words. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from ikectx.numbers import STATUS_TEXT, Fpt, Status
from ikectx.sa.context import Address
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Ctdr
from ikectx.wire.profile import decode_verdicts
from ikectx.wire.reasons import with_reasons


def offer_status(answer: Ctdr) -> tuple[Status, tuple[Verdict, ...]]:
    """The status of a CTDR: OK, IN_DOUBT, the first refusal, or MALFORMED if it says both yes and no, or
    nothing."""
    verdicts = with_reasons(decode_verdicts(answer.statuses), answer.blocks)
    if any(verdict.status is Status.IN_DOUBT for verdict in verdicts):
        return Status.IN_DOUBT, verdicts  # with S = 1, so that older gateways take it for neither yes nor no
    failed = next((verdict.status for verdict in verdicts if verdict.status is not Status.OK), None)
    if answer.complete == (failed is None):
        return failed or Status.OK, verdicts
    return Status.MALFORMED, verdicts


def relay_address(answer: Ctdr) -> Address | None:
    """The address to which the old gateway is to pass on what the mobile node sends; None: none that can be
    read."""
    size = len(answer.mn.packed)  # the mobile node has the same IP version
    for block in answer.blocks:
        if block.fpt == Fpt.RELAY and len(block.data) >= size:
            return ip_address(block.data[:size])
    return None


def refusal_text(status: Status, verdicts: Sequence[Verdict]) -> str:
    """A refusal in words: the text of its status, and the other gateway's own text."""
    text = STATUS_TEXT.get(status, f"status {int(status)}")
    words = next((verdict.detail for verdict in verdicts if verdict.status is status), "")
    return text if words in ("", text) else f"{text}: {words}"
