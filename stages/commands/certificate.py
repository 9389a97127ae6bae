"""Certificate: is everything here what the certificate says? One changed byte is found and named.

    make check-certificate
    make check-certificate PUBLIC_KEY=key.pub
    python -m stages certificate --write yes --key key.pem

In: ``reports/certificate.json``, which ``make verify`` writes, the files that it speaks of, and, if
it is signed and a public key is given, ``reports/certificate.json.sig``. Out: what is off, a line
each; exit status 1 if anything is. ``--write yes`` makes the certificate of what is here, and the
Croissant metadata of the pairs, without running anything again; what is here must be what dvc.lock
says.
"""

from pathlib import Path

from stages.commands import croissant, signature, statement
from stages.core import command
from stages.core.errors import UserError


def main(
    file: Path = statement.CERTIFICATE,
    write: str = "no",
    key: str = "",
    public_key: str = "",
) -> None:
    if write == "yes":
        issue(file, key)
        return
    stored = statement.read(file)
    signed = signature.beside(file).is_file()
    if public_key:
        print(f"{file}: {signature.verify(file, Path(public_key))}")
    elif signed:
        print(f"{file}: signed; PUBLIC_KEY=key.pub checks by whom")
    else:
        print(f"{file}: not signed, so it says what is here, and not who says so")
    off = statement.differences(stored, statement.make())
    if off:
        print("\n".join(off))
        raise UserError(f"not as {file} says: {len(off)}, listed above")
    subjects = len(stored["subject"])
    materials = len(stored["predicate"]["buildDefinition"]["resolvedDependencies"])
    print(f"all as it says: {subjects} files that were made, {materials} materials")


def issue(file: Path, key: str = "") -> None:
    """Write certificate and metadata, signed if there is a key.

    Raises:
        UserError: what is here is not what dvc.lock says.
    """
    statement.require_current()
    statement.write(file, statement.make())
    statement.write(croissant.FILE, croissant.make())
    old = signature.beside(file)
    old.unlink(missing_ok=True)
    print(f"{file}: an in-toto statement; {croissant.FILE}: the pairs in Croissant's words")
    if key:
        print(signature.sign(file, Path(key)))


if __name__ == "__main__":
    command.run(main)
