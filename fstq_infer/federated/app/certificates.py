"""Certificates and node keys for processes on loopback, valid for a year; docs/federated.md has those for devices."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any

from fstq_infer.errors import MissingExtraError

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID
except ModuleNotFoundError as error:
    raise MissingExtraError("SuperNodes on this machine", error.name or "cryptography", "federated") from error

ISSUER = "loopback CA"
PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def write_certificates(folder: Path) -> None:
    """ca.crt, server.pem and server.key, for 127.0.0.1 and localhost."""
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    (folder / "ca.crt").write_bytes(_certificate(ISSUER, authority, authority))
    (folder / "server.pem").write_bytes(_certificate("localhost", server, authority))
    write_private(folder / "server.key", server.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))


def write_key(path: Path) -> None:
    """An ECDSA key as ssh-keygen writes it, and PATH.pub."""
    key, form = ec.generate_private_key(ec.SECP384R1()), serialization.Encoding.OpenSSH
    write_private(path, key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
    path.with_suffix(".pub").write_bytes(key.public_key().public_bytes(form, serialization.PublicFormat.OpenSSH))


def write_private(path: Path, content: bytes) -> None:
    """A file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_bytes(content)


def _certificate(name: str, key: Any, authority: Any) -> bytes:
    now, own = datetime.datetime.now(datetime.timezone.utc), key is authority
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
    )
    if not own:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return bytes(builder.sign(authority, hashes.SHA256()).public_bytes(PEM))
