#!/usr/bin/env python3
"""Move an IKE_SA between two IKE daemons of your own, without charon.

`TinyDaemon` is all an IKE daemon must offer: twelve methods, called in the order in which they stand. Here
it keeps its SAs in a dictionary. Two of them, each behind a `Gateway`, hand over one SA on loopback: TLS 1.3,
certificates on both sides, journals on disk.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from inspect_context import made_up

from ikectx import (
    ContextSink,
    ContextSource,
    Endpoint,
    FinalChild,
    FinalState,
    Fpt,
    Gateway,
    IkeContext,
    MoveReport,
    PeerConfig,
    SaName,
    Status,
    TlsConfig,
    TransferEvent,
    UnknownSaError,
    Verdict,
    open_store,
)

OSEQ_JUMP = 1 << 20


class TinyDaemon(ContextSource, ContextSink):
    """Implements the steps of both; what it can do without has defaults there.

    Every method may be called again after a crash of the agent: each must lead to the same end.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.serving: dict[SaName, IkeContext] = {}
        self.frozen: dict[SaName, IkeContext] = {}
        self.prepared: dict[SaName, IkeContext] = {}

    # -- the gateway that lets go: ContextSource --

    async def find(self, mn: IPv4Address | IPv6Address) -> Sequence[SaName]:
        """The SAs of the mobile node that is at this outer address."""
        return [sa for sa, context in self.serving.items() if context.remote.address == mn]

    def recorded(self, sa: SaName) -> IkeContext:
        """The SA, without asking anybody: what strangers send is checked with its keys."""
        try:
            return self.serving[sa]
        except KeyError:
            raise UnknownSaError(f"{self.name} has no SA {sa[0].hex()}_{sa[1].hex()}") from None

    async def export(self, sa: SaName, *, away: bool = False) -> IkeContext:
        """Everything about the SA, as it is now.

        `away`: the mobile node has left. A liveness check that it has not answered is then no reason to
        refuse: say `unsure`, and its message ID as `mid_initiator`.
        """
        return self.recorded(sa)

    async def freeze(
        self,
        context: IkeContext,
        to: str,
        *,
        away: bool = False,
        sending: bool = False,
        renaming: bool = False,
    ) -> FinalState:
        """Send nothing for it any more, neither IKE nor ESP; say what the last numbers were.

        `sending` and `renaming` are for gateways that change SPIs, which this one does not.
        """
        now = self.frozen[context.spis] = self.serving.pop(context.spis)
        children = tuple(FinalChild(child.spi_in, child.inbound, child.outbound) for child in now.children)
        return FinalState(*now.spis, now.mid_initiator, now.mid_responder, now.epoch + 1, children)

    async def thaw(self, context: IkeContext, oseq_jump: int) -> None:
        """It stays after all. Add `oseq_jump` to each outbound sequence number first."""
        if context.spis in self.frozen:
            self.serving[context.spis] = _jumped(self.frozen.pop(context.spis), oseq_jump)

    async def release(self, context: IkeContext) -> None:
        """It has gone: forget it, without a word to the mobile node."""
        self.frozen.pop(context.spis, None)

    # -- the gateway that takes over: ContextSink --

    async def check(self, context: IkeContext, keep_address: bool) -> Sequence[Verdict]:
        """What speaks against it? Touch nothing."""
        if context.spis in self.serving:
            return [Verdict(Fpt.IKEV2_SA, Status.IKE_SPI_IN_USE, "an SA with these SPIs is here")]
        return []

    async def prepare(self, context: IkeContext, keep_address: bool) -> None:
        """Install it, but send nothing for it yet."""
        here = context.local if keep_address else Endpoint.of(self.address, context.local.port)
        self.prepared[context.spis] = replace(context, local=here)

    async def take(self, context: IkeContext, final: FinalState) -> None:
        """It is ours: the last numbers and a jump in, ESP flows. Never lower a number that was used here."""
        self.prepared[context.spis] = _jumped(self.prepared[context.spis], OSEQ_JUMP, final)

    async def move_peer(self, context: IkeContext, final: FinalState) -> MoveReport:
        """Tell the mobile node our address: INFORMATIONAL with UPDATE_SA_ADDRESSES (RFC 4555)."""
        return MoveReport(messages=2, octets=300, requests=1)

    async def activate(self, context: IkeContext, final: FinalState, report: MoveReport) -> None:
        """Speak IKE for it; our next request goes after those that `move_peer` has used up."""
        if context.spis in self.prepared:
            here = self.prepared.pop(context.spis)
            self.serving[context.spis] = replace(
                here,
                mid_initiator=final.mid_initiator + report.requests,
                mid_responder=final.mid_responder,
                epoch=final.epoch,
            )

    async def undo(self, context: IkeContext) -> None:
        """Nothing of `prepare` and `take` may be left."""
        self.prepared.pop(context.spis, None)


def _jumped(context: IkeContext, jump: int, final: FinalState | None = None) -> IkeContext:
    last = {child.spi_in: child.outbound.seq for child in final.children} if final else {}
    children = []
    for child in context.children:
        seq = last.get(child.spi_in, child.outbound.seq) + jump
        children.append(replace(child, outbound=replace(child.outbound, seq=max(child.outbound.seq, seq))))
    return replace(context, children=tuple(children))


def make_certificates(folder: Path, *names: str) -> dict[str, TlsConfig]:
    """A CA and a certificate for each name. In real life your PKI does this."""
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Example CA")])
    now = datetime.now(UTC)

    def certify(subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=60))
        signed = builder.add_extension(extension, critical=True).sign(ca_key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    ca = folder / "ca.pem"
    ca.write_bytes(certify(ca_name, ca_key, x509.BasicConstraints(ca=True, path_length=0)))
    made = {}
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        made[name] = TlsConfig(folder / f"{name}.cert.pem", folder / f"{name}.key.pem", ca)
        # the name in the certificate is the peer's name in the other gateway's configuration
        made[name].cert.write_bytes(
            certify(x509.Name([]), key, x509.SubjectAlternativeName([x509.DNSName(name)]))
        )
        made[name].key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return made


async def demo(folder: Path) -> bool:
    tls = make_certificates(folder, "psg", "nsg")
    old, new = TinyDaemon("psg", "192.0.2.1"), TinyDaemon("nsg", "192.0.2.2")
    context = made_up()
    old.serving[context.spis] = context

    with open_store(folder / "psg", now=time.time()) as psg_store, open_store(folder / "nsg") as nsg_store:
        # nsg lets psg push SAs to it; psg need not listen
        nsg = Gateway("nsg", new, new, nsg_store, [PeerConfig("psg", "127.0.0.1")], tls["nsg"])
        await nsg.start([("127.0.0.1", 0)])
        port = nsg.addresses[0][1]
        psg = Gateway("psg", old, old, psg_store, [PeerConfig("nsg", "127.0.0.1", port)], tls["psg"])
        await psg.start()

        def progress(event: TransferEvent) -> None:
            print(f"{event.ms:8.1f} ms  {event.state}")

        try:
            dry = await psg.transfer(context.spis, "nsg", dry_run=True)
            print(f"dry run: {dry.text}")
            report = await psg.transfer(context.spis, "nsg", progress=progress)
        finally:
            await psg.stop()
            await nsg.stop()

    print(f"{report.result}: {report.text}")
    print(f"{report.cxtp_messages} messages, {report.cxtp_octets} octets between the gateways")
    there = new.serving.get(context.spis)
    if there is None or context.spis in old.serving:
        print(f"not moved: {report.hint}")
        return False
    same = (
        there.current.secret == context.current.secret
        and there.children[0].spi_in == context.children[0].spi_in
    )
    print(f"at nsg: {there.remote_id}, epoch {there.epoch}, same keys and SPIs: {'yes' if same else 'no'}")
    return report.result == "moved" and same


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(0 if asyncio.run(demo(Path(name))) else 1)
