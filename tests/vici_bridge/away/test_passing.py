"""The mobile nodes that a gateway relays: their ports, and what depends on several of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ikectx.errors import BusyError
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from tests.vici_bridge.vici.test_views import context
from vici_bridge.away import passing as module
from vici_bridge.away.passing import Passing, rule_for
from vici_bridge.kernel.nat_rule import NatRule, elements, rule_from_json, rule_to_json
from vici_bridge.vici.views import COND_NAT_THERE

TO = ip_address("192.0.2.9")


class Nat:
    """nftables."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, bytes], bytes] = {}

    def change(self, old: Iterable[NatRule], new: Iterable[NatRule]) -> None:
        after = elements(new)
        for key in elements(old):
            self.found.pop(key, None)
        self.found.update(after)

    def set(self, rules: Iterable[NatRule]) -> None:
        self.found = elements(rules)


def rules(nat: Nat, *names: str) -> list[str]:
    return sorted(name for name, _ in nat.found if name.startswith(names))


def test_ports_are_one_for_each() -> None:
    passing, here = Passing(Nat()), context()  # type: ignore[arg-type]
    first = passing.seen_at(here)
    assert first.address == here.local.address
    assert passing.seen_at(here) == first
    other = replace(here, generations=(replace(here.current, spi_i=b"another1"),))
    assert passing.seen_at(other).port != first.port
    passing.put(here.spis.key, rule_for(here, first.port, TO))
    assert passing.of(first) == rule_for(here, first.port, TO)
    assert passing.of(Endpoint(first.address, 1)) is None


def test_what_was_promised_and_never_used_makes_room_for_who_comes() -> None:
    """After 4,096 dry runs of mobile nodes behind NATs none could be moved until the agent was restarted."""
    passing, here = Passing(Nat()), context()  # type: ignore[arg-type]

    def promised(number: int) -> Endpoint:
        current = replace(here.current, spi_i=number.to_bytes(8))
        return passing.seen_at(replace(here, generations=(current,)))

    most = len(module.RELAY_PORTS) // 2
    first = [promised(number) for number in range(1, most)]
    kept = promised(1)  # it is offered once more, so it is not the oldest
    for number in range(most, most + 100):
        promised(number)
    assert promised(1) == kept == first[0]
    assert len(passing._promised) <= most
    passing._rules = {str(port): rule_for(here, port, TO) for port in list(module.RELAY_PORTS)[:most]}
    with pytest.raises(BusyError, match=f"{most} mobile nodes are relayed"):
        passing.free_port()


def test_esp_under_an_unknown_spi_goes_back_to_the_only_one() -> None:
    nat = Nat()
    passing = Passing(nat)  # type: ignore[arg-type]
    one = context()
    two = replace(
        one,
        remote=Endpoint.of("198.51.100.8", 4500),
        children=tuple(replace(child, spi_out=b"two" + bytes((n,))) for n, child in enumerate(one.children)),
    )
    passing.put("1", rule_for(one, 20000, TO))
    assert rules(nat, "plainone") == ["plainone4"]
    passing.put("2", rule_for(two, 20001, TO))
    assert rules(nat, "plainone") == []
    assert len(rules(nat, "plainback")) == 2 * len(one.children)
    passing.put("1", None)
    assert rules(nat, "plainone") == ["plainone4"]
    passing.put("2", None)
    assert nat.found == {}


def test_a_later_agent_has_the_same() -> None:
    nat = Nat()
    passing = Passing(nat)  # type: ignore[arg-type]
    rule = rule_for(context(), 20000, TO)
    passing.put("1", rule)
    before = dict(nat.found)
    later = Passing(nat)  # type: ignore[arg-type]
    later.restore({"1": rule})
    assert nat.found == before
    later.put("1", replace(rule, esp=False))
    assert rules(nat, "esp", "plain4") == []
    assert rules(nat, "ike") == ["ike4"]


def test_ike_is_passed_on_for_some_seconds_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.0)

    async def scenario() -> None:
        nat = Nat()
        passing = Passing(nat)  # type: ignore[arg-type]
        rule = replace(rule_for(context(), 20000, TO), plain=False)
        passing.put("1", rule)
        passing.end_soon("1")
        passing.end_soon("1")
        assert rules(nat, "ike", "back", "esp") == ["back4", "ike4"]
        assert passing.of(Endpoint(rule.ours.address, rule.port)) is not None  # its port is not free yet
        await asyncio.sleep(0.01)
        assert nat.found == {}
        passing.put("1", rule)
        passing.end_soon("1")
        passing.put("1", rule)  # the SA is there after all
        await asyncio.sleep(0.01)
        assert rules(nat, "ike", "esp") == ["esp4", "ike4"]
        passing.end_soon("1")
        passing.restore({"2": rule})
        await asyncio.sleep(0.01)
        assert rules(nat, "ike", "esp") == ["esp4", "ike4"]

    asyncio.run(scenario())


def test_behind_a_nat_esp_is_in_udp() -> None:
    behind = replace(context(), conditions=COND_NAT_THERE)
    rule = rule_for(behind, 20000, TO)
    assert (rule.plain, rule.spis) == (False, ())
    assert rule_for(context(), 20000, TO, in_udp=True).plain is False
    assert rule_from_json(rule_to_json(rule)) == rule
    assert SaName(*behind.spis) == behind.spis
