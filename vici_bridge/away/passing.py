"""`Passing`: the mobile nodes whose packets this gateway passes on to the gateway that serves their SA.

Each is a `NatRule` by the key of its departure (`absences`), which keeps it in the store. Here are the rules
that are in the kernel, the ports of this gateway that stand for mobile nodes, and what depends on several of
them: ESP without UDP under an SPI that is not known can be led back only if there is one such mobile node.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ikectx.errors import BusyError, KernelError
from ikectx.sa.context import Address, Endpoint, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.kernel.nat_relay import NatRelay
from vici_bridge.kernel.nat_rule import NatRule
from vici_bridge.vici.views import COND_NAT_ANY, COND_NAT_FAKE, COND_NAT_HERE, COND_NAT_THERE

log = logging.getLogger(__name__)

LINGER = 3.0
"""Seconds for which IKE is passed on after the end of an SA: the gateway that served it may tell of the end
before its charon has sent the answer to the mobile node's Delete."""
RELAY_PORTS = range(20480, 28672)
"""UDP ports that stand for mobile nodes: none that the kernel gives to sockets by itself (from 32768 on)."""


class Passing:
    """The relays of one gateway. `nat` None: this host cannot pass packets on."""

    def __init__(self, nat: NatRelay | None = None) -> None:
        self._nat = nat
        self._rules: dict[str, NatRule] = {}
        self._plain: dict[tuple[Address, Address], set[str]] = {}
        """Keys of the mobile nodes whose ESP is not in UDP, by the other gateway's address and ours."""
        self._promised: dict[str, int] = {}
        """Ports of SAs that were offered to another gateway and have not left."""
        self._ending: dict[str, asyncio.TimerHandle] = {}
        self.began: Callable[[], None] = lambda: None
        """Called when there is something to be passed on; set by who has to know that."""

    @property
    def able(self) -> bool:
        """Whether this host can pass packets on at all."""
        return self._nat is not None

    @property
    def in_udp(self) -> bool:
        """Whether ESP in UDP is passed on."""
        return any(rule.esp and not rule.plain for rule in self._rules.values())

    def seen_at(self, context: IkeContext) -> Endpoint:
        """The endpoint of this gateway that is to stand for the mobile node. Errors: BusyError."""
        key = context.spis.key
        self._promised[key] = self._promised.pop(key, 0) or self.free_port()  # the last to be forgotten
        return Endpoint(context.local.address, self._promised[key])

    def free_port(self) -> int:
        """A port of this gateway that stands for nobody. Errors: BusyError."""
        relayed, most = {rule.port for rule in self._rules.values()}, len(RELAY_PORTS) // 2
        if len(relayed) >= most:
            raise BusyError(f"{len(relayed)} mobile nodes are relayed here, which is all that can be")
        # nobody gives up what was promised in a dry run, or to an SA that has another name since
        while len(taken := relayed | set(self._promised.values())) >= most:
            del self._promised[next(iter(self._promised))]
        while (port := secrets.choice(RELAY_PORTS)) in taken:
            pass
        return port

    def given_up(self, sa: SaName) -> None:
        """The SA does not leave, or has left by other means."""
        self._promised.pop(sa.key, None)

    def answered(self) -> Collection[int]:
        """See `NatRelay.answered`. Errors: KernelError."""
        return () if self._nat is None else self._nat.answered()

    def of(self, seen_at: Endpoint) -> NatRule | None:
        """The mobile node for which that endpoint of this gateway stands."""
        for rule in self._rules.values():
            if (rule.ours.address, rule.port) == (seen_at.address, seen_at.port):
                return rule
        return None

    def put(self, key: str, rule: NatRule | None) -> None:
        """Begin or change a relay, None: end it. Idempotent. Errors: KernelError."""
        if (timer := self._ending.pop(key, None)) is not None:
            timer.cancel()
        before = self._rules.get(key)
        if before == rule:
            return
        others = {key} | self._group(before) | self._group(rule)
        old = self._with_alone(others)
        self._set(key, rule)
        try:
            if self._nat is not None:
                self._nat.change(old, self._with_alone(others))
        except KernelError:
            self._set(key, before)  # whoever tries again must find what is to be changed
            raise
        if rule is not None:
            self._promised.pop(key, None)
            self.began()

    def end_soon(self, key: str) -> None:
        """The SA has ended: pass on IKE only, and nothing after `LINGER` seconds. An agent that is started
        meanwhile does not go on. Errors: KernelError."""
        if key in self._rules and key not in self._ending:
            self.put(key, replace(self._rules[key], esp=False))
            self._ending[key] = asyncio.get_running_loop().call_later(LINGER, self._end, key)

    def _end(self, key: str) -> None:
        try:
            self.put(key, None)
        except KernelError as error:
            log.error("packets of a relayed mobile node whose SA has ended are still passed on: %s", error)

    def restore(self, rules: Mapping[str, NatRule]) -> None:
        """Have these, and no others. Errors: KernelError."""
        for timer in self._ending.values():
            timer.cancel()
        self._ending.clear()
        self._rules = dict(rules)
        self._plain.clear()
        for key, rule in rules.items():
            self._enter(key, rule)
        if self._nat is not None:
            self._nat.set(self._with_alone(rules))
        if rules:
            self.began()

    def again(self) -> None:
        """Make the relays again, because somebody removed nftables' rules. For any thread. Errors:
        KernelError."""
        rules = dict(self._rules)
        if rules and self._nat is not None:
            self._nat.set(self._with_alone(rules))

    @property
    def port(self) -> int:
        """See `NatRelay.port`; 0: this host cannot pass packets on."""
        return 0 if self._nat is None else self._nat.port

    def _set(self, key: str, rule: NatRule | None) -> None:
        self._group(self._rules.pop(key, None)).discard(key)
        if rule is not None:
            self._rules[key] = rule
            self._enter(key, rule)

    def _enter(self, key: str, rule: NatRule) -> None:
        if rule.plain:
            self._plain.setdefault((rule.to, rule.ours.address), set()).add(key)

    def _group(self, rule: NatRule | None) -> set[str]:
        return set() if rule is None else self._plain.get((rule.to, rule.ours.address), set())

    def _with_alone(self, keys: Collection[str]) -> list[NatRule]:
        found = [self._rules[key] for key in keys if key in self._rules]
        return [replace(rule, alone=len(self._group(rule)) == 1) for rule in found]


def rule_for(context: IkeContext, port: int, to: Address, *, in_udp: bool = False) -> NatRule:
    """The relay of an SA that goes to the gateway at `to`. `in_udp`: its ESP is in UDP in any case."""
    spis = () if in_udp else plain_spis(context)
    return NatRule(context.remote, context.local, port, to, spis, bool(spis))


def plain_spis(context: IkeContext) -> tuple[bytes, ...]:
    """The SPIs under which the mobile node receives ESP that is not in UDP."""
    encap = COND_NAT_ANY | COND_NAT_FAKE | COND_NAT_HERE | COND_NAT_THERE
    return () if context.conditions & encap else tuple(child.spi_out for child in context.children)
