"""Stand-in for a routing daemon on the server and on the core: routes follow what gateways announce.

A gateway's updown script sends one datagram, `up CLIENT GATEWAY` or `down CLIENT GATEWAY`
(CLIENT with prefix length), and the route towards CLIENT is put through GATEWAY, or taken
out when it still goes there. Standard library only, so that `python -I -S` starts it fast:
one netlink message a change, no process.
"""

import ipaddress
import socket
import struct
import sys

RTM_NEWROUTE, RTM_DELROUTE = 24, 25
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 1, 4, 0x100, 0x400
RTA_DST, RTA_GATEWAY = 1, 5


def route_message(verb: str, client: str, gateway: str, sequence: int) -> bytes:
    """The rtnetlink request for one announcement (linux/rtnetlink.h, native order). Raises ValueError."""
    network = ipaddress.ip_network(client, strict=False)
    via = ipaddress.ip_address(gateway)
    if network.version != via.version or verb not in ("up", "down"):
        raise ValueError(f"not an announcement: {verb} {client} {gateway}")
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    up = verb == "up"
    kind, flags = (RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE) if up else (RTM_DELROUTE, 0)
    # struct rtmsg: main table, RTPROT_STATIC, universe, unicast (any where it is deleted)
    body = struct.pack("=BBBBBBBBI", family, network.prefixlen, 0, 0, 254, 4, 0, int(up), 0)
    for kind_of, data in ((RTA_DST, network.network_address.packed), (RTA_GATEWAY, via.packed)):
        body += struct.pack("=HH", 4 + len(data), kind_of) + data
    return struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK | flags, sequence, 0) + body


def serve(address: str, port: int) -> None:
    """Listens until it is killed; a line on stderr for every announcement."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind((address, port))
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    current: dict[str, str] = {}
    sequence = 0
    while True:
        words = listener.recv(2048).decode("ascii", "replace").split()
        try:
            verb, client, gateway = words
            if verb == "down" and current.get(client) != gateway:
                continue
            sequence += 1
            netlink.send(route_message(verb, client, gateway, sequence))
            answer = netlink.recv(65536)
            error = struct.unpack_from("=i", answer, 16)[0]
        except (ValueError, OSError, struct.error) as trouble:
            print("ignored", words, trouble, file=sys.stderr, flush=True)
            continue
        if verb == "up":
            current[client] = gateway
        else:
            current.pop(client, None)
        print(verb, client, gateway, "errno", -error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
