"""One end of the traffic probe: numbered UDP datagrams on an absolute schedule, everything remembered.

    python -I -S lab_probe.py

A line on standard input is a run: PORT INTERVAL_MS PATH[,PATH...] OUTPUT, where PATH is LOCAL>REMOTE;
OUTPUT.ready says it is prepared. From SIGUSR1 on, each interval one datagram goes out from LOCAL:PORT to
REMOTE:PORT of every path, with the same number on all, because a host that changes its address can be reached
by one of them only. OUTPUT.ready is gone when the first has gone out. What arrives is noted. With several
paths, each datagram names its source address, which the kernel refuses while it is not there, and only
datagrams from a path's remote address count.
SIGTERM ends sending; arrivals are awaited for another DRAIN seconds, then OUTPUT is written:
`sent` = [[number, time in ns, errno (0: the kernel took it, on one path at least)], ...],
`received` = [[number, time in ns], ...], `ended` = time in ns when it heard nothing more.
Times are CLOCK_REALTIME of the machine; an arrival has the kernel's stamp (SO_TIMESTAMPNS), so that a busy
machine does not look like a gap in the traffic. Standard library only, for a fast start; one process does all
runs, since even that takes a second on an emulated CPU.
"""

import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time

DRAIN = 1.0
SO_TIMESTAMPNS = 35
IP_PKTINFO = 8
IPV6_PKTINFO = 50


def main() -> None:
    for line in sys.stdin:
        port, interval, paths, output = line.split()
        ways = [tuple(path.split(">")) for path in paths.split(",")]
        run(int(port), float(interval) / 1000, ways, output)


def source(local: str) -> list[tuple[int, int, bytes]]:
    """The control message that makes the kernel send from that address, or refuse to."""
    if ":" in local:
        inside = socket.inet_pton(socket.AF_INET6, local) + struct.pack("=i", 0)
        return [(socket.IPPROTO_IPV6, IPV6_PKTINFO, inside)]
    return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, socket.inet_aton(local), bytes(4)))]


def run(port: int, interval: float, paths: list[tuple[str, ...]], output: str) -> None:
    family = socket.AF_INET6 if ":" in paths[0][0] else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_DGRAM)
    probe.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    probe.setblocking(False)
    one = len(paths) == 1
    probe.bind((paths[0][0] if one else "", port))
    ways = [((remote, port), [] if one else source(local)) for local, remote in paths]
    known = {remote for _local, remote in paths}
    running = True
    begun = False

    def begin(_number: int, _frame: object) -> None:
        nonlocal begun
        begun = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sent: list[tuple[int, int, int]] = []
    received: list[tuple[int, int]] = []
    number = 0
    poller = select.poll()
    poller.register(probe, select.POLLIN)
    payload = struct.Struct("!I28x")
    realtime = time.CLOCK_REALTIME
    with open(output + ".ready", "w"):
        pass
    while running and not begun:
        time.sleep(0.01)
    gc.collect()
    gc.disable()
    start = time.monotonic()
    end = 0.0
    while True:
        now = time.monotonic()
        if running:
            due = start + number * interval
            if now >= due:
                stamp = time.clock_gettime_ns(realtime)
                data = [payload.pack(number)]
                errors = []
                for target, control in ways:
                    try:
                        probe.sendmsg(data, control, 0, target)
                        errors.append(0)
                    except OSError as trouble:
                        errors.append(trouble.errno or -1)
                error = 0 if 0 in errors else errors[0]
                sent.append((number, stamp, error))
                if not number:
                    os.unlink(output + ".ready")
                number += 1
            # what arrives is taken also while this end is late, or its socket's buffer would overflow
            wait = max(0.0, start + number * interval - now)
        else:
            end = end or now + DRAIN
            if now >= end:
                break
            wait = end - now
        if not poller.poll(wait * 1000):
            continue
        try:
            got, ancillary, _flags, peer = probe.recvmsg(64, 64)
        except OSError:
            continue
        stamp = 0
        for _level, _kind, value in ancillary:
            seconds, nanoseconds = struct.unpack("=qq", value[:16])
            stamp = seconds * 1_000_000_000 + nanoseconds
        if len(got) >= 4 and (one or peer[0] in known):
            received.append((struct.unpack_from("!I", got)[0], stamp or time.clock_gettime_ns(realtime)))
    ended = time.clock_gettime_ns(realtime)
    probe.close()
    gc.enable()
    with open(output + ".part", "w", encoding="ascii") as file:
        json.dump({"sent": sent, "received": received, "ended": ended}, file)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.rename(output + ".part", output)


if __name__ == "__main__":
    main()
