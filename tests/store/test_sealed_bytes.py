"""Encryption at rest: what is sealed opens with its key, in its place, unchanged, or not at all."""

from __future__ import annotations

import base64

import pytest

from store.encryption import MAGIC, Keyring, MissingKeyError, SealError, is_sealed, parse_keys

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def text(*keys: bytes) -> str:
    return ",".join(base64.b64encode(key).decode() for key in keys)


def test_what_is_sealed_opens_in_its_place_and_shows_nothing_of_itself() -> None:
    sealed = Keyring((NEW,)).seal(b"a template", "somebody")
    assert is_sealed(sealed)
    assert b"template" not in sealed
    assert Keyring((NEW,)).open(sealed, "somebody") == b"a template"


def test_sealed_bytes_do_not_open_in_another_place() -> None:
    sealed = Keyring((NEW,)).seal(b"a template", "somebody")
    with pytest.raises(SealError):
        Keyring((NEW,)).open(sealed, "somebody else")


def test_one_flipped_bit_anywhere_is_found_or_does_no_harm_and_never_looks_like_a_lost_key() -> None:
    keyring = Keyring((NEW, OLD))
    sealed = Keyring((OLD,)).seal(b"a template", "somebody")
    of_the_name = range(len(MAGIC), len(MAGIC) + 4)
    for position in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[position] ^= 1
        if position in of_the_name:
            assert keyring.open(bytes(damaged), "somebody") == b"a template"
            continue
        with pytest.raises(SealError) as refusal:
            keyring.open(bytes(damaged), "somebody")
        assert not isinstance(refusal.value, MissingKeyError)
    for length in range(len(sealed)):
        with pytest.raises(SealError):
            Keyring((NEW,)).open(sealed[:length], "somebody")


def test_the_first_key_seals_and_every_key_opens() -> None:
    sealed = Keyring((OLD,)).seal(b"a template", "somebody")
    both = parse_keys(text(NEW, OLD))
    assert both.open(sealed, "somebody") == b"a template"
    assert not both.is_current(sealed)
    assert both.is_current(both.seal(b"a template", "somebody"))
    with pytest.raises(SealError, match="does not hold"):
        Keyring((NEW,)).open(sealed, "somebody")


def test_equal_templates_are_sealed_differently() -> None:
    assert Keyring((NEW,)).seal(b"same", "x") != Keyring((NEW,)).seal(b"same", "x")


@pytest.mark.parametrize("wrong", ["not base64!", text(b"short"), text(NEW, NEW)])
def test_keys_that_are_none_are_refused_without_being_shown(wrong: str) -> None:
    with pytest.raises(ValueError, match="it") as refusal:
        parse_keys(wrong)
    assert wrong not in str(refusal.value)


def test_a_keyring_never_shows_its_keys() -> None:
    assert base64.b64encode(NEW).decode() not in repr(parse_keys(text(NEW)))
    assert NEW.hex() not in repr(parse_keys(text(NEW)))


def test_without_keys_plain_bytes_are_current() -> None:
    assert Keyring().is_current(b"\x80\x05plain")
    assert not Keyring((NEW,)).is_current(b"\x80\x05plain")
    assert not parse_keys("  ")
