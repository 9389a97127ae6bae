"""What goes wrong around a pipeline: a full disk, a kill, two at once, a damaged cache. One clear
message, nothing lost, and the next run completes. docs/reliability.md has the table.
"""

import os
import re
import shutil
import signal
import subprocess
import sys

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks import endurance
from tests.contracts import ROOT, files_of, stages_in, text_of
from tests.repository import (
    PUT,
    attempt,
    call,
    clone,
    commit_and_push,
    environment,
    hashes,
    make,
    wait_for,
)

STAGE = (
    PUT
    + """
marker = pathlib.Path(os.environ.get("MARKER", "nowhere"))
if sys.argv[1] == "data":
    put("data/pairs/pairs.txt", "pairs")
if sys.argv[1] == "train":
    if marker.exists():  # as long as the test wants
        put(f"{marker}.begun", str(os.getpid()))
        time.sleep(60)
    put("models/adapter/weights", "weights")
    put("reports/curves/train.csv", "step,loss")
if sys.argv[1] == "evaluate":
    put("reports/results/metrics.json", "{}")
"""
)


@pytest.fixture
def project(tmp_path):
    return make(tmp_path, STAGE)


def begun(project, marker):
    """``dvc repro`` in the middle of its training."""
    marker.touch()
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=project,
        env=environment(MARKER=str(marker)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )
    wait_for(marker.with_name(f"{marker.name}.begun").exists)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_repro_that_was_ended_is_completed_by_the_next(project, tmp_path, how):
    marker = tmp_path / "marker"
    process = begun(project, marker)
    os.killpg(process.pid, how)
    process.communicate(timeout=30)
    assert process.returncode
    marker.unlink()
    assert "data/pairs" in hashes(project)  # what was finished is known
    said = call("dvc", "repro", folder=project)
    assert "'preprocess' didn't change" in said
    assert (project / "models/adapter/weights").read_text() == "weights"


@pytest.mark.slow
def test_a_second_repro_at_once_is_refused_and_harms_nothing(project, tmp_path):
    marker = tmp_path / "marker"
    process = begun(project, marker)
    try:
        second = attempt("dvc", "repro", folder=project)
        assert second.returncode
        assert re.search(r"lock|busy|another", second.stderr, re.IGNORECASE)
        assert "Traceback" not in second.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    marker.unlink()
    call("dvc", "repro", "--quiet", folder=project)
    assert (project / "models/adapter/weights").exists()


@pytest.mark.slow
def test_a_damaged_object_of_the_cache_is_noticed_and_pulled_again(project):
    call("dvc", "repro", "--quiet", folder=project)
    commit_and_push(project)
    shutil.rmtree(project / "models/adapter")
    (file,) = (
        file
        for file in (project / ".dvc/cache/files").rglob("*")
        if file.is_file() and file.read_bytes() == b"weights"
    )
    file.chmod(0o644)
    file.write_text("weighty")
    call("dvc", "pull", "--quiet", folder=project)
    assert (project / "models/adapter/weights").read_text() == "weights"


@pytest.mark.slow
def test_a_remote_that_is_gone_is_one_message(project, tmp_path):
    call("dvc", "repro", "--quiet", folder=project)
    commit_and_push(project)
    here = clone(project, tmp_path / "clone")
    call("dvc", "remote", "modify", "-q", "--local", "storage", "url", "s3://gone/x", folder=here)
    dead = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_MAX_ATTEMPTS": "1"}
    endpoint = ("endpointurl", "http://127.0.0.1:9")
    call("dvc", "remote", "modify", "-q", "--local", "storage", *endpoint, folder=here)
    done = attempt("dvc", "pull", folder=here, **dead)
    assert done.returncode
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ERROR")
    call("dvc", "repro", "--quiet", folder=here)  # it does not need the remote


@pytest.mark.parametrize("module", sorted({stage.module for stage in stages_in("dvc.yaml")}))
def test_every_stage_ends_in_one_way_and_with_all_that_it_started(module):
    source = text_of(f"{module.replace('.', '/')}.py")
    assert re.search(r"^    command\.run\(main\)", source, re.MULTILINE)
    for file in sorted(files_of(module)):
        started = text_of(file).count("subprocess.Popen(")
        ended = text_of(file).count("        ended_with_the_stage(process),")
        assert started == ended, file


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_preprocess_that_was_ended_leaves_no_worker_and_completes_later(tmp_path, how):
    endurance.write_shards(tmp_path / "raw" / endurance.SOURCE, 4000)
    endurance.write_params(tmp_path / "params.yaml", workers=2)
    words = [sys.executable, *endurance.stage_command("pairs")]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: list(tmp_path.glob(".pairs.partial/images/*")))
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.send_signal(how)
    assert process.wait(30) == (130 if how != signal.SIGKILL else -signal.SIGKILL)
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert not (tmp_path / "pairs").exists()
    subprocess.run(words, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), check=True)
    assert len(list((tmp_path / "pairs/images").iterdir())) == 4000
