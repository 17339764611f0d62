#!/usr/bin/env python3
"""Look at a context: make one, pack it as a gateway would send it, unpack it, print it without its secrets.

    inspect_context.py                 a made-up IKE_SA
    inspect_context.py --out FILE      ... and keep the octets (they hold its keys!)
    inspect_context.py FILE            what is in such a file

The octets are Context Data Blocks as in a PCTD message (RFC 4067), see docs/protocol.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import os
import sys
from ipaddress import IPv4Address
from pathlib import Path

from ikectx import (
    ChildContext,
    Encr,
    Endpoint,
    Identity,
    IdType,
    IkeContext,
    IkectxError,
    IkeGeneration,
    KeMethod,
    Prf,
    ReplayState,
    Secret,
    TrafficSelector,
    TransferHeader,
    decode_context,
    encode_context,
)
from ikectx.wire.cxtp import Pctd


def made_up() -> IkeContext:
    """An IKE_SA as a gateway at 192.0.2.1 knows it: the mobile node is outside, at 198.51.100.7."""
    generation = IkeGeneration(
        spi_i=os.urandom(8),
        spi_r=os.urandom(8),
        initiator=False,
        nonce_i=os.urandom(32),
        nonce_r=os.urandom(32),
        secret=Secret(os.urandom(32)),
        prf=Prf.HMAC_SHA2_256,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        ke=KeMethod.CURVE_25519,
    )
    inside = IPv4Address("10.3.0.1")
    child = ChildContext(
        name="net",
        generation=0,
        initiator=False,
        spi_in=os.urandom(4),
        spi_out=os.urandom(4),
        nonce_i=generation.nonce_i,
        nonce_r=generation.nonce_r,
        encr=Encr.AES_GCM_16,
        encr_bits=128,
        local_ts=(TrafficSelector(IPv4Address("10.1.0.0"), IPv4Address("10.1.255.255")),),
        remote_ts=(TrafficSelector(inside, inside),),
        inbound=ReplayState(seq=1000, window=32, bitmap=0xFFFFFFFF),
        outbound=ReplayState(seq=2000),
    )
    return IkeContext(
        connection="home",
        generations=(generation,),
        local_id=Identity(IdType.FQDN, b"gw.example"),
        remote_id=Identity(IdType.RFC822_ADDR, b"alice@example"),
        local=Endpoint.of("192.0.2.1", 4500),
        remote=Endpoint.of("198.51.100.7", 4500),
        children=(child,),
        remote_vips=(inside,),
        mid_initiator=2,
        mid_responder=5,
    )


def show(value: object, indent: str = "") -> None:
    """Print what is not a default, one field a line. A `Secret` prints as its length."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        inner = getattr(value, field.name)
        if inner in (field.default, ()):
            continue
        several = inner if isinstance(inner, tuple) else (inner,)
        for number, one in enumerate(several):
            name = f"{indent}{field.name}" + (f"[{number}]" if several is inner else "")
            if dataclasses.is_dataclass(one) and type(one).__str__ is object.__str__:
                print(f"{name}:")
                show(one, indent + "  ")
            elif isinstance(one, bytes):
                print(f"{name}: {one.hex()}")
            else:
                print(f"{name}: {one.name if isinstance(one, enum.Enum) else one}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="a PCTD message to look at")
    parser.add_argument("--out", type=Path, help="where to put the PCTD message")
    chosen = parser.parse_args()
    if chosen.file:
        octets = chosen.file.read_bytes()
    else:
        context = made_up()
        blocks = encode_context(context, transfer=TransferHeader(os.urandom(8)))
        octets = Pctd(context.remote.address, blocks).serialize()
    if chosen.out:
        with open(os.open(chosen.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(octets)
    try:
        message = Pctd.parse(octets)
        context, header = decode_context(message.blocks)
    except IkectxError as error:
        print(f"inspect_context: {error}", file=sys.stderr)
        return error.exit_code
    print(f"PCTD of {len(octets)} octets, transfer {header.transfer_id.hex()}, to {header.intent}")
    for block in message.blocks:
        print(f"  {block.fpt.name}: {block.size} octets")
    show(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
