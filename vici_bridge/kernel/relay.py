"""`Relay`: sends ESP that a mobile node still sends under an SPI in use here on to the other gateway. I/O.

A mobile node that was told our address before it could be given new SPIs sends under the old ones until its
SAs are rekeyed. The other gateway decrypts these packets until it releases the SA; here they would reach the
SA that has the SPI. So nftables rewrites the destination of such packets to the other gateway's address
before anything else sees them, selected by source address, port and SPI, because packets of the SA here come
from elsewhere.

The source stays the mobile node's, because behind a NAT a kernel reports every change of it to charon. If
routers between the gateways drop such packets (RFC 2827), they are lost, as they would be without the relay.

RFC 4303, 2.1 (SPI first); RFC 3948, 2.1 (in UDP).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ikectx.sa.context import Address, Endpoint

from .nftables import run_nft

TABLE = "ikectx_relay"
_HEAD = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class RelayRule:
    """Packets of `mn` under `spi` (4 octets) are sent on to `to`."""

    mn: Endpoint
    spi: bytes
    to: Address


class Relay:
    """The relays in the network namespace in which its calls run (they run `nft`: some 20 ms).

    They outlive the agent. For any thread. Errors: KernelError.
    """

    def __init__(self, port: int) -> None:
        """port: charon.port_nat_t."""
        self._port = port
        self._lock = threading.Lock()

    def add(self, one: RelayRule) -> None:
        """Begin to send its packets on. Idempotent."""
        with self._lock:
            run_nft(self._table() + "".join(f"add element {part}\n" for part in self._elements(one)))

    def remove(self, one: RelayRule) -> None:
        """Stop to send its packets on. Idempotent."""
        with self._lock:
            # deleting a missing element is an error, so it is added first, which has no effect if it is there
            lines = [f"add element {part}\ndelete element {part}\n" for part in self._elements(one)]
            run_nft(self._table() + "".join(lines))

    def _elements(self, one: RelayRule) -> list[str]:
        version = one.mn.address.version
        spi = f"0x{one.spi.hex()}"
        return [
            f"inet {TABLE} esp{version} {{ {one.mn.address} . {spi} : {one.to} }}",
            f"inet {TABLE} udp{version} {{ {one.mn.address} . {one.mn.port} . {spi} : {one.to} }}",
        ]

    def _table(self) -> str:
        lines = [f"add table inet {TABLE}"]
        for version, head in _HEAD.items():
            source = f"{head} saddr"
            lines += [
                f"add map inet {TABLE} esp{version} {{ typeof {source} . @th,0,32 : {head} daddr; }}",
                f"add map inet {TABLE} udp{version} "
                f"{{ typeof {source} . udp sport . @th,64,32 : {head} daddr; }}",
            ]
        lines += [
            # before conntrack, which must not take such a packet for a connection of its own
            f"add chain inet {TABLE} pre {{ type filter hook prerouting priority -310; policy accept; }}",
            f"flush chain inet {TABLE} pre",
        ]
        for version, head in _HEAD.items():
            rule = f"add rule inet {TABLE} pre"
            lines += [
                f"{rule} meta l4proto esp {head} daddr set {head} saddr . @th,0,32 map @esp{version} counter",
                f"{rule} udp dport {self._port} {head} daddr set "
                f"{head} saddr . udp sport . @th,64,32 map @udp{version} counter",
            ]
        return "\n".join(lines) + "\n"
