"""Has the kernel forget every connection that it tracks in this network namespace, and how NAT changed them.

    python -I -S untrack.py

The rules of a NAT see only the first packet of a connection. One that goes on between the same ends keeps the
address and port that rules gave it which are there no more (IPCTNL_MSG_CT_DELETE without a tuple, Linux
include/uapi/linux/netfilter/nfnetlink_conntrack.h). Standard library only, for a fast start.
"""

import socket
import struct

NETLINK_NETFILTER = 12
CT_DELETE = 1 << 8 | 2
REQUEST_ACK = 1 | 4


def main() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as link:
        link.send(struct.pack("=IHHIIBBH", 20, CT_DELETE, REQUEST_ACK, 1, 0, socket.AF_UNSPEC, 0, 0))
        _length, _kind, _flags, _number, _port, error = struct.unpack_from("=IHHIIi", link.recv(4096))
    if error:
        raise OSError(-error, "the kernel's connections are not forgotten")


if __name__ == "__main__":
    main()
