"""Arithmetic that gives the same bits on every x86-64 CPU."""

import os
import subprocess
import sys
from platform import machine

import pytest

from stages.core import portable
from tests import rounding
from tests.contracts import ROOT


@pytest.mark.slow
@pytest.mark.skipif(machine() != "x86_64", reason="other processors round otherwise")
def test_this_machine_rounds_as_all_that_were_tried():
    """In a process that scores, which sets its threads by torch; test_end_to_end.py trains in one
    that was started with them."""
    code = (
        "from stages.model import scoring; from stages.params import params; "
        "scoring.device_of(params.load()); from tests import rounding; rounding.main(); "
        "import torch; print(torch.get_num_threads())"
    )
    kept = {k: v for k, v in os.environ.items() if k not in portable.environment(portable=True)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "5"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == [rounding.COMMITTED, "2"], (
        f"{rounding.cpu()} rounds otherwise than the CPUs in benchmarks/PARITY.md"
    )


@pytest.mark.parametrize(
    ("device", "wanted", "found"),
    [
        ("cpu", True, ("COMPATIBLE", "PASSIVE")),
        ("auto", True, ("COMPATIBLE", "PASSIVE")),
        ("cpu", False, (None, "PASSIVE")),
        ("cuda", True, (None, None)),
    ],
)
def test_what_is_set_before_torch_is_imported(monkeypatch, device, wanted, found):
    monkeypatch.setattr(os, "environ", {})
    portable.prepare(device, portable=wanted)
    assert (os.environ.get("MKL_CBWR"), os.environ.get("OMP_WAIT_POLICY")) == found
