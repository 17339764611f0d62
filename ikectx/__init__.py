"""Moves a live IKEv2 SA, with its CHILD_SAs, from one gateway to another.

The public names are those of `__all__`; they stay, while the modules behind them may change. To look at a
context: `IkeContext` and its parts, `encode_context` and `decode_context`. To move one: implement
`ContextSource` and `ContextSink` for an IKE daemon and give them to a `Gateway`.

A name is imported when it is first used, so that a hook that needs one error class does not wait for TLS.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aio import Gateway
    from .context import (
        AuthRound,
        ChildContext,
        Endpoint,
        FinalChild,
        FinalState,
        Identity,
        IkeContext,
        IkeGeneration,
        Lifetime,
        PeerContext,
        PolicyContext,
        ReplayState,
        Secret,
        TrafficSelector,
    )
    from .cxtp import ContextDataBlock
    from .engine.journaled import MobileConfig
    from .errors import (
        BusyError,
        CharonError,
        ConfigError,
        IkectxError,
        KernelError,
        LinkError,
        RefusedError,
        StateError,
        StoreError,
        UnknownSaError,
        UsageError,
        WireError,
    )
    from .links import Stream
    from .name import SaName
    from .numbers import Encr, Fpt, IdType, Integ, KeMethod, Mode, Prf, Protocol, Status
    from .peer import PeerConfig
    from .ports import Clock, ContextSink, ContextSource, MoveReport, Renamer, Store, Verdict
    from .profile import TransferHeader, decode_final, encode_final
    from .profile import decode as decode_context
    from .profile import encode as encode_context
    from .report import TransferEvent, TransferReport
    from .store import SqliteStore, open_store
    from .tls import TlsConfig
    from .transfer import Timing

__all__ = [
    "AuthRound",
    "BusyError",
    "CharonError",
    "ChildContext",
    "Clock",
    "ConfigError",
    "ContextDataBlock",
    "ContextSink",
    "ContextSource",
    "Encr",
    "Endpoint",
    "FinalChild",
    "FinalState",
    "Fpt",
    "Gateway",
    "IdType",
    "Identity",
    "IkeContext",
    "IkeGeneration",
    "IkectxError",
    "Integ",
    "KeMethod",
    "KernelError",
    "Lifetime",
    "LinkError",
    "MobileConfig",
    "Mode",
    "MoveReport",
    "PeerConfig",
    "PeerContext",
    "PolicyContext",
    "Prf",
    "Protocol",
    "RefusedError",
    "Renamer",
    "ReplayState",
    "SaName",
    "Secret",
    "SqliteStore",
    "StateError",
    "Status",
    "Store",
    "StoreError",
    "Stream",
    "Timing",
    "TlsConfig",
    "TrafficSelector",
    "TransferEvent",
    "TransferHeader",
    "TransferReport",
    "UnknownSaError",
    "UsageError",
    "Verdict",
    "WireError",
    "decode_context",
    "decode_final",
    "encode_context",
    "encode_final",
    "open_store",
]

_ROOMS = (
    *("errors", "numbers", "name", "context", "ports", "cxtp", "profile", "transfer", "report"),
    *("peer", "store", "links", "tls", "engine.journaled", "aio"),
)
"""Modules that are searched for public names, in this order, because the first ones are cheap to import."""
_INSIDE = {"encode_context": "encode", "decode_context": "decode"}
"""Public names that differ from those in the modules, which would say too little here."""


def __getattr__(name: str) -> object:
    if name in __all__:
        for room in _ROOMS:
            value: object = getattr(import_module(f".{room}", __name__), _INSIDE.get(name, name), None)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
