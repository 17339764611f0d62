"""Tells the gateways that SAs came from where these are now, and receives the same from others (I/O).

A notice is in the store until the other gateway has acknowledged it, and is repeated until then: at once,
then after ever longer waits. Of several notices about one SA only the last is sent, because it makes the
others obsolete. See `whereabouts` for the format.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

from .cxtp import ContextDataBlock, Ctd
from .errors import IkectxError, LinkError, WireError
from .incoming import answer, refusal
from .links import Answer, Link, Links, PeerConfig
from .numbers import Fpt, Status
from .outgoing import offer_status
from .run import Parts, Tasks, log
from .whereabouts import NOBODY, What, Whereabouts, notice, parse_notice

_KIND = "notice"
"""Kind of store entry, by peer and SA: the notice for that peer, as in the block."""

Hear = Callable[[str, Whereabouts], None]
"""Takes a notice of the peer of that name. Errors: IkectxError if the peer should repeat it."""


class Notices:
    """All notices of one gateway. `hear`: takes those of other gateways; None: they are ignored."""

    def __init__(
        self,
        parts: Parts,
        peers: Mapping[str, PeerConfig],
        links: Callable[[], Links | None],
        tasks: Tasks,
        hear: Hear | None,
    ) -> None:
        self._parts = parts
        self._peers = peers
        self._links = links
        self._tasks = tasks
        self._hear = hear
        self._telling: set[str] = set()
        self._again: dict[str, asyncio.Event] = {}

    def tell(self, peer: str, news: Whereabouts) -> None:
        """Tell that peer, now and until it has acknowledged it, over restarts too. Errors: StoreError."""
        if peer not in self._peers:
            log.info("%s is no peer any more, so it gets no notice about its SA", peer)
            return
        self._parts.store.put(_KIND, _key(peer, news), news.serialize())
        self._start(peer)

    def start(self) -> None:
        """Go on sending the notices in the store."""
        for peer in {_peer_of(key) for key, _ in self._parts.store.items(_KIND)}:
            self._start(peer)

    def connected(self, peer: str) -> None:
        """There is a link to that peer: notices that wait for it are sent at once."""
        if peer in self._again:
            self._again[peer].set()

    def waiting(self, peer: str) -> list[Whereabouts]:
        """The notices that this peer has not acknowledged yet."""
        found = []
        for key, raw in self._parts.store.items(_KIND):
            if _peer_of(key) == peer:
                try:
                    found.append(_read(raw))
                except WireError as error:
                    log.error("a notice for %s cannot be read and is forgotten: %s", peer, error)
                    self._parts.store.delete(_KIND, key)
        return found

    def _start(self, peer: str) -> None:
        known = self._peers.get(peer)
        if known is None or peer in self._telling or self._links() is None:
            return
        self._telling.add(peer)
        self._tasks.spawn(self._tell_all(known), f"ikectx notices for {peer}")

    async def _tell_all(self, peer: PeerConfig) -> None:
        tries = 0
        self._again[peer.name] = asyncio.Event()
        try:
            while (links := self._links()) is not None and (news := self.waiting(peer.name)):
                message, told = notice(news)
                try:
                    with links.in_use(peer):
                        heard = await self._ask(links, peer, message)
                except LinkError as error:
                    level = logging.INFO if tries else logging.WARNING  # once is enough for an operator
                    log.log(level, "%s is not told yet where SAs of its are: %s", peer.name, error)
                    await self._pause(peer.name, tries)
                    tries += 1
                    continue
                tries = 0
                if not heard:
                    log.warning(
                        "%s knows no WHEREABOUTS: it may go on sending packets here for SAs that ended",
                        peer.name,
                    )
                self._forget(peer.name, told)
        finally:
            self._telling.discard(peer.name)
            del self._again[peer.name]

    async def _ask(self, links: Links, peer: PeerConfig, message: Ctd) -> bool:
        """Send one notice. True: it was acknowledged; False: the peer will never do that. Errors: LinkError:
        try again later."""
        link = await links.get(peer)
        asked: asyncio.Future[Answer] | None = None
        while True:
            _, asked = await link.ask(message, asked)
            try:
                async with asyncio.timeout(self._parts.timing.offer):
                    said = await asyncio.shield(asked)
                break
            except TimeoutError:
                log.info("%s has not answered a notice, it is sent again", peer.name)
        if isinstance(said, LinkError):
            raise said
        status, _ = offer_status(said)
        if status in (Status.OK, Status.MALFORMED):
            return said.complete
        raise LinkError(f"{peer.name} could not take it in ({status.name})")

    async def _pause(self, peer: str, tries: int) -> None:
        again = self._again[peer]
        again.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._parts.timing.wait(tries)):
                await again.wait()

    def _forget(self, peer: str, told: list[Whereabouts]) -> None:
        for news in told:
            # a newer notice of the same SA may be waiting
            if self._parts.store.get(_KIND, _key(peer, news)) == news.serialize():
                self._parts.store.delete(_KIND, _key(peer, news))

    # -- those of others ---------------------------------------------------------------------------------

    async def arrived(self, link: Link, message: Ctd) -> None:
        """Take in a peer's notice, and acknowledge it."""
        try:
            for news in parse_notice(message):
                log.info("%s says of the SA %s: %s", link.peer.name, news.sa, _words(news))
                if self._hear is not None:
                    self._hear(link.peer.name, news)
        except WireError as error:
            log.warning("%s sent a notice that does not parse: %s", link.label, error)
            await answer(link, NOBODY, refusal(Status.MALFORMED))
        except IkectxError as error:
            log.error("a notice of %s could not be processed: %s", link.label, error)
            await answer(link, NOBODY, refusal(error.status))
        else:
            await answer(link, NOBODY, ())


def _words(news: Whereabouts) -> str:
    words = {What.HERE: "it is there", What.MOVED: f"it moved to {news.to}", What.ENDED: "it ended"}
    return words.get(news.what, "it was ended there while it left")


def _key(peer: str, news: Whereabouts) -> str:
    return f"{news.sa.key} {peer}"


def _peer_of(key: str) -> str:
    return key.partition(" ")[2]


def _read(raw: bytes) -> Whereabouts:
    found = parse_notice(Ctd(NOBODY, (ContextDataBlock(Fpt.WHEREABOUTS, raw),)))
    if len(found) != 1:
        raise WireError(f"{len(found)} notices in one place")
    return found[0]
