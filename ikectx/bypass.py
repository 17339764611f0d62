"""I/O: sockets whose packets no IPsec policy catches, in or out (Linux).

IKE and CXTP's messages of the MN must not be protected by the very SA they move: the other gateway could
not open them. A policy on the socket goes before those of the system (linux/xfrm.h, as charon does it).
"""

from __future__ import annotations

import errno
import socket
import struct

_IP_XFRM_POLICY = 17
_IPV6_XFRM_POLICY = 35
_POLICY_SIZE = 168
"""Octets of struct xfrm_userpolicy_info."""

_NO_XFRM = {errno.ENOPROTOOPT, errno.EOPNOTSUPP}
"""A kernel without IPsec has no policies to bypass (ESP in user space)."""


def bypass(sock: socket.socket) -> None:
    """Let what `sock` sends and receives pass in the clear. Errors: OSError, without CAP_NET_ADMIN."""
    six = sock.family == socket.AF_INET6
    level, option = (socket.IPPROTO_IPV6, _IPV6_XFRM_POLICY) if six else (socket.IPPROTO_IP, _IP_XFRM_POLICY)
    for direction in (0, 1):  # XFRM_POLICY_IN, XFRM_POLICY_OUT
        policy = bytearray(_POLICY_SIZE)  # action 0 is XFRM_POLICY_ALLOW
        struct.pack_into("=H", policy, 40, sock.family)
        policy[160] = direction
        try:
            sock.setsockopt(level, option, bytes(policy))
        except OSError as error:
            if error.errno not in _NO_XFRM:
                raise
