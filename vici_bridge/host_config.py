"""The settings of an agent for its own host: the charon, the kernel and what both may do with SAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ikectx.sa.context import Address
from vici_bridge.ha.messages import BUFLEN
from vici_bridge.policy.allowed import Rules
from vici_bridge.policy.new_names import SPI_MAX, SPI_MIN

from .rekey_after_move import RekeyAfter


@dataclass(frozen=True, slots=True)
class HostConfig:
    """The agent's settings for its own host.

    `ports`: charon's UDP ports (charon.port, charon.port_nat_t). `ha_buflen`: octets of the longest HA
    message that charon reads. `segments`: the ha plugin's `segment_count`, 0: not known. `kernel_esp` False:
    charon uses user-space ESP (kernel-libipsec), whose counters cannot be read.
    `forward_via`: by peer name, inner addresses of that gateway. `updown`: by connection name. `host_access`:
    connections whose children have `hostaccess = yes`, for the updown script. `announced`:
    connections whose updown script leads packets for a mobile node to the gateway that serves it. `agents`:
    connections whose mobile nodes have an agent. `oseq_jump`: packets; `late`: seconds for which late packets
    are decrypted after letting go; `early`: seconds after which the kernel drops what was installed for a
    mobile node that has announced itself. `mobile_node`: charon is a mobile node's own, so its SAs are never
    muted one by one. `collision`: how an SA whose SPIs are taken is treated: "update" (UPDATE_SPI, else a
    rekey), "rekey" or "refuse". `spi_min`, `spi_max`: the range of new inbound SPIs, charon's own.
    `rekey_after`: what of an SA that came here gets keys that the gateway before does not know. `rules`: by
    connection name, limits that charon does not report; `peers`: by name,
    addresses of other gateways. `updown_helper`: as in `updown.Script`.
    """

    addresses: tuple[Address, ...]
    ports: tuple[int, int] = (500, 4500)
    ha_buflen: int = BUFLEN
    ha_local: str = "127.0.0.2"
    ha_remote: str = "127.0.0.1"
    ha_port: int = 4510
    vici: str = "unix:///run/charon.vici"
    segments: int = 0
    kernel_esp: bool = True
    updown: Mapping[str, str] = field(default_factory=dict)
    forward_via: Mapping[str, Sequence[Address]] = field(default_factory=dict)
    host_access: frozenset[str] = frozenset()
    announced: frozenset[str] = frozenset()
    agents: frozenset[str] = frozenset()
    oseq_jump: int = 65536
    late: int = 5
    early: int = 120
    mobile_node: bool = False
    collision: str = "update"
    spi_min: int = SPI_MIN
    spi_max: int = SPI_MAX
    rekey_after: RekeyAfter = "no"
    rules: Mapping[str, Rules] = field(default_factory=dict)
    peers: Mapping[str, frozenset[Address]] = field(default_factory=dict)
    updown_helper: str = ""
