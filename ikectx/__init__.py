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
    from ikectx.clock import Clock
    from ikectx.disk.place import open_store
    from ikectx.disk.store import SqliteStore
    from ikectx.driver import GatewayHooks
    from ikectx.engine.journaled import MobileConfig, TransferPolicy
    from ikectx.engine.ports import ContextSink, ContextSource, MoveReport, Renamer, Store
    from ikectx.engine.report import TransferEvent, TransferReport
    from ikectx.errors import (
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
    from ikectx.gateway import Gateway
    from ikectx.net.credentials import TlsConfig
    from ikectx.net.links import Stream
    from ikectx.numbers import Encr, Fpt, IdType, Integ, KeMethod, Mode, Prf, Protocol, Status
    from ikectx.peer import PeerConfig
    from ikectx.sa.context import (
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
    from ikectx.sa.name import SaName
    from ikectx.sa.verdict import Verdict
    from ikectx.timing import Timing
    from ikectx.wire.cxtp import ContextDataBlock
    from ikectx.wire.profile import TransferHeader, decode_final, encode_final
    from ikectx.wire.profile import decode as decode_context
    from ikectx.wire.profile import encode as encode_context

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
    "GatewayHooks",
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
    "TransferPolicy",
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

_MODULES = {
    ".clock": "Clock",
    ".disk.place": "open_store",
    ".disk.store": "SqliteStore",
    ".driver": "GatewayHooks",
    ".engine.journaled": "MobileConfig TransferPolicy",
    ".engine.ports": "ContextSink ContextSource MoveReport Renamer Store",
    ".engine.report": "TransferEvent TransferReport",
    ".errors": (
        "BusyError CharonError ConfigError IkectxError KernelError LinkError RefusedError StateError "
        "StoreError UnknownSaError UsageError WireError"
    ),
    ".gateway": "Gateway",
    ".net.credentials": "TlsConfig",
    ".net.links": "Stream",
    ".numbers": "Encr Fpt IdType Integ KeMethod Mode Prf Protocol Status",
    ".peer": "PeerConfig",
    ".sa.context": (
        "AuthRound ChildContext Endpoint FinalChild FinalState Identity IkeContext IkeGeneration "
        "Lifetime PeerContext PolicyContext ReplayState Secret TrafficSelector"
    ),
    ".sa.name": "SaName",
    ".sa.verdict": "Verdict",
    ".timing": "Timing",
    ".wire.cxtp": "ContextDataBlock",
    ".wire.profile": "TransferHeader decode_final encode_final",
}
_WHERE = {name: (module, name) for module, names in _MODULES.items() for name in names.split()} | {
    "decode_context": (".wire.profile", "decode"),
    "encode_context": (".wire.profile", "encode"),
}
"""Public names: the module that has each of them, and what it is called there."""


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inside = _WHERE[name]
    value: object = getattr(import_module(module, __name__), inside)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
