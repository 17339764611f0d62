"""How long each part of a transfer may take, in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Time limits, in seconds.

    connect: TCP and TLS. offer: PCTD to CTDR. predictive: how long both ends keep an announced context.
    request: how long a target repeats a CT-Req; unproven: the same for a stranger's request, until the source
    has answered it. confirm: CTD to CTDR, then the CTD is sent again. hold: how long a target keeps a
    prepared SA. step: one step of a port (freeze, take, ...). in_doubt: CTD to report. idle: an unused
    connection; renew: an unused one to a peer that is kept connected. keepalive: TCP probes. backoff doubles
    up to backoff_max; busy_backoff: between attempts when the SA was busy. turn: how long an operator's
    transfer waits until another one of the same SA has ended. stop: how long `stop` waits. retries: how often
    a clean-up is tried before the report says that it failed (the tries go on).
    """

    connect: float = 5.0
    offer: float = 15.0
    predictive: float = 60.0
    request: float = 30.0
    unproven: float = 10.0
    confirm: float = 60.0
    hold: float = 60.0
    step: float = 90.0
    in_doubt: float = 120.0
    idle: float = 60.0
    renew: float = 3600.0
    keepalive: float = 10.0
    backoff: float = 0.2
    backoff_max: float = 30.0
    busy_backoff: float = 0.3
    turn: float = 15.0
    stop: float = 5.0
    retries: int = 5

    def wait(self, tries: int) -> float:
        """Seconds before repetition number `tries` (from 0): exponential back-off (RFC 4067, 3)."""
        return min(self.backoff_max, self.backoff * 2.0 ** min(tries, 30))
