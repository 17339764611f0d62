"""Virtual IPs that mobile nodes take along: what charon's pools make of them (5.9.8 to 6.0.6). Pure.

An SA that leaves frees its lease, as one that ends does. charon keeps a free lease for the identity that had
it, until a mobile node with another identity comes and the pool has no address left that nobody has had: then
that one gets it, while the first uses it at the other gateway. No command of charon's can prevent that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from ikectx.engine.report import TransferReport
from ikectx.sa.context import Address
from ikectx.sa.name import SaName

ADVICE = (
    "charon gives an address again when it has no other left, also that of a mobile node that moved: make "
    "the pool larger than the number of identities that ever connect, or have one place assign each identity "
    "an address of its own (RADIUS with Framed-IP-Address by user, or the plugin attr-sql with one database "
    "and a pool without --timeout); and no two gateways may have the same range"
)


def used(pool: Mapping[str, Any]) -> tuple[int, int]:
    """How many addresses of a pool identities have or had, and how many there are."""
    return int(pool.get("online", 0)) + int(pool.get("offline", 0)), int(pool.get("size", 0))


def full(pools: Mapping[str, Mapping[str, Any]], address: Address) -> str:
    """The pool of the address, if it has no other left; empty: there is none, or it has."""
    for name, pool in pools.items():
        given, size = used(pool)
        base = ip_address(str(pool["base"]))
        if base.version == address.version and 0 <= int(address) - int(base) < size <= given:
            return name
    return ""


def warned(
    reports: Iterable[TransferReport],
    leases: Mapping[SaName, Sequence[Address]],
    pools: Mapping[str, Mapping[str, Any]],
) -> list[TransferReport]:
    """The reports of a dry run, with a warning where the SA's virtual IP may be given to another mobile
    node."""
    return [report if report.exit_code else _warned(report, leases, pools) for report in reports]


def _warned(
    report: TransferReport,
    leases: Mapping[SaName, Sequence[Address]],
    pools: Mapping[str, Mapping[str, Any]],
) -> TransferReport:
    names = {full(pools, address): address for address in leases.get(report.sa, ())}
    why = "; ".join(
        f"pool {name} is full, and the next mobile node may get {address}, too (see `ikectx doctor`)"
        for name, address in names.items()
        if name
    )
    if not why:
        return report
    return replace(report, why="; ".join(filter(None, (report.why, why))), text=f"{report.text}; {why}")
