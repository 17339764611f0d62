"""`doctor` on this gateway's certificate, its key and its CAs, and on when they expire."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ikectx.errors import ConfigError
from ikectx.net.credentials import DAY, EXPIRY_DAYS, issued_by, list_end, revocation_lists, revoked

from .findings import Outcome
from .world import World


def certificates(world: World) -> Iterator[Outcome]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    transfer = world.config.transfer
    if transfer.transport != "tls":
        yield "ok", 'not needed with transport = "ipsec"'
        return
    missing = False
    data: dict[str, bytes] = {}
    for key, path in (("certificate", transfer.certificate), ("key", transfer.key), ("ca", transfer.ca)):
        try:
            data[key] = Path(path).read_bytes()
        except OSError as error:
            missing = True
            yield (
                "fail",
                f"[transfer] {key}: {path}: {error.strerror}",
                "see `TLS certificates` in the README",
            )
    if missing:
        return
    try:
        own = x509.load_pem_x509_certificates(data["certificate"])[0]
        cas = x509.load_pem_x509_certificates(data["ca"])
        private = load_pem_private_key(data["key"], None)
    except (ValueError, TypeError) as error:
        yield (
            "fail",
            f"not PEM, or a key with a passphrase: {error}",
            "give PEM files, and a key without passphrase",
        )
        return
    raw = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*raw) != own.public_key().public_bytes(*raw):
        yield (
            "fail",
            f"{transfer.key} is not the key of {transfer.certificate}",
            "give the key that belongs to it",
        )
    names = _names(own)
    if world.config.name.lower() not in names:
        yield (
            "note",
            f"the certificate holds {', '.join(sorted(names)) or 'no name'}, not {world.config.name!r}",
            'the peers need `identity = "…"` with one of these names in their [[peer]] for this gateway',
        )
    yield from _validity(world, own)
    yield from _usage(own)
    for ca in cas:
        if (
            found := expiry(
                world, f"the CA {ca.subject.rfc4514_string()}", ca.not_valid_after_utc.timestamp()
            )
        )[0] != "ok":
            yield found
    yield from _lists(world, own)
    if not any(issued_by(own, ca) for ca in cas):
        chain = x509.load_pem_x509_certificates(data["certificate"])[1:]
        if not chain:
            yield (
                "fail",
                f"{transfer.certificate} was not issued by a CA in {transfer.ca}",
                "give the CA of the gateways; intermediate ones go into the certificate file",
            )


def _names(certificate: Any) -> frozenset[str]:
    """dNSNames, else the CN; lower case. Peers are identified by the same rule."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
    except (x509.ExtensionNotFound, ValueError):
        dns = []
    if not dns:
        dns = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    return frozenset(name.lower() for name in dns)


def _validity(world: World, own: Any) -> Iterator[Outcome]:
    begins, ends = own.not_valid_before_utc.timestamp(), own.not_valid_after_utc.timestamp()
    if world.now() < begins:
        yield "fail", "the own certificate is not valid yet", "set the clock, or wait"
    else:
        yield expiry(world, "the own certificate", ends)


def expiry(world: World, what: str, ends: float) -> Outcome:
    """Whether a certificate is valid for `EXPIRY_DAYS` more. `ends`: seconds since 1970."""
    left = (ends - world.now()) / DAY
    if left < 0:
        return "fail", f"{what} expired {-left:.0f} days ago", "renew it"
    if left < EXPIRY_DAYS:
        return (
            "warn",
            f"{what} expires in {left:.1f} days",
            "renew it: the agent reads the new file by itself",
        )
    return "ok", f"{what} is valid for {left:.0f} days"


def _lists(world: World, own: Any) -> Iterator[Outcome]:
    """The revocation lists, and whether this gateway's own certificate is in one."""
    tls = world.config.transfer.tls
    get = "get the CA's present list; the agent reads it by itself"
    try:
        lists = revocation_lists(tls)
    except OSError as error:
        yield "fail", f"[transfer] revocation_lists: {error.filename}: {error.strerror}", get
        return
    except ConfigError as error:
        yield "fail", str(error), error.hint or get
        return
    for one in lists:
        name, left = one.issuer.rfc4514_string(), (list_end(one) - world.now()) / DAY
        if left > 1:
            yield "ok", f"the revocation list of {name} is valid for {left:.0f} days"
        elif left > 0:
            yield "warn", f"the revocation list of {name} is due to be replaced in {24 * left:.0f} hours", get
        elif tls.expired_count:
            found = f"the revocation list of {name} is {-left:.1f} days past its next update"
            yield "warn", f"{found}, and counts (expired_lists)", get
        else:
            yield (
                "fail",
                f"the revocation list of {name} is {-left:.1f} days past its next update: peers are refused",
                get,
            )
    if reason := revoked(own, lists, world.now(), True):
        yield "fail", f"of this gateway: {reason}", "issue another certificate, or get the list of its CA"


def _usage(own: Any) -> Iterator[Outcome]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

    try:
        usages = set(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    lacking = [
        name
        for name, oid in (("serverAuth", Usage.SERVER_AUTH), ("clientAuth", Usage.CLIENT_AUTH))
        if oid not in usages
    ]
    if lacking and Usage.ANY_EXTENDED_KEY_USAGE not in usages:
        yield (
            "fail",
            f"the own certificate is not for {' and '.join(lacking)}",
            "issue it with both extended key usages: a gateway is client and server",
        )
