"""Why an SA that charon serves cannot be moved: `list` shows it, and a transfer is refused with it. Pure.

Each check raises the error that describes the obstacle. An SA of a kind that cannot be moved is refused
(RefusedError with a status of its own, wherever it is noticed); one that is only not known is an
UnknownSaError, and a resync may help.

charon's ha plugin (strongSwan 5.9.8 to 6.1.0) reports an AH SA without its algorithms, a CHILD_SA for single
CPUs (6.0.2 and later) not at all, and of a PPK only that there is one.
"""

from __future__ import annotations

from ikectx.errors import RefusedError, UnknownSaError
from ikectx.numbers import STATUS_TEXT, Status
from ikectx.sa.context import IkeContext
from vici_bridge.ha.messages import TABLES
from vici_bridge.ha.record import uncovered
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.vici.views import SaView

RESYNC = "rekey it, or `ikectx resync`, after which charon rekeys all CHILD_SAs"


def _refused(status: Status, reason: str = "") -> RefusedError:
    return RefusedError(reason or STATUS_TEXT[status], status=status)


def check_kind(view: SaView) -> None:
    """Check charon's listing. Errors: RefusedError."""
    if view.ppk:
        raise _refused(Status.PPK)
    for child in view.children:
        if child.protocol != "ESP":
            raise _refused(
                Status.NOT_ESP, f"CHILD_SA {child.name} is {child.protocol}, and only ESP can be moved"
            )
        if child.per_cpu:
            raise _refused(Status.PER_CPU, f"CHILD_SA {child.name} has SAs for single CPUs (per_cpu_sas)")


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


def check_told(view: SaView, context: IkeContext) -> None:
    """Errors: UnknownSaError if charon has CHILD_SAs that it has not reported."""
    told = {child.spi_in for child in context.children}
    living = [child for child in view.children if child.state == "INSTALLED"]
    untold = {child.name for child in living if child.spi_in not in told}
    if untold:
        raise UnknownSaError(
            f"no record of CHILD_SA {', '.join(sorted(untold))}: it came up while no agent ran", hint=RESYNC
        )
