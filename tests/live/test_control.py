"""The control socket by the official VICI client, and the hook for `updown =`, with real charons."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import vici

from ikectx_cli.lab.net import OUTER

from .world import World, spis, until

pytestmark = pytest.mark.live


def session(world: World, host: str) -> vici.Session:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(f"{world.lab.work}/{host}/ikectx.vici")
    return vici.Session(sock)


def of(message: Any) -> Any:
    """An item's or answer's whole."""
    return json.loads(message["json"])


def test_the_official_client_lists_and_transfers(world: World) -> None:
    # vici: version, status, list-contexts, transfer with its progress, history; then psg -> nsg as always
    sa = world.up()
    psg = session(world, "psg")
    version = psg.request("version")
    assert (version["daemon"], version["name"]) == (b"ikectx", b"psg")
    assert of(psg.request("status"))["sas"] == 1
    (item,) = psg.streamed_request("list-contexts", "list-context")
    (listed,) = [of(item)]
    assert (listed["spi_i"], listed["spi_r"]) == spis(sa)
    assert listed["movable"] is True
    assert listed["remote"].startswith(OUTER["mn"][4])
    phases = [
        of(one)["phase"] for one in psg.streamed_request("transfer", "transfer-progress", {"to": "nsg"})
    ]
    assert phases[:2] == ["offered", "freezing"]
    assert phases[-1] == "done"
    world.settle("nsg")
    (entry, *_) = [of(one) for one in psg.streamed_request("history", "history-entry", {"limit": "1"})]
    assert (entry["role"], entry["peer"], entry["result"]) == ("source", "nsg", "moved")
    nsg = session(world, "nsg")
    (item,) = nsg.streamed_request("list-contexts", "list-context")
    assert of(item)["spi_i"] == sa["initiator-spi"]


def test_events_of_a_transfer_reach_those_who_listen(world: World) -> None:
    # one client listens at nsg for transfer-state; psg -> nsg as always
    world.up()
    heard = []
    listener = session(world, "nsg").listen(["transfer-state"], timeout=0.2)
    next(listener)  # it registers before it waits, and gives nothing after that time
    work = world.begin("psg", "transfer", "--to", "nsg", "--json")
    for kind, message in listener:
        if kind is None:
            continue
        assert kind == b"transfer-state"
        event = of(message)
        assert event["role"] == "target"
        heard.append(event["phase"])
        if heard[-1] == "owned":
            break
    assert world.end(work).code == 0
    assert heard == ["checking", "preparing", "prepared", "owning", "moving", "activating", "owned"]


@pytest.mark.parametrize(
    ("command", "request_", "exit_"),
    [
        ("transfer", {"to": "nowhere", "all": "yes"}, 2),
        ("transfer", {"to": "nsg", "ike": "nobody"}, 6),
        ("transfer", {}, 2),
        ("show-context", {"ike": "nobody"}, 6),
        ("cancel", {"transfer": "00"}, 8),
        ("reclaim", {"transfer": "00"}, None),
        ("resolve", {"transfer": "00"}, 8),
        ("resolve", {"transfer": "00", "decision": "perhaps"}, 2),
        ("no-such-command", {}, None),
    ],
)
def test_the_official_client_gets_errors(
    world: World, command: str, request_: dict[str, str], exit_: int | None
) -> None:
    # no exchange; the connection stays usable
    world.up()
    psg = session(world, "psg")
    with pytest.raises((vici.exception.CommandException, vici.exception.SessionException)) as caught:
        if command == "transfer":
            list(psg.streamed_request(command, "transfer-progress", request_))
        else:
            psg.request(command, request_)
    if exit_ is not None:
        assert str(caught.value)
    assert psg.request("version")["daemon"] == b"ikectx"
    world.serves("psg")


def test_a_crowd_at_the_socket_keeps_the_operator_from_nothing(world: World) -> None:
    # 100 clients that say nothing; then status and a transfer
    world.up()
    crowd = []
    for _ in range(100):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(f"{world.lab.work}/psg/ikectx.vici")
        crowd.append(sock)
    try:
        assert json.loads(world.must("psg", "ikectx", "status", "--json"))["sas"] == 1
        assert world.ikectx("psg", "transfer", "--to", "nsg").code == 0
    finally:
        for sock in crowd:
            sock.close()
    world.settle("nsg")


def test_a_mistyped_key_moves_nothing(world: World) -> None:
    sa = world.up()
    psg = session(world, "psg")
    for wrong in ({"dryrun": "yes"}, {"dry-run": "1"}, {"dry-run": ["yes"]}):
        with pytest.raises(vici.exception.CommandException, match="transfer"):
            list(psg.streamed_request("transfer", "transfer-progress", {"to": "nsg", **wrong}))
    assert spis(world.serves("psg")) == spis(sa)


def hook(world: World, host: str, *options: str) -> None:
    """swanctl.conf of a gateway uses the hook, which goes on with the lab's own script."""
    script = world.lab.work / host / "updown"
    tools = world.lab.work / "bin"
    agent = world.lab.work / host / "ikectx.vici"  # charon hands on no environment of ours
    words = [str(tools / "ikectx"), "updown", "--socket", str(agent), *options, "--then", str(script)]
    world.edit(host, f"updown = {script}", f"updown = {' '.join(words)}")


def calls(world: World, host: str) -> list[str]:
    path = world.lab.work / host / "updown.log"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def clear(world: World) -> None:
    for host in ("psg", "nsg"):
        (world.lab.work / host / "updown.log").unlink(missing_ok=True)


def test_the_hook_runs_what_charon_would_have_run(world: World) -> None:
    # IKE_SA_INIT, IKE_AUTH; INFORMATIONAL D from the MN: up-client and down-client, once each, no transfer
    world.up()
    world.forget("mn")
    world.forget("psg")
    clear(world)
    hook(world, "psg", "--connection", "mn")
    world.lab.connect()
    world.ping()
    assert calls(world, "psg") == ["up-client"]
    world.ends("mn", "psg")
    assert calls(world, "psg") == ["up-client", "down-client"]
    assert "was not told" not in world.log("psg")
    assert not world.status("psg")["transfers"]


def test_the_hook_without_an_agent(world: World) -> None:
    # the agent is away: charon's own exchanges and its script go on as if there were no hook
    world.up()
    world.forget("mn")
    world.forget("psg")
    clear(world)
    hook(world, "psg")
    with world.without_agent("psg"):
        world.lab.connect()
        world.ping()
        world.lab.terminate("mn")
        until(lambda: not world.lab.list_sas("psg"), "psg has no SA")
    assert calls(world, "psg") == ["up-client", "down-client"]
    assert "was not told" in world.log("psg")


def test_a_moved_sa_runs_each_script_once(world: World) -> None:
    # psg -> nsg: down-client at psg, up-client at nsg, by the agents, with what charon would have told; then
    # INFORMATIONAL D from the MN: down-client at nsg, by charon
    clear(world)
    world.up()
    world.move("psg", "nsg")
    world.settle("nsg")
    assert calls(world, "psg") == ["up-client", "down-client"]
    assert calls(world, "nsg") == ["up-client"]
    world.ends("mn", "nsg")
    assert calls(world, "nsg") == ["up-client", "down-client"]
    up, down = (world.lab.work / "nsg" / "updown.log").read_text().splitlines()
    assert up.split()[1:] == down.split()[1:] == ["net", OUTER["mn"][4], "10.3.0.0/24", "10.4.0.10/32"]


def test_an_undone_transfer_leaves_the_scripts_balanced(world: World) -> None:
    # nsg -> MN INFORMATIONAL, dropped: nsg's script is run up and down, psg's down and up again
    clear(world)
    world.up()
    quick = "[transfer]\nmn_tries = 2\nmn_timeout = 0.2\n"
    with world.agent_with("nsg", "[transfer]\n", quick), world.blocked("nsg", "mn"):
        done = world.transfer("psg", "nsg", "--address", "move")
        assert done.report["status"]["name"] == "PEER_SILENT"
    assert calls(world, "nsg") == ["up-client", "down-client"]
    assert calls(world, "psg") == ["up-client", "down-client", "up-client"]
    world.ping()
    world.serves("psg")
