"""A full disk and a read-only one under what each stage writes: one message, nothing lost, and the
same command completes once there is room.

A small tmpfs is the disk, in a namespace of its own, so that nothing has to be unmounted. The
stages that load no torch stand for all: ``stages.core.command`` says it for each.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.contracts import ROOT
from tests.copies import copied_data
from tests.repository import STAGES, environment, make

# $1 and $2: how the disk at $3 is mounted at first, and then; what follows runs on it twice.
TWICE = """
first=$1 then=$2 at=$3; shift 3
mount -t tmpfs -o "$first" tmpfs "$at" || exit 99
"$@"; echo "exit status $?"
mount -o "remount,$then" "$at"
"$@"; echo "exit status $?"
"""
FULL, READ_ONLY = ("size=32k", "size=64m"), ("ro,size=64m", "rw")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
HAS_NAMESPACES = (
    shutil.which("unshare") is not None
    and subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    ).returncode
    == 0
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.rehearsal,
    pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine allows no mount namespace"),
]


def twice(words, folder, disk, *, at="disk"):
    """Run a command on a disk that is full or read-only, then again when it is not: exit statuses
    and what the first run said."""
    (folder / at).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", TWICE, "sh", *disk, at, *words],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    first, _, second = done.stdout.partition("exit status ")
    assert "exit status" in second, done.stdout
    return int(second[0]), int(second.rpartition("exit status ")[2]), first + second


def check(words, folder, disk):
    first, second, said = twice(words, folder, disk)
    assert (first, second) == (1, 0), said
    assert "Traceback" not in said
    told = [line for line in said.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(told) == 1, said
    wanted = "writable|can't be written" if disk is READ_ONLY else "free some space|make room"
    assert any(each in told[0] for each in wanted.split("|")), told


@pytest.mark.parametrize(
    ("stage", "disk"),
    [
        ("fetch --item model.source --out disk/base", FULL),
        ("preprocess --raw raw --out disk/pairs --report disk/preprocess.json", FULL),
        ("preprocess --raw raw --out disk/pairs --report disk/preprocess.json", READ_ONLY),
    ],
)
def test_a_stage_is_stopped_by_one_message_and_completes_later(tmp_path, write_params, stage, disk):
    write_params(
        tmp_path / "params.yaml",
        **{
            "data.sources": {"mine": {"kind": "path", "path": "mine", "licence": None}},
            "model.source.path": str(ROOT / "demo" / "model"),
            "preprocess.workers": 1,
        },
    )
    (tmp_path / "mine").mkdir()
    colours = [Image.new("RGB", (200, 200), (4 * i, 99, 99)) for i in range(40)]
    rows = []
    for i, image in enumerate(colours):
        image.save(tmp_path / "mine" / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "Q", "chosen": "A", "rejected": "B"})
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "mine" / "pairs.jsonl").write_text(lines)
    copied_data(tmp_path / "mine", tmp_path / "raw" / "mine")
    check([sys.executable, "-m", *f"stages.{stage}".split()], tmp_path, disk)


@pytest.mark.parametrize("disk", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_cache_of_dvc_that_takes_nothing_is_one_message_and_the_next_repro_completes(
    tmp_path, disk
):
    stage = f"TRACKED = False\n{STAGES}"
    small = 'put("data/pairs/pairs.txt", str(p["preprocess"]))'
    large = small.replace("]))", "]) * 99999)")
    assert small in stage
    project = make(tmp_path, stage.replace(small, large))
    _, second, said = twice(["dvc", "repro"], project, disk, at=".dvc/cache")
    assert second == 0, said  # DVC goes on without a copy in its cache, and says so
    assert "Traceback" not in said
    assert re.search(r"ERROR.*(No space left|Read-only file system)", said)
    assert (project / "models" / "adapter" / "weights").exists()
