"""`Sealer`: values as they rest on the disk, each sealed for its place (AES-256-GCM)."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ikectx.errors import StoreError

KEY_SIZE = 32
NONCE_SIZE = 12
_VERSION = 1
"""Part of what is authenticated with each sealed value; it is older than the schema and stays."""


class Sealer:
    """AES-256-GCM with the name of the place as additional data."""

    __slots__ = ("_aead",)

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise StoreError(f"the store's key has {len(key)} octets instead of {KEY_SIZE}")
        self._aead = AESGCM(key)

    def seal(self, place: str, value: bytes) -> bytes:
        """nonce | ciphertext | tag."""
        nonce = secrets.token_bytes(NONCE_SIZE)
        return nonce + self._aead.encrypt(nonce, value, self._bind(place))

    def open(self, place: str, sealed: bytes) -> bytes:
        """Errors: StoreError when it was made with another key, for another place, or damaged.

        A column of SQLite holds a value of any type, whatever the table says.
        """
        try:
            return self._aead.decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], self._bind(place))
        except (InvalidTag, ValueError, TypeError):
            raise StoreError(
                f"{place} does not open: the key is another one, or the database is damaged",
                hint="restore state.db and state.key from one backup, or move both away to start anew",
            ) from None

    @staticmethod
    def _bind(place: str) -> bytes:
        return f"{place}|{_VERSION}".encode()
