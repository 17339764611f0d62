"""I/O: sockets whose packets are exempt from IPsec policies, in or out (Linux).

IKE and the CXTP messages of the mobile node must not be protected by the SA that they move, because the other
gateway could not decrypt them. A policy on the socket takes precedence over those of the system
(linux/xfrm.h, as charon does it).
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
    """Let the packets of `sock` pass in the clear, both ways. Errors: OSError, without CAP_NET_ADMIN."""
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
