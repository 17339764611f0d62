"""Certificates for tests: a CA and what it signs, as PEM files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ikectx.net.credentials import TlsConfig


class Authority:
    """A CA in a folder."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.path = folder / f"{name}.pem"
        certificate = (
            self._builder(self._name, self._key, 365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=10))
            .not_valid_after(now + timedelta(days=days))
        )

    def issue(
        self, cn: str, *sans: str, days: int = 30, password: bytes | None = None, trusts: Path | None = None
    ) -> TlsConfig:
        """A certificate with this CN and these dNSNames, its key, and the CA to trust."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(cn), key, days)
        if sans:
            names = x509.SubjectAlternativeName([x509.DNSName(san) for san in sans])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        cert_path, key_path = self._folder / f"{cn}.cert.pem", self._folder / f"{cn}.key.pem"
        cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        key_path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        )
        return TlsConfig(cert_path, key_path, trusts or self.path)

    def below(self, name: str) -> Authority:
        """An intermediate CA that this one has issued, in the same folder."""
        made = Authority(self._folder, name)
        certificate = (
            self._builder(made._name, made._key, 365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        made.path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return made

    def revoke(self, *certificates: Path | str, days: float = 7.0) -> Path:
        """The revocation list of this CA with these certificates, valid for `days` more; always the same
        file."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - timedelta(days=8))
            .next_update(now + timedelta(days=days))
        )
        for certificate in certificates:
            number = x509.load_pem_x509_certificate(Path(certificate).read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder().serial_number(number).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        path = self.path.with_suffix(".crl")
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path


def _name(cn: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)])
