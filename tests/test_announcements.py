"""What mobile nodes say of themselves, as a gateway's agent hears it beside charon."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ikectx.context import Endpoint, IkeContext
from ikectx.errors import StoreError
from ikectx.numbers import Protocol
from ikectx_cli import announcements
from ikectx_cli.announcements import AGAIN, Announcements
from mobike_ext.naming import ask
from mobike_ext.raw import udp_datagram
from mobike_ext.rename import FRESH_OCTETS, SpiUpdate
from vici_bridge.chain import import_messages
from vici_bridge.record import Record

from .peers import a_context

GATEWAY = a_context()
(GENERATION,) = GATEWAY.generations


class Host:
    """What is asked of `CharonHost`."""

    def __init__(self, context: IkeContext = GATEWAY) -> None:
        self.record = Record()
        for message in import_messages(context, 3):
            self.record.feed(message)
        self.noted: list[str] = []
        self.fails = False

    def note_update_spi(self, mn: Any, knows: bool) -> None:
        assert knows
        if self.fails:
            raise StoreError("disk full")
        self.noted.append(str(mn))


def ears(host: Host) -> Announcements:
    return Announcements(host, [GATEWAY.local.address])  # type: ignore[arg-type]


def said(*, announce: bool = True, by_mn: bool = True, asks: Any = ()) -> bytes:
    """An IP packet of the MN's, or one in its name."""
    mine = replace(GENERATION, initiator=not GENERATION.initiator) if by_mn else GENERATION
    machine = SpiUpdate(
        mine,
        3,
        GATEWAY.remote,
        GATEWAY.local,
        asks,
        iv=bytes(64),
        fresh=bytes(FRESH_OCTETS),
        addresses=False,
        announce=announce,
    )
    ((payload, _),) = machine.to_send(0.0)
    return packet(payload)


def packet(payload: bytes, to: Endpoint = GATEWAY.local) -> bytes:
    udp = udp_datagram(GATEWAY.remote, to, payload)
    head = bytes((0x45, 0)) + (20 + len(udp)).to_bytes(2) + bytes(4) + bytes((64, 17, 0, 0))
    return head + GATEWAY.remote.address.packed + to.address.packed + udp


def test_an_mn_that_knows_update_spi_is_noted_once() -> None:
    host = Host()
    here = ears(host)
    for when in (0.0, 5.0, AGAIN / 2):
        here.hear(said(), when)
    assert host.noted == [str(GATEWAY.remote_id)]
    here.hear(said(), AGAIN + 1)
    assert len(host.noted) == 2


@pytest.mark.parametrize(
    "other",
    [
        b"",
        packet(b"\0\0\0\0nonsense"),
        said(announce=False),
        said(by_mn=False),  # our own, sent back
        said()[:-1] + b"\0",  # damaged
        packet(said()[28:], Endpoint.of("192.0.2.77", 4500)),
        said(announce=False, asks=(ask(Protocol.ESP, b"\xc1\0\0\0", b"\xc1\0\0\1"),)),
    ],
)
def test_everything_else_says_nothing(other: bytes) -> None:
    host = Host()
    here = ears(host)
    here.hear(other, 0.0)
    assert host.noted == []
    here.hear(said(), 0.0)
    assert host.noted == [str(GATEWAY.remote_id)]


def test_an_sa_that_is_not_here() -> None:
    host = Host()
    host.record.forget(GATEWAY.spis)
    ears(host).hear(said(), 0.0)
    assert host.noted == []


def test_not_more_than_so_many_in_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "RATE", 3)
    host = Host()
    here = ears(host)
    for _ in range(3):
        here.hear(said(announce=False), 7.0)
    here.hear(said(), 7.5)
    assert host.noted == []
    here.hear(said(), 8.0)
    assert len(host.noted) == 1


def test_a_store_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    host.fails = True
    ears(host).hear(said(), 0.0)
    assert "not noted" in caplog.text
