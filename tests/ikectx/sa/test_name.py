"""How an IKE_SA is named: in memory, in the store, to people."""

from __future__ import annotations

import pytest

from ikectx.sa.name import SaName

NAME = SaName(bytes(range(8)), bytes(range(8, 16)))


def test_a_name_has_one_key_and_one_text() -> None:
    assert NAME.key == "000102030405060708090a0b0c0d0e0f"
    assert str(NAME) == f"{NAME}" == "0001020304050607:08090a0b0c0d0e0f"
    assert NAME.octets == bytes(range(16))
    assert SaName.from_key(NAME.key) == SaName.from_text(str(NAME)) == NAME


def test_it_is_the_plain_tuple_of_its_spis() -> None:
    assert (NAME.spi_i, NAME.spi_r) == NAME
    assert {NAME: 1}[NAME.spi_i, NAME.spi_r] == 1  # type: ignore[index]


def test_it_follows_a_change_of_spis() -> None:
    assert NAME.renamed({}) == NAME
    assert NAME.renamed({NAME.spi_r: bytes(8)}) == SaName(NAME.spi_i, bytes(8))


@pytest.mark.parametrize("key", ["", "00" * 15, "00" * 17, "0g" * 16, "00 " * 10 + "00", "00" * 14 + "  00"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError):
        SaName.from_key(key)


@pytest.mark.parametrize("text", ["", "00" * 16, "00" * 7 + ":" + "00" * 9, "00" * 8 + ":", ":" + "00" * 16])
def test_what_is_no_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        SaName.from_text(text)
