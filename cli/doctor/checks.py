"""`ikectx doctor`: frequent mistakes of operators, each as one check that says what to write where.

A check is a function of the `World` that yields findings; `CHECKS` is the list. Levels: ok; note (worth
knowing); warn (something will not work as expected); fail (nothing can be moved, or not safely).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ikectx.errors import IkectxError, KernelError
from vici_bridge.ha.version import UPGRADE, wire_version

from .inside import inside, pools
from .ipsec import protection, reach
from .world import World

NET_ADMIN, NET_RAW = 12, 13
DAY = 86400
EXPIRY_DAYS = 14
LEVELS = ("ok", "note", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check, and what to do about it."""

    check: str
    level: str
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


Outcome = tuple[str, str] | tuple[str, str, str]
"""(level, result) or (level, result, what to do)."""

Check = Callable[[World], Iterator[Outcome]]


def examine(world: World) -> list[Finding]:
    """Run every check; one that cannot run yields the reason, and the others go on."""
    findings: list[Finding] = []
    reasons: dict[str, str] = {}
    for name, check in CHECKS:
        try:
            findings += [Finding(name, *outcome) for outcome in check(world)]
        except IkectxError as error:
            first = reasons.setdefault(str(error), name)
            if first == name:
                findings.append(Finding(name, "fail", str(error), error.hint))
            else:
                findings.append(Finding(name, "note", f"not checked, because of {first}"))
        except OSError as error:
            findings.append(Finding(name, "warn", f"could not be checked: {error}"))
    return findings


def ha_snippet(world: World) -> str:
    """The part of strongswan.conf that the ha plugin needs."""
    charon = world.config.charon
    return (
        "in strongswan.conf (Debian: /etc/strongswan.d/charon/ha.conf), then restart strongSwan: "
        f"charon.plugins.ha {{ load = yes, local = {charon.ha_remote}, remote = {charon.ha_local}, "
        f"monitor = no, resync = no, segment_count = {charon.segments} }} (one setting a line)"
    )


def charon_runs(world: World) -> Iterator[Outcome]:
    version = world.charon("version")
    yield "ok", f"{version.get('daemon', 'charon')} {version.get('version', '?')}"
    if world.charon("stats").get("plugins") is None:
        yield "warn", "charon does not list its plugins"


def ha_plugin(world: World) -> Iterator[Outcome]:
    plugins = world.charon("stats").get("plugins", [])
    if "ha" not in plugins:
        install = "install it (Debian: libcharon-extra-plugins) and write "
        yield "fail", "charon has not loaded the ha plugin", install + ha_snippet(world)
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
    try:
        daemon = world.charon("version").get("daemon", "charon-systemd")
    except IkectxError:
        daemon = "charon-systemd"
    charon = world.config.charon

    def value(key: str, default: str) -> str:
        for name in (daemon, "charon"):
            setting = settings.get(f"{name}.plugins.ha.{key}")
            if setting is not None and setting.value:
                return setting.value
        return default

    wrong = False
    for key, default, wanted, why in (
        ("local", "", charon.ha_remote, "charon's own address, [charon] ha_remote"),
        ("remote", "", charon.ha_local, "the agent's address, [charon] ha_local"),
        ("monitor", "yes", "no", "charon would take over SAs by itself when the agent is silent"),
        ("segment_count", "1", str(charon.segments), "[charon] segments"),
    ):
        found = value(key, default)
        if _yes(found) if wanted == "no" else found != wanted:
            wrong = True
            yield (
                "fail",
                f"charon.plugins.ha.{key} is {found or 'not set'}, not {wanted} ({why})",
                ha_snippet(world),
            )
    if _yes(value("resync", "yes")):
        wrong = True
        yield (
            "warn",
            "charon.plugins.ha.resync is on: charon asks for a resync at each start",
            ha_snippet(world),
        )
    if value("secret", ""):
        wrong = True
        yield "fail", "charon.plugins.ha.secret is set: the agent cannot read its messages", "remove it"
    if not wrong:
        yield "ok", "strongswan.conf agrees with the configuration"


def _yes(value: str) -> bool:
    return value.lower() not in ("no", "false", "0", "disabled")


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
    else:
        yield (
            "fail",
            f"{place} is taken by {owner.name} (pid {owner.pid or '?'}): it gets the keys of all SAs",
            "end that process, or give [charon] ha_local and charon.plugins.ha.remote another address",
        )


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
        return
    agent, charon = world.agent_pid(), world.charon_pid()
    times = (world.started(charon) if charon else None, world.started(agent) if agent else None)
    before = times[0] is not None and times[1] is not None and times[0] < times[1]
    names = ", ".join(str(sa.get("name")) for sa in unknown[:5])
    why = "charon started before the agent" if before else "they came up while the agent was away"
    yield (
        "warn",
        f"{len(unknown)} SAs cannot be moved ({names}): {why}",
        "start the agent before charon (Before=strongswan.service in its unit); "
        "`ikectx resync` fetches these now, and rekeys every CHILD_SA for it",
    )


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
        if info.st_uid not in (0, os.geteuid()):
            wrong = True
            yield "warn", f"{what} {path} belongs to user {info.st_uid}", f"chown root {path}"
    if not wrong:
        yield "ok", "no other user can read the keys"


def certificates(world: World) -> Iterator[Outcome]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    transfer = world.config.transfer
    if transfer.transport != "tls":
        yield "ok", 'not needed with transport = "ipsec"'
        return
    missing = False
    data: dict[str, bytes] = {}
    for key, path in (("certificate", transfer.certificate), ("key", transfer.key), ("ca", transfer.ca)):
        try:
            data[key] = Path(path).read_bytes()
        except OSError as error:
            missing = True
            yield (
                "fail",
                f"[transfer] {key}: {path}: {error.strerror}",
                "see `TLS certificates` in the README",
            )
    if missing:
        return
    try:
        own = x509.load_pem_x509_certificates(data["certificate"])[0]
        cas = x509.load_pem_x509_certificates(data["ca"])
        private = load_pem_private_key(data["key"], None)
    except (ValueError, TypeError) as error:
        yield (
            "fail",
            f"not PEM, or a key with a passphrase: {error}",
            "give PEM files, and a key without passphrase",
        )
        return
    raw = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*raw) != own.public_key().public_bytes(*raw):
        yield (
            "fail",
            f"{transfer.key} is not the key of {transfer.certificate}",
            "give the key that belongs to it",
        )
    names = _names(own)
    if world.config.name.lower() not in names:
        yield (
            "note",
            f"the certificate holds {', '.join(sorted(names)) or 'no name'}, not {world.config.name!r}",
            'the peers need `identity = "…"` with one of these names in their [[peer]] for this gateway',
        )
    yield from _validity(world, own)
    yield from _usage(own)
    if not any(_issued(own, ca) for ca in cas):
        chain = x509.load_pem_x509_certificates(data["certificate"])[1:]
        if not chain:
            yield (
                "fail",
                f"{transfer.certificate} was not issued by a CA in {transfer.ca}",
                "give the CA of the gateways; intermediate ones go into the certificate file",
            )


def _names(certificate: Any) -> frozenset[str]:
    """dNSNames, else the CN; lower case. Peers are identified by the same rule."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        dns = []
    if not dns:
        dns = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return frozenset(name.lower() for name in dns)


def _validity(world: World, own: Any) -> Iterator[Outcome]:
    now = world.now()
    begins, ends = own.not_valid_before_utc.timestamp(), own.not_valid_after_utc.timestamp()
    if now < begins:
        yield "fail", "the own certificate is not valid yet", "set the clock, or wait"
    elif now > ends:
        yield "fail", f"the own certificate expired {(now - ends) / DAY:.0f} days ago", "renew it"
    elif ends - now < EXPIRY_DAYS * DAY:
        yield "warn", f"the own certificate expires in {(ends - now) / DAY:.1f} days", "renew it"
    else:
        yield "ok", f"the own certificate is valid for {(ends - now) / DAY:.0f} days"


def _usage(own: Any) -> Iterator[Outcome]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

    try:
        usages = set(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    lacking = [
        name
        for name, oid in (("serverAuth", Usage.SERVER_AUTH), ("clientAuth", Usage.CLIENT_AUTH))
        if oid not in usages
    ]
    if lacking and Usage.ANY_EXTENDED_KEY_USAGE not in usages:
        yield (
            "fail",
            f"the own certificate is not for {' and '.join(lacking)}",
            "issue it with both extended key usages: a gateway is client and server",
        )


def _issued(certificate: Any, ca: Any) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


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


def kernel(world: World) -> Iterator[Outcome]:
    if world.config.charon.kernel_esp:
        yield from _esp(world)
    elif world.exists("/dev/net/tun"):
        yield "note", "user-space ESP: sequence numbers cannot be carried over (see the limits in the README)"
    else:
        yield "fail", "/dev/net/tun is missing, which user-space ESP needs", "modprobe tun"
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


def _esp(world: World) -> Iterator[Outcome]:
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
            "message IDs that leave are not noted: `nft flush ruleset` removes the rules",
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


CHECKS: Sequence[tuple[str, Check]] = (
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
    ("kernel", kernel),
    ("message ids", message_ids),
    ("addresses", addresses),
    ("protection", protection),
    ("peers", peers),
    ("inside", inside),
    ("connections", connections),
    ("pools", pools),
)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print a table, then what to do, then one closing line."""
    from ..render import say, table

    styles = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}
    table(("check", "", "found"), [(item.check, item.level, item.found) for item in findings], styles=styles)
    told = [item for item in findings if item.fix and item.level != "ok"]
    for fix in dict.fromkeys(item.fix for item in told):
        for item in told:
            if item.fix == fix:
                say(f"{item.level} {item.check}: {item.found}")
        say(f"    {fix}")
    counts = {level: sum(item.level == level for item in findings) for level in LEVELS}
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
