"""`Looks`: charon's state at the time when SAs come in, asked once for many of them. I/O.

An SA may come in only if no SA here has its names, addresses or networks. With a thousand SAs charon takes a
tenth of a second to answer, and the answer as long to parse. Names are compared and taken by one SA after the
other, because two may want the same. So an SA that waits for its turn asks before it, those that ask at the
same time share the answer (`Listing`), and SAs that came in between that answer and the turn are added to it.
What the check of an SA has found is not asked again by its `prepare`, which follows in a push at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ikectx import trace
from ikectx.numbers import Fpt, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.name import SaName
from ikectx.sa.verdict import Verdict
from vici_bridge.host import MOMENT, CharonHost
from vici_bridge.host_config import HostConfig
from vici_bridge.policy.admission import admit
from vici_bridge.policy.checks import (
    check_address,
    check_covered,
    check_ike_algorithms,
    check_names,
    check_numbers,
    check_selectors,
    check_sizes,
    check_vips,
)
from vici_bridge.vici.codec import Message
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
        self._checked: dict[SaName, tuple[Seen, asyncio.TimerHandle]] = {}
        """Looks of SAs that were just checked, each counted as open."""

    @contextlib.asynccontextmanager
    async def look(self, prepared: SaName | None = None) -> AsyncIterator[Seen]:
        """charon's state. Until the end of this context `now` adds the SAs that came in since.

        `prepared`: an SA for which an answer of the last `MOMENT` that was kept for it will do. Errors:
        CharonError, WireError.
        """
        host, came = self._host, len(self._came)
        self._open += 1
        try:
            kept = self._checked.get(prepared) if prepared is not None else None
            if kept is not None and prepared is not None:
                seen = kept[0]
                self._drop(prepared)
            else:
                with trace.span("look", "part"):
                    seen = Seen(
                        await host.version(),
                        tuple(await host.views()),
                        await host.connections(),
                        await host.vici.pools(),
                        await host.vici.algorithms(),
                        came,
                        host.listening(),
                    )
            yield seen
        finally:
            self._close()

    def keep(self, sa: SaName, seen: Seen) -> None:
        """Keep this look, which is open, for the `look` by which that SA is prepared."""
        self._drop(sa)
        self._open += 1
        self._checked[sa] = seen, asyncio.get_running_loop().call_later(MOMENT, self._drop, sa)

    def _drop(self, sa: SaName) -> None:
        kept = self._checked.pop(sa, None)
        if kept is not None:
            kept[1].cancel()
            self._close()

    def _close(self) -> None:
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
    verdicts += check_sizes(here, seen.version, config.ha_buflen)
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
