"""One end of the traffic probe: numbered UDP datagrams on an absolute schedule, everything remembered.

    python -I -S lab_probe.py

A line on standard input is a run: LOCAL PORT REMOTE INTERVAL_MS OUTPUT; OUTPUT.ready says it is prepared.
From SIGUSR1 on, sends one datagram each interval from LOCAL:PORT to REMOTE:PORT; notes what arrives there.
SIGTERM ends sending; arrivals are awaited for another DRAIN seconds, then OUTPUT is written:
`sent` = [[number, time in ns, errno (0: the kernel took it)], ...], `received` = [[number, time in ns], ...],
`ended` = time in ns when it heard nothing more.
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


def main() -> None:
    for line in sys.stdin:
        local, port, remote, interval, output = line.split()
        run(local, int(port), remote, float(interval) / 1000, output)


def run(local: str, port: int, remote: str, interval: float, output: str) -> None:
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    probe = socket.socket(family, socket.SOCK_DGRAM)
    probe.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    probe.setblocking(False)
    probe.bind((local, port))
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
    target = (remote, port)
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
                error = 0
                try:
                    probe.sendto(payload.pack(number), target)
                except OSError as trouble:
                    error = trouble.errno or -1
                sent.append((number, stamp, error))
                number += 1
                continue
            wait = due - now
        else:
            end = end or now + DRAIN
            if now >= end:
                break
            wait = end - now
        if not poller.poll(wait * 1000):
            continue
        try:
            data, ancillary, _flags, _source = probe.recvmsg(64, 64)
        except OSError:
            continue
        stamp = 0
        for _level, _kind, value in ancillary:
            seconds, nanoseconds = struct.unpack("=qq", value[:16])
            stamp = seconds * 1_000_000_000 + nanoseconds
        if len(data) >= 4:
            received.append((struct.unpack_from("!I", data)[0], stamp or time.clock_gettime_ns(realtime)))
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
