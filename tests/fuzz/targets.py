"""The one table of what comes from outside.

`tests/across/test_fuzz_decoders.py` tries each target for a moment, `python -m tests.fuzz` a million times,
guided by coverage.
"""

from __future__ import annotations

from . import engine, gateways, host, ike
from .target import Target

TARGETS: dict[str, Target] = {**gateways.TARGETS, **engine.TARGETS, **ike.TARGETS, **host.TARGETS}
