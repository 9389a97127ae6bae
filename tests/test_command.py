"""A stage's command line: a user's mistake is one message, anything else keeps its trace."""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stages.__main__ import commands

ROOT = Path(__file__).parent.parent


@pytest.fixture
def stage(tmp_path):
    """``stage(body)`` is the command line of a stage whose ``main(raw, times)`` has that body."""

    def command(body, *arguments):
        script = tmp_path / "stage.py"
        script.write_text(
            '"""Stage: 100% of what it does."""\n'
            "import errno, time\n"
            "from pathlib import Path\n"
            "from stages.core import command\n"
            "from stages.core.errors import UserError\n"
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


@pytest.mark.parametrize(
    ("body", "first", "keeps_its_trace"),
    [
        ("raise UserError('no such key; add it')", "error: no such key; add it\n", False),
        ("try: {}['a']\nexcept KeyError: raise UserError('ours')", "error: ours\n", False),
        ("raise ValueError('a defect')", "Traceback", True),
        (
            "raise OSError(errno.EROFS, 'Read-only file system', 'models/adapter')",
            "error: Read-only file system: models/adapter; free some space, or make it writable,",
            False,
        ),
        (
            "Path('/dev/full').write_text('x' * 100)",
            "error: No space left on device: while writing; free some space, or",
            False,
        ),
        ("raise OSError(errno.EIO, 'Input/output error', 'x')", "Traceback", True),
    ],
)
def test_a_mistake_or_a_full_disk_is_one_message_and_a_defect_keeps_its_trace(
    stage, body, first, keeps_its_trace
):
    done = run(stage(body, "--raw-data", "a"))
    assert done.returncode == 1
    assert done.stderr.startswith(first)
    assert ("Traceback" in done.stderr) == keeps_its_trace


def test_a_reader_that_has_seen_enough_costs_no_trace(stage):
    words = shlex.join(stage("for i in range(99999): print(i)", "--raw-data", "a"))
    done = run(["sh", "-c", f"{words} | head -n 1"])
    assert (done.stdout, done.stderr) == ("0\n", "")


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


def test_every_module_of_commands_is_a_command_that_says_what_it_does():
    found = commands()
    assert {"ask", "seeds", "verify"} <= found.keys()
    for name, about in found.items():
        source = (ROOT / "stages" / "commands" / f"{name}.py").read_text()
        assert about.endswith((".", "``.")), name
        assert "command.run(main)" in source, name


# the diary


def diary_of(stage, folder, body, name="train"):
    done = subprocess.run(
        stage(body, "--raw-data", "a"),
        env={"PYTHONPATH": str(ROOT), **({"DVC_STAGE": name} if name else {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
    )
    files = list((folder / "reports" / "diary").glob("*.json"))
    return done, {file.name: json.loads(file.read_text()) for file in files}


def test_a_stage_that_dvc_runs_leaves_a_note_of_what_it_cost(stage, tmp_path):
    body = "time.sleep(0.3); return {'device': 'cpu', 'pairs_per_second': 12.5}"
    done, notes = diary_of(stage, tmp_path, body, "demo/dvc.yaml:fetch@data")
    assert done.returncode == 0
    ((name, note),) = notes.items()
    assert name == "fetch@data.json"
    assert (note["stage"], note["device"], note["pairs_per_second"]) == ("fetch@data", "cpu", 12.5)
    assert 0.3 <= note["seconds"] < 20
    assert 0 < note["peak_memory_gb"] < 2


def test_what_failed_or_was_not_run_by_dvc_leaves_no_note(stage, tmp_path):
    assert diary_of(stage, tmp_path, "raise UserError('no')")[1] == {}
    assert diary_of(stage, tmp_path, "pass", name=None)[1] == {}


def test_a_diary_that_cannot_be_written_costs_nothing_else(stage, tmp_path):
    (tmp_path / "reports").write_text("a file in the way")
    done, notes = diary_of(stage, tmp_path, "print('done')")
    assert (done.returncode, done.stdout, notes) == (0, "done\ntrain: 0.0 s\n", {})


# what a stage shows

NOISE = """
    import os, subprocess
    from stages.core import console
    print("in words")
    os.write(2, b"of a library\\n")
    subprocess.run(["sh", "-c", "echo of a process >&2"])
"""


@pytest.mark.parametrize(
    ("end", "status", "shown"),
    [
        ("pass", 0, ()),
        ("raise UserError('no')", 1, ("error: no",)),
        ("{}['key']", 1, ("of a library", "of a process", "Traceback", "KeyError: 'key'")),
    ],
)
def test_a_stage_shows_its_sentences_and_logs_what_libraries_say(
    stage, tmp_path, end, status, shown
):
    done, _ = diary_of(stage, tmp_path, NOISE + f"    {end}\n")
    assert done.returncode == status
    assert done.stdout.splitlines() == ["in words", *(["train: 0.0 s"] if not status else [])]
    assert [text for text in shown if text not in done.stderr] == []
    assert bool(done.stderr) == bool(shown)
    log = (tmp_path / "reports/diary/train.log").read_text()
    assert log == "of a library\nof a process\n"


def test_the_outermost_bar_counts_for_all_and_off_a_terminal_it_is_a_line_now_and_then(
    stage, tmp_path
):
    body = """
    from stages.core import console
    console.PAUSE = 0
    with console.bar(4, "pairs", "pairs"):
        for _ in console.counted(range(2), 2, "inner", "things"):
            time.sleep(0.001)
        for _ in console.counted(range(2), 2, "other", "things"):
            time.sleep(0.001)
    """
    done, _ = diary_of(stage, tmp_path, body)
    assert done.stderr.splitlines() == [f"pairs: {number} of 4 pairs" for number in (1, 2, 3, 4)]


def test_on_a_terminal_a_bar_fills_once_and_leaves_nothing(stage, tmp_path):
    body = """
    from stages.core import console
    for _ in console.counted(range(100), 100, "preprocess", "rows"):
        time.sleep(0.01)
    """
    script = shlex.join(stage(body, "--raw-data", "a"))
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", script, "/dev/null"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "preprocess", "TERM": "xterm"},
        cwd=tmp_path,
        capture_output=True,
        timeout=30,
    )
    shown = done.stdout.decode()
    bars = [part for part in shown.split("\r") if part.startswith("preprocess:")]
    assert len(bars) > 2
    assert "100/100" not in shown.rpartition("\r")[2]
    assert shown.rstrip().endswith(" s")
