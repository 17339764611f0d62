"""ESP SAs and policies of the kernel as frozen data, to and from XFRM's netlink messages.

Sans-IO: `kernel.py` has the sockets. A message that is parsed and built again is the same message: attributes
without a meaning here keep number and octets in `extra`, so an SA or policy can be restored exactly as it
was. Keys exist only inside `Secret`.

Sources: linux/xfrm.h (uapi), the kernel's net/xfrm/xfrm_user.c for which attributes a message must carry.
Foreign bytes raise only `WireError`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ikectx.errors import WireError
from ikectx.numbers import Encr, Integ
from ikectx.sa.context import NO_SECRET, Address, Secret

from . import xfrm_wire as wire
from .algorithms import (
    CIPHERS,
    INTEGRITY,
    KernelReplay,
    encryption_of,
    fit_replay,
    integrity_of,
    merge_replay,
)
from .netlink_parts import ACK, CREATE, DUMP, EXCL, REPLACE, REQUEST
from .xfrm_parts import (
    ESP,
    NO_LIMITS,
    NO_USAGE,
    TUNNEL,
    Encap,
    KernelLimits,
    KernelUsage,
    Mark,
    Network,
    Selector,
    Template,
    XfrmRequest,
    address_of,
    algo,
    algorithm_of,
    any_selector,
    encap_of,
    family_of,
    limit_values,
    limits_of,
    mark_attribute,
    mark_of,
    network_of,
    octets16,
    packed,
    replay_of,
    selector_of,
    selector_values,
    template_octets,
    templates_of,
    usage_of,
)

__all__ = [
    "CIPHERS",
    "INTEGRITY",
    "Encap",
    "KernelLimits",
    "KernelPolicy",
    "KernelReplay",
    "KernelSa",
    "KernelUsage",
    "Mark",
    "Selector",
    "Template",
    "XfrmRequest",
    "fit_replay",
    "merge_replay",
]

STATE_ESN = 128
ALLOW, BLOCK = 0, 1
DIRECTIONS = ("in", "out", "fwd", "socket in", "socket out", "socket fwd")
_SA_DIR = 33
"""XFRMA_SA_DIR (kernel 6.10): 1 inbound, 2 outbound."""
_OFFLOAD_DEV, _OFFLOAD_PACKET = 28, 4
"""XFRMA_OFFLOAD_DEV, an interface index and flags; the flag for offload of all of ESP to the card."""
_SA_PCPU = 35
"""XFRMA_SA_PCPU (kernel 6.13): the CPU that alone uses the SA."""
_FRESH = KernelReplay()


@dataclass(frozen=True, slots=True)
class KernelSa:
    """One SA of the kernel's SAD.

    Sizes are in bits. `encr_key` has an AEAD's salt, too, at its end, as KEYMAT does. `mode` is XFRM's.
    `sequence` is a number of the owner's choice that the kernel only stores.
    """

    source: Address
    destination: Address
    spi: bytes
    proto: int = ESP
    reqid: int = 0
    mode: int = TUNNEL
    encr_name: str = ""
    encr_key: Secret = NO_SECRET
    icv_bits: int = 0
    auth_name: str = ""
    auth_key: Secret = NO_SECRET
    auth_trunc_bits: int = 0
    is_aead: bool = False
    replay: KernelReplay = _FRESH
    flags: int = 0
    encap: Encap | None = None
    mark: Mark | None = None
    if_id: int = 0
    limits: KernelLimits = NO_LIMITS
    usage: KernelUsage = NO_USAGE
    failures: tuple[int, int, int] = (0, 0, 0)
    """Packets refused: outside the window, replayed, integrity failed."""
    sequence: int = 0
    selector: Selector | None = None
    extra: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6, of the outer addresses."""
        return family_of(self.destination)

    @property
    def encr_bits(self) -> int:
        """Length of the encryption key with its salt."""
        return 8 * len(self.encr_key)

    @property
    def esn(self) -> bool:
        """Extended (64-bit) sequence numbers."""
        return bool(self.flags & STATE_ESN)

    @property
    def transforms(self) -> tuple[Encr, int, Integ] | None:
        """(encryption, key bits or 0 where the cipher has one size, integrity), None: not in our tables."""
        encr = encryption_of(self.encr_name, len(self.encr_key), self.icv_bits)
        integ = integrity_of(self.auth_name, self.auth_trunc_bits)
        return None if encr is None or integ is None else (*encr, integ)

    @property
    def outbound(self) -> bool | None:
        """None if it is unknown: kernels before 6.10, and nothing sent or received yet."""
        for number, octets in self.extra:
            if number == _SA_DIR and octets[:1] in (b"\x01", b"\x02"):
                return octets[:1] == b"\x02"
        if bool(self.replay.oseq) == bool(self.replay.seq):
            return None
        return bool(self.replay.oseq)

    @property
    def cpu(self) -> int | None:
        """The CPU that alone uses the SA; None: all do."""
        for number, octets in self.extra:
            if number == _SA_PCPU:
                return int.from_bytes(octets[:4], sys.byteorder)
        return None

    @property
    def offloaded(self) -> bool:
        """The network card does all of it and keeps the counters (packet offload)."""
        flags = [octets[4] for number, octets in self.extra if number == _OFFLOAD_DEV and len(octets) > 4]
        return any(flag & _OFFLOAD_PACKET for flag in flags)

    def __post_init__(self) -> None:
        if len(self.spi) != 4:
            raise ValueError("an SPI has 4 octets")

    def __str__(self) -> str:
        kind = "ESP" if self.proto == ESP else f"protocol {self.proto}"
        return f"{kind} SA {self.spi.hex()} to {self.destination}"

    @classmethod
    def parse(cls, data: bytes) -> KernelSa:
        """An XFRM_MSG_NEWSA, as GETSA answers it. Errors: WireError."""
        message = wire.parse(wire.usersa_info, data)
        found = wire.attributes(message)
        family = message["family"]
        cipher = found.get("XFRMA_ALG_AEAD") or found.get("XFRMA_ALG_CRYPT")
        encr_name, encr_key = algorithm_of(cipher)
        auth = found.get("XFRMA_ALG_AUTH_TRUNC") or found.get("XFRMA_ALG_AUTH")
        auth_name, auth_key = algorithm_of(auth)
        long_form = found.get("XFRMA_REPLAY_ESN_VAL")
        return cls(
            source=address_of(message["saddr"], family),
            destination=address_of(message["daddr"], family),
            spi=message["spi"],
            proto=message["proto"],
            reqid=message["reqid"],
            mode=message["mode"],
            encr_name=encr_name,
            encr_key=encr_key,
            icv_bits=found["XFRMA_ALG_AEAD"]["icv_bits"] if "XFRMA_ALG_AEAD" in found else 0,
            auth_name=auth_name,
            auth_key=auth_key,
            auth_trunc_bits=found["XFRMA_ALG_AUTH_TRUNC"]["icv_bits"]
            if "XFRMA_ALG_AUTH_TRUNC" in found
            else 0,
            is_aead="XFRMA_ALG_AEAD" in found,
            replay=replay_of(found, message["replay_window"], esn=bool(message["flags"] & STATE_ESN)),
            flags=message["flags"],
            encap=encap_of(found.get("XFRMA_ENCAP")),
            mark=mark_of(found.get("XFRMA_MARK")),
            if_id=found["XFRMA_IF_ID"]["number"] if "XFRMA_IF_ID" in found else 0,
            limits=limits_of(message),
            usage=usage_of(message, "cur_"),
            failures=(message["stat_window"], message["stat_replay"], message["stat_integrity"]),
            sequence=message["seq"],
            selector=selector_of(message, family),
            extra=wire.other_attributes(message),
        )._checked(long_form is not None)

    def _checked(self, long_form: bool) -> KernelSa:
        if self.esn and not long_form:
            raise WireError(f"{self}: extended sequence numbers without the long replay state")
        return self

    def _id(self) -> dict[str, Any]:
        return {
            "daddr": packed(self.destination),
            "spi": self.spi,
            "proto": self.proto,
            "family": self.family,
        }

    def _lookup(self) -> list[tuple[str, Any]]:
        """The attributes that the kernel also needs to find this SA."""
        return mark_attribute(self.mark)

    def _replay_attribute(self, state: KernelReplay) -> tuple[str, dict[str, Any]]:
        if state.words is None:
            return ("XFRMA_REPLAY_VAL", {"oseq": state.oseq, "seq": state.seq, "bitmap": state.bitmap})
        names = ("bmp_len", "oseq", "seq", "oseq_hi", "seq_hi", "window")
        return (
            "XFRMA_REPLAY_ESN_VAL",
            {**dict(zip(names, state.long_head(), strict=True)), "words": state.ring()},
        )

    def add(self) -> XfrmRequest:
        """XFRM_MSG_NEWSA with its replay state; `usage` begins anew.

        Errors: WireError for a field that does not fit.
        """
        attributes: list[tuple[str, Any]] = []
        if self.is_aead:
            attributes.append(("XFRMA_ALG_AEAD", algo(self.encr_name, self.encr_key, self.icv_bits)))
        elif self.encr_name:
            attributes.append(("XFRMA_ALG_CRYPT", algo(self.encr_name, self.encr_key)))
        if self.auth_name:
            attributes.append(("XFRMA_ALG_AUTH", algo(self.auth_name, self.auth_key)))
            attributes.append(
                ("XFRMA_ALG_AUTH_TRUNC", algo(self.auth_name, self.auth_key, self.auth_trunc_bits))
            )
        if self.encap is not None:
            attributes.append(
                (
                    "XFRMA_ENCAP",
                    {
                        "type": self.encap.type,
                        "sport": octets16(self.encap.source_port),
                        "dport": octets16(self.encap.destination_port),
                        "oa": self.encap.original,
                    },
                )
            )
        attributes += self._lookup()
        attributes.append(self._replay_attribute(self.replay))
        if self.if_id:
            attributes.append(("XFRMA_IF_ID", {"number": self.if_id}))
        values = {
            **self._id(),
            **selector_values(self.selector or any_selector(self.destination)),
            **limit_values(self.limits),
            "saddr": packed(self.source),
            "seq": self.sequence,
            "reqid": self.reqid,
            "mode": self.mode,
            # The long form has its own window; a second one here would be compared with it.
            "replay_window": self.replay.window if self.replay.words is None else 0,
            "flags": self.flags,
        }
        flags = REQUEST | ACK | CREATE | EXCL
        data = wire.build(wire.usersa_info, wire.NEWSA, flags, values, attributes, extra=self.extra)
        return XfrmRequest(Secret(data), f"add {self}")

    def reserve(self, low: int, high: int) -> XfrmRequest:
        """XFRM_MSG_ALLOCSPI: hold a free SPI of low..high, 256 at least, for an inbound SA like this one.

        The answer is the SA with its SPI and without keys. It blocks `add` of that SPI, and is gone after
        net.core.xfrm_acq_expires seconds (30, and 165 where charon's kernel-netlink has set it).
        """
        values = {
            **self._id(),
            **selector_values(any_selector(self.destination)),
            **limit_values(NO_LIMITS),
            "spi": bytes(4),
            "saddr": packed(self.source),
            "reqid": self.reqid,
            "mode": self.mode,
            "min": low,
            "max": high,
        }
        data = wire.build(wire.userspi_info, wire.ALLOCSPI, REQUEST, values, self._lookup())
        return XfrmRequest(Secret(data), f"reserve an SPI of {low:#x}..{high:#x} to {self.destination}")

    def delete(self) -> XfrmRequest:
        """XFRM_MSG_DELSA."""
        flags = REQUEST | ACK
        data = wire.build(wire.usersa_id, wire.DELSA, flags, self._id(), self._lookup())
        return XfrmRequest(Secret(data), f"delete {self}")

    def get(self) -> XfrmRequest:
        """XFRM_MSG_GETSA for this SA (destination, SPI, protocol and mark count)."""
        data = wire.build(wire.usersa_id, wire.GETSA, REQUEST, self._id(), self._lookup())
        return XfrmRequest(Secret(data), f"look for {self}")

    def get_replay(self) -> XfrmRequest:
        """XFRM_MSG_GETAE: replay state and lifetimes."""
        values = {**self._id(), "saddr": packed(self.source), "flags": 2 | 4, "reqid": self.reqid}
        data = wire.build(wire.aevent_id, wire.GETAE, REQUEST, values, self._lookup())
        return XfrmRequest(Secret(data), f"read the counters of {self}")

    def set_replay(self, state: KernelReplay) -> XfrmRequest:
        """XFRM_MSG_NEWAE: both directions' counters in place. Form and size must be the installed SA's.

        The kernel ignores a state in the other form, and answers 0: read it back.
        """
        return self._new_ae(self._replay_attribute(state))

    def set_usage(self, usage: KernelUsage) -> XfrmRequest:
        """XFRM_MSG_NEWAE: what counts towards the limits."""
        names = ("bytes", "packets", "add_time", "use_time")
        return self._new_ae(("XFRMA_LTIME_VAL", {name: getattr(usage, name) for name in names}))

    def _new_ae(self, attribute: tuple[str, Any]) -> XfrmRequest:
        values = {**self._id(), "saddr": packed(self.source), "reqid": self.reqid}
        flags = REQUEST | ACK | REPLACE
        attributes = [*self._lookup(), attribute]
        data = wire.build(wire.aevent_id, wire.NEWAE, flags, values, attributes)
        return XfrmRequest(Secret(data), f"write the counters of {self}")

    def parse_replay(self, data: bytes) -> tuple[KernelReplay, KernelUsage]:
        """The answer to `get_replay` for this SA. Errors: WireError."""
        found = wire.attributes(wire.parse(wire.aevent_id, data))
        usage = found.get("XFRMA_LTIME_VAL")
        return (
            replay_of(found, self.replay.window, esn=self.esn),
            NO_USAGE if usage is None else usage_of(usage, ""),
        )


def dump_sas() -> XfrmRequest:
    """XFRM_MSG_GETSA for all SAs."""
    data = wire.build(wire.usersa_id, wire.GETSA, REQUEST | DUMP, {})
    return XfrmRequest(Secret(data), "list the SAs")


def dump_sas_to(destination: Address) -> XfrmRequest:
    """XFRM_MSG_GETSA for all SAs to that address, whatever their marks."""
    nowhere, bits = bytes(len(destination.packed)), destination.max_prefixlen
    data = wire.dump_to(wire.GETSA, nowhere, destination.packed, family_of(destination), bits)
    return XfrmRequest(Secret(data), f"list the SAs to {destination}")


@dataclass(frozen=True, slots=True)
class KernelPolicy:
    """One policy of the kernel's SPD. `direction`: one of `DIRECTIONS`. `priority`: smaller precedes.

    `index` is the kernel's name for it. `kind`: 0 main, 1 sub.
    """

    direction: str
    selector: Selector
    priority: int = 0
    action: int = ALLOW
    templates: tuple[Template, ...] = ()
    mark: Mark | None = None
    if_id: int = 0
    flags: int = 0
    share: int = 0
    index: int = 0
    kind: int = 0
    limits: KernelLimits = NO_LIMITS
    usage: KernelUsage = NO_USAGE
    extra: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)

    @property
    def source(self) -> Network:
        return network_of(self.selector.source, self.selector.source_prefix)

    @property
    def destination(self) -> Network:
        return network_of(self.selector.destination, self.selector.destination_prefix)

    def __str__(self) -> str:
        return f"policy {self.direction} {self.source} -> {self.destination} (priority {self.priority})"

    @classmethod
    def parse(cls, data: bytes) -> KernelPolicy:
        """An XFRM_MSG_NEWPOLICY, as GETPOLICY answers it or `raw` gives it. Errors: WireError."""
        message = wire.parse(wire.userpolicy_info, data)
        found = wire.attributes(message)
        if message["dir"] >= len(DIRECTIONS):
            raise WireError(f"a policy's direction {message['dir']}")
        return cls(
            direction=DIRECTIONS[message["dir"]],
            selector=selector_of(message, message["sel_family"]),
            priority=message["priority"],
            action=message["action"],
            templates=templates_of(found["XFRMA_TMPL"]["octets"]) if "XFRMA_TMPL" in found else (),
            mark=mark_of(found.get("XFRMA_MARK")),
            if_id=found["XFRMA_IF_ID"]["number"] if "XFRMA_IF_ID" in found else 0,
            flags=message["flags"],
            share=message["share"],
            index=message["index"],
            kind=found["XFRMA_POLICY_TYPE"]["type"] if "XFRMA_POLICY_TYPE" in found else 0,
            limits=limits_of(message),
            usage=usage_of(message, "cur_"),
            extra=wire.other_attributes(message),
        )

    @property
    def raw(self) -> bytes:
        """The policy as octets, to be stored and parsed again by `parse`; it has no key."""
        return self._put(wire.NEWPOLICY, CREATE | EXCL)

    def blocking(self) -> KernelPolicy:
        """The same policy, dropping its packets instead of protecting them."""
        return replace(self, action=BLOCK, templates=())

    def _put(self, number: int, flags: int) -> bytes:
        attributes: list[tuple[str, Any]] = []
        if self.templates:
            octets = b"".join(template_octets(template) for template in self.templates)
            attributes.append(("XFRMA_TMPL", {"octets": octets}))
        attributes += self._lookup()
        values = {
            **selector_values(self.selector),
            **limit_values(self.limits),
            "priority": self.priority,
            "index": self.index,
            "dir": DIRECTIONS.index(self.direction),
            "action": self.action,
            "flags": self.flags,
            "share": self.share,
        }
        flags |= REQUEST | ACK
        return wire.build(wire.userpolicy_info, number, flags, values, attributes, extra=self.extra)

    def _lookup(self) -> list[tuple[str, Any]]:
        attributes = mark_attribute(self.mark)
        if self.kind:
            attributes.append(("XFRMA_POLICY_TYPE", {"type": self.kind}))
        if self.if_id:
            attributes.append(("XFRMA_IF_ID", {"number": self.if_id}))
        return attributes

    def add(self) -> XfrmRequest:
        """XFRM_MSG_NEWPOLICY; the kernel refuses it if the policy exists."""
        return XfrmRequest(Secret(self.raw), f"add {self}")

    def put(self) -> XfrmRequest:
        """XFRM_MSG_UPDPOLICY: add or replace the policy of the same selector and direction."""
        return XfrmRequest(Secret(self._put(wire.UPDPOLICY, REPLACE)), f"replace {self}")

    def delete(self) -> XfrmRequest:
        """XFRM_MSG_DELPOLICY by selector and direction (an index could name another policy by now)."""
        values = {**selector_values(self.selector), "dir": DIRECTIONS.index(self.direction)}
        flags = REQUEST | ACK
        data = wire.build(wire.userpolicy_id, wire.DELPOLICY, flags, values, self._lookup())
        return XfrmRequest(Secret(data), f"delete {self}")


def dump_policies() -> XfrmRequest:
    """XFRM_MSG_GETPOLICY for all policies."""
    data = wire.build(wire.userpolicy_id, wire.GETPOLICY, REQUEST | DUMP, {})
    return XfrmRequest(Secret(data), "list the policies")


def policies_of(policies: Iterable[KernelPolicy], sa: KernelSa, *directions: str) -> list[KernelPolicy]:
    """Those of `policies` whose templates ask for `sa` (its reqid, outer addresses and protocol).

    Their marks may differ from the SA's: charon gives those of an inbound SA only to its policies.
    """
    return [
        policy
        for policy in policies
        if policy.direction in directions
        and policy.if_id == sa.if_id
        and any(
            template.reqid == sa.reqid
            and template.proto == sa.proto
            and template.mode == sa.mode
            # in transport mode a template may leave the addresses open
            and (template.destination == sa.destination or int(template.destination) == 0)
            and (template.source == sa.source or int(template.source) == 0)
            for template in policy.templates
        )
    ]
