"""Half a minute of fuzzing; docs/reliability.md has the command for ten."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", TARGETS)
def test_a_well_formed_file_of_each_format_is_read(name):
    for data in TARGETS[name].seeds():
        TARGETS[name].run(data)


def test_each_target_can_be_named():
    assert tuple(TARGETS) == run.NAMES


def test_the_same_seed_gives_the_same_inputs():
    for name, target in TARGETS.items():
        seeds = target.seeds()
        assert seeds == target.seeds(), name
        drawn = [run.mutation(seeds, random.Random(f"{i}")) for i in range(50)]
        assert drawn == [run.mutation(seeds, random.Random(f"{i}")) for i in range(50)]
        assert len(set(drawn)) > 45


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_ten_seconds_of_mutations_find_nothing(name, tmp_path):
    """In a process of its own: a decoder that crashes would end the tests without a word."""
    command = [sys.executable, "-m", "tests.fuzz.run", "--target", name, "--seconds", "10"]
    done = subprocess.run(
        [*command, "--findings", str(tmp_path / "finding.bin")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing found" in done.stdout
