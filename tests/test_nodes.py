"""Several machines in one training: what is refused and called, how others join and leave."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.commands import join
from stages.core.errors import UserError
from stages.tuning import nodes

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"NNODES": "2"}, r"NNODES is 2, and train\.nodes means 1.*docs/scaling\.md"),
        ({"NPROC_PER_NODE": "4"}, r"NPROC_PER_NODE is 4, and train\.gpus means 1: unset it"),
        ({"NODE_RANK": "1"}, r"NODE_RANK is 1.*`make join` here"),
        ({"USE_RAY": "1"}, r"USE_RAY is set, and ray is not installed: `make extras`"),
        ({"USE_V1": "1"}, r"USE_V1 is set.*unset it"),
        ({"RDZV_ID": "7", "NNODES": "1"}, r"RDZV_ID is set.*unset it"),
    ],
)
def test_a_variable_that_would_start_other_processes_is_refused(environment, told, monkeypatch):
    monkeypatch.setattr(nodes, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=told):
        nodes.require(environment, 0, 1)


def test_variables_that_say_the_same_as_the_parameter_are_taken():
    nodes.require({"NNODES": "2", "NODE_RANK": "0", "NPROC_PER_NODE": "8", "USE_RAY": "0"}, 8, 2)
    nodes.require({}, 0, 2)


def test_ray_gets_no_torchrun_calls_nobody_and_reports_to_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "find_spec", lambda _: object())
    given = {"USE_RAY": "1", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    nodes.require(given, 2, 2)
    made = nodes.environment(given, 2, 2)
    assert "FORCE_TORCHRUN" not in made
    assert made["RAY_USAGE_STATS_ENABLED"] == "0"
    assert made["TRAINING_FOLDER"] == str(Path.cwd())
    with nodes.calling(tmp_path, ["train"], tmp_path, made, 2, 2):
        assert nodes.read(tmp_path) is None


def test_one_machine_keeps_its_environment_and_calls_nobody(tmp_path):
    assert nodes.environment({"A": "b"}, 8, 1) == {"A": "b"}
    with nodes.calling(tmp_path, ["train"], tmp_path, {}, 8, 1):
        assert nodes.read(tmp_path) is None


def test_the_first_machine_says_where_it_is_unless_told(tmp_path):
    made = nodes.environment({"MASTER_ADDR": "10.0.0.1"}, 0, 3)
    assert (made["NNODES"], made["NODE_RANK"], made["NPROC_PER_NODE"]) == ("3", "0", "1")
    assert made["MASTER_ADDR"] == "10.0.0.1"
    assert 0 < int(made["MASTER_PORT"]) < 65536
    assert nodes.environment({}, 8, 2)["NPROC_PER_NODE"] == "8"


def test_the_call_is_there_while_the_training_runs_and_holds_nothing_of_the_users(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    given = nodes.environment(os.environ | {"CUDA_VISIBLE_DEVICES": "0,1"}, 2, 2)
    with nodes.calling(tmp_path, ["train", "x.yaml"], Path("run"), given, 2, 2):
        call = nodes.read(tmp_path)
        assert call is not None
        assert call["arguments"] == ["train", "x.yaml"]
        assert call["environment"].keys() == {
            *("MASTER_ADDR", "MASTER_PORT", "FORCE_TORCHRUN", "NPROC_PER_NODE"),
            *("NNODES", "NODE_RANK"),
        }
    assert nodes.read(tmp_path) is None
    assert "waiting for machine 1: `make join` there" in capsys.readouterr().out


# joining, with a program that only writes down how it was called


@pytest.fixture
def program(tmp_path, monkeypatch):
    """``program(line)``: what llamafactory-cli does, as a shell script."""
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(interpreter))

    def write(line):
        script = interpreter.with_name("llamafactory-cli")
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    return write


def call(folder, **more):
    made = {"id": "1", "nodes": 2, "gpus": 0, "directory": str(folder), "arguments": ["train", "x"]}
    made |= {
        "events": str(folder / "events.jsonl"),
        "environment": {"NNODES": "2", "NODE_RANK": "0"},
    }
    (folder / nodes.CALL).write_text(json.dumps(made | more))
    return made | more


def test_a_machine_runs_the_firsts_command_as_another_node(tmp_path, program):
    program('echo "$NNODES $NODE_RANK $*" > said; [ -n "$TRAINING_EVENTS" ] && exit 3')
    assert nodes.join(call(tmp_path), 1, tmp_path) == 3
    assert (tmp_path / "said").read_text() == "2 1 train x\n"


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_training_that_the_first_machine_left_is_ended_here_too(
    tmp_path, program, monkeypatch, change
):
    monkeypatch.setattr(nodes, "GRACE", 0.1)
    program("exec sleep 30")
    made = call(tmp_path)
    if change == "gone":
        (tmp_path / nodes.CALL).unlink()
    else:
        call(tmp_path, id="2")
    started = time.monotonic()
    assert nodes.join(made, 1, tmp_path) < 0
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("node", [0, 2])
def test_a_number_that_the_training_has_not_got_is_refused(tmp_path, node):
    with pytest.raises(UserError, match="NODE_RANK must be 1 to 1 here"):
        nodes.join(call(tmp_path), node, tmp_path)


@pytest.mark.parametrize("number", ["", "0", "first"])
def test_a_machine_must_say_which_it_is(number, monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(UserError, match="NODE_RANK=1 make join"):
        join.main(number)


def test_it_joins_the_training_that_is_called_once(tmp_path, program, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/training").mkdir(parents=True)
    program("echo joined >> said")
    call(tmp_path / "models/training", directory=str(tmp_path))
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.delenv("NODE_RANK", raising=False)
    join.main(trainings=1)
    assert (tmp_path / "said").read_text() == "joined\n"
    assert "machine 1: the training here ended with status 0" in capsys.readouterr().out


def test_interrupting_it_leaves_no_process(tmp_path):
    (tmp_path / "models/training").mkdir(parents=True)
    script = tmp_path / "bin/llamafactory-cli"
    script.parent.mkdir()
    script.write_text('#!/bin/sh\necho $$ > "$HOME/pid"\nexec sleep 30\n')
    script.chmod(0o755)
    call(tmp_path / "models/training", directory=str(tmp_path))
    code = f"import sys; sys.executable = {str(script.with_name('python'))!r}\n"
    code += "from stages import join; from stages.core import command; command.run(join.main)"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "--node", "1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
    )
    pid, end = tmp_path / "pid", time.monotonic() + 30
    while not (pid.is_file() and pid.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.02)
    started.terminate()
    _, told = started.communicate(timeout=30)
    assert b"Traceback" not in told
    assert not Path("/proc", pid.read_text().strip()).exists()
