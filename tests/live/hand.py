"""A mobile node's agent worked by hand, for tests: commands on standard input, one JSON answer a line.

    python hand.py mobile.toml
    quiet | move LOCAL REMOTE | loud | resume | state | die

`die` is the crash: nothing is tidied up. `fail EFFECT` makes the process die before that effect of a step.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ikectx.disk.place import open_store
from ikectx.errors import IkectxError
from ikectx.sa.context import Endpoint
from ikectx.sa.name import SaName
from ikectx_cli.mobile.config import load
from vici_bridge.effects import mobile
from vici_bridge.effects.mobile import CharonMobile
from vici_bridge.effects.runner import LedgerStep
from vici_bridge.host import CharonHost
from vici_bridge.host_config import HostConfig


def dying(step: LedgerStep[Any], name: str) -> LedgerStep[Any]:
    """The step, in which the process dies before the effect of that name."""

    async def die(work: Any) -> None:
        os._exit(9)

    effects = (replace(effect, do=die) if effect.name == name else effect for effect in step.effects)
    return replace(step, effects=tuple(effects))


class Hand:
    def __init__(self, config: Path) -> None:
        self.config = load(config)
        charon = self.config.charon
        self.store = open_store(self.config.state_dir)
        self.host = CharonHost(
            HostConfig((), vici=charon.vici, kernel_esp=charon.kernel_esp, mobile_node=True), self.store
        )
        self.mobile = CharonMobile(self.host)

    async def sa(self) -> SaName:
        (view,) = await self.host.views()
        return view.spis

    async def do(self, words: list[str]) -> Any:
        match words:
            case ["quiet"]:
                await self.mobile.quiet(await self.sa())
            case ["move", local, remote]:
                sa = await self.sa()
                context = await self.mobile.export(sa)
                ends = (
                    Endpoint.of(local, context.local.port),
                    Endpoint.of(remote, context.remote.port),
                )
                after = await self.mobile.readdress(context, *ends)
                return {"local": str(after.local), "remote": str(after.remote)}
            case ["loud"]:
                await self.mobile.loud(await self.sa())
            case ["resume"]:
                await self.mobile.resume()
            case ["export"]:
                context = await self.mobile.export(await self.sa())
                return {
                    "local": str(context.local),
                    "remote": str(context.remote),
                    "initiator": context.current.initiator,
                    "vips": [str(vip) for vip in context.local_vips],
                    "children": [child.spi_in.hex() for child in context.children],
                }
            case ["fail", *name]:
                for step in ("QUIET", "READDRESS", "LOUD"):
                    setattr(mobile, step, dying(getattr(mobile, step), " ".join(name)))
            case ["die"]:
                os._exit(9)
        return None

    async def work(self) -> None:
        await self.host.open()
        loop = asyncio.get_running_loop()
        print(json.dumps({"ok": True}), flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            try:
                answer = {"ok": True, "value": await self.do(line.split())}
            except IkectxError as error:
                answer = {"ok": False, "error": type(error).__name__, "text": str(error)}
            print(json.dumps(answer), flush=True)
        await self.host.close()


if __name__ == "__main__":
    asyncio.run(Hand(Path(sys.argv[1])).work())
