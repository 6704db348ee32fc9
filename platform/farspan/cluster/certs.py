"""Certificates for TLS both ways between Ray's processes: one authority, one certificate for each node."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farspan.cluster.diagnose import cannot_write
from farspan.cluster.environment import TLS_FILES
from farspan.errors import ConfigError, StorageError

_CA_DAYS = 3650
_EARLIER = datetime.timedelta(minutes=5)
_ALWAYS = ("127.0.0.1", "localhost")
# A certificate travels in every handshake, and gRPC, which Ray speaks, ends one of more than some 8 KiB of it unsaid.
_MOST_ADDRESSES = 1024
# Of an address and its header in a certificate; IPv6 takes three times that, a name its letters and two.
_ADDRESS_BYTES = 6
# A name does not end in a number: that would be a mistyped address.
_HOST_NAME = re.compile(r"(?!-)([A-Za-z0-9-]{1,63}\.)*(?!\d+$)[A-Za-z0-9-]{1,63}")


def make_certificates(folder: Path, hosts: list[str], days: int) -> list[Path]:
    """Write ca.crt and ca.key once, and node.crt and node.key for `hosts` each time; gives the paths written.

    Ray connects by address: `hosts` must hold every address a node is reached by, each alone or by its network
    (10.0.0.0/26), where nobody knows yet which of them nodes get. 127.0.0.1 is always among them.

    Raises:
        ConfigError: no host, too many addresses, or days out of range.
        StorageError: the folder cannot be written, or holds half an authority.
    """
    if not hosts:
        raise ConfigError("--host", "must be given at least once", None, "add --host ADDRESS for each node")
    if not 1 <= days <= _CA_DAYS:
        raise ConfigError("--days", f"must lie in 1..{_CA_DAYS}", days, "use --days 365")
    addresses = list(_alternatives(hosts))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority, key, written = _authority(folder)
        node_key = ec.generate_private_key(ec.SECP256R1())
        node = _node_certificate(authority, key, node_key, addresses, days)
        written += [_write(folder / "node.crt", _pem(node)), _write(folder / "node.key", _pem_key(node_key))]
    except OSError as problem:
        raise StorageError(str(folder), f"certificates {cannot_write(problem)}") from None
    return written


def check_certificates(folder: Path, nodes: Mapping[str, str], least: int = 0) -> None:
    """Refuse a folder whose certificates would not be taken by the nodes; raises ConfigError.

    `nodes` holds the address of each host that is known. Where addresses are given later, the certificate must hold at
    least `least` of them, a network's.
    """
    again = f"run farspan infra certs {folder} with --host for each node"
    if missing := [name for name in TLS_FILES if not (folder / name).is_file()]:
        raise ConfigError("tls_folder", f"must hold {', '.join(TLS_FILES)}", f"no {missing[0]} in {folder}", again)
    try:
        authority, node = (x509.load_pem_x509_certificate((folder / name).read_bytes()) for name in TLS_FILES[:2])
        key = serialization.load_pem_private_key((folder / TLS_FILES[2]).read_bytes(), password=None)
        node.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError("tls_folder", "must hold certificates of one authority", str(folder), again) from None
    if key.public_key() != node.public_key():
        raise ConfigError("tls_folder", "must hold the key of node.crt", str(folder / "node.key"), again)
    for name, certificate in (("node.crt", node), ("ca.crt", authority)):
        if certificate.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
            ended = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
            raise ConfigError("tls_folder", f"must hold certificates that are good now: {name} ended", ended, again)
    names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    for host, address in nodes.items():
        if _alternative(address) not in names:
            missing_one = address if host == address else f"{address} ({host})"
            raise ConfigError("tls_folder", "must hold a certificate with every node's address", missing_one, again)
    addresses = [address for address in names.get_values_for_type(x509.IPAddress) if not _is_loopback(address)]
    if len(addresses) < least:
        rule = f"must hold a certificate of the network that nodes get addresses from, {least} or more of them"
        way_out = f"run farspan infra certs {folder} --host NETWORK, as 10.0.0.0/26"
        raise ConfigError("tls_folder", rule, f"{len(addresses)} addresses", way_out)


def _is_loopback(address: object) -> bool:
    return getattr(address, "is_loopback", False)


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, list[Path]]:
    """The authority of this folder: a second call signs with the first one's key, so that old nodes stay trusted."""
    certificate_file, key_file = folder / "ca.crt", folder / "ca.key"
    if certificate_file.exists() != key_file.exists():
        raise StorageError(
            str(folder), "holds half an authority; remove ca.crt and ca.key, or bring the other one back"
        )
    if key_file.exists():
        try:
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            loaded = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        except ValueError:
            raise StorageError(str(folder), "ca.crt or ca.key is not PEM; remove both to start over") from None
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise StorageError(str(folder), "ca.key is of another kind than ours; use another folder")
        return certificate, loaded, []
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farspan cluster authority")])
    certificate = (
        _builder(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate, key, [_write(certificate_file, _pem(certificate)), _write(key_file, _pem_key(key))]


def _node_certificate(
    authority: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    node_key: ec.EllipticCurvePrivateKey,
    addresses: list[x509.GeneralName],
    days: int,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farspan node")])
    both_ways = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        _builder(name, authority.subject, node_key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(both_ways, critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    # A clock that is a little late must not refuse it.
    start = datetime.datetime.now(datetime.UTC) - _EARLIER
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """What a certificate says of these hosts and of this machine itself, each once."""
    found = {_alternative(host): None for host in _ALWAYS}
    room = _MOST_ADDRESSES * _ADDRESS_BYTES
    for host in hosts:
        named = _network(host) if "/" in host else [_alternative(host)]
        fresh = dict.fromkeys(name for name in named if name not in found)
        room -= sum(map(_bytes_of, fresh))
        if room < 0:
            rule = f"must name at most {_MOST_ADDRESSES} addresses in all, a /22, a third of that of IPv6"
            raise ConfigError("--host", rule, host, "keep a smaller subnet for the cluster, and name that")
        found |= fresh
    return list(found)


def _bytes_of(name: x509.GeneralName) -> int:
    """What a name or address takes of a certificate."""
    if isinstance(name, x509.IPAddress):
        return _ADDRESS_BYTES * (3 if name.value.version == 6 else 1)
    return len(str(name.value)) + 2


def _network(written: str) -> list[x509.GeneralName]:
    """Every address of a network; of a large one so many that they are too many."""
    try:
        network = ipaddress.ip_network(written)
    except ValueError as problem:
        raise ConfigError("--host", f"must be a network ({problem})", written, "write it as 10.0.0.0/26") from None
    return [x509.IPAddress(network[i]) for i in range(min(network.num_addresses, _MOST_ADDRESSES + 1))]


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            way_out = "write it as 10.0.0.4, 10.0.0.0/26 or node.example"
            raise ConfigError("--host", "must be an address, a network or a name", host, way_out) from None
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(file: Path, content: bytes) -> Path:
    # A fresh file each time, with its final mode: a key is never readable by others, not even for a moment.
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as target:
        target.write(content)
    return file
