"""The proposals of a rekey, and checks that an answer matches them.

Source: RFC 7296 (2.7 and 3.3 for proposals, 2.9 for selectors). Errors: `WireError` for an unusable answer.
"""

from __future__ import annotations

from dataclasses import replace

from ikectx.errors import WireError
from ikectx.numbers import Integ, KeMethod, Payload, Protocol
from ikectx.sa.context import ChildContext, IkeGeneration, TrafficSelector
from ikectx.wire.ikev2 import IkeMessage
from ikectx.wire.payloads import Proposal, RawSelector, SaPayload, Transform, TransformType, TsPayload

from .notify import usable_spi


def child_offer(child: ChildContext, ke: KeMethod, spi: bytes) -> Proposal:
    """The algorithms of `child` and nothing else; `spi`: on which the offering side will receive."""
    transforms: list[Transform] = []
    if child.protocol is Protocol.ESP:
        transforms.append(Transform.encr(child.encr, child.encr_bits))
    if child.integ is not Integ.NONE:
        transforms.append(Transform(TransformType.INTEG, child.integ))
    if ke is not KeMethod.NONE:
        transforms.append(Transform(TransformType.KE, ke))
    transforms.append(Transform(TransformType.ESN, int(child.esn)))
    return Proposal(1, child.protocol, tuple(transforms), spi)


def ike_offer(generation: IkeGeneration, ke: KeMethod, spi: bytes) -> Proposal:
    """The algorithms of the IKE_SA and nothing else."""
    transforms = [Transform.encr(generation.encr, generation.encr_bits)]
    if generation.integ is not Integ.NONE:
        transforms.append(Transform(TransformType.INTEG, generation.integ))
    transforms += [Transform(TransformType.PRF, generation.prf), Transform(TransformType.KE, ke)]
    return Proposal(1, Protocol.IKE, tuple(transforms), spi)


def chosen_of(message: IkeMessage, offered: Proposal) -> Proposal:
    """The one proposal of an answer, which must be `offered` but for its SPI."""
    found = [p for p in message.payloads if isinstance(p, SaPayload)]
    if len(found) != 1 or len(found[0].proposals) != 1:
        raise WireError("the answer has not one proposal")
    (chosen,) = found[0].proposals
    if chosen.protocol != offered.protocol or _kinds(chosen) != _kinds(offered):
        raise WireError("the answer's proposal was not offered")
    if not usable_spi(offered.protocol, chosen.spi):
        raise WireError("the answer's SPI cannot be one")
    return chosen


def _kinds(proposal: Proposal) -> list[tuple[int, int, int]]:
    """Its transforms, sorted; "no key exchange" may be present or not."""
    found = [(one.type, one.id, one.key_bits) for one in proposal.transforms]
    return sorted(one for one in found if one[:2] != (TransformType.KE, KeMethod.NONE))


def narrowed(
    message: IkeMessage, kind: Payload, offered: tuple[TrafficSelector, ...]
) -> tuple[TrafficSelector, ...]:
    """The answer's selectors: those offered, or parts of them (RFC 7296, 2.9)."""
    found = [p.selectors for p in message.payloads if isinstance(p, TsPayload) and p.type == kind]
    if len(found) != 1 or not found[0]:
        raise WireError(f"the answer has no {kind.name}")
    plain = {replace(one, dynamic=False): one for one in offered}
    taken: list[TrafficSelector] = []
    for one in found[0]:
        if isinstance(one, RawSelector) or not any(_within(one, whole) for whole in offered):
            raise WireError(f"{kind.name} of the answer was not offered")
        taken.append(plain.get(one, one))
    return offered if set(taken) == set(offered) else tuple(taken)


def _within(one: TrafficSelector, whole: TrafficSelector) -> bool:
    return (
        one.start.version == whole.start.version
        and int(whole.start) <= int(one.start) <= int(one.end) <= int(whole.end)
        and whole.protocol in (0, one.protocol)
        and whole.start_port <= one.start_port
        and one.end_port <= whole.end_port
    )
