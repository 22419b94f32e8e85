"""Encrypts what is stored, with the keys of TEMPLATE_KEYS; sealed bytes open only in their own place."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
# Sealed bytes begin with this. No pickle does (pickles begin with \x80), and neither does JSON or a NumPy file.
MAGIC = b"FSEAL1"
_KEY_NAME_BYTES = 4
_NONCE_AT = len(MAGIC) + _KEY_NAME_BYTES
# Bytes that sealing adds.
SEAL_BYTES = _NONCE_AT + NONCE_BYTES + TAG_BYTES


class SealError(ValueError):
    """Sealed bytes do not open: they are damaged, moved from their place, or sealed with a key that is not here."""


class MissingKeyError(SealError):
    """Bytes are sealed with a key, named `key_name`, that the keyring does not hold."""

    def __init__(self, key_name: str) -> None:
        self.key_name = key_name
        super().__init__(f"sealed with the key {key_name}, which TEMPLATE_KEYS does not hold")


@dataclass(frozen=True, repr=False)
class Keyring:
    """Keys for AES-256-GCM (NIST SP 800-38D): the first seals, all of them open. Without keys nothing is sealed.

    Args:
        keys: 32 bytes each.
        plain_too: whether templates that are not sealed are read too.
    """

    keys: Sequence[bytes] = ()
    plain_too: bool = True

    def __bool__(self) -> bool:
        return bool(self.keys)

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """The keys' names for the log: four bytes of each key's digest, in hexadecimal."""
        return [_key_name(key).hex() for key in self.keys]

    def seal(self, data: bytes, place: str) -> bytes:
        """Encrypt `data` with the first key; it opens again only for the same `place` (a user_id, a file's name).

        A nonce is 96 random bits. After 2^32 seals with one key, the chance that two nonces are equal is 2^-32, the
        limit that SP 800-38D sets (section 8.3).
        """
        nonce = os.urandom(NONCE_BYTES)
        head = MAGIC + _key_name(self.keys[0]) + nonce
        return head + AESGCM(self.keys[0]).encrypt(nonce, data, head + place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """Decrypt what `seal` made for this `place`; SealError if it does not open."""
        if not is_sealed(sealed) or len(sealed) < SEAL_BYTES:
            raise SealError("not sealed, or cut off")
        nonce, body = sealed[_NONCE_AT : _NONCE_AT + NONCE_BYTES], sealed[_NONCE_AT + NONCE_BYTES :]
        missing = self.missing_key(sealed)
        # A damaged key name must not look like a missing key: try every key before reporting one.
        for key in self.keys:
            if missing or sealed.startswith(MAGIC + _key_name(key)):
                with suppress(InvalidTag):
                    return AESGCM(key).decrypt(nonce, body, MAGIC + _key_name(key) + nonce + place.encode())
        if missing:
            raise MissingKeyError(missing)
        raise SealError("damaged, or not in its own place")

    def missing_key(self, data: bytes) -> str | None:
        """Return the name of the key that bytes are sealed with, if the keyring does not hold it; None otherwise."""
        name = data[len(MAGIC) : _NONCE_AT]
        return name.hex() if is_sealed(data) and all(_key_name(key) != name for key in self.keys) else None

    def is_current(self, data: bytes) -> bool:
        """Whether bytes are stored as this keyring would store them: with the first key, or plain without keys."""
        if not self.keys:
            return not is_sealed(data)
        return data.startswith(MAGIC + _key_name(self.keys[0]))


NO_KEYS = Keyring()


def is_sealed(data: bytes) -> bool:
    """Whether bytes look like what `Keyring.seal` returns."""
    return data.startswith(MAGIC)


def parse_keys(text: str) -> Keyring:
    """Read TEMPLATE_KEYS: keys in base64, 32 bytes each, separated by commas or spaces, the newest first.

    Raises:
        ValueError: a key is not valid, or is there twice; the message does not show it.
    """
    keys = []
    for number, word in enumerate(re.split(r"[,\s]+", text.strip()) if text.strip() else [], 1):
        try:
            key = base64.b64decode(word.replace("-", "+").replace("_", "/"), validate=True)
        except binascii.Error as error:
            raise ValueError(f"its key number {number} is not base64") from error
        if len(key) != KEY_BYTES:
            raise ValueError(f"its key number {number} has {len(key)} bytes instead of {KEY_BYTES}")
        keys.append(key)
    if len(set(keys)) < len(keys):
        raise ValueError("it holds the same key twice")
    return Keyring(tuple(keys))


def _key_name(key: bytes) -> bytes:
    return hashlib.sha256(b"face-api template key" + key).digest()[:_KEY_NAME_BYTES]
