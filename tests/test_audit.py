"""``.ci/audit`` tells vulnerable, sound and unreachable apart, with a fake uv for the tool."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = "zipp Dependency not found on PyPI and could not be audited: zipp (4.1.2)"
FOUND = "Found 2 known vulnerabilities in 1 package\nName Version ID\ntorch 2.11.0 GHSA-x"


@pytest.mark.parametrize(
    ("said", "status", "told"),
    [
        ("No known vulnerabilities found", 0, "in requirements.txt; 0 packages could not be"),
        (f"No known vulnerabilities found\n{SKIPPED}\n{SKIPPED}", 0, "; 2 packages could not be"),
        (FOUND, 1, "GHSA-x"),
        ("Found 1 known vulnerability in 1 package", 1, "Found 1 known vulnerability"),
        ("ERROR: Connection refused", 0, "Not audited, since PyPI's advisories can't be reached"),
        ("", 0, "Not audited"),
    ],
)
def test_only_a_known_vulnerability_fails_the_audit(tmp_path, said, status, told):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "audit", tmp_path / ".ci" / "audit")
    (tmp_path / "Makefile").write_text("venv:\n")
    uv = tmp_path / ".venv" / "bin" / "uv"
    failed = int("Found" in said or "ERROR" in said)
    uv.write_text(f"#!/bin/sh\necho \"$@\" > called\ncat <<'END'\n{said}\nEND\nexit {failed}\n")
    uv.chmod(0o755)
    done = subprocess.run(
        [tmp_path / ".ci" / "audit"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == status, done.stderr
    assert told in done.stdout
    assert "pip-audit==" in (tmp_path / "called").read_text()
