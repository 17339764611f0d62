"""Telling the gateways that SAs came from where these are now, and hearing that of others.

A notice is in the store until the other gateway has acknowledged it, and is repeated until then: at once,
then after ever longer waits. Of several notices about one SA only the last is sent, because it makes the
others obsolete. See `whereabouts` for the format.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ikectx.errors import IkectxError, LinkError, StoreError, WireError
from ikectx.numbers import Fpt, Status
from ikectx.peer import PeerConfig
from ikectx.wire.cxtp import ContextDataBlock, Ctd
from ikectx.wire.whereabouts import NOBODY, What, Whereabouts, notice, parse_notice

from .effects import Delete, Get, Hear, Items, Put
from .journaled import Parts
from .lines import Line, Question, reply_to
from .new_gateway import answer, refusal
from .offer_answer import offer_status
from .procedures import Event, Process, Steps, log

_KIND = "notice"
"""Kind of store entry, by peer and SA: the notice for that peer, as in the block. It is not in the ledger,
because it stays until the peer acknowledges it, whatever becomes of the SA."""


class Notices:
    """All notices of one gateway."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._peers = {peer.name: peer for peer in parts.config.peers}
        self._telling: dict[str, Process] = {}
        self._unkept: dict[str, bytes] = {}
        """Notices that the store could not take, for as long as the process lives."""

    def tell(self, peer: str, news: Whereabouts) -> Steps[None]:
        """Tell that peer, now and until it has acknowledged it, over restarts too. Errors: StoreError: it is
        told, but not after a restart."""
        if peer not in self._peers:
            log.info("%s is no peer any more, so it gets no notice about its SA", peer)
            return
        key, raw = _key(peer, news), news.serialize()
        self._unkept[key] = raw  # an older one of the SA is obsolete
        self.start(peer)
        yield Put(_KIND, key, raw)
        if self._unkept.get(key) == raw:
            del self._unkept[key]

    def start_all(self) -> Steps[None]:
        """Go on telling what the store has."""
        kept: Sequence[tuple[str, bytes]] = yield Items(_KIND)
        for peer in {_peer_of(key) for key, _ in kept}:
            self.start(peer)

    def start(self, peer: str) -> None:
        """Tell that peer what there is for it."""
        known = self._peers.get(peer)
        if known is None or peer in self._telling:
            return
        self._telling[peer] = self._parts.scheduler.spawn(self._tell_all(known), f"notices for {peer}")

    def connected(self, peer: str) -> None:
        """There is a link to that peer: what waits for it need not wait any longer."""
        if peer in self._telling:
            self._telling[peer].post("connected")

    def _waiting(self, peer: str) -> Steps[list[Whereabouts]]:
        """What that peer has not acknowledged yet."""
        found = []
        kept: Sequence[tuple[str, bytes]] = yield Items(_KIND)
        for key, raw in {**dict(kept), **self._unkept}.items():
            if _peer_of(key) == peer:
                try:
                    found.append(_read(raw))
                except WireError as error:
                    log.error("a notice for %s cannot be read, it is forgotten: %s", peer, error)
                    yield Delete(_KIND, key)
        return found

    def _tell_all(self, peer: PeerConfig) -> Steps[None]:
        tries = 0
        try:
            while True:
                try:
                    if not (yield from self._tell_some(peer)):
                        return
                    tries = 0
                except (LinkError, StoreError) as error:
                    level = logging.INFO if tries else logging.WARNING  # once is enough for an operator
                    log.log(level, "%s is not told yet where SAs of its are: %s", peer.name, error)
                    yield Event(self._parts.now + self._parts.timing.wait(tries))
                    tries += 1
        finally:
            del self._telling[peer.name]

    def _tell_some(self, peer: PeerConfig) -> Steps[bool]:
        """Tell as much as fits into one message. False: there was nothing. Errors: LinkError, StoreError."""
        news = yield from self._waiting(peer.name)
        if not news:
            return False
        message, told = notice(news)
        with self._parts.scheduler.using(peer.name):
            heard = yield from self._ask(peer, message)
        if not heard:
            log.warning(
                "%s knows no WHEREABOUTS: it may go on sending packets here for SAs that ended", peer.name
            )
        yield from self._forget(peer.name, told)
        return True

    def _ask(self, peer: PeerConfig, message: Ctd) -> Steps[bool]:
        """Send one notice. True: it was acknowledged; False: the peer will never do that. Errors: LinkError:
        try again later."""
        line = yield from self._parts.lines.get(peer)
        asked: Question | None = None
        while True:
            _, asked = line.ask(message, asked)
            said = yield from reply_to(asked, self._parts.now + self._parts.timing.offer)
            if said is not None:
                break
            log.info("%s has not answered a notice, it is sent again", peer.name)
        if isinstance(said, LinkError):
            raise said
        status, _ = offer_status(said)
        if status in (Status.OK, Status.MALFORMED):
            return said.complete
        raise LinkError(f"{peer.name} could not take it in ({status.name})")

    def _forget(self, peer: str, told: list[Whereabouts]) -> Steps[None]:
        for news in told:
            # there may be newer ones of the same SA
            key, raw = _key(peer, news), news.serialize()
            unkept = self._unkept.get(key) == raw  # then the store has none, or an older one
            if unkept:
                del self._unkept[key]
            if unkept or (yield Get(_KIND, key)) == raw:
                yield Delete(_KIND, key)

    # -- those of others ---------------------------------------------------------------------------------

    def arrived(self, line: Line, message: Ctd) -> Steps[None]:
        """Take in a peer's notice, and acknowledge it."""
        try:
            for news in parse_notice(message):
                yield Hear(line.peer.name, news)
                log.info("%s says of the SA %s: %s", line.peer.name, news.sa, _words(news))
        except WireError as error:
            log.warning("%s sent a notice that does not parse: %s", line.label, error)
            answer(line, NOBODY, refusal(Status.MALFORMED))
        except IkectxError as error:
            log.error("a notice of %s is not taken in: %s", line.label, error)
            answer(line, NOBODY, refusal(error.status))
        else:
            answer(line, NOBODY, ())
        line.handled()


def _words(news: Whereabouts) -> str:
    words = {What.HERE: "it is there", What.MOVED: f"it moved to {news.to}", What.ENDED: "it ended"}
    words |= {What.RENAMED: "it has other SPIs there", What.READY: "packets for it can be sent there"}
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
