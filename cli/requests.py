"""The requests on the control sockets: the keys of every command, of a gateway's agent and of a mobile
node's, and addresses."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING

from vici_bridge.vici.request_keys import Keys, Kind

if TYPE_CHECKING:
    from ikectx.engine.ports import Address as Wish
    from ikectx.sa.context import Address

ADDRESSES: Mapping[str, Wish] = {
    **{"auto": "auto", "move": "update", "update": "update", "keep": "keep"},
    **{"relay": "relay", "invite": "invite"},
}
"""How a mobile node is to get to the other gateway, by the word of the option; "update" is the older word."""
_NAMES: dict[str, Kind] = {"ike": "text", "ike-id": "text", "spi": "text", "peer": "text", "all": "flag"}
"""The ways to name IKE_SAs (`views.chosen`)."""

GATEWAY: Mapping[str, Keys] = {
    "version": {},
    "status": {},
    "list-contexts": {},
    "show-context": {**_NAMES, "secrets": "flag"},
    "transfer": {**_NAMES, "to": "text", "dry-run": "flag", "address": "text", "no-detour": "flag"},
    "pull": {"from": "text", "mn": "text", "sa": "text", "dry-run": "flag"},
    "history": {"limit": "text", "audit": "flag"},
    "verify-history": {"head": "text"},
    "resync": {},
    "rotate-key": {"key": "text"},
    "reload": {},
    "cancel": {"transfer": "text"},
    "resolve": {"transfer": "text", "decision": "text"},
    # everything that charon passes to its script, in any version
    "updown": {"verb": "text", "reqid": "text", "child": "text", "connection": "text", "PLUTO_*": "text"},
    "detours": {"end": "text", "unblock": "flag"},
}

MOBILE: Mapping[str, Keys] = {
    "version": {},
    "status": {},
    "handover": {
        **dict.fromkeys(("to", "what", "ike", "ike-id", "address"), "text"),
        "anew": "flag",
        "leaving": "flag",
    },
    "cancel": {},
    "resync": {},
    "rotate-key": {"key": "text"},
}


def plain_address(text: str) -> Address:
    """An IP address that means the same on every host: none with a zone, as in fe80::1%eth0 (RFC 4007, 11).

    Errors: ValueError.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    return ip_address(text)
