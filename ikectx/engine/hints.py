"""What an operator can do about each status, at either gateway. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ikectx.numbers import Status

_RECONNECT = "it stays where it is; let the MN connect without that"

HINTS: Mapping[Status, str] = {
    Status.FAILED: "read {there}'s log and its `history`",
    Status.MALFORMED: "run the same version at both gateways",
    Status.NOT_ALLOWED: "change what is not allowed in {there}'s configuration: the right `push` and whose "
    "SAs {back} may bring ([[peer]]), [connections.NAME], or its connection in swanctl.conf",
    Status.NO_CONNECTION: "load a connection of that name at {there}",
    Status.NO_CHILD: "add the child to the connection at {there}",
    Status.IKE_SPI_IN_USE: "{there} has an SA of that name: look there for a leftover with `list`",
    Status.ESP_SPI_IN_USE: "wait for a rekey of the child, which picks a new SPI, then try again",
    Status.VIP_IN_USE: "pools of two gateways must not overlap, nor fill: charon then gives away an address "
    "that a node took along when it moved; use pools larger than the number of identities, or one place that "
    "assigns for all gateways (RADIUS by user, attr-sql without --timeout)",
    Status.SELECTORS_OVERLAP: "end the SA at {there} that has these traffic selectors",
    Status.ALGORITHM: "load the algorithm at {there}, or rekey with another proposal",
    Status.PROPOSAL: "permit the algorithms at {there} in ike_proposals or esp_proposals of "
    "[connections.NAME], or align the proposals of both gateways and rekey",
    Status.NO_ADDRESS: "give {there} an address of the MN's family",
    Status.CHARON: "look at charon at {there}: `doctor` there tells more",
    Status.KERNEL: "look at the kernel at {there}: `doctor` there tells more",
    Status.UNREACHABLE: "check address, port, firewall and certificates: `doctor` tells more",
    Status.PEER_SILENT: "relay it (--address relay; auto does so): a filter or NAT keeps {there} from it, or "
    "it does not go where it is told (libreswan 4.10 after a rekey of its IKE_SA)",
    Status.PEER_REFUSED: "relay it (--address relay; auto does so): it does not accept {there}'s address",
    Status.UNKNOWN_TRANSFER: "try again: {there} was restarted or had waited too long",
    Status.BUSY: "try again when the exchange or the other transfer is over",
    Status.STALE_EPOCH: "a newer owner exists: see `history` at both gateways before anything else. Where "
    "{back} serves the SA and has lost its store, rekey the IKE_SA (`swanctl --rekey --ike`): {there} counts "
    "owners by SPIs, and those of a rekeyed SA are new",
    Status.NOT_COVERED: "this SA cannot be moved: see the limits in the documentation",
    Status.AMBIGUOUS: "name the SA by its SPIs: `list` at {there} shows them",
    Status.IN_DOUBT: "{there}'s agent has lost its notes (state.db was moved away, or restored from an old "
    "backup), so {back} does not serve the SA before it is known that {there} does not. Look with `swanctl "
    "--list-sas` there: if it serves the MN, leave both as they are, or end the SA there and let the MN "
    "connect anew. If it does not, end the SA there; {back} asks again and then serves the MN",
    Status.NO_MOBIKE: "--address relay, or move the gateway's address along (--address keep)",
    Status.IDENTITY: "align the connection's identities (`id`, `eap_id`), or name the SA's gateway identity "
    "in local_ids of [connections.NAME] at {there}",
    Status.AUTHENTICATION: "align `auth` of the connection at both gateways",
    Status.MN_ADDRESS: "check the MN's address in `list`: it must not be a gateway's own or a special one",
    Status.VIP_NOT_ALLOWED: "name what MNs may have in virtual_ips of [connections.NAME] at {there}",
    Status.SELECTORS: "align local_ts and remote_ts of the child at both gateways",
    Status.MODE: "align `mode` of the child at both gateways",
    Status.LIFETIME: "align rekey_time and reauth_time at both gateways, then rekey the SA",
    Status.NUMBERS_SPENT: "rekey it first (`swanctl --rekey`), then try again",
    Status.SPIS: "rekey it, which picks new SPIs, then try again",
    Status.TOO_MUCH: "let the MN connect anew with fewer CHILD_SAs or traffic selectors; where charon's HA "
    "messages are too long, set a larger charon.plugins.ha.buflen there and restart charon and agent",
    Status.PPK: _RECONNECT,
    Status.NOT_ESP: _RECONNECT,
    Status.LOCAL_VIP: "it stays where it is: an SA in which the gateway is the client of a pool is not moved",
    Status.KEY_EXCHANGES: "run strongSwan 6.0.1 or newer at {there}",
    Status.PER_CPU: "it stays where it is; let the MN connect without `per_cpu_sas`",
    Status.OFFLOADED: "it stays where it is; let the MN connect without `hw_offload = packet`",
}
"""{there}: the gateway that refuses; {back}: the one that has the SA."""


def advice(status: Status, *, refused_here: bool = False) -> str:
    """What to do about a refusal; empty: nothing is known. `refused_here`: for the log of who refuses."""
    this, other = "this gateway", "the other gateway"
    there, back = (this, other) if refused_here else (other, this)
    return HINTS.get(status, "").format(there=there, back=back)
