"""Gives charon messages of its HA plugin, as if its agent had sent them.

    python -I -S lab_inject.py < LINES

A line is a datagram in hexadecimal, or `sleep SECONDS`. They go from 127.0.0.2:4510 to 127.0.0.1:4510 by a
raw socket, since the first of these addresses is the agent's. Standard library only, for a fast start.
"""

import socket
import struct
import sys
import time

CHARON, AGENT, PORT = "127.0.0.1", "127.0.0.2", 4510


def datagram(source: str, port: int, to: str, its_port: int, payload: bytes) -> bytes:
    """IPv4 and UDP around it; the kernel fills in what is 0 (RFC 768 allows no UDP checksum)."""
    ends = socket.inet_aton(source) + socket.inet_aton(to)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(payload), 0, 0, 64, socket.IPPROTO_UDP, 0) + ends
    return ip + struct.pack("!HHHH", port, its_port, 8 + len(payload), 0) + payload


def main() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for line in sys.stdin:
            words = line.split()
            if words[0] == "sleep":
                time.sleep(float(words[1]))
            else:
                octets = bytes.fromhex(words[0])
                raw.sendto(datagram(AGENT, PORT, CHARON, PORT, octets), (CHARON, 0))


if __name__ == "__main__":
    main()
