"""A kernel's SAs and policies in dictionaries, as an agent asks for them and changes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ikectx.errors import StateError
from ikectx.sa.context import Address, ReplayState
from vici_bridge.kernel.algorithms import KernelReplay, fit_replay, merge_replay
from vici_bridge.kernel.xfrm import KernelPolicy, KernelSa, Selector
from vici_bridge.kernel.xfrm_parts import KernelUsage


class KernelTables:
    """SAs by destination and SPI, as the kernel finds them; `step` comes before each change."""

    marked = False

    def __init__(self, step: Callable[[], None] = lambda: None) -> None:
        self.step = step
        self.sas: dict[tuple[Address, bytes], KernelSa] = {}
        self.policies: dict[tuple[str, Selector, Any], KernelPolicy] = {}

    def close(self) -> None: ...

    def sas_to(self, destination: Address) -> list[KernelSa]:
        return [sa for sa in self.sas.values() if sa.destination == destination]

    def get_sa(self, destination: Address, spi: bytes, proto: int = 50, mark: Any = None) -> KernelSa | None:
        return self.sas.get((destination, spi))

    def get_sas(self, names: Sequence[tuple[Address, bytes]]) -> list[KernelSa | None]:
        return [self.get_sa(*name) for name in names]

    def get_replay(self, sa: KernelSa, *, outbound: bool | None = None) -> tuple[ReplayState, KernelUsage]:
        known = self.sas[sa.destination, sa.spi]
        return (known.replay.outbound if outbound else known.replay.inbound), known.usage

    def set_replay(self, sa: KernelSa, state: ReplayState, *, outbound: bool | None = None) -> None:
        self.step()
        now = self.sas[sa.destination, sa.spi]
        if outbound:
            if state.seq < now.replay.oseq:
                raise StateError("the counter cannot go back")
            after = replace(now.replay, oseq=state.seq)
        else:
            window = now.replay.window
            joined = fit_replay(merge_replay(now.replay.inbound, fit_replay(state, window)), window)
            after = replace(now.replay, seq=joined.seq, bitmap=joined.bitmap)
        self.sas[sa.destination, sa.spi] = replace(now, replay=after)

    def set_replays(self, changes: Sequence[tuple[KernelSa, ReplayState, bool]]) -> None:
        for sa, state, outbound in changes:
            self.set_replay(sa, state, outbound=outbound)

    def take_out(self, sas: Sequence[KernelSa]) -> list[KernelReplay | None]:
        self.step()
        gone = [self.sas.pop((sa.destination, sa.spi), None) for sa in sas]
        return [None if sa is None else sa.replay for sa in gone]

    def count_on(self, sa: KernelSa, octets: int, packets: int) -> None:
        self.step()
        now = self.sas[sa.destination, sa.spi]
        usage = replace(now.usage, bytes=octets, packets=packets)
        self.sas[sa.destination, sa.spi] = replace(now, usage=usage)

    def dump_policies(self) -> list[KernelPolicy]:
        return list(self.policies.values())

    async def policies_change(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def policies_about(self, reqids: Collection[int]) -> list[KernelPolicy]:
        return [one for one in self.dump_policies() if any(t.reqid in reqids for t in one.templates)]

    def replace_policies(self, policies: Iterable[KernelPolicy]) -> None:
        for policy in policies:
            self.replace_policy(policy)

    def replace_policy(self, policy: KernelPolicy) -> None:
        self.step()
        self.policies[policy.direction, policy.selector, policy.mark] = policy

    def delete_policies(self, policies: Iterable[KernelPolicy]) -> None:
        for policy in policies:
            self.delete_policy(policy)

    def delete_policy(self, policy: KernelPolicy) -> bool:
        self.step()
        return self.policies.pop((policy.direction, policy.selector, policy.mark), None) is not None
