"""Why an SA that charon serves cannot be moved: `list` shows it, and a transfer is refused with it. Pure.

Each check raises the error that describes the obstacle. An SA of a kind that cannot be moved is refused
(RefusedError with a status of its own, wherever it is noticed); one that is only not known is an
UnknownSaError, and a resync may help.

charon's ha plugin (strongSwan 5.9.8 to 6.1.0) reports an AH SA without its algorithms, a CHILD_SA for single
CPUs (6.0.2 and later) not at all, and of a PPK only that there is one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ikectx.errors import RefusedError, UnknownSaError
from ikectx.numbers import STATUS_TEXT, Status
from ikectx.sa.context import IkeContext
from vici_bridge.ha.messages import TABLES
from vici_bridge.ha.record import uncovered
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.vici.views import SaView

RESYNC = "rekey it, or `ikectx resync`, after which charon rekeys all CHILD_SAs"


LONGEST_ID = 255
"""Octets of an identity in charon's HA messages, whose length has one octet; charon lets it wrap."""
_RDN = re.compile(r"(?:^|, )([A-Za-z]+|[0-9a-f:]+)=")


def _refused(status: Status, reason: str = "") -> RefusedError:
    return RefusedError(reason or STATUS_TEXT[status], status=status)


def check_kind(view: SaView) -> None:
    """Check charon's listing. Errors: RefusedError."""
    if view.ppk:
        raise _refused(Status.PPK)
    for whose, text in (("MN's", view.remote_id), ("gateway's", view.local_id), ("EAP", view.remote_eap_id)):
        if octets_of(text) > LONGEST_ID:
            raise RefusedError(
                f"the {whose} identity has more than {LONGEST_ID} octets, which charon's HA messages cannot "
                "express",
                hint="no SA of that identity can be moved, whatever is tried: give its owner a shorter one "
                "(a DN with fewer or shorter parts, or a subjectAltName as its id)",
                status=Status.NOT_COVERED,
            )
    for child in view.children:
        if child.protocol != "ESP":
            raise _refused(
                Status.NOT_ESP, f"CHILD_SA {child.name} is {child.protocol}, and only ESP can be moved"
            )
        if child.per_cpu:
            raise _refused(Status.PER_CPU, f"CHILD_SA {child.name} has SAs for single CPUs (per_cpu_sas)")


def octets_of(text: str) -> int:
    """Octets of an identity that charon prints so. A DN in DER has eleven for each part beside its value, and
    more for rarer attribute types."""
    parts = _RDN.split(text)
    if len(parts) == 1:
        return len(text)
    values, names = parts[2::2], parts[1::2]
    longer = {"E": 6, "UID": 7, "DC": 7}
    size = sum(11 + longer.get(name, 0) + len(value) for name, value in zip(names, values, strict=True))
    return size + (4 if size > 255 else 3 if size > 127 else 2)


def check_ports(view: SaView, ports: Collection[int]) -> None:
    """Errors: RefusedError for an SA on a port of charon's that the agent does not know."""
    if view.local.port not in ports:
        raise RefusedError(
            f"charon has it on UDP port {view.local.port}, and message IDs are noted only of those from "
            f"{' and '.join(map(str, ports))}",
            hint="write charon's ports into ikectx.toml: port and port_nat_t under [charon]",
            status=Status.NOT_COVERED,
        )


def check_context(context: IkeContext) -> None:
    """Check the report of a gateway's charon over its ha plugin. Errors: RefusedError."""
    reason = uncovered(context, max(TABLES))
    if reason is not Status.OK:
        raise _refused(reason)


def check_kernel(child: str, sa: KernelSa) -> None:
    """Check the kernel's SA of a CHILD_SA of that name. Errors: RefusedError."""
    if sa.cpu is not None:
        raise _refused(Status.PER_CPU, f"CHILD_SA {child} has an SA for CPU {sa.cpu} alone ({sa})")
    if sa.offloaded:
        raise _refused(
            Status.OFFLOADED, f"CHILD_SA {child} is left to the network card, packet by packet ({sa})"
        )


def check_alone(view: SaView, others: Iterable[SaView]) -> None:
    """Errors: RefusedError if one of the others has a CHILD_SA of the same selectors: charon gives both the
    same policies, here and at the mobile node, so that packets follow neither of them alone."""
    mine = {(child.local_ts, child.remote_ts, child.tags): child.name for child in view.children}
    for other in others:
        for child in other.children if other.state == "ESTABLISHED" else ():
            name = mine.get((child.local_ts, child.remote_ts, child.tags))
            if name is not None and child.local_ts and child.state == "INSTALLED":
                raise RefusedError(
                    f"the MN has another IKE_SA {other.name} #{other.unique_id} here with the traffic "
                    f"selectors of CHILD_SA {name}",
                    hint="end the one that it does not use any more (swanctl --terminate --ike-id N); while "
                    "it authenticates again there are two for some seconds: try again then",
                    status=Status.NOT_COVERED,
                )


def check_told(view: SaView, context: IkeContext) -> None:
    """Errors: UnknownSaError if charon has CHILD_SAs that it has not reported."""
    told = {child.spi_in for child in context.children}
    living = [child for child in view.children if child.state == "INSTALLED"]
    untold = {child.name for child in living if child.spi_in not in told}
    if untold:
        raise UnknownSaError(
            f"no record of CHILD_SA {', '.join(sorted(untold))}: it came up while no agent ran", hint=RESYNC
        )
