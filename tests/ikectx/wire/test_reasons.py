"""The words of a refusal on their way to the other gateway's operator."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from ikectx.engine.offer_answer import offer_status, refusal_text
from ikectx.numbers import Fpt, Status
from ikectx.sa.verdict import Verdict
from ikectx.wire.cxtp import Ctdr
from ikectx.wire.profile import encode_verdicts
from ikectx.wire.reasons import REASON_OCTETS, REASONS, encode_reasons, refusals, with_reasons

MN = ip_address("192.0.2.7")
ID = Verdict(Fpt.PAD, Status.NOT_ALLOWED, "the mobile node's identity is root.evil")
TS = Verdict(Fpt.SPD, Status.NOT_ALLOWED, "net: 10.3.0.10 is not in its remote_ts here")


def answered(*verdicts: Verdict) -> tuple[Verdict, ...]:
    """As the source reads what the target says of them."""
    sent = Ctdr(MN, encode_verdicts(verdicts), blocks=encode_reasons(verdicts)).serialize()
    _, said = offer_status(Ctdr.parse(sent))
    return said


def test_both_ends_have_the_same_words() -> None:
    said = {verdict.fpt: verdict for verdict in answered(ID, TS)}
    assert (said[Fpt.PAD], said[Fpt.SPD]) == (ID, TS)
    assert said[Fpt.SAD].status is Status.OK and said[Fpt.SAD].detail == ""
    text = refusal_text(Status.NOT_ALLOWED, answered(ID))
    assert text == "the configuration there does not allow it: the mobile node's identity is root.evil"


def test_a_gateway_that_says_no_words() -> None:
    (verdict,) = (each for each in answered(replace(ID, detail="")) if each.status is not Status.OK)
    assert verdict.detail == "the configuration there does not allow it"
    assert refusal_text(Status.NOT_ALLOWED, [verdict]) == verdict.detail


def test_one_that_knows_no_words_reads_the_same_statuses_first() -> None:
    with_words = Ctdr(MN, encode_verdicts([ID]), blocks=encode_reasons([ID])).serialize()
    without = Ctdr(MN, encode_verdicts([ID])).serialize()
    assert with_words[4:].startswith(without[4:]) and len(with_words) % 4 == 0


def test_words_steer_nothing_here() -> None:
    (verdict,) = with_reasons([replace(ID, detail="")], encode_reasons([replace(ID, detail="a\n\x1b[31m")]))
    assert verdict.detail == "a\\x0a\\x1b[31m"


def test_many_reasons_are_told_as_a_few_and_a_number() -> None:
    many = [replace(TS, detail=f"reason {n}") for n in range(64)]
    assert refusals(many) == "reason 0; reason 1; reason 2; reason 3; reason 4; and 59 more"
    assert len(answered(*many)[2].detail) < 100 and REASONS == 5


def test_long_words_are_cut_between_characters() -> None:
    (block,) = encode_reasons([replace(TS, detail="ü" * REASON_OCTETS)])
    (verdict,) = with_reasons([TS], [block])
    assert verdict.detail == "ü" * (REASON_OCTETS // 2)
