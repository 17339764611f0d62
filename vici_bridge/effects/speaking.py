"""charon speaks for an SA again, with message IDs that it was told.

charon takes orders from a socket of their own, and confirms none. If it heard the mobile node before it has
the message IDs, it would answer a request, and then expect the same ID once more: every later request would
be ignored, for good. What charon lists over VICI does not show that it has them, because the SA may have been
active before. So an empty message follows them, and charon is unmuted when it has read that.

An exchange that was under way goes back into charon's queue when charon is told message IDs (task_manager
`reset`), and begins again only when charon is told to begin something, or its next exchange ends (5.9.8).
"""

from __future__ import annotations

import logging

from ikectx.errors import CharonError, WireError
from ikectx.sa.name import SaName
from vici_bridge.ha import messages as ha
from vici_bridge.ha.ike_id import IkeId
from vici_bridge.host import CharonHost

log = logging.getLogger(__name__)


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


async def go_on_asking(host: CharonHost, sa: SaName) -> None:
    """Have charon begin what waits in its queue, if anything does: by the rekey of a CHILD_SA, because that
    changes nothing else. Raises nothing."""
    try:
        view = await host.view(sa)
        if view is not None and view.waits and view.state == "ESTABLISHED":
            log.info("%s: charon begins what waited: %s", view.name, ", ".join(view.tasks))
            for child in view.children[:1]:
                await host.vici.rekey(child_id=child.unique_id)
    except (CharonError, WireError) as error:
        log.warning("%s: what charon was about to do waits: %s", sa, error)
