"""Which configured peer an address belongs to (I/O: names are looked up)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from ikectx.errors import LinkError
from ikectx.peer import PeerConfig
from ikectx.sa.context import Address

log = logging.getLogger("ikectx.net.neighbours")

AT_START = 1.0
"""Seconds that a start waits for the addresses of peers."""
RESOLVE_AGAIN = 60.0
"""Seconds for which a peer's name keeps its addresses."""


async def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a host, or the address that it is written as. Errors: LinkError."""
    if is_address(host):
        return [ip_address(host)]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        if error.errno and not isinstance(error, socket.gaierror):
            raise LinkError(os.strerror(error.errno)) from None
        raise LinkError(error.strerror or str(error)) from None
    return list(dict.fromkeys(plain_address(entry[4]) for entry in found))


def is_address(host: str) -> bool:
    """True if it is written as an address, not as a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def plain_address(name: Any) -> Address:
    """The address in a socket's name, without the scope of a link-local one."""
    return ip_address(str(name[0]).partition("%")[0])


def own_address(listen: Sequence[tuple[str, int]], version: int) -> Address | None:
    """The source of connections to peers: the first address that this gateway listens on, because peers know
    it by that address."""
    found = [ip_address(host) for host, _ in listen if is_address(host)]
    return next((each for each in found if each.version == version and not each.is_unspecified), None)


class Neighbours:
    """The addresses that peers connect from: those of `host`, `addresses` and `sources`.

    A peer's name is looked up when `look` is called, and again, in the background, when a stranger comes
    and the last look was `RESOLVE_AGAIN` seconds ago.
    """

    def __init__(self, peers: Sequence[PeerConfig]) -> None:
        self._peers = peers
        self._found: dict[str, list[Address]] = {
            peer.host: [ip_address(peer.host)] for peer in peers if is_address(peer.host)
        }
        self._looked = -RESOLVE_AGAIN
        self._looking: asyncio.Task[None] | None = None

    async def look_soon(self) -> None:
        """`look`, and wait for that for a moment: transfers that an agent before this one has left open must
        not wait for a name server."""
        self._looking = asyncio.get_running_loop().create_task(self.look())
        await asyncio.wait({self._looking}, timeout=AT_START)

    async def look(self) -> None:
        """Look up the names of all peers. A name that is not found is logged; its old addresses stay."""
        self._looked = time.monotonic()
        named = [peer for peer in self._peers if peer.host and not is_address(peer.host)]
        answers = await asyncio.gather(
            *(resolve(peer.host, peer.port) for peer in named), return_exceptions=True
        )
        for peer, found in zip(named, answers, strict=True):
            if isinstance(found, LinkError):
                log.warning("%s: %s: %s", peer.name, peer.host, found)
            elif isinstance(found, BaseException):
                raise found
            else:
                self._found[peer.host] = found

    def owners(self, address: Address) -> list[PeerConfig]:
        """The peers with that address, as far as it is known now."""
        owners = [peer for peer in self._peers if self._has(peer, address)]
        if not owners and time.monotonic() - self._looked >= RESOLVE_AGAIN:
            self._looked = time.monotonic()
            if any(not is_address(peer.host) for peer in self._peers):
                self._looking = asyncio.get_running_loop().create_task(self.look())
        return owners

    def knows(self, address: Address) -> bool:
        """True if the address is any peer's."""
        return bool(self.owners(address))

    def _has(self, peer: PeerConfig, address: Address) -> bool:
        return (
            address in self._found.get(peer.host, ())
            or address in peer.addresses
            or any(address in network for network in peer.sources)
        )

    def owner(self, address: Address) -> PeerConfig:
        """The one peer with that address. Errors: LinkError."""
        found = self.owners(address)
        if not found:
            raise LinkError(f"{address} is no configured peer's address", hint="compare [[peer]] address")
        if len(found) > 1:
            names = ", ".join(peer.name for peer in found)
            raise LinkError(
                f"{address} is the address of several peers: {names}",
                hint='with transport = "ipsec" each [[peer]] needs an address of its own',
            )
        return found[0]
