"""Writes what the lab's daemons read: strongswan.conf, swanctl.conf, certificates, agents' files, updown.

Every file is plain text in the folder of its host, so that a person can read what a scenario really ran.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import bird as lab_bird
from .boot import virtual_time
from .net import (
    ANNOUNCED,
    CORE,
    GATEWAYS,
    HOST_BITS,
    INNER,
    INNER_NET,
    MOBILES,
    OUTER,
    SECOND_NET,
    SHARED,
)

PLUGINS = (
    "random nonce openssl aes sha1 sha2 hmac gcm ccm ctr cmac xcbc chapoly curve25519 kdf drbg x509 pem pkcs1"
    " pkcs8 pubkey constraints {kernel} socket-default vici updown ha eap-identity eap-mschapv2 eap-md5 ml"
)
PSK = "only-in-the-lab"
EAP_USER = "carol"
CXTP_PORT = 5091
PRODUCT = "ikectx_cli.main"
"""The module that `bin/ikectx` of a lab runs."""
PROGRAM = "IKECTX_LAB_PROGRAM"
"""The environment variable by which it is another one."""
STOPS = "IKECTX_LAB_STOPS"
"""The environment variable with the folder of an agent that stops at points (`stops`)."""
SAMPLES = "IKECTX_LAB_SAMPLES"
"""The environment variable with the file for what an agent's CPU time went into (`sampled`)."""


@dataclass(frozen=True, slots=True)
class Tunnel:
    """How the mobile node's tunnel is made. The defaults are those of the scenario `handover`.

    `family` and `inner`: IP version outside and inside. `initiator`: mn or gateway. `shared`: the gateways
    have one outer address, and it moves along with the tunnel. `ike`, `esp`: proposals. `connection`,
    `child`: further settings of swanctl.conf.
    `mobile`: the mobile node has an agent, too. `by_packet`: they ask each
    other about IKE messages for SAs they do not know. `second`: there is another mobile node, mn2, with a
    connection of its own, whose charon hears of SAs by the HA plugin, too. `segments`: of each charon's HA
    plugin. `nat`: the mobile nodes share one
    address. `transfer`: further settings of [transfer] in the gateways' ikectx.toml.
    `daemon`: the IKE daemon of mn, charon or one of `daemons.KINDS`.
    `inside`: how the inner network finds a mobile node that has moved. static: not at all, everything for its
    inner address goes on to psg. announce: the gateways' updown scripts tell the server. bird: the updown
    script of examples/bird has BIRD announce a host route by BGP. `forward_via`: whether the gateways know
    each other's inner address.
    """

    family: int = 4
    inner: int = 4
    initiator: str = "mn"
    auth: str = "psk"
    vip: bool = True
    encap: bool = False
    shared: bool = False
    ike: str = "aes128gcm16-prfsha256-x25519"
    esp: str = "aes128gcm16"
    mode: str = "tunnel"
    children: int = 1
    libipsec: bool = False
    daemon: str = "charon"
    mobile: bool = False
    by_packet: bool = False
    second: bool = False
    segments: int = 1
    nat: bool = False
    inside: str = "static"
    forward_via: bool = True
    rogue: bool = False
    connection: Mapping[str, str | int | bool] = field(default_factory=dict)
    child: Mapping[str, str | int | bool] = field(default_factory=dict)
    transfer: Mapping[str, str | int | bool] = field(default_factory=dict)

    @property
    def mobiles(self) -> tuple[str, ...]:
        """The mobile nodes that take part."""
        return MOBILES if self.second else MOBILES[:1]

    @property
    def charons(self) -> tuple[str, ...]:
        """The hosts with a charon."""
        return tuple(host for host in self.hosts if host not in self.others)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts with an IKE daemon."""
        return (*self.mobiles, *GATEWAYS)

    @property
    def others(self) -> Mapping[str, str]:
        """The hosts with another IKE daemon than charon, and its kind."""
        return {} if self.daemon == "charon" else {"mn": self.daemon}

    @property
    def agents(self) -> tuple[str, ...]:
        """The hosts with an agent, in scenarios that have agents."""
        return (*(["mn"] if self.mobile else []), *GATEWAYS)

    def of_today(self, auth: str) -> Tunnel:
        """The same without what this project adds: the mobile node terminates its tunnel and connects anew.

        No gateway asks another for an SA by a packet: it would get the SA that the mobile node gives up just
        then, and draw the inside's packets to it, away from the new one.
        """
        return replace(self, auth=auth, initiator="mn", inside="announce", by_packet=False)

    def same_daemons(self, other: Tunnel) -> bool:
        """Whether daemons that run with this one's files can go on with the other's, reloaded."""
        names = (
            "daemon",
            "libipsec",
            "shared",
            "mobile",
            "by_packet",
            "second",
            "forward_via",
            "rogue",
            "transfer",
        )
        return all(getattr(self, name) == getattr(other, name) for name in names) and (
            self.plain == other.plain
        )

    @property
    def plain(self) -> bool:
        """Whether its ESP does not encrypt, which an agent takes only where it is told so."""
        return "null" in self.esp.split("-")


def write_all(work: Path, tunnel: Tunnel, overrides: Mapping[str, str]) -> None:
    """Writes every host's folder. `overrides`: text by host, appended, so it wins: swanctl.conf's by the name
    of the host, strongswan.conf's by HOST.strongswan."""
    write_tools(work)
    write_credentials(work)
    for host in tunnel.charons:
        folder = work / host
        folder.mkdir(exist_ok=True)
        for name in ("x509", "x509ca", "private"):
            (folder / name).mkdir(exist_ok=True)
        (folder / "x509ca" / "ca.pem").write_bytes((work / "pki" / "ca.pem").read_bytes())
        (folder / "x509" / "own.pem").write_bytes((work / "pki" / f"{host}.pem").read_bytes())
        key = folder / "private" / "own.pem"
        key.write_bytes((work / "pki" / f"{host}.key").read_bytes())
        key.chmod(0o600)
        mirrored = host in tunnel.agents or host == "mn2"
        settings = strongswan_conf(
            work,
            host,
            libipsec=tunnel.libipsec,
            mirrored=mirrored,
            segments=tunnel.segments,
            polls=virtual_time(),
        )
        (folder / "strongswan.conf").write_text(settings + overrides.get(f"{host}.strongswan", ""))
        text = gateway_conf(work, host, tunnel) if host in GATEWAYS else mobile_conf(tunnel, host)
        (folder / "swanctl.conf").write_text(text + SECRETS + overrides.get(host, ""))
    for host in GATEWAYS:
        script = work / host / "updown"
        script.write_text(updown_script(host, tunnel))
        script.chmod(0o755)
        (work / host / "state").mkdir(mode=0o700, exist_ok=True)
        (work / host / "ikectx.toml").write_text(agent_toml(work, host, tunnel))
    if tunnel.mobile:
        (work / "mn" / "state").mkdir(mode=0o700, exist_ok=True)
        (work / "mn" / "mobile.toml").write_text(mobile_toml(work, "mn", tunnel))


def strongswan_conf(
    work: Path,
    host: str,
    *,
    libipsec: bool = False,
    mirrored: bool = True,
    segments: int = 1,
    polls: bool = False,
) -> str:
    """charon's and swanctl's settings. Retransmission stays at strongSwan's defaults.

    `mirrored`: charon tells an agent about its SAs, by the HA plugin, which has so many `segments`. `polls`:
    its standard output has a line for every poll of its watcher, for `lab_drain`.
    """
    kernel = "kernel-libipsec kernel-netlink" if libipsec else "kernel-netlink"
    folder = work / host
    # Where an agent says when to move, charon is not to look for its gateway by itself (MOBIKE): an agent is
    # faster on any real machine, in an emulated one it may not be.
    roaming = "" if host != "mn" or not mirrored else "kernel-netlink { roam_events = no }"
    mirror = "ha { local = 127.0.0.1\n remote = 127.0.0.2\n monitor = no\n resync = no\n"
    mirror += f" segment_count = {segments} }}"
    plugins = PLUGINS.format(kernel=kernel)
    told = "polls { path = stdout\n flush_line = yes\n default = -1\n job = 3 }" if polls else ""
    if not mirrored:
        mirror, plugins = "", plugins.replace(" ha ", " ")
    return f"""charon-systemd {{
  load_modular = no
  load = {plugins}
  plugins {{
    vici {{ socket = unix://{folder}/charon.vici }}
    {mirror}
    {roaming}
  }}
  filelog {{
    log {{
      path = {folder}/charon.log
      time_format = %H:%M:%S
      time_add_ms = yes
      flush_line = yes
      default = 1
      ike = 2
      cfg = 1
      knl = 2
    }}
    {told}
  }}
}}
swanctl {{
  load = random nonce openssl x509 pem pkcs1 pkcs8 pubkey
  socket = unix://{folder}/charon.vici
}}
include {folder}/more*.conf
"""


def _settings(settings: Mapping[str, str | int | bool], indent: str) -> str:
    shown = {True: "yes", False: "no"}
    lines = [
        f"{indent}{key} = {shown[value] if isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]
    return "\n".join(lines)


def _auth(gateway: str, tunnel: Tunnel, host: str, *, mobile: bool) -> tuple[str, str]:
    """(local section, remote section) as the mobile node `host` (or the gateway) writes them."""
    own = f"id = {host}.example"
    gateway_id = f"{gateway}.example" if gateway else "%any"
    if tunnel.auth == "psk":
        node, gate = f"auth = psk\n      {own}", f"auth = psk\n      id = {gateway_id}"
    elif tunnel.auth == "cert":
        node = f"auth = pubkey\n      {own}" + ("\n      certs = own.pem" if mobile else "")
        gate = f"auth = pubkey\n      id = {gateway_id}" + ("" if mobile else "\n      certs = own.pem")
    else:
        node = f"auth = eap-mschapv2\n      {own}\n      eap_id = {EAP_USER}"
        gate = f"auth = pubkey\n      id = {gateway_id}" + ("" if mobile else "\n      certs = own.pem")
        if not mobile:
            node = f"auth = eap-mschapv2\n      {own}\n      eap_id = %any"
    return (node, gate) if mobile else (gate, node)


def _children(tunnel: Tunnel, host: str, updown: str, *, mobile: bool) -> str:
    """The child sections of `host`'s tunnel: `net`, and `net2` towards the server's second network."""
    far, near = INNER_NET[tunnel.inner], INNER[host][tunnel.inner]
    bits = 32 if tunnel.inner == 4 else 128
    own = "" if tunnel.vip else f"{near}/{bits}"
    sections = []
    for number in range(1, tunnel.children + 1):
        inside = far if number == 1 else SECOND_NET[tunnel.inner]
        if tunnel.mode == "transport":
            inside, own = "", ""
        mine, theirs = (own, inside) if mobile else (inside, own)
        lines = [f"      net{'' if number == 1 else number} {{"]
        if mine:
            lines.append(f"        local_ts = {mine}")
        if theirs:
            lines.append(f"        remote_ts = {theirs}")
        lines += [f"        esp_proposals = {tunnel.esp}", f"        mode = {tunnel.mode}"]
        if updown:
            lines.append(f"        updown = {updown}")
        lines.append(_settings(tunnel.child, "        "))
        sections.append("\n".join([*lines, "      }"]))
    return "\n".join(sections)


def _connection(name: str, tunnel: Tunnel, head: list[str], auth: tuple[str, str], children: str) -> str:
    lines = [f"  {name} {{", "    version = 2", f"    proposals = {tunnel.ike}"]
    lines += [f"    {line}" for line in head]
    if tunnel.encap:
        lines.append("    encap = yes")
    lines.append(_settings(tunnel.connection, "    "))
    lines += [f"    local {{\n      {auth[0]}\n    }}", f"    remote {{\n      {auth[1]}\n    }}"]
    return "\n".join([*lines, f"    children {{\n{children}\n    }}", "  }"])


def mobile_conf(tunnel: Tunnel, host: str = "mn") -> str:
    """A mobile node knows both gateways: connections `psg` and `nsg`, children `net` (and `net2`)."""
    connections = []
    for gateway in GATEWAYS:
        head = [f"remote_addrs = {(SHARED if tunnel.shared else OUTER[gateway])[tunnel.family]}"]
        if tunnel.vip and tunnel.initiator == "mn":
            head.append(f"vips = {INNER[host][tunnel.inner]}")
        auth = _auth(gateway, tunnel, host, mobile=True)
        connections.append(_connection(gateway, tunnel, head, auth, _children(tunnel, host, "", mobile=True)))
    return "connections {\n" + "\n".join(connections) + "\n}\n"


def gateway_conf(work: Path, gateway: str, tunnel: Tunnel) -> str:
    """A gateway has one connection for each mobile node, with its name, the same everywhere.

    Each has a pool of one address, so that every gateway hands out the one that scenarios name.
    """
    connections, pools = [], []
    for host in tunnel.mobiles:
        head = [f"local_addrs = {(SHARED if tunnel.shared else OUTER[gateway])[tunnel.family]}"]
        if tunnel.initiator == "gateway":
            head.append(f"remote_addrs = {OUTER[host][tunnel.family]}")
        if tunnel.vip:
            head.append(f"pools = {host}")
            pools.append(f"  {host} {{\n    addrs = {INNER[host][tunnel.inner]}\n  }}\n")
        children = _children(tunnel, host, f"{work}/{gateway}/updown", mobile=False)
        auth = _auth(gateway, tunnel, host, mobile=False)
        connections.append(_connection(host, tunnel, head, auth, children))
    text = "connections {\n" + "\n".join(connections) + "\n}\n"
    return text + ("pools {\n" + "".join(pools) + "}\n" if pools else "")


SECRETS = f"""secrets {{
  ike-lab {{
    secret = {PSK}
  }}
  eap-lab {{
    id = {EAP_USER}
    secret = {PSK}
  }}
}}
"""


def updown_script(host: str, tunnel: Tunnel) -> str:
    """What a gateway runs for a tunnel: a line in its updown.log, and what `Tunnel.inside` asks for.

    With a shared outer address it draws that one to this gateway at the core: that is how the operator of
    such gateways moves it, and no matter of the inside. bash only where it opens UDP without a process, since
    it takes longer than a shell to start.
    """
    gateway, inside, draw = INNER[host], "", ""
    if tunnel.inside == "announce":
        inside = f'echo "$verb $PLUTO_PEER_CLIENT $via" > /dev/udp/{INNER["srv"][4]}/5353'
    if tunnel.inside == "bird":
        inside = str(lab_bird.FOLDER / "updown")
    if tunnel.shared:
        words = [f"up {SHARED[v]}/{HOST_BITS[v]} {OUTER[host][v]}" for v in (4, 6)]
        sends = "; ".join(f'echo "{word}" > /dev/udp/{CORE[host][4]}/5353' for word in words)
        draw = f'[ "$verb" = up ] && {{ {sends}; }}'
    shell = "bash" if "/dev/udp/" in inside + draw else "sh"
    return f"""#!/bin/{shell}
case "$PLUTO_VERB" in
  up-client|up-host|up-client-v6|up-host-v6) verb=up ;;
  down-client|down-host|down-client-v6|down-host-v6) verb=down ;;
  *) exit 0 ;;
esac
case "$PLUTO_PEER_CLIENT" in
  *:*) via={gateway[6]} ;;
  *) via={gateway[4]} ;;
esac
{inside}
{draw}
echo "$PLUTO_VERB $PLUTO_CONNECTION $PLUTO_PEER $PLUTO_MY_CLIENT $PLUTO_PEER_CLIENT" >> "${{0%/*}}/updown.log"
exit 0
"""


def agent_toml(work: Path, host: str, tunnel: Tunnel) -> str:
    """The gateway agent's configuration."""
    folder = work / host
    other = "nsg" if host == "psg" else "psg"
    addresses = ", ".join(f'"{address}"' for address in outer(host, tunnel))
    more = "".join(f"{key} = {_toml(value)}\n" for key, value in tunnel.transfer.items())
    # with a way by the other gateway nobody asks, and the agent need not start anew for a baseline
    announces = tunnel.inside != "static" and not tunnel.forward_via
    told = "announces = true\n" if announces else ""
    told += "agents = true\n" if tunnel.mobile else ""
    # SAs keep the identity of the gateway that they were set up at
    ids = f'local_ids = ["{other}.example"]\n'
    if tunnel.plain:
        ids += f"esp_proposals = {_toml([tunnel.esp])}\n"
    sections = "".join(f'[connections.{name}]\nupdown = "{folder}/updown"\n{ids}{told}\n' for name in MOBILES)
    sections += f"[mobile]\nlisten = [{addresses}]\n\n"
    if tunnel.by_packet:
        sections += f'[by_packet]\nask = ["{other}"]\n\n'
    via = f"forward_via = {_toml(list(INNER[other].values()))}\n" if tunnel.forward_via else ""
    rights = ["push", "pull"]
    if tunnel.by_packet:
        rights.append("packet")
    return f'''name = "{host}"
state_dir = "{folder}/state"

[control]
socket = "{folder}/ikectx.vici"

{_charon_toml(folder, tunnel)}
[gateway]
addresses = [{addresses}]

[transfer]
listen = ["{OUTER[host][4]}:{CXTP_PORT}"]
certificate = "{folder}/x509/own.pem"
key = "{folder}/private/own.pem"
ca = "{folder}/x509ca/ca.pem"
{more}
{sections}[[peer]]
name = "{other}"
address = "{OUTER[other][4]}:{CXTP_PORT}"
rights = {_toml(rights)}
{via}{_ROGUE if tunnel.rogue else ""}'''


_ROGUE = f'''
[[peer]]
name = "mn2"
address = "{OUTER["mn2"][4]}:{CXTP_PORT}"
rights = ["push", "pull"]
'''


def outer(host: str, tunnel: Tunnel) -> list[str]:
    """The addresses from which a gateway serves mobile nodes, of both IP versions."""
    found = list((SHARED if tunnel.shared else OUTER[host]).values())
    return found + (list(ANNOUNCED.values()) if tunnel.by_packet and host == "nsg" else [])


def _charon_toml(folder: Path, tunnel: Tunnel) -> str:
    return f'''[charon]
vici = "unix://{folder}/charon.vici"
ha_local = "127.0.0.2"
ha_remote = "127.0.0.1"
segments = {tunnel.segments}
esp = "{"libipsec" if tunnel.libipsec else "kernel"}"
'''


def mobile_toml(work: Path, host: str, tunnel: Tunnel) -> str:
    """The configuration of a mobile node's agent: it knows both gateways."""
    folder = work / host
    gateways = "".join(
        f'[[gateway]]\nname = "{name}"\naddress = {_toml(list(OUTER[name].values()))}\n\n'
        for name in GATEWAYS
    )
    return f'''state_dir = "{folder}/state"

[control]
socket = "{folder}/ikectx.vici"

{_charon_toml(folder, tunnel)}
{gateways}'''


def _toml(value: object) -> str:
    """A value as TOML has it: what JSON writes for texts, numbers, truth and lists is TOML, too."""
    return json.dumps(value)


def write_tools(work: Path) -> None:
    """`bin/ikectx`, which finds this very installation, since a namespace or a VM inherits no PATH."""
    tools = work / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    wrapper = tools / "ikectx"
    path = os.environ.get("PYTHONPATH", "")  # where the packages are not in the environment of this Python
    found = f"export PYTHONPATH={shlex.quote(path)}\n" if path else ""
    program = f'{shlex.quote(sys.executable)} -m "${{{PROGRAM}:-{PRODUCT}}}"'
    wrapper.write_text(f'#!/bin/sh\n{found}exec {program} "$@"\n')
    wrapper.chmod(0o755)


def write_credentials(work: Path) -> None:
    """A CA and a certificate a host (ECDSA P-256, valid for 60 days, because an agent warns for 30), once a
    lab."""
    folder = work / "pki"
    if (folder / "ca.pem").exists():
        return
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, mode=0o700, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)

    def build(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
        return (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=12))
            .not_valid_after(now + datetime.timedelta(days=60))
        )

    def save(name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = folder / f"{name}.key"
        private.touch(mode=0o600)
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )

    authority = ec.generate_private_key(ec.SECP256R1())
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
            "digital_signature",
        ),
        False,
    )
    authority_id = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    for host in OUTER:
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(host), x509.DNSName(f"{host}.example")]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in OUTER[host].values()]
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            build(host, "ikectx lab", key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False
            )
            .sign(authority, hashes.SHA256())
        )
        save(host, certificate, key)
    root = (
        build("ikectx lab", "ikectx lab", authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(authority_id, critical=False)
        .sign(authority, hashes.SHA256())
    )
    save("ca", root, authority)
