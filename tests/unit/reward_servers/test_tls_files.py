"""Files of TLS: what is taken from them, and what is refused. Connections: tests/integration/test_tls.py."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme

from reward_servers.client import RewardClient
from reward_servers.exchange import client_options
from reward_servers.tls import ServerCertificate, client_context, read_authority


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_only_certificates_are_taken_from_a_file(authority: trustme.CA, tmp_path: Path) -> None:
    file, other = tmp_path / "both.pem", trustme.CA()
    key = authority.private_key_pem.bytes()
    file.write_bytes(b"# Gr\xc3\xbc\xc3\x9fe\n" + authority.cert_pem.bytes() + key + other.cert_pem.bytes())
    text = read_authority(file)
    assert text.count("BEGIN CERTIFICATE") == 2
    assert "PRIVATE KEY" not in text and "Gr" not in text.splitlines()[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"", "no PEM file of certificates"),
        (b"\x30\x82\x01\x0a\xff", "no PEM file of certificates"),
        (
            b"-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n",
            "holds a certificate that is none",
        ),
        (b"-----BEGIN CERTIFICATE-----\n%%\n-----END CERTIFICATE-----\n", "holds a certificate that is none"),
    ],
)
def test_a_file_without_certificates_is_named(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "authority.pem"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}: {says}"):
        read_authority(file)


def test_verification_is_never_off(authority: trustme.CA) -> None:
    for given in (None, authority.cert_pem.bytes().decode()):
        context = client_context(given)
        assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def test_an_authority_is_trusted_beside_the_system_s(authority: trustme.CA) -> None:
    alone, both = client_context(), client_context(authority.cert_pem.bytes().decode())
    assert both.cert_store_stats()["x509_ca"] == alone.cert_store_stats()["x509_ca"] + 1


def test_an_authority_for_plain_http_is_refused(authority: trustme.CA) -> None:
    with pytest.raises(ValueError, match="is for an https:// address, not 'http://h'"):
        RewardClient("ocr", "http://h", None, authority=authority.cert_pem.bytes().decode())


def test_a_client_of_https_verifies() -> None:
    import httpx

    context = client_options(httpx.URL("https://h.example"), None)["verify"]
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def shown(authority: trustme.CA, folder: Path) -> ServerCertificate:
    made = authority.issue_cert("localhost")
    chain, key = folder / "chain.pem", folder / "key.pem"
    made.cert_chain_pems[0].write_to_path(str(chain))
    made.private_key_pem.write_to_path(str(key))
    return ServerCertificate(chain, key)


def test_a_certificate_with_its_key_is_taken(authority: trustme.CA, tmp_path: Path) -> None:
    shown(authority, tmp_path).check()


def test_a_key_of_another_certificate_is_refused(authority: trustme.CA, tmp_path: Path) -> None:
    given = shown(authority, tmp_path)
    authority.issue_cert("localhost").private_key_pem.write_to_path(str(given.key))
    with pytest.raises(ValueError, match=r"no PEM certificate with its PEM key \(KEY_VALUES_MISMATCH\)"):
        given.check()


def test_a_file_that_is_not_there_is_named(authority: trustme.CA, tmp_path: Path) -> None:
    given = shown(authority, tmp_path)
    given.key.unlink()
    with pytest.raises(ValueError, match=f"{given.key}: cannot be read"):
        given.check()


def test_nobody_is_asked_for_a_passphrase(authority: trustme.CA, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    given = shown(authority, tmp_path)
    key = serialization.load_pem_private_key(given.key.read_bytes(), None)
    given.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="has a passphrase, which nobody is asked for"):
        given.check()
