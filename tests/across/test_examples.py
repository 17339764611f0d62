"""What an integrator copies runs as it stands; and the names it uses are the ones that are promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ikectx

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

PROMISED = """
AuthRound BusyError CharonError ChildContext Clock ConfigError ContextDataBlock ContextSink ContextSource
Encr Endpoint FinalChild FinalState Fpt Gateway GatewayHooks IdType Identity IkeContext IkeGeneration
IkectxError Integ KeMethod KernelError Lifetime LinkError MobileConfig Mode MoveReport PeerConfig
PeerContext PolicyContext Prf Protocol RefusedError Renamer ReplayState SaName Secret SqliteStore
StateError Status Store StoreError Stream Timing TlsConfig TrafficSelector TransferEvent TransferHeader
TransferPolicy TransferReport UnknownSaError UsageError Verdict WireError decode_context decode_final
encode_context encode_final open_store
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, check=False, cwd=EXAMPLES
    )


def test_the_public_names_are_those_promised() -> None:
    assert sorted(ikectx.__all__) == sorted(PROMISED.split())
    assert set(ikectx.__all__) <= set(dir(ikectx))
    for name in ikectx.__all__:
        value = getattr(ikectx, name)
        assert name == "SaName" or value.__module__.startswith("ikectx."), name
    assert not hasattr(ikectx, "Renamed")


def test_an_error_class_does_not_cost_tls() -> None:
    code = "import sys, ikectx; ikectx.LinkError; print('ssl' in sys.modules or 'asyncio' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


def test_inspect_context(tmp_path: Path) -> None:
    kept = tmp_path / "context"
    first = run("inspect_context.py", "--out", kept)
    assert (first.returncode, first.stderr) == (0, "")
    assert "remote_id: alice@example" in first.stdout
    assert "secret: <secret, 32 octets>" in first.stdout
    second = run("inspect_context.py", kept)
    assert second.stdout == first.stdout
    octets = kept.read_bytes()
    context, _ = ikectx.decode_context(ikectx.wire.cxtp.Pctd.parse(octets).blocks)
    assert context.current.secret.reveal().hex() not in first.stdout
    kept.write_bytes(octets[:-1])
    damaged = run("inspect_context.py", kept)
    assert damaged.returncode == ikectx.WireError.exit_code
    assert damaged.stderr.startswith("inspect_context: PCTD: message length")


def test_own_daemon() -> None:
    done = run("own_daemon.py")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "dry run: nsg would take it"
    assert "moved: nsg serves alice@example now" in lines
    assert lines[-1] == "at nsg: alice@example, epoch 1, same keys and SPIs: yes"
