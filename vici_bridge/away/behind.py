"""`Behind`: block policies behind SAs that came from another gateway, for the time after their end. I/O.

The gateway that gave an SA sends its packets on to here until it was told that the SA is gone, and the
network may send them here, too. When the mobile node ends its SA, charon removes the policies, so packets
that still arrive would leave in the clear. So each outbound policy of such an SA has a block policy behind it
that drops the same packets, of the least priority there is, so that it matters only if there is no other. It
remains until another mobile node has the address here, or the operator removes it (`ikectx detours --end NAME
--unblock`). There is no block behind a policy for everything (as of a route-based VPN without marks), because
it would cut the gateway off, nor behind one for the mobile node's outer address where the old gateway does
not send such packets on (transport mode, and behind a NAT). Where it does, IKE is not blocked, because
charon's sockets have policies of their own.

A block is there already when an SA is only prepared, because from then on the gateway that has it may send
its packets here. If the SA is not taken in the end, that gateway is told so after the SA's policies were
removed here, and goes on sending until then. This block drops only packets that would leave by the device
towards the mobile node's outer address, because the way to the gateway that serves it may lead through here.

With ESP in user space there are no policies, and so no blocks.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any

from ikectx.engine.ports import Store
from ikectx.errors import KernelError, StoreError, WireError, reading
from ikectx.mac import digest
from ikectx.sa.context import Address, IkeContext
from ikectx.sa.name import SaName
from vici_bridge.kernel.kernel import Kernel
from vici_bridge.kernel.xfrm import KernelPolicy
from vici_bridge.kernel.xfrm_parts import Network

from .departures import bare_blocks, block_of, detourable, within

log = logging.getLogger(__name__)

BEHIND = int.from_bytes(b"IKEB")
"""The `user` of these policies' selectors, as `departures.OURS` is that of departures."""

KIND = "behind"
"""Kind of store entry, by a digest of the policy: a `Block`. It is not in the ledger, because it stays
when the SA has ended."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block behind the SA `sa` (its name when it came) of the mobile node `mn`.

    `outer`: the address towards which the policy's device leads; None: the policy names no device.
    """

    sa: SaName
    mn: str
    policy: KernelPolicy
    outer: Address | None = None

    @property
    def key(self) -> str:
        """Its key in the store. There is one block for the same packets, whichever SA they were of."""
        return digest(self.policy.raw).hex()[:32]

    def dumps(self) -> bytes:
        """The stored form."""
        outer = None if self.outer is None else str(self.outer)
        value = {"sa": self.sa.pair, "mn": self.mn, "policy": self.policy.raw.hex(), "outer": outer}
        return json.dumps(value).encode()

    @classmethod
    def loads(cls, key: str, raw: bytes) -> Block:
        """Read what `dumps` wrote. Errors: StoreError."""
        with reading(f"the block {key}"):
            found: Any = json.loads(raw)
            policy = KernelPolicy.parse(bytes.fromhex(found["policy"]))
            outer = ip_address(found["outer"]) if found.get("outer") else None
            return cls(SaName.from_pair(found["sa"]), str(found["mn"]), policy, outer)

    def to_json(self) -> dict[str, object]:
        """For operators, as plain JSON values."""
        blocked = f"{self.policy.source} -> {self.policy.destination}"
        return {"sa": self.sa.pair, "mn": self.mn, "blocked": blocked}


class Behind:
    """All these blocks at one gateway; those in the store are there after `load`.

    `kernel` is None if ESP is in user space. `device_now`: the index of the device towards an address now, 0:
    there is none.
    """

    def __init__(self, store: Store, kernel: Kernel | None, device_now: Callable[[str], int]) -> None:
        self._store = store
        self._kernel = kernel
        self._device_now = device_now
        self.keeps = False
        """Are blocks left in the kernel that the store does not have?"""
        self._blocks: dict[str, Block] = {}
        self._to: defaultdict[Network, set[str]] = defaultdict(set)
        """Keys by the mobile node's network."""

    def load(self) -> None:
        """Read the store; a row that cannot be read is logged and left there."""
        for key, raw in self._store.items(KIND):
            try:
                self._enter(Block.loads(key, raw))
            except StoreError as error:
                log.error("%s", error)

    def listing(self) -> list[Block]:
        """All blocks."""
        return list(self._blocks.values())

    def stand(
        self, context: IkeContext, reqids: Collection[int], device: int = 0, outer: Address | None = None
    ) -> None:
        """The SA came, with policies of these reqids: put blocks behind them. Idempotent; failures are
        logged.

        It raises nothing, because the SA serves already. `device`: drop only packets that would leave by the
        device of that index, which leads towards `outer`; 0: all of them.
        """
        if self._kernel is None:
            return
        try:
            for policy in self._kernel.policies_about(reqids):
                if policy.direction == "out" and not _too_wide(policy, context):
                    block = block_of(policy)
                    block = replace(block, selector=replace(block.selector, user=BEHIND, ifindex=device))
                    for one in (block, *bare_blocks(block, context, device)):
                        self._stand(Block(context.spis, str(context.remote_id), one, outer))
        except (KernelError, StoreError, WireError) as error:
            log.error(
                "packets for %s may leave in the clear when its SA ends here: %s", context.remote_id, error
            )

    def serves(self, who: str, children: Iterable[tuple[Sequence[Network], Sequence[Network]]]) -> None:
        """The mobile node `who` has an SA here with these networks of both sides.

        Blocks for these networks that were another node's end. Its own remain, because the gateway that gave
        its SA may still send packets for it here. Errors: KernelError, StoreError.
        """
        for local, remote in children:
            for network in remote:
                for key in list(self._to.get(network, ())):
                    block = self._blocks[key]
                    if block.mn != who and any(within(block.policy.source, ours) for ours in local):
                        self._remove(block)

    def end(self, name: str) -> int:
        """Remove the blocks of an SA (SPIi:SPIr) or a mobile node. Returns their number.

        Errors: KernelError, StoreError.
        """
        found = [block for block in self._blocks.values() if name in (block.mn, str(block.sa))]
        for block in found:
            self._remove(block)
        return len(found)

    def restore(self) -> None:
        """Put into the kernel what the store has, and remove the rest. Failures are logged."""
        if self._kernel is None:
            return
        self.look_again()
        try:
            wanted = {block.policy.raw for block in self._blocks.values()}
            for policy in () if self.keeps else self._kernel.dump_policies():
                if policy.selector.user == BEHIND and replace(policy, index=0).raw not in wanted:
                    self._kernel.delete_policy(policy)
            for block in self._blocks.values():
                self._kernel.replace_policy(block.policy)
        except KernelError as error:
            log.error("packets for mobile nodes may leave in the clear when their SAs end: %s", error)

    def look_again(self) -> None:
        """Devices changed: have each block that names one name the present one. Failures are logged."""
        for block in [block for block in self._blocks.values() if block.outer is not None]:
            try:
                device = self._device_now(str(block.outer))
                selector = replace(block.policy.selector, ifindex=device)
                if device and selector != block.policy.selector:
                    self._stand(replace(block, policy=replace(block.policy, selector=selector)))
                    self._remove(block)
            except (KernelError, StoreError) as error:
                log.error("packets for %s may leave in the clear when its SA ends here: %s", block.mn, error)

    def _stand(self, block: Block) -> None:
        """Install the block in place of narrower ones for the same packets, unless a wider one is there."""
        device = block.policy.selector.ifindex
        others = [self._blocks[key] for key in self._to.get(block.policy.destination, ())]
        same = [other for other in others if _but_for_device(other.policy) == _but_for_device(block.policy)]
        if device and any(not other.policy.selector.ifindex for other in same):
            return
        self._put(block)
        for other in same:
            if not device and other.policy.selector.ifindex:
                self._remove(other)

    def _put(self, block: Block) -> None:
        """Also if the store is full: then it is written with the next note that can be."""
        assert self._kernel is not None
        try:
            self._store.put(KIND, block.key, block.dumps())
        except StoreError as error:
            log.error("that packets for %s are blocked here is not stored yet: %s", block.mn, error)
            self._store.put(KIND, block.key, block.dumps(), soon=True)
        self._enter(block)
        self._kernel.replace_policy(block.policy)

    def _enter(self, block: Block) -> None:
        self._blocks[block.key] = block
        self._to[block.policy.destination].add(block.key)

    def _remove(self, block: Block) -> None:
        if self._kernel is not None:
            self._kernel.delete_policy(block.policy)
        self._store.delete(KIND, block.key)
        # last, because whoever tries again after an error must find it
        del self._blocks[block.key]
        network = block.policy.destination
        self._to[network].discard(block.key)
        if not self._to[network]:
            del self._to[network]


def _too_wide(policy: KernelPolicy, context: IkeContext) -> bool:
    """Whether it would drop more than the SA's packets: all packets, or all for an outer address that others
    have as well."""
    if policy.mark is not None or policy.if_id:
        return False
    if context.remote.address not in policy.destination:
        return not policy.destination.prefixlen
    return not policy.destination.prefixlen or str(policy.destination) not in detourable(context)


def _but_for_device(policy: KernelPolicy) -> KernelPolicy:
    return replace(policy, selector=replace(policy.selector, ifindex=0))
