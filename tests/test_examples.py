"""The examples for clusters: they parse, what they would run are commands that exist, and they run
from a clean machine to results in the remotes.
"""

import json
import re
import shutil
import subprocess
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.contracts import ROOT
from tests.repository import (
    PARAMS,
    PUT,
    call,
    clone,
    commit_and_push,
    make,
    processes_with,
    wait_for,
)

SLURM, SKY = ROOT / "examples" / "slurm.sh", ROOT / "examples" / "skypilot.yaml"


def test_the_slurm_script_refuses_what_it_can_not_run():
    for more, told in (
        ({"NAME": "first"}, "REPOSITORY: the address of the Git repository"),
        ({"NAME": "a", "REPOSITORY": "b", "SLURM_NNODES": "2", "SET": "c=1,2"}, "has 2 nodes"),
    ):
        env = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1", **more}
        done = subprocess.run(["bash", str(SLURM)], env=env, capture_output=True, text=True)
        assert done.returncode
        assert told in done.stderr
    assert not re.search(r"(?m)^[^#\n].*\n(.*\n)*#SBATCH", SLURM.read_text())  # read before them


# run for real: a project of no work, stubs for SLURM's commands, a clean machine

STAGE = (
    PUT
    + PARAMS
    + """
if sys.argv[1] == "data":
    assert not pathlib.Path({pushed!r}).exists(), "the data were pushed"
    put("data/pairs/pairs.txt", str(p["preprocess"]))
if sys.argv[1] == "train":
    began = pathlib.Path({began!r})
    if p["train"]["seed"] == 7 and not began.exists():
        began.touch()
        time.sleep(100)
    if p["train"]["gpus"] > 1:
        import ray
        ray.init()
        while len(ray.nodes()) < p["train"]["gpus"]:
            time.sleep(0.1)
        pathlib.Path("joined").write_text(str(len(ray.nodes())))
    put("models/adapter/weights", json.dumps(p["train"]))
    put("reports/curves/train.csv", "step,loss")
if sys.argv[1] == "evaluate":
    put("reports/results/metrics.json", json.dumps({{"win_rate": p["train"]["beta"]}}))
"""
)
STUBS = {
    "sbatch": """
while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
cp "$1" "$SPOOL/slurm_script"  # as SLURM does
SLURM_NNODES=${nodes:-1} SLURM_NODEID=0 exec bash "$SPOOL/slurm_script"
""",
    "srun": """
while [[ $1 == --* ]]; do [[ $1 != --nodes=* ]] || nodes=${1#*=}; shift; done
set -m  # each node a process group
trap 'for group in $(jobs -p); do kill -- -"$group"; done' TERM
for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & done
wait
""",
}


class Machine:
    """Where jobs run, with what a bare machine has and an environment that is installed already:
    the clone brings it along.
    """

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / "machine" / "pipeline"
        self.began, pushed, self.bin = folder / "began", folder / "pushed", folder / "bin"
        self.bin.mkdir()
        for name, text in STUBS.items():
            executable(self.bin / name, f"#!/usr/bin/env bash{text}")
        project = make(folder, STAGE.format(began=str(self.began), pushed=str(pushed)))
        (project / "params").mkdir()
        for name, beta, seed in (("small", 0.1, 1), ("big", 0.4, 1), ("slow", 0.4, 7)):
            text = f"preprocess: 1\ntrain: {{beta: {beta}, seed: {seed}, gpus: 1}}\n"
            (project / "params" / f"{name}.yaml").write_text(text)
        shutil.copy(project / "params" / "small.yaml", project / "params.yaml")
        shutil.copy(ROOT / "Makefile", project)
        (project / "stages").symlink_to(ROOT / "stages")
        for name in ("requirements.txt", "requirements-extras.txt"):
            (project / name).write_text("")
        ignored = ("/models/training/", "/reports/diary/", "/joined", "__pycache__/")
        (project / ".gitignore").write_text("\n".join(ignored) + "\n")
        self.install(project / ".venv")
        call("dvc", "repro", "--quiet", folder=project, PYTHONPATH=str(ROOT))
        commit_and_push(project)
        pushed.touch()

    def install(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        (folder / ".gitignore").unlink(missing_ok=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
        executable(folder / "bin" / "dvc", '#!/bin/sh\nexec "${0%/*}/python" -m dvc "$@"\n')
        line = "from ray.scripts.scripts import main; main()"
        executable(folder / "bin" / "uv", "#!/bin/sh\n")
        executable(folder / "bin" / "ray", f'#!/bin/sh\nexec "${{0%/*}}/python" -c "{line}" "$@"\n')
        version = re.search(r"(?m)^UV := (.*)$", (ROOT / "Makefile").read_text())
        assert version
        (folder / "made-in.txt").write_text(f"{self.work} uv {version[1]}\n")
        (folder / "installed.txt").write_text("")

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "SPOOL": str(self.folder),
            "WORK": str(self.work),
            "REPOSITORY": str(self.folder / "origin.git"),
            "DVC_NO_ANALYTICS": "1",
            **more,
        }

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            words,
            cwd=self.work.parent,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **more: str) -> str:
        started = self.start(*words, **more)
        said, _ = started.communicate(timeout=200)
        assert started.returncode == 0, said
        return said

    def beta_elsewhere(self, name: str, folder: Path) -> float:
        """What an experiment trained with, in a fresh clone that has only what was pushed."""
        here = clone(self.folder / "project", folder / name)
        call("dvc", "exp", "pull", "--quiet", "origin", name, folder=here)
        call("dvc", "exp", "apply", "--quiet", name, folder=here)
        return float(json.loads((here / "models/adapter/weights").read_text())["beta"])


def executable(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def machine(prepared):
    shutil.rmtree(prepared.work.parent, ignore_errors=True)
    prepared.work.parent.mkdir()
    return prepared


@pytest.mark.rehearsal
@pytest.mark.slow
def test_a_slurm_job_at_its_end_is_interrupted_and_the_next_completes_and_pushes(machine, tmp_path):
    job = ("sbatch", str(SLURM))
    first = machine.start(*job, NAME="first", PRESET="slow")
    wait_for(machine.began.exists, 100)
    first.terminate()  # SLURM's signal is for the script alone
    said, _ = first.communicate(timeout=100)
    assert first.returncode, said
    assert not processes_with("SPOOL", str(machine.folder))
    said = machine.run(*job, NAME="first", PRESET="slow")
    assert "git clone" not in said
    assert machine.beta_elsewhere("first", tmp_path) == 0.4


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.skipif(not find_spec("ray"), reason="ray is one of the extras")
def test_a_slurm_job_of_two_nodes_trains_on_both_and_leaves_none(machine, tmp_path):
    two = {"SLURM_GPUS_ON_NODE": "1", "RAY_TMPDIR": "/tmp"}
    machine.run("sbatch", "--nodes=2", str(SLURM), NAME="both", PRESET="big", **two)
    assert (machine.work / "joined").read_text() == "2"
    assert not processes_with("SPOOL", str(machine.folder))
    assert machine.beta_elsewhere("both", tmp_path) == 0.4


@pytest.mark.rehearsal
@pytest.mark.slow
def test_a_slurm_job_of_several_experiments_pushes_them_all(machine, tmp_path):
    settings = {"SET": "train.beta=0.5,0.6", "GPUS": "0,1", "PRESET": "big", "NAME": "warm"}
    machine.run("sbatch", str(SLURM), **settings)
    assert machine.beta_elsewhere("warm-beta-0.5", tmp_path) == 0.5
    assert machine.beta_elsewhere("warm-beta-0.6", tmp_path) == 0.6


@pytest.mark.rehearsal
@pytest.mark.slow
def test_the_skypilot_task_sets_up_a_clean_machine_runs_and_pushes(machine, tmp_path):
    task = YAML(typ="safe").load(SKY.read_text())
    for part in ("setup", "setup", "run"):  # launched again, it sets up again
        alone = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_SETUP_NODE_RANK": "0", "SHARED": "."}
        machine.run("bash", "-c", task[part], NAME="rented", PRESET="big", **alone)
    assert machine.beta_elsewhere("rented", tmp_path) == 0.4
