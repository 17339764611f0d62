"""`Looks`: charon's state at the time when SAs come in, asked once for many of them. I/O.

An SA may come in only if no SA here has its names, addresses or networks. With a thousand SAs charon takes a
tenth of a second to answer, and the answer as long to parse. Names are compared and taken by one SA after the
other, because two may want the same. So an SA that waits for its turn asks before it, those that ask at the
same time share the answer (`Listing`), and SAs that came in between that answer and the turn are added to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ikectx import trace
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.verdict import Verdict
from vici_bridge.host import CharonHost, HostConfig
from vici_bridge.policy.admission import admit
from vici_bridge.policy.checks import (
    check_address,
    check_covered,
    check_ike_algorithms,
    check_names,
    check_numbers,
    check_selectors,
    check_vips,
)
from vici_bridge.vici.client import Message
from vici_bridge.vici.views import SaView


@dataclass(frozen=True, slots=True)
class Seen:
    """charon's answers. `version`: its HA wire version. `came`: how many SAs had come in when it was asked.

    `listening`: whether its end of the HA link exists.
    """

    version: int
    views: tuple[SaView, ...]
    connections: Mapping[str, Message]
    pools: Mapping[str, Message]
    algorithms: Mapping[str, Mapping[str, str]]
    came: int
    listening: bool = True


class Looks:
    """The looks of one gateway, and the SAs that came in during them."""

    def __init__(self, host: CharonHost) -> None:
        self._host = host
        self._came: list[SaView] = []
        self._open = 0

    @contextlib.asynccontextmanager
    async def look(self) -> AsyncIterator[Seen]:
        """charon's state. Until the end of this context `now` adds the SAs that came in since.

        Errors: CharonError, WireError.
        """
        host, came = self._host, len(self._came)
        self._open += 1
        try:
            with trace.span("look", "part"):
                seen = Seen(
                    await host.version(),
                    tuple(await host.views()),
                    await host.connections(),
                    await host.ask(host.vici.get_pools, True),
                    await host.ask(host.vici.algorithms),
                    came,
                    host.listening(),
                )
            yield seen
        finally:
            self._open -= 1
            if not self._open:
                self._came.clear()

    def came(self, view: SaView) -> None:
        """This SA came in, or has other names than before; earlier looks do not have that."""
        if self._open:
            self._came.append(view)

    def now(self, seen: Seen) -> Seen:
        """charon's present state, as far as this agent has changed it since."""
        new = self._came[seen.came :]
        return replace(seen, views=(*seen.views, *new)) if new else seen


def objections(
    context: IkeContext,
    here: IkeContext,
    seen: Seen,
    config: HostConfig,
    spis: Sequence[Verdict],
    *,
    keep_address: bool,
) -> list[Verdict]:
    """All reasons against an SA from charon's state. `here`: the SA as it would be here.

    `spis`: the reasons against its SPIs.
    """
    verdicts = [*check_covered(here, seen.version), *check_address(here, context, keep_address)]
    if not seen.listening:
        verdicts.append(Verdict(Fpt.IKEV2_SA, Status.CHARON, "charon does not listen on its HA address"))
    verdicts += check_names(here, seen.connections)
    verdicts += admit(here, seen.connections, seen.pools, config)
    verdicts += spis
    verdicts += check_numbers(here, config.oseq_jump)
    verdicts += check_vips(here, seen.views, seen.pools)
    verdicts += check_selectors(here, seen.views)
    verdicts += check_ike_algorithms(here, seen.algorithms)
    return verdicts
