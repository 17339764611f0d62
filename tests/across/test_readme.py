"""The README's library example runs as it is written, but for names and addresses of another machine."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ikectx import Gateway, PeerConfig, TlsConfig, open_store
from tests.certs import Authority
from tests.peers import Ether, MemoryGateway, a_context

README = Path(__file__).parent.parent.parent / "README.md"


def example(**here: str) -> Callable[..., Awaitable[dict[str, Any]]]:
    """The example of the section on the library, with some of its text replaced; gives its variables."""
    text = README.read_text().partition("\n## Library\n")[2].partition("```python\n")[2].partition("```")[0]
    for name, other in here.items():
        assert text.count(name) == 1, name
        text = text.replace(name, other)
    found: dict[str, Any] = {}
    body = textwrap.indent(text, "    ") + "    return locals()\n"
    exec(f"async def example(daemon, sa):\n{body}", found)
    made: Callable[..., Awaitable[dict[str, Any]]] = found["example"]
    return made


def test_the_library_example_moves_an_sa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ca, ether = Authority(tmp_path), Ether()
    for name in ("psg", "nsg"):
        tls = ca.issue(name)
        Path(tls.cert).rename(f"{name}.pem")
        Path(tls.key).rename(f"{name}.key")

    async def scenario() -> None:
        psg, nsg = MemoryGateway("psg", ether), MemoryGateway("nsg", ether)
        store = open_store(tmp_path / "nsg")
        tls = TlsConfig("nsg.pem", "nsg.key", "ca.pem")
        there = Gateway("nsg", nsg, nsg, store, [PeerConfig("psg", "127.0.0.1")], tls)
        await there.start([("127.0.0.1", 0)])
        run = example(
            **{
                "/var/lib/mine": str(tmp_path / "psg"),
                '"198.51.100.1"': f'"127.0.0.1", {there.addresses[0][1]}',
                '("192.0.2.1", 5091)': '("127.0.0.1", 0)',
            }
        )
        sa = psg.serve(a_context())
        made = await run(psg, sa)
        await made["gateway"].stop()
        await there.stop()
        store.close()
        assert set(nsg.served) == {sa}

    asyncio.run(scenario())
    assert capsys.readouterr().out == "moved nsg serves mn1.example now\n"
