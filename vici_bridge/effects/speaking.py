"""charon speaks for an SA again, with message IDs that it was told.

charon takes orders from a socket of their own, and confirms none. If it heard the mobile node before it has
the message IDs, it would answer a request, and then expect the same ID once more: every later request would
be ignored, for good. What charon lists over VICI does not show that it has them, because the SA may have been
active before. So an empty message follows them, and charon is unmuted when it has read that.
"""

from __future__ import annotations

from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.host import CharonHost


async def tell_ids(host: CharonHost, ike: IkeId, initiator: int | None, responder: int | None = None) -> None:
    """Tell charon the message IDs of its next request and of the next one that it expects. None or 0: it
    keeps its own. Errors: CharonError."""
    version, numbers = await host.version(), ((True, initiator), (False, responder))
    messages = [ha.ike_mid(version, ike, initiator=ours, mid=mid) for ours, mid in numbers if mid]
    await host.send([*messages, ha.nothing(version)])
    for message in messages:
        host.record.feed(message)


async def speak(host: CharonHost, sa: SaName) -> None:
    """Unmute the SA, once charon has carried out what it was told until now. Errors: CharonError."""
    await host.carried_out()
    host.mute.unmute(sa)
    # an agent that was killed at the freeze may have left it mute before the store knew why
    host.orphans.known.discard(sa)
