"""The world of `doctor`: processes, sockets, files, the kernel, charon, the agent, the peers.

Every method returns what it found, or None if that cannot be known; none makes a lasting change (the kernel
is tried in a network namespace of its own).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ikectx.errors import IkectxError, LinkError
from ikectx.net.five_tuple import Flow, Transport
from ikectx.sa.context import Address, Endpoint
from ikectx.wire.cxtp import PORT

from .. import reach
from ..config import Config, PeerSection
from ..settings import Setting, of_charon, pid_behind, with_numbers
from .strangers import as_nobody

SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROBE_SECONDS = 20
CONNECT_SECONDS = 5
SOME_PORT = 49152
"""Stands for the ephemeral port of the side that dials."""


@dataclass(frozen=True, slots=True)
class UdpOwner:
    """The owner of a UDP socket; pid 0: it could not be found out (no root, or another PID namespace)."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class PeerAnswer:
    """The result of connecting to a peer: the names that it proved, or the error and where it happened."""

    names: frozenset[str] = frozenset()
    not_before: float | None = None
    not_after: float | None = None
    failed: str = ""
    refused: bool = False


def _address(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _looks_for_charon(answer: Any) -> bool:
    """Whether an agent's status says that it has no connection with charon."""
    charon = answer.get("charon") if isinstance(answer, dict) else None
    return isinstance(charon, dict) and charon.get("reachable") is False


class World:
    """This machine, with the paths and addresses of the configuration."""

    def __init__(self, config: Config, control: str) -> None:
        self.config = config
        self.control = control
        self._asked: dict[str, Any] = {}

    def is_root(self) -> bool:
        return os.geteuid() == 0

    # -- charon and the agent

    def charon(self, what: str) -> Any:
        """`version`, `stats`, `conns` or `pools` over VICI. Errors: IkectxError."""
        from vici_bridge.vici.client import CharonVici

        if what not in self._asked:
            client = CharonVici(self.config.charon.vici, timeout=5)
            calls: dict[str, Callable[[], Any]] = {
                "version": client.version,
                "stats": client.stats,
                "conns": client.list_conns,
                "pools": client.get_pools,
            }
            try:
                self._asked[what] = calls[what]()
            except IkectxError as error:
                self._asked[what] = error
            finally:
                client.close()
        answer = self._asked[what]
        if isinstance(answer, IkectxError):
            raise answer
        return answer

    def agent(self, command: str) -> Any:
        """The JSON of an agent's command; `list-contexts` gives a list. Errors: IkectxError."""
        from vici_bridge.vici.client import ControlClient, json_of

        with ControlClient(self.control, timeout=5) as client:
            if command == "list-contexts":
                return client.listing(command, "list-context")
            answer = json_of(client.request(command))
            end = time.monotonic() + CONNECT_SECONDS
            while _looks_for_charon(answer) and self.charon_pid() is not None and time.monotonic() < end:
                time.sleep(0.2)  # one of them has just been started
                answer = json_of(client.request(command))
            return answer

    def agent_pid(self) -> int | None:
        return pid_behind(self.control)

    def agent_user(self) -> int | None:
        """The user that the agent runs as."""
        try:  # the owner of its folder in /proc is root, because its memory cannot be dumped
            status = Path(f"/proc/{self.agent_pid()}/status").read_text()
            return next(int(line.split()[2]) for line in status.splitlines() if line.startswith("Uid:"))
        except (OSError, ValueError, LookupError, StopIteration):
            return None

    def charon_pid(self) -> int | None:
        return pid_behind(self.config.charon.vici.removeprefix("unix://"))

    def started(self, pid: int) -> int | None:
        """The time at which a process started, in clock ticks since boot."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            return int(stat.rpartition(")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            return None

    def capabilities(self, pid: int | None) -> int | None:
        """The effective capabilities of a process, or of this one."""
        try:
            for line in Path(f"/proc/{pid or 'self'}/status").read_text().splitlines():
                if line.startswith("CapEff:"):
                    return int(line.split()[1], 16)
        except (OSError, ValueError, IndexError):
            pass
        return None

    # -- files

    def settings(self, which: str) -> dict[str, Setting] | None:
        """All settings of `strongswan.conf` or `swanctl.conf`, as charon reads them (its environment and
        root)."""
        return of_charon(self.charon_pid(), which)

    def now(self) -> float:
        return time.time()

    # -- network

    def udp_owner(self, address: str, port: int) -> UdpOwner | None:
        """The process that has bound address:port (or the port on every address); None: nobody.

        systemd (pid 1) is named only if nobody else has the socket, because it keeps those that it gives
        away."""
        for inode in self._udp_inodes(address, port):
            pids = [pid for pid in self._pids() if self._has_inode(pid, inode)]
            if not pids:
                return UdpOwner(0, "a process that cannot be seen")
            return UdpOwner(max(pids), self._name(max(pids)))
        return None

    def as_nobody(self, addresses: Sequence[tuple[str, int]], paths: Sequence[str]) -> list[str] | None:
        """See `strangers.as_nobody`."""
        return as_nobody(addresses, paths)

    @staticmethod
    def _udp_inodes(address: str, port: int) -> Iterator[str]:
        wanted = ip_address(address)
        table = "/proc/net/udp" if wanted.version == 4 else "/proc/net/udp6"
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            return
        for line in lines:
            fields = line.split()
            host, _, hexport = fields[1].partition(":")
            words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
            bound = ip_address(b"".join(words))
            if int(hexport, 16) == port and (bound == wanted or bound.is_unspecified):
                yield fields[9]

    @staticmethod
    def _pids() -> Iterator[int]:
        for name in os.listdir("/proc"):
            if name.isdigit():
                yield int(name)

    @staticmethod
    def _has_inode(pid: int, inode: str) -> bool:
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                return any(os.readlink(entry.path) == f"socket:[{inode}]" for entry in entries)
        except OSError:
            return False

    @staticmethod
    def _name(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:
            return "?"

    def is_local(self, address: str) -> bool:
        """Whether this machine has the address."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
        except OSError:
            return False
        return True

    def device_of(self, address: str) -> str:
        """The interface that has the address; empty if none has."""
        return reach.device_of(ip_address(address))

    def way_to(self, address: Address) -> reach.PacketWay:
        """The way by which packets for the address leave this machine."""
        return reach.way_to(address)

    def is_there(self, address: Address) -> bool | None:
        """Whether a machine with that address answers; None: not known. Takes up to two seconds."""
        return reach.answers(address)

    def connect(self, peer: PeerSection) -> PeerAnswer:
        """Connect to a peer by TLS with our certificate, as a transfer would; nothing is sent on it."""
        from ikectx.net.neighbours import is_address, own_address
        from ikectx.net.tls import certificate_names

        transfer = self.config.transfer
        version = ip_address(peer.host).version if is_address(peer.host) else 4
        own = own_address([(item.host, item.port) for item in transfer.listen], version)
        source = None if own is None else (str(own), 0)  # as a transfer, because the peer checks the source
        try:
            context = transfer.tls.context(server=False)
            with (
                socket.create_connection((peer.host, peer.port), CONNECT_SECONDS, source) as raw,
                context.wrap_socket(raw) as sock,
            ):
                certificate = sock.getpeercert()
                names = certificate_names(certificate)
                since, until = (str((certificate or {}).get(key, "")) for key in ("notBefore", "notAfter"))
                not_before = ssl.cert_time_to_seconds(since) if since else None
                not_after = ssl.cert_time_to_seconds(until) if until else None
                # With TLS 1.3 a server's verdict on our certificate comes after the handshake.
                sock.settimeout(1)
                try:
                    refused = sock.recv(1) == b""
                except TimeoutError:
                    refused = False
                return PeerAnswer(names, not_before, not_after, refused=refused)
        except IkectxError as error:
            return PeerAnswer(failed=str(error))
        except ssl.SSLError as error:
            text = error.reason or str(error)
            return PeerAnswer(failed=f"TLS: {text.replace('_', ' ').lower()}")
        except OSError as error:
            return PeerAnswer(failed=error.strerror or str(error))

    def connect_plainly(self, peer: PeerSection) -> PeerAnswer:
        """Connect to a peer as with `transport = "ipsec"`.

        Errors: LinkError if the kernel does not protect the connection, KernelError if that is not known.
        """
        addresses = self.addresses(peer.host)
        if not addresses:
            return PeerAnswer(failed="the name has no address")
        for address in addresses:
            self.check_protection(self.flows(address, peer.port)[0])
        return self._dial(peer)

    def _dial(self, peer: PeerSection) -> PeerAnswer:
        """Connect to a peer as a transfer would, through the kernel's IPsec."""
        return asyncio.run(self._dialled(peer))

    async def _dialled(self, peer: PeerSection) -> PeerAnswer:
        from ikectx.net.plain import plain_dial
        from ikectx.peer import PeerConfig
        from ikectx.timing import Timing
        from vici_bridge.kernel.spd_watch import SpdGuard

        transfer = self.config.transfer
        protocol: Transport = "sctp" if transfer.protocol == "sctp" else "tcp"
        listen = [(item.host, item.port) for item in transfer.listen]
        with SpdGuard() as guard:
            dial = plain_dial(Timing(connect=CONNECT_SECONDS), protocol, guard, listen)
            try:
                stream = await dial(PeerConfig(peer.name, peer.host, peer.port))
            except LinkError as error:
                return PeerAnswer(failed=str(error).removeprefix(f"{peer.name} at {peer.host}:{peer.port}: "))
            try:
                async with asyncio.timeout(1):
                    return PeerAnswer(refused=await stream.read() == b"")
            except TimeoutError:
                return PeerAnswer()
            except LinkError as error:
                return PeerAnswer(failed=str(error))
            finally:
                stream.close()

    def addresses(self, host: str) -> list[str]:
        """The addresses of a name. Errors: LinkError."""
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise LinkError(f"{host}: {error.strerror or error}") from None
        return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))

    def flows(self, address: str, port: int) -> tuple[Flow, Flow]:
        """A connection of ours to a peer, and one of its to us; the dialling side's port stands for any.

        Errors: LinkError.
        """
        remote = ip_address(address)
        transfer = self.config.transfer
        own = [(here, listen.port) for listen in transfer.listen if (here := _address(listen.host))]
        local, own_port = next(
            ((here, number) for here, number in own if here.version == remote.version and int(here)),
            (None, own[0][1] if own else PORT),
        )
        if local is None:
            family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect((address, 9))
                    local = ip_address(probe.getsockname()[0])
            except OSError as error:
                raise LinkError(f"there is no way to {address}: {error.strerror}") from None
        protocol: Transport = "sctp" if transfer.protocol == "sctp" else "tcp"
        return (
            Flow(Endpoint(local, SOME_PORT), Endpoint(remote, port), protocol),
            Flow(Endpoint(local, own_port), Endpoint(remote, SOME_PORT), protocol),
        )

    def check_protection(self, flow: Flow) -> None:
        """Errors: LinkError unless the kernel protects the flow now; KernelError if that cannot be asked."""
        from vici_bridge.kernel.spd_watch import SpdGuard

        with SpdGuard() as guard:
            guard.protection(flow)

    # -- tools and the kernel

    def notes_right(self) -> bool | None:
        """Whether the kernel notes message IDs as they leave, tried now; None: there are no rules for it.

        Errors: KernelError if it cannot be tried.
        """
        from vici_bridge.kernel.message_ids import MessageIds

        numbers = with_numbers(self.config.charon)
        with closing(MessageIds((numbers.port, numbers.port_nat_t))) as noted:
            return noted.right()

    def tool(self, name: str) -> str | None:
        """The path of a program."""
        return shutil.which(name, path=os.environ.get("PATH", "") + ":" + SEARCH)

    def probe(self, *command: str) -> tuple[bool | None, str]:
        """Try a command in a network namespace of its own: whether it worked (None: not tried), and its
        output."""
        if not self.is_root():
            return None, "only root can try it"
        try:
            done = subprocess.run(
                ["unshare", "-n", "--", *command],
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=False,
                env={**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SEARCH, "LC_ALL": "C"},
            )
        except (OSError, subprocess.SubprocessError) as error:
            return None, str(error)
        said = (done.stderr or done.stdout).strip().splitlines()
        return done.returncode == 0, said[-1] if said else f"exit code {done.returncode}"

    def forwards(self, version: int) -> bool:
        """Whether this host forwards packets of that IP version."""
        from vici_bridge.kernel.nat_relay import forwards_packets

        return forwards_packets(version)

    def redirects(self, device: str) -> bool:
        """Whether this host sends ICMP redirects (IPv4) to senders behind that interface.

        Linux does if the setting of all interfaces or that of this one says so.
        """
        for name in ("all", device):
            with suppress(OSError):
                if Path(f"/proc/sys/net/ipv4/conf/{name}/send_redirects").read_text().strip() != "0":
                    return True
        return False

    def forward_drops(self) -> list[str] | None:
        """nftables' chains that drop forwarded packets unless a rule accepts them; None: not known."""
        try:
            done = subprocess.run(
                ["nft", "list", "chains"],
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                check=True,
                env={**os.environ, "PATH": os.environ.get("PATH", "") + ":" + SEARCH, "LC_ALL": "C"},
            )
        except (OSError, subprocess.SubprocessError):
            return None
        found, table, chain = [], "", ""
        for line in map(str.strip, done.stdout.splitlines()):
            words = line.split()
            if words[:1] == ["table"]:
                table = " ".join(words[1:3])
            elif words[:1] == ["chain"]:
                chain = words[1]
            elif "hook forward" in line and "policy drop" in line:
                found.append(f"{table} {chain}")
        return found

    def exists(self, path: str) -> bool:
        return os.path.exists(path)
