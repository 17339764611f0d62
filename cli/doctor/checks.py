"""`ikectx doctor`: frequent mistakes of operators, each as one check that says what to write where.

`CHECKS` is the list of those for a gateway; `findings` says what a check is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ikectx.errors import KernelError
from vici_bridge.ha.version import UPGRADE, wire_version

from ..settings import Setting, is_yes
from .certificates import certificates, expiry
from .findings import Checks, Outcome
from .inside import inside, pools
from .ipsec import protection, reach
from .later import identities, starts
from .many import many_sas
from .relay import relay
from .world import World

NET_ADMIN, NET_RAW = 12, 13
SEGMENTS = 16
"""The most that charon has; a move concerns all SAs of one of them."""


def ha_snippet(world: World) -> str:
    """The part of strongswan.conf that the ha plugin needs, to be pasted."""
    charon = world.config.charon
    return (
        "write into /etc/strongswan.d/charon/ha.conf (it is charon.plugins in strongswan.conf):\n"
        "ha {\n"
        "    load = yes\n"
        f"    local = {charon.ha_remote}\n"
        f"    remote = {charon.ha_local}\n"
        "    monitor = no\n"
        "    resync = no\n"
        f"    segment_count = {charon.segments or SEGMENTS}\n"
        "}\n"
        f"then {RESTART}"
    )


RESTART = "start the agent if it does not run yet, and after it: systemctl restart strongswan"


def charon_runs(world: World) -> Iterator[Outcome]:
    version = world.charon("version")
    yield "ok", f"{version.get('daemon', 'charon')} {version.get('version', '?')}"
    if world.charon("stats").get("plugins") is None:
        yield "warn", "charon does not list its plugins"


def ha_plugin(world: World) -> Iterator[Outcome]:
    plugins = world.charon("stats").get("plugins", [])
    if "ha" not in plugins:
        settings = world.settings("strongswan.conf")
        if settings and not list(_wrong_settings(world, settings)) and is_yes(_ha(settings, "load", "no")):
            found = (
                "charon has not loaded the ha plugin, which strongswan.conf names: it has not been restarted"
            )
            yield "fail", found, f"{RESTART}. If that does not help: apt-get install libcharon-extra-plugins"
        else:
            fix = f"apt-get install libcharon-extra-plugins (Debian), and {ha_snippet(world)}"
            yield "fail", "charon has not loaded the ha plugin", fix
        return
    yield "ok", "charon has loaded the ha plugin"
    charon = world.config.charon
    owner = world.udp_owner(charon.ha_remote, charon.ha_port)
    if owner is None:
        yield "fail", f"charon does not listen on {charon.ha_remote}:{charon.ha_port}", ha_snippet(world)


def ha_settings(world: World) -> Iterator[Outcome]:
    settings = world.settings("strongswan.conf")
    if settings is None:
        yield "note", "strongswan.conf cannot be read, so its ha section is not checked"
        return
    wrong = list(_wrong_settings(world, settings))
    yield from wrong or [("ok", "strongswan.conf agrees with the configuration")]


def _ha(settings: Mapping[str, Setting], key: str, default: str) -> str:
    """A setting of the ha plugin."""
    for name in ("charon-systemd", "charon"):
        setting = settings.get(f"{name}.plugins.ha.{key}")
        if setting is not None and setting.value:
            return setting.value
    return default


def _wrong_settings(world: World, settings: Mapping[str, Setting]) -> Iterator[Outcome]:
    charon = world.config.charon
    for key, default, wanted, why in (
        ("local", "", charon.ha_remote, "charon's own address, [charon] ha_remote"),
        ("remote", "", charon.ha_local, "the agent's address, [charon] ha_local"),
        ("monitor", "yes", "no", "charon would take over SAs by itself when the agent is silent"),
        # where that is not set the agent takes what is there
        *([("segment_count", "1", str(charon.segments), "[charon] segments")] if charon.segments else ()),
    ):
        found = _ha(settings, key, default)
        if is_yes(found) if wanted == "no" else found != wanted:
            yield (
                "fail",
                f"charon.plugins.ha.{key} is {found or 'not set'}, not {wanted} ({why})",
                ha_snippet(world),
            )
    if is_yes(_ha(settings, "resync", "yes")):
        yield (
            "warn",
            "charon.plugins.ha.resync is on: charon asks for a resync at each start",
            ha_snippet(world),
        )
    if _ha(settings, "secret", ""):
        yield "fail", "charon.plugins.ha.secret is set: the agent cannot read its messages", "remove it"


def ha_socket(world: World) -> Iterator[Outcome]:
    charon = world.config.charon
    place = f"{charon.ha_local}:{charon.ha_port}"
    owner = world.udp_owner(charon.ha_local, charon.ha_port)
    agent = world.agent_pid()
    if owner is None:
        level = "fail" if agent else "warn"
        yield level, f"nobody listens on {place}: what charon tells about its SAs is lost", "start the agent"
    elif agent is not None and owner.pid in (0, agent):
        yield "ok", f"the agent listens on {place}"
        yield from _strangers(world)
    elif owner.pid == 1:
        yield (
            "warn",
            f"systemd keeps {place} for the agent, which does not use it",
            "systemctl restart ikectx",
        )
    else:
        yield (
            "fail",
            f"{place} is taken by {owner.name} (pid {owner.pid or '?'}): it gets the keys of all SAs",
            "end that process, or give [charon] ha_local and charon.plugins.ha.remote another address",
        )


def _strangers(world: World) -> Iterator[Outcome]:
    """What a user without rights can do with the HA addresses and the agent's files, by trying it."""
    charon = world.config.charon
    got = world.as_nobody(
        [(charon.ha_local, charon.ha_port), (charon.ha_remote, charon.ha_port)],
        [world.config.control.socket, str(world.config.state_dir)],
    )
    for what in got or ():
        fix = "chmod 700 a folder, 600 a socket: only root and the agent's user need them"
        if what.startswith("bind "):
            fix = "run strongSwan, and the agent with ikectx.socket; set ha_users under [charon] as well"
        yield "fail", f"a user without rights can {what}", fix


def agent_runs(world: World) -> Iterator[Outcome]:
    status = world.agent("status")
    yield "ok", f"the agent runs as {status.get('name')!r}, version {status.get('version')}"
    if status.get("name") != world.config.name:
        yield (
            "warn",
            f"the agent has the name {status.get('name')!r}, the configuration {world.config.name!r}",
            "restart the agent",
        )
    charon = status.get("charon") or {}
    if charon.get("reachable") is False:
        yield "fail", "the agent cannot reach charon", "compare [charon] vici with charon.plugins.vici.socket"


def ha_version(world: World) -> Iterator[Outcome]:
    """Find out whether charon was upgraded under the agent: it drops HA messages of another version than its
    own."""
    now = str(world.charon("version").get("version", ""))
    charon = world.agent("status").get("charon") or {}
    number, expected = charon.get("ha_version"), wire_version(now)
    if charon.get("problem"):
        yield "fail", str(charon["problem"]), UPGRADE
    elif charon.get("version") != now or number != expected:
        yield (
            "fail",
            f"charon is {now} (HA wire version {expected}), and the agent takes it for "
            f"{charon.get('version') or 'none'} ({number or 'none'})",
            "restart the agent; if it says the same again, upgrade ikectx",
        )
    else:
        yield "ok", f"agent and charon {now} speak HA wire version {number}"


def _mobile_nodes(world: World) -> list[dict[str, Any]]:
    """The agent's SAs, without those with other gateways that protect the connections between the agents."""
    hosts = {peer.host for peer in world.config.peers} if world.config.transfer.transport != "tls" else set()
    found = world.agent("list-contexts")
    return [sa for sa in found if str(sa.get("remote", "")).rpartition(":")[0].strip("[]") not in hosts]


def kinds(world: World) -> Iterator[Outcome]:
    """SAs that cannot be moved, whatever the configuration."""
    for sa in _mobile_nodes(world):
        if sa.get("known") and sa.get("reason") and sa.get("state") == "ESTABLISHED":
            yield "note", f"{sa.get('name')} #{sa.get('ike_id')} cannot be moved: {sa['reason']}", sa["hint"]


def order(world: World) -> Iterator[Outcome]:
    """SAs that came up while nobody listened on the HA socket: their keys are not known."""
    unknown = [sa for sa in _mobile_nodes(world) if sa.get("known") is False]
    if not unknown:
        yield "ok", "the agent knows the keys of all SAs"
    unnoted = [sa for sa in unknown if "message IDs" in str(sa.get("reason"))]
    if unnoted:
        yield "warn", f"{_those(unnoted)}: {unnoted[0]['reason']}", str(unnoted[0].get("hint", ""))
    unknown = [sa for sa in unknown if sa not in unnoted]
    if not unknown:
        return
    agent, charon = world.agent_pid(), world.charon_pid()
    times = (world.started(charon) if charon else None, world.started(agent) if agent else None)
    before = times[0] is not None and times[1] is not None and times[0] < times[1]
    why = "charon started before the agent" if before else "they came up while the agent was away"
    yield (
        "warn",
        f"{_those(unknown)}: {why}",
        "start the agent before charon (Before=strongswan.service in its unit); "
        "`ikectx resync` fetches these now, and rekeys every CHILD_SA for it",
    )


def _those(sas: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(str(sa.get("name")) for sa in sas[:5])
    return f"{len(sas)} SAs cannot be moved ({names})"


def capabilities(world: World) -> Iterator[Outcome]:
    pid = world.agent_pid()
    who = "the agent" if pid else "this process"
    bits = world.capabilities(pid)
    if bits is None:
        yield "note", f"the capabilities of {who} cannot be read"
        return
    lacking = [
        name for name, bit in (("CAP_NET_ADMIN", NET_ADMIN), ("CAP_NET_RAW", NET_RAW)) if not bits >> bit & 1
    ]
    if lacking:
        yield (
            "fail" if pid else "warn",
            f"{who} has no {' and no '.join(lacking)}",
            "run the agent as root, or with AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW in its unit",
        )
    else:
        yield "ok", f"{who} has CAP_NET_ADMIN and CAP_NET_RAW"


def secret_files(world: World) -> Iterator[Outcome]:
    wrong = False
    files = [(world.config.state_dir, "the store of keys")]
    if world.config.transfer.transport == "tls":
        files.insert(0, (world.config.transfer.key, "the private key"))
    for path, what in files:
        try:
            info = os.stat(path)
        except OSError:
            continue
        want = "0700" if stat.S_ISDIR(info.st_mode) else "0600"
        if info.st_mode & 0o077:
            wrong = True
            yield (
                "fail",
                f"{what} {path} is open to others ({stat.S_IMODE(info.st_mode):04o})",
                f"chmod {want} {path}",
            )
        if info.st_uid not in (0, os.geteuid(), world.agent_user()):
            wrong = True
            yield "warn", f"{what} {path} belongs to user {info.st_uid}", f"chown root {path}"
    if not wrong:
        yield "ok", "no other user can read the keys"


def clock(world: World) -> Iterator[Outcome]:
    now = world.now()
    try:
        written = os.stat(world.config.path).st_mtime
    except OSError:
        written = 0.0
    if now < written - 60:
        yield (
            "fail",
            "the clock is behind the time at which the configuration was written",
            "set the clock (NTP)",
        )
    else:
        yield "ok", "the clock seems right"


def esp(world: World) -> Iterator[Outcome]:
    if world.config.charon.kernel_esp:
        yield from _kernel_esp(world)
    elif world.exists("/dev/net/tun"):
        yield "note", "user-space ESP: sequence numbers cannot be carried over (see the limits in the README)"
    else:
        yield "fail", "/dev/net/tun is missing, which user-space ESP needs", "modprobe tun"


def nftables(world: World) -> Iterator[Outcome]:
    if world.tool("nft") is None:
        why = "a transfer mutes IKE messages with it"
        yield "fail", f"the program nft is missing: {why}", "apt-get install nftables"
        return
    works, said = world.probe("nft", "add", "table", "inet", "ikectx_doctor")
    if works:
        yield "ok", "nftables works"
    elif works is None:
        yield "note", f"nftables was not tried: {said}"
    else:
        yield "fail", f"nftables does not work: {said}", "modprobe nf_tables"


def _kernel_esp(world: World) -> Iterator[Outcome]:
    if world.tool("ip") is None:
        yield "fail", "the program ip is missing", "apt-get install iproute2"
        return
    works, said = world.probe("ip", *ESP_PROBE)
    if works:
        yield "ok", "the kernel has ESP"
    elif works is None:
        yield "note", f"the kernel's ESP was not tried: {said}"
    else:
        yield (
            "fail",
            f"the kernel does not take an ESP SA: {said}",
            "load esp4, esp6 and xfrm_user, or boot a kernel that has them; "
            'with user-space ESP in charon write esp = "libipsec" under [charon]',
        )


ESP_PROBE = (
    *("xfrm", "state", "add", "src", "127.0.0.1", "dst", "127.0.0.2", "proto", "esp", "spi", "0x100"),
    *("mode", "tunnel", "aead", "rfc4106(gcm(aes))", "0x" + "00" * 20, "128"),
)
"""An unused SA, in a namespace that is gone at once."""


def message_ids(world: World) -> Iterator[Outcome]:
    """Compare a known message ID with the one that is read back: an SA with a wrong one would be deaf after a
    move."""
    try:
        right = world.notes_right()
    except KernelError as error:
        yield "note", f"the notes of message IDs were not tried: {error}", error.hint
        return
    restart = "restart the agent: it makes these rules anew"
    if right:
        yield "ok", "the kernel notes message IDs as they leave"
    elif right is False:
        yield "fail", "the message IDs that the kernel notes are not those that leave", restart
    elif world.agent_pid() is not None:
        yield (
            "warn",
            "message IDs that leave are not noted: somebody has removed the rules",
            restart,
        )
    else:
        yield "note", "message IDs are not noted yet", "start the agent"


def addresses(world: World) -> Iterator[Outcome]:
    wrong = False
    config = world.config
    places = [("[gateway] addresses", str(address)) for address in config.gateway.addresses]
    places += [("[transfer] listen", listen.host) for listen in config.transfer.listen]
    places += [("[mobile] listen", listen.host) for listen in (config.mobile.listen if config.mobile else ())]
    places += [("[charon] ha_local", config.charon.ha_local), ("[charon] ha_remote", config.charon.ha_remote)]
    for key, address in places:
        if not world.is_local(address):
            wrong = True
            yield (
                "fail",
                f"{key}: {address} is not an address of this machine",
                "give the machine the address, or correct the key",
            )
    if not wrong:
        yield "ok", "all addresses are this machine's"


def peers(world: World) -> Iterator[Outcome]:
    if not world.config.peers:
        yield "warn", "there is no [[peer]], so no SA can be moved", "write a [[peer]] for each gateway"
    if world.config.transfer.transport != "tls":
        yield from reach(world)
        return
    for peer in world.config.peers:
        answer = world.connect(peer)
        who = f"{peer.name} ({peer.address})"
        if answer.failed:
            yield (
                "fail",
                f"{who}: {answer.failed}",
                "is its agent running? does a firewall let TCP through? same CA, right time at both ends?",
            )
        elif answer.not_before is not None and answer.not_before > world.now():
            yield (
                "fail",
                f"{who} has a certificate that is not valid yet",
                "set the clock, here or there (NTP)",
            )
        elif peer.identity.lower() not in answer.names:
            yield (
                "fail",
                f"{who} has a certificate for {', '.join(sorted(answer.names)) or 'nobody'}",
                f'if it is the right machine: identity = "{min(answer.names, default="…")}" in that [[peer]]',
            )
        elif answer.refused:
            yield (
                "fail",
                f"{who} does not accept us",
                f'there: a [[peer]] with name = "{world.config.name}" (or our certificate as identity)',
            )
        else:
            yield "ok", f"{who} is reached and proves to be {peer.identity}"
            found = expiry(world, f"the certificate of {peer.name}", answer.not_after or float("inf"))
            if found[0] != "ok":
                yield found


def connections(world: World) -> Iterator[Outcome]:
    known = {str(conn.get("name")) for conn in world.charon("conns")}
    wrong = False
    for name in world.config.connections:
        if name not in known:
            wrong = True
            yield (
                "warn",
                f"charon has no connection {name!r}",
                "load it (swanctl --load-conns), or remove it from the file",
            )
    helper = world.config.updown_helper
    scripts = any(conn.updown for conn in world.config.connections.values())
    if helper is not None and scripts and not world.exists(helper):
        wrong = True
        yield (
            "fail",
            f"nobody runs updown scripts: the socket {helper} (updown_helper) is not there; an SA that "
            "has one cannot come here",
            "systemctl enable --now ikectx-updown.socket",
        )
    settings = world.settings("swanctl.conf") or {}
    for key, setting in settings.items():
        parts = key.split(".")
        if parts[0] != "connections" or parts[-1] != "updown" or len(parts) < 5 or not setting.value:
            continue
        name = ".".join(parts[1:-3])
        conn = world.config.connections.get(name)
        if conn is None or conn.updown is None:
            wrong = True
            yield (
                "warn",
                f"connection {name!r} has an updown script that imported SAs will not get",
                f'write [connections.{name}] updown = "{setting.value}"',
            )
    if not wrong:
        yield "ok", f"{len(known)} connections"


CHECKS: Checks = (
    ("charon", charon_runs),
    ("ha plugin", ha_plugin),
    ("ha settings", ha_settings),
    ("ha socket", ha_socket),
    ("agent", agent_runs),
    ("ha version", ha_version),
    ("order", order),
    ("kinds", kinds),
    ("capabilities", capabilities),
    ("secret files", secret_files),
    ("certificates", certificates),
    ("clock", clock),
    ("kernel", esp),
    ("kernel", nftables),
    ("message ids", message_ids),
    ("addresses", addresses),
    ("protection", protection),
    ("peers", peers),
    ("inside", inside),
    ("relay", relay),
    ("connections", connections),
    ("pools", pools),
    ("identities", identities),
    ("starts", starts),
    ("many SAs", many_sas),
)

FOR_ROOT = (
    *("charon", "ha plugin", "ha settings", "ha socket", "ha version", "secret files", "certificates"),
    *("kernel", "message ids", "protection", "peers", "inside", "relay", "connections", "pools"),
    *("identities", "starts", "many SAs"),
)
"""Those that only root can run: they ask charon and the kernel, or read keys."""
