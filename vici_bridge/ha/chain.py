"""Builds the HA messages that install an IKE_SA and the rekeyed SAs that it came from. Pure.

charon finds an IKE_SA by version, SPIs and role. Ancestors are installed under the IKE version `HIDDEN`,
which never appears on the wire, so they cannot collide with another SA: their SPIs may belong to another
mobile node's SA by now, or the SA itself may have other SPIs here. Their keys are right all the same, because
they are derived from the SPIs alone. Children made under an ancestor get their right keys, and the next
IKE_ADD adopts them (IKE_REKEY_ID). An ancestor exists only while one burst of messages is processed.

`reshape` takes an SA that charon has already through its generations once more, to add children of any of
them or to give it other SPIs. Its other children are handed on and never leave the kernel.
"""

from __future__ import annotations

from dataclasses import replace

from ikectx.errors import CharonError
from ikectx.numbers import STATUS_TEXT, Status
from ikectx.sa.context import ChildContext, IkeContext

from .ike_id import IkeId
from .messages import Attr, HaMessage, child_add, child_delete, ike_add, ike_delete, ike_update
from .record import mid_messages, uncovered


def import_messages(context: IkeContext, version: int) -> list[HaMessage]:
    """The messages that make charon take the IKE_SA as PASSIVE. `context.local` is this gateway's address.

    Errors: CharonError with the status of `record.uncovered`.
    """
    reason = uncovered(context, version)
    if reason is not Status.OK:
        raise CharonError(STATUS_TEXT[reason], status=reason)
    return _walk(context, version, 0, None, context.children)


def undo_messages(context: IkeContext, version: int) -> list[HaMessage]:
    """The messages that undo `import_messages`, wherever it stopped: ancestors may still exist on their
    own."""
    *ancestors, last = (IkeId.of(generation) for generation in context.generations)
    return [ike_delete(version, last), *(ike_delete(version, ike.hidden()) for ike in reversed(ancestors))]


def reshape(
    before: IkeContext, after: IkeContext, version: int, *, stopped: int | None = None
) -> list[HaMessage]:
    """The messages that turn the SA that charon has as `before` into `after`: missing children, other SPIs.

    Children that `after` lacks stay: see `leftovers`. After a change of its SPIs the SA is PASSIVE, and its
    message IDs are those of `after`. `stopped`: an earlier burst ended in the middle, and the SA has the
    hidden name of that generation of `after`.
    """
    # 1. Find the children that charon lacks; each must be added under the generation that its keys stem from.
    have = {(child.spi_in, child.spi_out) for child in before.children}
    adds = tuple(child for child in after.children if (child.spi_in, child.spi_out) not in have)
    last = len(after.generations) - 1
    # 2. After a burst that stopped, the SA has the hidden name of a generation. Go on from that one:
    if stopped is not None:
        there = IkeId.of(after.generations[stopped]).hidden()
        first = min((child.generation for child in adds), default=stopped + 1)
        #    begin again at another generation if the first child to add needs that,
        if first != stopped:
            return _walk(after, version, first, there, adds)
        #    else add the children of this generation where it is, and take the SA on to the later ones.
        direct = [child_add(version, there, child) for child in adds if child.generation == stopped]
        later = tuple(child for child in adds if child.generation != stopped)
        return direct + _walk(after, version, stopped + 1, there, later)
    # 3. If the SPIs stay and all children are of the last generation, they are added to the SA as it is.
    same = before.current == after.current
    if same and all(child.generation == last for child in adds):
        ike = IkeId.of(after.current)
        return [child_add(version, ike, child) for child in adds]
    # 4. Else take the SA through its generations, from the first that gets a child, or only to its new SPIs.
    first = min((child.generation for child in adds), default=last)
    return _walk(after, version, first, IkeId.of(before.current), adds)


def leftovers(before: IkeContext, after: IkeContext, version: int) -> list[HaMessage]:
    """The messages that delete, after `reshape`, the children that only `before` had."""
    keep = {(child.spi_in, child.spi_out) for child in after.children}
    ike = IkeId.of(after.current)
    return [
        child_delete(version, ike, child.spi_in)
        for child in before.children
        if (child.spi_in, child.spi_out) not in keep
    ]


def _walk(
    context: IkeContext, version: int, first: int, begins: IkeId | None, adds: tuple[ChildContext, ...]
) -> list[HaMessage]:
    out: list[HaMessage] = []
    end = len(context.generations) - 1
    before = begins
    for index, generation in list(enumerate(context.generations))[first:]:
        last = index == end
        ike = IkeId.of(generation) if last else IkeId.of(generation).hidden()
        out.append(_named(ike_add(version, generation, context.remote, replaces=before), ike))
        out += [_update(context, version, ike, last=last)]
        if last:
            out += _settled(context, version)
        out += [child_add(version, ike, child) for child in adds if child.generation == index]
        before = ike
    return out


def settle(context: IkeContext, version: int) -> list[HaMessage]:
    """The messages after the last IKE_ADD, for an SA whose burst ended there. They change nothing if it did
    not."""
    return [_update(context, version, IkeId.of(context.current), last=True), *_settled(context, version)]


def _update(context: IkeContext, version: int, ike: IkeId, *, last: bool) -> HaMessage:
    return ike_update(
        version,
        ike,
        local_id=context.local_id,
        remote_id=context.remote_id,
        remote_eap_id=context.remote_eap_id if last else None,
        local=context.local,
        remote=context.remote,
        conditions=(context.conditions, context.private_conditions),
        extensions=(context.extensions, context.private_extensions),
        name=context.connection,
        peer_addresses=context.peer_addresses if last else (),
    )


def _settled(context: IkeContext, version: int) -> list[HaMessage]:
    ike = IkeId.of(context.current)
    vips = [ike_update(version, ike, remote_vips=context.remote_vips)] if context.remote_vips else []
    return vips + mid_messages(context, version)


def _named(message: HaMessage, ike: IkeId) -> HaMessage:
    """The message for another name of its IKE_SA."""
    attributes = tuple((attr, ike if attr is Attr.IKE_ID else value) for attr, value in message.attributes)
    return replace(message, attributes=attributes)
