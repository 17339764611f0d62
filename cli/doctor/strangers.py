"""What a user without rights can do on this machine, by trying it in a process that has become one (I/O)."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress

NOBODY = 65534


def as_nobody(addresses: Sequence[tuple[str, int]], paths: Sequence[str]) -> list[str] | None:
    """What worked of: binding these UDP addresses, reading or connecting to these paths. None: only root
    can try.

    A socket is bound with SO_REUSEADDR, which takes a place beside one that has it, too.
    """
    if os.geteuid() != 0:
        return None
    come, go = os.pipe()
    child = os.fork()
    if not child:
        found: list[str] = []
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            found = [*_bound(addresses), *_opened(paths)]
            os.write(go, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(go)
    with open(come, "rb") as reader:
        said = reader.read()
    os.waitpid(child, 0)
    return list(json.loads(said)) if said else None


def _bound(addresses: Sequence[tuple[str, int]]) -> list[str]:
    found = []
    for host, port in addresses:
        any_ = "::" if ":" in host else "0.0.0.0"  # noqa: S104 - whether somebody else could
        for place in (host, any_):
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with suppress(OSError):
                    sock.bind((place, port))
                    found.append(f"bind {place}:{port}, and so get or forge what charon tells of its SAs")
    return list(dict.fromkeys(found))


def _opened(paths: Sequence[str]) -> list[str]:
    found = []
    for path in paths:
        with suppress(OSError):
            if os.path.isdir(path):
                os.listdir(path)
                found.append(f"list {path}")
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(path)
                found.append(f"connect to {path}")
    return found
