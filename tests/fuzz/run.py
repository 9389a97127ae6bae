"""Fuzzes a reader: bytes near a well-formed file, until one raises what it should not, or hangs.

    python -m tests.fuzz.run --target image --seconds 600
    python -m tests.fuzz.run --target records --replay finding.bin

Mutations are drawn from a fixed seed: the same inputs in the same order each time. A finding is
kept in a file, which ``--replay`` runs again.
"""

import argparse
import faulthandler
import random
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

NAMES = ("image", "records")
SLOW = 10.0  # seconds of CPU for one small input: a hang
MEMORY = 4 * 2**30  # bytes that may be mapped
_ODD = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x80",
    b'"',
    b"\\",
    b"\n",
    b"[",
    b"..",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=NAMES, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", default="2026")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--findings", type=Path, default=Path("finding.bin"))
    options = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from tests.fuzz.targets import TARGETS

    target = TARGETS[options.target]
    if options.replay:
        target.run(options.replay.read_bytes())
        return
    count = mutated(target, options.seconds, options.seed, options.findings)
    print(f"{options.target}: {count:,} inputs in {options.seconds:g} s, nothing found")


def mutated(target: "Target", seconds: float, seed: str, findings: Path) -> int:
    """Run mutations of the seeds for so long; gives their number. The last one is in ``findings``
    if it raised, killed the process or took too long."""
    seeds, count = target.seeds(), 0
    for data in seeds:
        target.run(data)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutation(seeds, random.Random(f"{seed}/{count}"))
        findings.write_bytes(data)
        start = time.process_time()
        target.run(data)
        taken = time.process_time() - start
        assert taken < SLOW, f"{taken:.1f} s for {len(data)} bytes"
        count += 1
    findings.unlink(missing_ok=True)
    return count


def mutation(seeds: list[bytes], draw: random.Random) -> bytes:
    """A seed with a few places changed, repeated, cut, or taken from another seed."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 8, 20))):
        at = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 16, 200))
        how = draw.randrange(6)
        if how == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            odd = draw.choice(_ODD)
            data[at : at + len(odd)] = odd
        elif how == 2:
            del data[at : at + length]
        elif how == 3:
            data[at:at] = data[at : at + length] * draw.choice((1, 2, 50))
        elif how == 4:
            other = draw.choice(seeds)
            place = draw.randrange(len(other))
            data[at : at + length] = other[place : place + length]
        elif at < len(data):
            data[at] ^= 1 << draw.randrange(8)
    return bytes(data)


if __name__ == "__main__":
    main()
