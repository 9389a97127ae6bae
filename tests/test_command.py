"""A stage's command line: a user's mistake is one message, anything else keeps its trace."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stage(tmp_path):
    """``stage(body)`` is the command line of a stage whose ``main(raw, times)`` has that body."""

    def command(body, *arguments):
        script = tmp_path / "stage.py"
        script.write_text(
            '"""Stage: 100% of what it does."""\n'
            "import time\n"
            "from pathlib import Path\n"
            "from stages import command\n"
            "from stages.errors import UserError\n"
            "def main(raw_data: Path, times: int = 2) -> None:\n"
            + textwrap.indent(textwrap.dedent(body), "    ")
            + "\ncommand.run(main)\n"
        )
        return [sys.executable, str(script), *arguments]

    return command


def run(arguments):
    return subprocess.run(
        arguments, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30
    )


def test_arguments_are_converted_by_their_annotations(stage):
    done = run(stage("print(repr(raw_data), times + 1)", "--raw-data", "a/b"))
    assert (done.returncode, done.stdout) == (0, "PosixPath('a/b') 3\n")
    done = run(stage("print(times + 1)", "--raw-data", "a", "--times", "7"))
    assert done.stdout == "8\n"


def test_a_missing_argument_is_told_with_the_usage(stage):
    done = run(stage("pass"))
    assert done.returncode == 2
    assert "--raw-data" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_the_stages_docstring(stage):
    done = run(stage("pass", "--help"))
    assert done.returncode == 0
    assert "100% of what it does" in done.stdout


def test_a_users_mistake_is_one_message_without_a_trace(stage):
    body = """
    try:
        {}["key"]
    except KeyError:
        raise UserError("params.yaml: no such key; add it")
    """
    done = run(stage(body, "--raw-data", "a"))
    assert done.returncode == 1
    assert done.stderr == "error: params.yaml: no such key; add it\n"


def test_a_defect_keeps_its_trace(stage):
    done = run(stage("raise ValueError('ours')", "--raw-data", "a"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: ours" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_ended_unwinds_and_says_what_to_do(stage, number):
    body = """
    try:
        print("started", flush=True)
        time.sleep(30)
    finally:
        print("cleaned up", flush=True)
    """
    with subprocess.Popen(
        stage(body, "--raw-data", "a"),
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == "cleaned up\n"
    assert error.startswith("interrupted;")
    assert "Traceback" not in error
