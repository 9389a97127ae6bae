"""The examples for clusters: they parse, and what they would run are commands that exist."""

import re
import shlex
import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from tests.contracts import PRESETS, ROOT

SLURM, SKY = ROOT / "examples" / "slurm.sh", ROOT / "examples" / "skypilot.yaml"
NAMES = {"REPOSITORY": "git@host:us/pipeline.git", "NAME": "first"}


def dry_run(**more):
    return subprocess.run(
        ["bash", str(SLURM)],
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", **more},
        capture_output=True,
        text=True,
        timeout=20,
    )


def commands_of(script):
    """Words of each line that a script runs, assignments and tests aside."""
    for line in script.splitlines():
        line = line.strip().removeprefix("+ ").removeprefix(".venv/bin/")
        if re.match(r"(git|make|dvc|python) ", line):
            yield shlex.split(line, comments=True)


def check(commands):
    from dvc.cli.parser import get_main_parser

    targets = set(re.findall(r"(?m)^([a-z]+):.*## ", (ROOT / "Makefile").read_text()))
    seen = set()
    for words in commands:
        seen.add(" ".join(words[:3]))
        if words[0] == "dvc":
            get_main_parser().parse_args(words[1:])
        if words[0] == "make":
            assert words[1] in targets, words
    return seen


@pytest.mark.parametrize("settings", ["", "train.beta=0.1,0.2"])
def test_the_slurm_script_would_run_commands_that_exist(settings):
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    done = dry_run(**NAMES, SET=settings)
    assert done.returncode == 0, done.stderr
    seen = check(commands_of(done.stdout))
    assert ("make sweep SET=train.beta=0.1,0.2" in seen) == bool(settings)
    assert ("dvc exp run" in seen) != bool(settings)
    assert "dvc exp push" in seen


def test_a_job_of_several_nodes_trains_on_all_of_them():
    done = dry_run(**NAMES, SLURM_NNODES="2")
    assert done.returncode == 0, done.stderr
    assert "+ srun --nodes=2 " in done.stdout
    assert "make join" in done.stdout
    assert "dvc exp run --name first --set-param train.nodes=2" in done.stdout
    check(commands_of(done.stdout))
    assert "srun" not in dry_run(**NAMES, SLURM_NNODES="1").stdout
    both = dry_run(**NAMES, SLURM_NNODES="2", SET="train.beta=0.1,0.2")
    assert both.returncode == 2
    assert "this job has 2 nodes" in both.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_says_what_it_needs():
    done = dry_run(NAME="first")
    assert done.returncode
    assert "REPOSITORY: the address of the Git repository" in done.stderr


def test_sbatch_options_come_before_the_first_command():
    lines = SLURM.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options
    assert max(options) < first
    assert all(re.match(r"#SBATCH --[a-z-]+(=\S+)?( |$)", lines[i]) for i in options)


def test_the_skypilot_task_has_the_fields_of_one_and_runs_commands_that_exist():
    task = YAML(typ="safe").load(SKY.read_text())
    assert set(task) == {"name", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) <= {"accelerators", "disk_size", "use_spot"}
    assert task["envs"].keys() == {"REPOSITORY", "NAME", "PRESET"}
    assert task["envs"]["PRESET"] in {path.stem for path in PRESETS}
    assert {name for name, value in task["envs"].items() if value is None} == set(NAMES)
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
        used = set(re.findall(r"\$\{?(\w+)", task[part])) - {"PWD", "PATH"}
        assert used <= task["envs"].keys()
        assert check(commands_of(task[part]))
