"""TLS on both sides: whom a client trusts, what a server shows, and what a failed handshake means.

Promises
- Certificates and host names are verified, always: nothing here, and no setting, turns that off.
- Trusted are the system's authorities and, where one is given, that one.
- `refusal` tells what no other attempt mends: a certificate that proves nothing, or a server without TLS.

Used by the clients of reward servers and of the queue alike; needs nothing but the standard library.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CERTIFICATE: Final = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
# Numbers of OpenSSL, X509_V_ERR_...
_OTHER_NAME: Final = frozenset({62, 63, 64})
_UNKNOWN_SIGNER: Final = frozenset({18, 19, 20, 21})
_NO_TLS: Final = frozenset(
    {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL"}
)
"""Reasons of OpenSSL for a first answer that is no TLS."""


def read_authority(path: Path) -> str:
    """The certificates in a PEM file, and nothing else of it: a key that lies beside them goes nowhere.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    found = "\n".join(_CERTIFICATE.findall(text))
    if not found:
        raise ValueError(f"{path}: no PEM file of certificates (-----BEGIN CERTIFICATE-----)")
    try:
        client_context(found)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{path}: holds a certificate that is none: {error}") from error
    return found + "\n"


def client_context(authority: str | None = None) -> ssl.SSLContext:
    """What a client connects with.

    Args:
        authority: certificates to trust beside the system's, PEM.
    """
    context = ssl.create_default_context()
    if authority is not None:
        context.load_verify_locations(cadata=authority)
    return context


@dataclass(frozen=True)
class ServerCertificate:
    """What a server proves itself with."""

    chain: Path
    """PEM: its certificate, and those between it and the authority."""
    key: Path
    """PEM: its key, without a passphrase."""

    def check(self) -> None:
        """Refuse what uvicorn would fail at, or ask a passphrase for.

        Raises:
            ValueError: a file cannot be read, or the two do not belong together.
        """
        for path in (self.chain, self.key):
            try:
                path.read_bytes()
            except OSError as error:
                raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self.chain, self.key, password=_no_passphrase
            )
        except ssl.SSLError as error:
            raise ValueError(
                f"{self.chain} and {self.key}: no PEM certificate with its PEM key ({error.reason})"
            ) from error


def _no_passphrase() -> str:
    raise ValueError("the TLS key has a passphrase, which nobody is asked for here: give one without")


def refusal(error: BaseException, setting: str) -> str | None:
    """Why no other attempt will do better; None where one may.

    Args:
        error: of a connection that failed, as a client library has wrapped it.
        setting: where an authority is named, for the text.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _unproven(cause, setting)
        if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
            return f"what answers there speaks no TLS ({cause.reason})"
    return None


def _unproven(error: ssl.SSLCertVerificationError, setting: str) -> str:
    said = error.verify_message.rstrip(".")
    if error.verify_code in _OTHER_NAME:
        return f"its certificate is for another name ({said}): use one that is in it, or give it one for this"
    if error.verify_code in _UNKNOWN_SIGNER:
        return (
            f"its certificate is signed by nobody who is trusted here ({said}): name the PEM file of its "
            f"authority in {setting}; without one the system's authorities are trusted"
        )
    return f"its certificate proves nothing ({said}): it needs another one"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
