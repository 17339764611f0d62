"""Reads and changes the kernel's SAD and SPD: `Kernel`. Only `Mute`, `Detour` and this module touch the
kernel. I/O.

Errors are `KernelError` with the errno and a sentence about the request, never with a key.
"""

from __future__ import annotations

import errno
import logging
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Self

from ikectx.errors import KernelError, StateError, UsageError, WireError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import Address, ReplayState, Secret

from . import xfrm_wire as wire
from .algorithms import CIPHERS, INTEGRITY, KernelReplay, fit_replay, known, merge_replay
from .detour import Detour, is_local
from .mute import Mute
from .netlink import ROUTE, XFRM, Netlink, failure
from .spd_index import SpdIndex
from .xfrm import KernelPolicy, KernelSa, dump_policies, dump_sas, dump_sas_to, policies_of
from .xfrm_parts import ESP, INET, INET6, TRANSPORT, KernelLimits, KernelUsage, Mark, XfrmRequest

log = logging.getLogger(__name__)

__all__ = ["Detour", "InboundSnapshot", "Kernel", "Mute"]

LATE = int.from_bytes(b"LATE")
"""Written into an SA's `sequence`, which the kernel only stores. It marks our SAs for late packets."""

_REPORT = "please report the versions of the kernel and of strongSwan"

_MARKS = 1 << 16
"""Marks that are remembered; if there are more they are looked for again."""
_FEW = 4096
"""Ranges of at most so many SPIs are searched one by one."""
_CANNOT = (errno.ENOSYS, errno.ENOENT, errno.EINVAL, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP)
_PROBE = {INET: ("192.0.2.254", "192.0.2.253"), INET6: ("2001:db8::fffe", "2001:db8::fffd")}
_PROBE_SPI = bytes.fromhex("000000ff")
"""Reserved by IANA and never negotiated (RFC 4303, 2.1)."""


@dataclass(frozen=True, slots=True)
class InboundSnapshot:
    """The SAs and policies that decrypt packets towards the gateway."""

    sas: tuple[KernelSa, ...]
    policies: tuple[KernelPolicy, ...]


@dataclass(frozen=True, slots=True)
class LatePackets:
    """What is to decrypt packets that are still on their way, when charon has removed the SAs `going`.

    going: (destination, SPI). seconds: for which the SAs of `inbound` are restored then.
    """

    inbound: InboundSnapshot
    going: tuple[tuple[Address, bytes], ...]
    seconds: int


class Kernel:
    """XFRM in the network namespace this object was made in. Calls take some 100 us; threads may share it."""

    def __init__(self) -> None:
        self._xfrm = Netlink(XFRM, "XFRM")
        self._route = Netlink(ROUTE, "routes")
        self._spd = SpdIndex(self._xfrm)
        self.marked = False
        """Whether SAs here may have marks, so that some are found only by them."""
        self._marks: dict[tuple[Address, bytes], Mark] = {}
        """Marks of SAs that were found by their destination and SPI."""
        self._can: dict[tuple[Encr, int, Integ, int], bool] = {}
        self._unreadable: set[bytes] = set()
        """SPIs of SAs that were logged because they do not parse."""

    def close(self) -> None:
        self._spd.close()
        self._xfrm.close()
        self._route.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading.

    def dump_sas(self) -> list[KernelSa]:
        """All SAs that can be read. About 60 us each: use `get_sa` for a single one.

        The kernel may have SAs that are not charon's. One that cannot be read is left out, and logged once by
        its SPI. Errors: KernelError.
        """
        return list(self._readable(self._xfrm.ask(dump_sas())))

    def _readable(self, answers: Iterable[bytes]) -> Iterator[KernelSa]:
        for answer in answers:
            try:
                yield KernelSa.parse(answer)
            except WireError as error:
                spi = wire.spi_of(answer)
                if spi not in self._unreadable:
                    self._unreadable.add(spi)
                    log.warning("the kernel's SA with SPI %s is left out: %s", spi.hex(), error)

    def get_sa(
        self, destination: Address, spi: bytes, proto: int = ESP, mark: Mark | None = None
    ) -> KernelSa | None:
        """One SA, None if there is none. Errors: KernelError, also for one that cannot be read.

        The kernel finds an SA with a mark only by a mark that matches it. `mark` None: it may have any.
        """
        asked = mark or self._marks.get((destination, spi))
        (found,) = self._found([KernelSa(destination, destination, spi, proto, mark=asked)])
        if found is None and mark is None and self.marked:
            found = self._any_mark(destination, spi, proto)
        return found

    def get_sas(self, names: Sequence[tuple[Address, bytes]]) -> list[KernelSa | None]:
        """The ESP SAs of these destinations and SPIs, in one datagram. Otherwise as `get_sa`."""
        found = self._found([KernelSa(to, to, spi, mark=self._marks.get((to, spi))) for to, spi in names])
        if not self.marked:
            return found
        return [
            self._any_mark(*name, ESP) if sa is None else sa for name, sa in zip(names, found, strict=True)
        ]

    def sas_to(self, destination: Address) -> list[KernelSa]:
        """The SAs to that address. Errors: KernelError."""
        return list(self._readable(self._xfrm.ask(dump_sas_to(destination))))

    def _any_mark(self, destination: Address, spi: bytes, proto: int) -> KernelSa | None:
        """One SA whose mark is not known, from all to that address."""
        answers = self._xfrm.ask(dump_sas_to(destination))
        for sa in self._readable(answer for answer in answers if spi in answer):
            if (sa.destination, sa.spi, sa.proto) == (destination, spi, proto):
                if sa.mark is not None:
                    if len(self._marks) >= _MARKS:
                        self._marks.clear()
                    self._marks[destination, spi] = sa.mark
                return sa
        return None

    def _found(self, wanted: Sequence[KernelSa]) -> list[KernelSa | None]:
        requests, found = [sa.get() for sa in wanted], list[KernelSa | None]()
        for sa, outcome in zip(wanted, self._xfrm.attempt(requests, errno.ESRCH), strict=True):
            try:
                found.append(KernelSa.parse(outcome.answers[0]) if outcome.answers else None)
            except WireError as error:
                raise KernelError(f"the kernel's {sa} cannot be read: {error}", hint=_REPORT) from None
        return found

    def dump_policies(self) -> list[KernelPolicy]:
        """All policies but those of single sockets. Errors: KernelError, WireError."""
        return _policies(self._xfrm.ask(dump_policies()))

    def policies_about(self, reqids: Collection[int]) -> list[KernelPolicy]:
        """The present policies with a template for one of these reqids, see `SpdIndex`. An SA may be frozen
        meanwhile, so only the first of these calls dumps the SPD, and one after events were lost.

        Errors: KernelError, WireError.
        """
        return self._spd.about(reqids)

    async def policies_change(self, seconds: float) -> None:
        """Wait until the kernel reports a change of policies, but no longer than that. Errors:
        KernelError."""
        await self._spd.change(seconds)

    # Counters.

    def get_replay(self, sa: KernelSa, *, outbound: bool | None = None) -> tuple[ReplayState, KernelUsage]:
        """Replay state of an SA, and its usage so far.

        An inbound SA has number, window and bitmap, an outbound one only the number. `outbound` None: derived
        from the SA, see `is_outbound`. Errors: KernelError (ESRCH: it has gone), WireError.
        """
        state, usage = self._counters(sa)
        if outbound is None:
            outbound = self.is_outbound(replace(sa, replay=state))
        return (state.outbound if outbound else state.inbound, usage)

    def _counters(self, sa: KernelSa) -> tuple[KernelReplay, KernelUsage]:
        return self._replay_in(sa, self._xfrm.ask(sa.get_replay()))

    @staticmethod
    def _replay_in(sa: KernelSa, answers: Sequence[bytes]) -> tuple[KernelReplay, KernelUsage]:
        if not answers:
            raise WireError(f"the kernel answered nothing to a request to {sa.get_replay().what}")
        return sa.parse_replay(answers[0])

    def set_replay(self, sa: KernelSa, state: ReplayState, *, outbound: bool | None = None) -> None:
        """Write replay state in place.

        Outbound: the number goes forward only, because an IV or sequence number must never be used twice
        (StateError). Inbound: joined with the kernel's present state and fitted to the SA's own window, so
        that no received number is forgotten, except one that arrives in the microseconds between reading and
        writing. The state is read back, because a kernel that ignores it answers 0, too. Errors: KernelError,
        StateError, UsageError if the number needs ESN and the SA has none.
        """
        now, _ = self._counters(sa)
        now_sa = replace(sa, replay=now)
        self.set_replays([(now_sa, state, self.is_outbound(now_sa) if outbound is None else outbound)])

    def set_replays(self, changes: Sequence[tuple[KernelSa, ReplayState, bool]]) -> None:
        """The same for several SAs in one datagram, each as it was just read, and whether it is outbound."""
        wanted = [(sa, _raised(sa, state, outbound=outbound)) for sa, state, outbound in changes]
        requests = [one for sa, after in wanted for one in (sa.set_replay(after), sa.get_replay())]
        outcomes = self._xfrm.transact(requests)
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome.errno:
                raise failure(request, outcome)
        for (sa, after), outcome in zip(wanted, outcomes[1::2], strict=True):
            # packets that arrived or left since may have raised the numbers further
            there, _ = self._replay_in(sa, outcome.answers)
            told = replace(after.inbound, bitmap=known(after.bitmap, after.seq, after.window))
            if there.oseq < after.oseq or merge_replay(there.inbound, told) != there.inbound:
                raise KernelError(
                    f"the kernel took no notice of new counters of {sa}: it has sent {there.oseq} and "
                    f"received {there.seq}, instead of {after.oseq} and {after.seq}",
                    hint=_REPORT,
                )

    def count_on(self, sa: KernelSa, octets: int, packets: int) -> None:
        """Count towards the SA's limits from what another gateway has counted; when it was added stays.

        Never back, and not beyond the soft limits here: the next packet then has charon rekey the SA, where a
        hard limit that is passed would end it. `sa`: as `get_sa` gives it. Errors: KernelError.
        """
        _, usage = self._counters(sa)
        limits = sa.limits
        after = replace(
            usage,
            bytes=_count(usage.bytes, octets, limits.soft_bytes, limits.hard_bytes),
            packets=_count(usage.packets, packets, limits.soft_packets, limits.hard_packets),
        )
        if after != usage:
            self._xfrm.ask(sa.set_usage(after))

    def is_outbound(self, sa: KernelSa) -> bool:
        """Whether packets leave by this SA: from its direction (kernel 6.10) or usage, else from its
        addresses.

        If the gateway's address is not here yet, and nothing was received, only the caller can know.
        """
        return not is_local(self._route, sa.destination) if sa.outbound is None else sa.outbound

    # Changing.

    def batch(self, requests: Sequence[XfrmRequest]) -> None:
        """Several changes in one datagram, during which no other process changes SAs or policies.

        All are tried; the first refusal is raised. Packets may be processed in between.
        """
        for request, outcome in zip(requests, self._xfrm.transact(requests), strict=True):
            if outcome.errno:
                raise failure(request, outcome)

    def take_out(self, sas: Sequence[KernelSa]) -> list[KernelReplay | None]:
        """Delete SAs and return the last counters of each, None for one that was not there. Errors:
        KernelError, WireError.

        It is one datagram, so that next to no packet can come between a reading and its deletion.
        """
        outcomes = self._xfrm.transact([one for sa in sas for one in (sa.get_replay(), sa.delete())])
        found: list[KernelReplay | None] = []
        for sa, counters, deleted in zip(sas, outcomes[::2], outcomes[1::2], strict=True):
            if deleted.errno not in (0, errno.ESRCH):
                raise failure(sa.delete(), deleted)
            found.append(sa.parse_replay(counters.answers[0])[0] if counters.answers else None)
        return found

    def delete_sa(self, sa: KernelSa) -> bool:
        """Delete an SA; False: it was not there. Errors: KernelError."""
        return self._gone(sa.delete(), errno.ESRCH)

    def reserve_spi(self, source: Address, destination: Address, low: int, high: int) -> bytes | None:
        """Reserve a free inbound ESP SPI of low..high (see `KernelSa.reserve`), None: there is none.

        `delete_sa` of that name releases it, which must happen before anybody else adds an SA under it.
        Errors: KernelError, WireError.
        """
        wanted = KernelSa(source, destination, bytes(4))
        ranges = [(low, high)] * 3
        if high - low < _FEW:
            # the kernel tries at random, as often as the range is long, and may miss the last free ones
            singles = [(spi, spi) for spi in range(low, high + 1)]
            secrets.SystemRandom().shuffle(singles)
            ranges += singles
        for first, last in ranges:
            try:
                answers = self._xfrm.ask(wanted.reserve(first, last))
            except KernelError as error:
                if error.errno != errno.ENOENT:
                    raise
                continue
            return KernelSa.parse(answers[0]).spi if answers else None
        return None

    def replace_policies(self, policies: Iterable[KernelPolicy]) -> None:
        """Install policies, each in place of one with the same selector and direction, in one datagram.
        Errors: KernelError."""
        self.batch([policy.put() for policy in policies])

    def replace_policy(self, policy: KernelPolicy) -> None:
        """The same for one."""
        self._xfrm.ask(policy.put())

    def delete_policies(self, policies: Iterable[KernelPolicy]) -> None:
        """Those of these that are there, in one datagram. Errors: KernelError."""
        self._xfrm.attempt([policy.delete() for policy in policies], errno.ENOENT)

    def delete_policy(self, policy: KernelPolicy) -> bool:
        """Delete the policy of that selector and direction; False: it was not there. Errors: KernelError."""
        return self._gone(policy.delete(), errno.ENOENT)

    def _gone(self, request: XfrmRequest, absent: int) -> bool:
        try:
            self._xfrm.ask(request)
        except KernelError as error:
            if error.errno == absent:
                return False
            raise
        return True

    # Probes.

    def supports(self, encr: Encr, bits: int, integ: Integ, family: int = INET) -> bool:
        """Whether the kernel does ESP with these transforms: an SA is added and deleted again.

        /proc/crypto would not show that, because modules load on demand. `bits` 0: the cipher has one size.
        False also for transforms without a kernel name. Errors: KernelError (EPERM).
        """
        key = (encr, bits, integ, family)
        if key not in self._can:
            self._can[key] = self._try(*key)
        return self._can[key]

    def _try(self, encr: Encr, bits: int, integ: Integ, family: int) -> bool:
        cipher = CIPHERS.get(encr)
        if cipher is None or (integ is not Integ.NONE and integ not in INTEGRITY):
            return False
        size = bits or cipher.sizes[0]
        if size not in cipher.sizes or (not cipher.icv and integ is Integ.NONE):
            return False
        auth_name, trunc, auth_bits = INTEGRITY.get(integ, ("", 0, 0))
        source, destination = _PROBE[family]
        sa = KernelSa(
            ip_address(source),
            ip_address(destination),
            _PROBE_SPI,
            mode=TRANSPORT,
            encr_name=cipher.name,
            # distinct octets, because 3DES refuses equal key halves
            encr_key=Secret(bytes(range(size // 8 + cipher.salt))),
            icv_bits=cipher.icv,
            is_aead=bool(cipher.icv),
            auth_name=auth_name,
            auth_key=Secret(bytes(range(auth_bits // 8))),
            auth_trunc_bits=trunc,
            limits=KernelLimits(hard_add=1),
        )
        added, _ = self._xfrm.transact([sa.add(), sa.delete()])
        if added.errno in (0, errno.EEXIST):
            return True
        if added.errno in _CANNOT:
            return False
        raise failure(sa.add(), added)

    # Late packets, after the SA was let go.

    def snapshot_inbound(self, sas: Iterable[KernelSa]) -> InboundSnapshot:
        """These inbound SAs, as they were just read, with their "in" and "fwd" policies.

        Call it just before charon deletes them. Errors: KernelError, WireError.
        """
        found = tuple(sas)
        policies = self.policies_about({sa.reqid for sa in found})
        wanted: dict[bytes, KernelPolicy] = {}
        for sa in found:
            wanted.update((policy.raw, policy) for policy in policies_of(policies, sa, "in", "fwd"))
        return InboundSnapshot(found, tuple(wanted.values()))

    def restore_inbound(self, snapshot: InboundSnapshot, seconds: int) -> int:
        """Restore them after charon deleted them; after `seconds` the kernel drops them, agent or not.

        They only receive, so no counter or IV is used. SAs and policies that exist (again) are left as they
        are. Returns the number of SAs restored. Errors: KernelError for the first that was refused, after
        trying all.
        """
        if seconds < 1 or not snapshot.sas:
            return 0
        limits = KernelLimits(hard_add=seconds)
        requests = [replace(sa, limits=limits, sequence=LATE).add() for sa in snapshot.sas]
        requests += [replace(policy, limits=limits, index=0).add() for policy in snapshot.policies]
        outcomes = self._xfrm.attempt(requests, errno.EEXIST)
        return sum(outcome.errno == 0 for outcome in outcomes[: len(snapshot.sas)])

    def late_sas(self) -> list[KernelSa]:
        """SAs that `restore_inbound` restored and that have not expired, of this agent or one before it."""
        mark = LATE.to_bytes(4, sys.byteorder)  # others, thousands maybe, are not read
        found = self._readable(answer for answer in self._xfrm.ask(dump_sas()) if mark in answer)
        return [sa for sa in found if sa.sequence == LATE]

    def drop_late(self, sas: Iterable[KernelSa]) -> int:
        """Delete such SAs and their policies early, for instance if the same SA comes back. Returns their
        number.

        Other SAs, and policies without an expiry, are not touched.
        """
        late = [
            now
            for sa in sas
            if (now := self.get_sa(sa.destination, sa.spi, sa.proto, sa.mark)) is not None
            and now.sequence == LATE
        ]
        if late:
            policies = self.policies_about({sa.reqid for sa in late})
            policies = [policy for policy in policies if policy.limits.hard_add is not None]
            for sa in late:
                self.delete_policies(policies_of(policies, sa, "in", "fwd"))
                self.delete_sa(sa)
        return len(late)


def _raised(sa: KernelSa, state: ReplayState, *, outbound: bool) -> KernelReplay:
    """The SA's counters after `Kernel.set_replay`. Errors: as there."""
    now = sa.replay
    if state.seq >> 32 and not sa.esn:
        raise UsageError(f"sequence number {state.seq} is too high for {sa}, which has no ESN")
    state = replace(state, esn=sa.esn)
    if outbound:
        if state.seq < now.oseq:
            raise StateError(f"{sa} has sent {now.oseq} already; its counter cannot go back to {state.seq}")
        return replace(now, oseq=state.seq)
    joined = fit_replay(merge_replay(now.inbound, fit_replay(state, now.window)), now.window)
    return replace(now, seq=joined.seq, bitmap=joined.bitmap)


def _count(now: int, before: int, soft: int | None, hard: int | None) -> int:
    most = soft if soft is not None else before if hard is None else hard * 9 // 10
    return max(now, min(before, most))


def _policies(answers: Iterable[bytes]) -> list[KernelPolicy]:
    policies = map(KernelPolicy.parse, answers)
    return [policy for policy in policies if not policy.direction.startswith("socket")]
