"""`Rewrite`: a mobile node's ESP leaves and comes under new outer addresses before its SAs have them. I/O.

charon gives an SA other addresses by a second pair, when the new gateway has answered. Until then nftables
rewrites the outer addresses of the old pair's packets, which ESP does not protect (RFC 4303, 3.1.2): those
that leave to the old gateway go to the new one, from the new address, and those of the new gateway come to
the old pair. So SAs, policies, keys and sequence numbers stay as they are, and the way back is the end of the
rewriting.

The old address must be one of this host meanwhile, because XFRM looks for the way from there. If it is none
any more, a route in the table `local` makes it one. On a link where somebody else may have that address this
is not done, because this host would answer for it (ARP).

Packets are rewritten after conntrack on their way out and before it on their way in, so that a firewall sees
the connection that it knows."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from ikectx import trace
from ikectx.errors import KernelError
from ikectx.sa.context import Address

from .host_routes import HostRoutes
from .nftables import NftTable, run_nft

log = logging.getLogger(__name__)

TABLE = "ikectx_esp"
_HEAD = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class EspPair:
    """The SPIs (4 octets) of a pair in tunnel mode. port: ours of ESP in UDP; 0: plain ESP."""

    spi_in: bytes
    spi_out: bytes
    port: int = 0


@dataclass(frozen=True, slots=True)
class NewPlace:
    """Where a mobile node is. `old_local`, `old_remote`: addresses of its pairs; `local`, `remote`: those on
    the wire. All are of one IP version."""

    old_local: Address
    old_remote: Address
    local: Address
    remote: Address
    pairs: tuple[EspPair, ...]


class Rewrite:
    """The rewriting of one SA's ESP at a time, in the network namespace that it is first used in. For any
    thread.

    It outlives the agent: `prepare` ends what an earlier one has left.
    """

    def __init__(self) -> None:
        self._table = NftTable(TABLE)
        self._routes = HostRoutes()
        self._lock = threading.Lock()
        self._prepared = False
        self.place: NewPlace | None = None
        """What is rewritten at present."""

    def close(self) -> None:
        """Close the sockets; what is rewritten stays so."""
        self._table.close()
        self._routes.close()

    def prepare(self) -> None:
        """Make the table by `nft`, some 20 ms, with nothing in it. Errors: KernelError."""
        with self._lock:
            self._prepared = False
            run_nft(_script())
            self._routes.clear()
            self._prepared, self.place = True, None

    @trace.spanned("rewrite ESP", "part")
    def begin(self, place: NewPlace) -> bool:
        """Rewrite from now on, and nothing else any more; False: that cannot be done here. Errors:
        KernelError."""
        with self._lock:
            if not self._prepared:
                return False
            self._end()
            away = not self._routes.is_own(place.old_local)
            if away and self._routes.is_neighbours(place.old_local):
                log.info("%s may be somebody else's here: ESP waits for the new gateway", place.old_local)
                return False
            try:
                self._table.put([*_elements(place)])
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                run_nft(_script())  # somebody has flushed the firewall
                self._table.put([*_elements(place)])
            self.place = place
            if away:
                self._routes.add(place.old_local)
            return True

    def end(self) -> None:
        """Rewrite nothing any more. Idempotent. Errors: KernelError."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self.place is not None:
            self._table.empty(sorted({name for name, _, _ in _elements(self.place)}))
            self._routes.remove(self.place.old_local)
            self.place = None


def _elements(place: NewPlace) -> Iterator[tuple[str, bytes, bytes]]:
    """(map, key, value) of each element."""
    version = place.local.version
    for pair in place.pairs:
        kind = f"udp{version}" if pair.port else f"esp{version}"
        port = pair.port.to_bytes(2) + bytes(2) if pair.port else b""
        sent, came = port + pair.spi_out, place.local.packed + port + pair.spi_in
        yield f"sent_saddr_{kind}", place.old_local.packed + sent, place.local.packed
        yield f"sent_daddr_{kind}", place.old_remote.packed + sent, place.remote.packed
        yield f"came_saddr_{kind}", came, place.old_remote.packed
        yield f"came_daddr_{kind}", came, place.old_local.packed


def _script() -> str:
    """The table anew. In UDP the SPI comes after the header of UDP (RFC 3948, 2.1), and our port is in the
    key."""
    maps: list[str] = []
    rules: dict[str, list[str]] = {"sent": [], "came": []}
    for version, head in _HEAD.items():
        for way, of_source, port in (("sent", "saddr", "sport"), ("came", "daddr", "dport")):
            for field, in_key in (("saddr", of_source), ("daddr", "daddr")):
                for kind, match, spi in (
                    (f"esp{version}", "meta l4proto esp ", "@th,0,32"),
                    (f"udp{version}", "", f"udp {port} . @th,64,32"),
                ):
                    name, key = f"{way}_{field}_{kind}", f"{head} {in_key} . {spi}"
                    maps.append(f"map {name} {{ typeof {key} : {head} {field}; }}")
                    rules[way].append(f"{match}{head} {field} set {key} map @{name}")
    lines = [
        *maps,
        "chain sent { type route hook output priority -150; policy accept;",
        *rules["sent"],
        "}",
        "chain came { type filter hook prerouting priority -310; policy accept;",
        *rules["came"],
        "}",
    ]
    body = "\n".join(lines)
    return f"add table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{body}\n}}\n"
