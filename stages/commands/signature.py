"""The signature of a certificate, by the package ``model_signing`` with a key of the user's.

The package is not among the requirements; without it a certificate stays unsigned. It works offline
and writes a Sigstore bundle, which its own command line verifies too. A key pair is made with
``openssl ecparam -name prime256v1 -genkey -noout -out key.pem`` and
``openssl ec -in key.pem -pubout -out key.pub``.
"""

from pathlib import Path

from stages.core.errors import UserError

INSTALL = "run `make extras`"


def beside(certificate: Path) -> Path:
    return certificate.with_name(f"{certificate.name}.sig")


def sign(certificate: Path, key: Path) -> str:
    """Sign with a private key (PEM, elliptic curve), if the package is there; a sentence on it.

    Raises:
        UserError: the key can't be used.
    """
    try:
        from model_signing import signing
    except ImportError:
        return f"{certificate} is not signed: the package model_signing is missing; {INSTALL}"
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        signer.sign(certificate, beside(certificate))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{key} can't sign: {' '.join(str(error).split())[:200]}") from None
    return f"{beside(certificate)}: signed with {key.name}"


def verify(certificate: Path, public_key: Path) -> str:
    """Check the signature with a public key; a sentence on it.

    Raises:
        UserError: there is no signature, it is another's, or the package is missing.
    """
    signature = beside(certificate)
    if not signature.is_file():
        raise UserError(f"{signature} is missing: the certificate is not signed")
    try:
        from model_signing import verifying
    except ImportError:
        raise UserError(
            f"{signature} can't be checked without the package model_signing; {INSTALL}"
        ) from None
    if not public_key.is_file():
        raise UserError(f"{public_key} is missing; name the signer's public key")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        verifier.verify(certificate, signature)
    except Exception as error:  # its errors share no base class
        raise UserError(
            f"{signature} is not a signature of {certificate} by {public_key.name}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return f"signed by the owner of {public_key.name}"
