"""What TLS between gateways rests on: certificate, key, CAs and revocation lists, read anew when they
change (I/O).

The files are looked at before each handshake and every `LOOK_AGAIN` seconds. Whatever cannot be used is
logged, and what was read before stays in use, because a gateway without certificates could move nothing.
Connections whose certificate is not acceptable any more are closed then."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from ikectx.errors import ConfigError, LinkError
from ikectx.mistakes import log_mistake

if TYPE_CHECKING:
    from cryptography import x509

log = logging.getLogger("ikectx.net.tls")

LOOK_AGAIN = 10.0
"""Seconds after which the files are looked at again, even if nobody connects."""
DAY = 86400.0
EXPIRY_DAYS = 30
"""So many days before a certificate expires, that is told once a day."""
_LIST = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """PEM files: our certificate (with its chain), its key, and the CAs that have issued peers' certificates.

    `revocation_lists` (RFC 5280, 5): of these CAs. With any of them a peer is refused if one of its issuers
    has none. `expired_count`: one that is past its next update goes on to count; else it forbids all of its
    CA's."""

    cert: Path | str
    key: Path | str
    ca: Path | str
    revocation_lists: tuple[Path | str, ...] = ()
    expired_count: bool = False

    @property
    def files(self) -> tuple[Path | str, ...]:
        """All of them."""
        return (self.ca, self.cert, self.key, *self.revocation_lists)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """A context for TLS 1.3 that demands a certificate of the other side. Errors: ConfigError naming the
        file."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        # the name is compared with the configuration after the handshake, for both roles alike
        made.check_hostname = False
        made.verify_mode = ssl.CERT_REQUIRED
        if keylog := os.environ.get("SSLKEYLOGFILE"):
            try:
                made.keylog_filename = keylog  # the operator's wish, as other programs heed it
            except OSError as error:
                hint = "the unit lets the agent write in /var/lib/ikectx"
                raise ConfigError(f"SSLKEYLOGFILE: {keylog}: {error.strerror}", hint=hint) from None
            log.warning(
                "the secrets of TLS connections are written to %s: contexts can be read with them", keylog
            )
        if server:
            made.num_tickets = 0  # connections are long-lived, and resumption would skip no certificate
        for path in self.files:
            try:
                Path(path).open("rb").close()
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from None
        _load(made, self.ca, "certificates of CAs in PEM")
        for path in self.revocation_lists:
            _load(made, path, "revocation lists in PEM (`openssl crl -inform DER -in FILE -out FILE.pem`)")
        if self.revocation_lists and not self.expired_count:
            # OpenSSL has no way to accept one that is past its next update: `objection` does it then
            made.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN
        try:
            made.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{self.cert} with {self.key}: {tls_reason(error)}",
                hint="PEM without a pass phrase, and the key must belong to the certificate",
            ) from None
        return made


def _load(context: ssl.SSLContext, path: Path | str, what: str) -> None:
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{path}: {tls_reason(error)}", hint=what) from None


def _no_password() -> str:
    """An empty password, so that OpenSSL does not ask for one on the terminal."""
    return ""


def tls_reason(error: BaseException) -> str:
    """An error of a connection in words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or str(error)).replace('_', ' ').lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def revocation_lists(config: TlsConfig) -> list[x509.CertificateRevocationList]:
    """The lists in the configured files. Errors: ConfigError, also for one that no CA of `ca` has signed."""
    from cryptography import x509

    if not config.revocation_lists:
        return []
    try:
        cas = x509.load_pem_x509_certificates(Path(config.ca).read_bytes())
    except ValueError as error:
        raise ConfigError(f"{config.ca} has no certificates in PEM: {error}") from None
    found = []
    for path in config.revocation_lists:
        for octets in _LIST.findall(Path(path).read_bytes()) or [b""]:
            try:
                one = x509.load_pem_x509_crl(octets)
            except ValueError:
                raise ConfigError(f"{path} has no revocation list in PEM") from None
            if not any(_signed(one, ca) for ca in cas):
                raise ConfigError(
                    f"{path}: no CA of {config.ca} has signed the revocation list of {_named(one.issuer)}",
                    hint="the file of CAs must have the one that issues the list, an intermediate one, too",
                )
            found.append(one)
    return found


def _signed(one: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    if one.issuer != ca.subject:
        return False
    with suppress(TypeError, ValueError):
        return one.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    return False


def issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether that CA has signed that certificate."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def revoked(
    certificate: x509.Certificate,
    lists: list[x509.CertificateRevocationList],
    now: float,
    expired_count: bool,
    *,
    peer: bool = True,
) -> str:
    """Why the revocation lists forbid that certificate; empty: they do not. `now`: seconds since 1970.
    `expired_count`: as in `TlsConfig`. `peer`: it is no CA's."""
    own = [one for one in lists if one.issuer == certificate.issuer]
    for one in own:
        entry = one.get_revoked_certificate_by_serial_number(certificate.serial_number)
        if entry is not None:
            what = "certificate" if peer else f"issuer {_named(certificate.subject)}"
            return f"its {what} was revoked on {entry.revocation_date_utc:%Y-%m-%d %H:%M} UTC"
    if lists and not own:
        return f"there is no revocation list of {_named(certificate.issuer)}"
    if own and not expired_count and not any(list_end(one) > now for one in own):
        return f"the revocation list of {_named(certificate.issuer)} is past its next update"
    return ""


def list_end(one: x509.CertificateRevocationList) -> float:
    """When the next update of a revocation list was due, in seconds since 1970."""
    return one.next_update_utc.timestamp() if one.next_update_utc else float("inf")


def _named(name: x509.Name) -> str:
    return name.rfc4514_string() or "a CA without name"


class Proven(Protocol):
    """A connection whose other side has shown a certificate."""

    @property
    def label(self) -> str:
        """The other side's address."""

    @property
    def certificate(self) -> bytes:
        """The other side's certificate in DER."""

    def lost(self, error: LinkError) -> None:
        """Close the connection, for this reason."""


class Credentials:
    """The files of one gateway's TLS as they were last read, and the connections that rest on them."""

    def __init__(self, config: TlsConfig, wall: Callable[[], float] = time.time) -> None:
        """Reads the files. `wall`: seconds since 1970. Errors: ConfigError."""
        self.config = config
        self._wall = wall
        self._open: WeakSet[Proven] = WeakSet()
        self._told: dict[str, float] = {}
        self._seen = self._stamps()
        self._read()

    def _stamps(self) -> list[tuple[int, int, int]]:
        found = []
        for path in self.config.files:
            try:
                info = os.stat(path)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((info.st_ino, info.st_mtime_ns, info.st_size))
        return found

    def _read(self) -> None:
        from cryptography import x509

        contexts = {server: self.config.context(server=server) for server in (False, True)}
        try:
            lists = revocation_lists(self.config)
            cas, own = (
                x509.load_pem_x509_certificates(Path(path).read_bytes())
                for path in (self.config.ca, self.config.cert)
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.config.cert} or {self.config.ca} is not PEM: {error}") from None
        # nothing is replaced before everything is read
        self._contexts, self._lists, self._cas, self._own = contexts, lists, cas, own[0]

    def context(self, *, server: bool) -> ssl.SSLContext:
        """The context for a handshake that begins now."""
        self.look()
        return self._contexts[server]

    def look(self) -> None:
        """Read the files if they have changed. Raises nothing."""
        now = self._stamps()
        if now == self._seen:
            return
        try:
            self.reload()
        except (ConfigError, OSError) as error:
            log.error("changed TLS files are not used, but those that were read before: %s", error)

    def reload(self) -> None:
        """Read all files, and close the connections that what is in them forbids. Errors: ConfigError, and
        nothing has changed then."""
        self._seen = self._stamps()
        before = self._cas
        self._read()
        log.info("certificates, keys, CAs and %d revocation lists were read anew", len(self._lists))
        self.drop(other_cas=before != self._cas)

    def admit(self, stream: Proven) -> None:
        """A handshake is over: the connection may go on for as long as its certificate is acceptable.

        Errors: LinkError with the reason, where it is not.
        """
        if reason := self.objection(stream.certificate):
            raise LinkError(reason)
        self._open.add(stream)

    def objection(self, certificate: bytes) -> str:
        """Why a certificate (DER) of a peer, whose chain was verified, is not acceptable now; empty: it
        is."""
        from cryptography import x509

        read = x509.load_der_x509_certificate(certificate)
        if (ends := read.not_valid_after_utc).timestamp() < self._wall():
            return f"its certificate has expired on {ends:%Y-%m-%d %H:%M} UTC"
        return self._revoked(read)

    def _revoked(self, certificate: x509.Certificate, *below: x509.Certificate) -> str:
        """As `revoked`, for each way up to a CA that has issued itself. OpenSSL looks at a chain only in the
        handshake, and where `expired_count` is set not at its lists."""
        now, counts = self._wall(), self.config.expired_count
        reason = revoked(certificate, self._lists, now, counts, peer=not below)
        if reason or not self._lists:
            return reason
        above = [ca for ca in self._cas if ca not in below and issued_by(certificate, ca)]
        ways = ["" if ca.subject == ca.issuer else self._revoked(ca, certificate, *below) for ca in above]
        return min(ways, default="")

    def drop(self, *, other_cas: bool = False) -> None:
        """Close the connections that may not go on. `other_cas`: the file of CAs has changed."""
        from cryptography import x509

        for stream in list(self._open):
            reason = self.objection(stream.certificate)
            if not reason and other_cas:
                read = x509.load_der_x509_certificate(stream.certificate)
                # through an intermediate CA of its own it may still be acceptable: the next handshake tells
                if not any(issued_by(read, ca) for ca in self._cas):
                    reason = f"none of the CAs in {self.config.ca} has issued its certificate"
            if reason:
                log.warning("the connection with %s ends: %s", stream.label, reason)
                self._open.discard(stream)
                stream.lost(LinkError(f"{stream.label}: {reason}"))

    async def tend(self) -> None:
        """Look at files, connections and dates until it is cancelled."""
        while True:
            try:
                self.look()
                self.drop()
                for text in self.expiring():
                    log.warning("%s", text)
            except Exception as error:  # later lists and certificates are to be read all the same
                log_mistake(log, "a look at certificates", error)
            await asyncio.sleep(LOOK_AGAIN)

    def expiring(self) -> Iterator[str]:
        """What expires within `EXPIRY_DAYS`, or is past its next update, and was not told in the last day."""
        from cryptography import x509

        now = self._wall()
        ends = {"the certificate of this gateway": self._own.not_valid_after_utc.timestamp()}
        ends |= {f"the CA {_named(ca.subject)}": ca.not_valid_after_utc.timestamp() for ca in self._cas}
        for stream in self._open:
            read = x509.load_der_x509_certificate(stream.certificate)
            ends[f"the certificate {_named(read.subject)} of a peer"] = read.not_valid_after_utc.timestamp()
        soon = [
            (what, f"{what} {'expires' if end > now else 'has expired'} on {_date(end)}")
            for what, end in ends.items()
            if end - now < EXPIRY_DAYS * DAY
        ]
        for one in self._lists:
            if list_end(one) < now:
                what = f"the revocation list of {_named(one.issuer)}"
                follows = "it goes on to count" if self.config.expired_count else "its peers are refused"
                soon.append((what, f"{what} is past its next update ({_date(list_end(one))}): {follows}"))
        for what, text in soon:
            if now - self._told.get(what, 0.0) >= DAY:
                self._told[what] = now
                yield text


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
