"""Octets and what they stand for: CXTP (RFC 4067), profiles, tokens, IKEv2 (RFC 7296)."""
