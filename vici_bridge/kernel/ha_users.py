"""An nftables rule by which only some users may send to the HA addresses (I/O).

While charon is down its address belongs to nobody, and any local user could send SAs to the agent from there.
"""

from __future__ import annotations

import pwd
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from ikectx.errors import KernelError

from .nftables import NftTable, run_nft

TABLE = "ikectx_ha"
CHAIN = "out"


class HaUsers:
    """The rule: `names` of users, and the user ID `own`, may send to these addresses and UDP port. It stays
    when the agent ends."""

    def __init__(self, names: Iterable[str], own: int, addresses: Sequence[str], port: int) -> None:
        """Errors: KernelError, if there is no such user."""
        self._script = script(sorted({own, *map(_number, names)}), addresses, port)
        self._rules = len(addresses)

    def install(self) -> None:
        """Install it in the place of one that is there. Errors: KernelError."""
        run_nft(self._script)

    def again(self) -> bool:
        """Install it if somebody has removed it. Returns whether it was there. Errors: KernelError."""
        table = NftTable(TABLE)
        try:
            stood = table.rules(CHAIN) == [self._rules]
        finally:
            table.close()
        if not stood:
            self.install()
        return stood


def script(users: Iterable[int], addresses: Iterable[str], port: int) -> str:
    """What `nft` is told."""
    allowed = ", ".join(map(str, users))
    lines = [f"add table inet {TABLE}", f"delete table inet {TABLE}", f"add table inet {TABLE}"]
    lines.append(
        f"add chain inet {TABLE} {CHAIN} {{ type filter hook output priority filter; policy accept; }}"
    )
    for address in addresses:
        family = "ip" if ip_address(address).version == 4 else "ip6"
        lines.append(
            f"add rule inet {TABLE} {CHAIN} {family} daddr {address} udp dport {port}"
            f" meta skuid != {{ {allowed} }} counter drop"
        )
    return "\n".join(lines) + "\n"


def _number(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise KernelError(
            f"there is no user {name!r}", hint="correct ha_users under [charon] in the configuration"
        ) from None
