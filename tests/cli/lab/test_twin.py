"""An SA made to collide: both ends have the same keys, and exactly the names that are asked for."""

from __future__ import annotations

import io
import socket
import struct

import pytest

from ikectx.sa.context import IkeContext
from ikectx.sa.keys import esp_keys
from ikectx_cli.lab import inject as lab_inject
from ikectx_cli.lab.config import Tunnel
from ikectx_cli.lab.twin import FRESH_OCTETS, KINDS, TwinNames, lines, twin

TAKEN = TwinNames("11" * 8, "22" * 8, "c3333333", "c4444444")
FRESH = bytes(range(256)) * 2


def names(context: IkeContext) -> set[str]:
    (child,) = context.children
    return {part.hex() for part in (*context.spis, child.spi_in, child.spi_out)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [4, 6])
def test_both_ends_fit_and_have_the_names(kind: str, version: int) -> None:
    tunnel = Tunnel(family=version, inner=version, second=True, nat=version == 4)
    ends = twin(tunnel, kind, TAKEN, FRESH[:FRESH_OCTETS])
    nsg, mn2 = ends["nsg"], ends["mn2"]
    wanted = {getattr(TAKEN, name) for name in KINDS[kind]}
    assert names(nsg) == names(mn2) and names(nsg) & set(vars_of(TAKEN)) == wanted
    assert (nsg.children[0].spi_in, nsg.children[0].spi_out) == (
        mn2.children[0].spi_out,
        mn2.children[0].spi_in,
    )
    assert nsg.children[0].local_ts == mn2.children[0].remote_ts
    assert (nsg.connection, mn2.connection, nsg.local_id, nsg.remote_id) == (
        "mn2",
        "nsg",
        mn2.remote_id,
        mn2.local_id,
    )
    inbound, outbound = esp_keys(nsg.current, nsg.children[0])
    assert [key.reveal() for key in (*inbound, *outbound)] == [
        key.reveal() for pair in reversed(esp_keys(mn2.current, mn2.children[0])) for key in pair
    ]


def vars_of(taken: TwinNames) -> tuple[str, ...]:
    return taken.spi_i, taken.spi_r, taken.spi_in, taken.spi_out


def test_as_behind_a_nat() -> None:
    nsg = twin(Tunnel(second=True, nat=True), "all", TAKEN, FRESH)["nsg"]
    assert str(nsg.remote) == "10.9.0.1:4502"
    assert str(twin(Tunnel(second=True), "ike", TAKEN, FRESH)["nsg"].remote) == "10.1.1.10:4500"


def test_lines_end_with_the_toggle() -> None:
    text = lines(twin(Tunnel(second=True), "ike", TAKEN, FRESH)["mn2"], "5.9.8").splitlines()
    assert text[-3] == "sleep 0.5" and [line[:4] for line in text[-2:]] == ["0309", "0308"]
    assert all(bytes.fromhex(line) for line in text[:-3])


def test_a_datagram_of_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[bytes, tuple[str, int]]] = []

    class Raw:
        def __init__(self, *_: int) -> None:
            pass

        def __enter__(self) -> Raw:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def sendto(self, data: bytes, to: tuple[str, int]) -> None:
            sent.append((data, to))

    monkeypatch.setattr(lab_inject.socket, "socket", Raw)
    monkeypatch.setattr(lab_inject.sys, "stdin", io.StringIO("0309\nsleep 0\n"))
    lab_inject.main()
    ((data, to),) = sent
    assert to == ("127.0.0.1", 0) and data[28:] == b"\x03\x09"
    assert data[12:20] == socket.inet_aton("127.0.0.2") + socket.inet_aton("127.0.0.1")
    assert struct.unpack("!HHHH", data[20:28]) == (4510, 4510, 10, 0)
