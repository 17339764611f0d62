"""A mobile node's agent that dies, for tests, where it would begin one step of `SpiWatch` or `CharonMobile`.

    python dying.py mobile.toml STEP

The process is gone at once: nothing is tidied up.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ikectx_cli.mobile import agent as mobile_agent
from ikectx_cli.mobile.config import load
from vici_bridge.effects.mobile import CharonMobile
from vici_bridge.mobile import spis as mobile_spis


def main(config: str, step: str) -> int:
    def die(*_: Any, **__: Any) -> Any:
        os._exit(9)

    if hasattr(CharonMobile, step):
        setattr(CharonMobile, step, die)
    else:
        setattr(mobile_spis, step, die)
    return mobile_agent.run(load(Path(config)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
