"""The Makefile, the lock and the files around them keep their promises.

Set-up is tested with the real Makefile in a copy of the project, where the interpreter and uv are
fakes written here: a shell script that answers the Makefile's question through a real Python whose
facts (version, modules) are altered, and one that writes down how it was called.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.contracts import ROOT

TOOLS = ["awk", "cat", "cmp", "cp", "df", "dirname", "env", "git", "make", "mkdir", "rm", "sh"]
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exec {real} -c {facts} "$2" ;;
  "-m venv") mkdir -p .venv/bin; echo "$*" >> venv.log; cp "$0" .venv/bin/python ;;
  "-m pip") cp uv.fake .venv/bin/uv ;;
  *) exit 99 ;;
esac
"""
FULL_DISK = """#!/bin/sh
echo Filesystem 1024-blocks Used Available Capacity Mounted on
echo /dev/sda1 99999999 96854271 3145728 97% /
"""
FAKE_UV = """#!/bin/sh
echo "$*" >> uv.log
env > uv.env
[ ! -e unreachable ]
"""
OLD = "sys.version_info = (3, 9, 2, 'final', 0)"


@pytest.fixture
def project(tmp_path):
    """A clone, in a folder with a space in its name: the Makefile and a tiny lock."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("nothing==1.0\n")
    script(folder / "uv.fake", FAKE_UV)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def path(tmp_path):
    """A folder for PATH that holds the commands of a bare machine, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or pytest.skip(f"needs {tool}"))
    return folder


def script(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.write_text(text)
    file.chmod(0o755)


def python(file: Path, facts: str = "pass") -> None:
    """Write a fake interpreter whose ``-c`` runs in a real one after the statements ``facts``."""
    before = f"import sys; sys._base_executable = {str(file)!r}; {facts}; exec(sys.argv[1])"
    script(file, FAKE_PYTHON.format(real=shlex.quote(sys.executable), facts=shlex.quote(before)))


def make(project: Path, path: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": str(path), "HOME": str(project), **env}
    return subprocess.run(["make", *words], cwd=project, env=env, capture_output=True, text=True)


def counts(project: Path) -> tuple[int, int]:
    """How often an environment was made, and the lock installed."""
    logs = (project / "venv.log", project / "uv.log")
    made, installed = (log.read_text().count("\n") if log.exists() else 0 for log in logs)
    return made, installed


# what the machine lacks


@pytest.mark.parametrize(
    ("lack", "told"),
    [
        ("no Python", "None of these is a Python 3.11 or newer with its venv module: python3.11 "),
        ("no venv module", "apt install python3-venv"),
        ("a wrong PYTHON", "/no/such. Install one"),
        ("no git", "install git"),
        ("no clone", "git clone"),
        ("a full disk", "has 3 GB free, and the installation needs 8 GB"),
        ("a linked .venv", ".venv is a link"),
    ],
)
def test_what_is_missing_is_told_in_one_sentence_before_anything_is_made(project, path, lack, told):
    facts = {"no venv module": "sys.modules['ensurepip'] = None"}
    if lack != "no Python":
        python(path / "python3", facts.get(lack, "pass"))
    if lack == "no git":
        (path / "git").unlink()
    if lack == "no clone":
        shutil.rmtree(project / ".git")
    if lack == "a full disk":
        script(path / "df", FULL_DISK)
    if lack == "a linked .venv":
        (project / "elsewhere").mkdir()
        (project / ".venv").symlink_to("elsewhere")
    result = make(project, path, "lint", PYTHON="/no/such" if lack == "a wrong PYTHON" else "")
    assert result.returncode == 2
    assert result.stdout == ""
    sentence, closing = result.stderr.splitlines()
    assert told in sentence
    assert closing.startswith("make: ***")
    assert counts(project) == (0, 0)


def test_the_first_python_that_works_is_taken_or_the_one_that_is_named(project, path, tmp_path):
    python(path / "python3", OLD)
    script(path / "python3.11", "#!/bin/sh\necho 'pyenv: command not found' >&2; exit 127\n")
    python(path / "python3.12", "sys.version_info = (3, 12, 1, 'final', 0)")
    python(tmp_path / "a chosen one")
    for named, taken in (("", path / "python3.12"), *[(str(tmp_path / "a chosen one"),) * 2]):
        shutil.rmtree(project / ".venv", ignore_errors=True)
        assert make(project, path, "setup", PYTHON=named).returncode == 0
        assert (project / ".venv/bin/python").read_bytes() == Path(taken).read_bytes()


# installing


def test_set_up_does_what_is_needed_and_no_more(project, path):
    python(path / "python3")
    lock = project / "requirements.txt"
    assert make(project, path, "setup").returncode == 0
    assert counts(project) == (1, 1)
    os.utime(lock)  # as a checkout does
    again = make(project, path, "setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert counts(project) == (1, 1)
    lock.write_text("nothing==2.0\n")
    os.utime(lock, (0, 0))
    (project / "unreachable").touch()  # the index
    failed = make(project, path, "setup")
    assert "Run the same command again to continue" in failed.stderr
    (project / "unreachable").unlink()
    assert make(project, path, "setup").returncode == 0
    assert counts(project) == (1, 3)
    called = (project / "uv.log").read_text().splitlines()
    assert set(called) == {"pip sync --python .venv/bin/python --require-hashes requirements.txt"}


@pytest.mark.parametrize("moved", [True, False])
def test_a_venv_that_no_longer_works_is_made_anew(project, path, moved):
    python(path / "python3")
    make(project, path, "setup")
    if moved:
        project = project.rename(project.with_name("moved"))
    else:
        (project / ".venv/bin/python").unlink()
    assert make(project, path, "setup").returncode == 0
    assert counts(project) == (2, 2)


def test_the_users_shell_leaks_nothing_in_and_nothing_reports_home(project, path):
    python(path / "python3")
    active = dict.fromkeys(("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"), "/there")
    make(project, path, "setup", **active, UV_CACHE_DIR="/scratch")
    seen = set((project / "uv.env").read_text().splitlines())
    assert not active.keys() & {line.split("=")[0] for line in seen}
    assert seen >= {"DVC_NO_ANALYTICS=1", "DO_NOT_TRACK=1", "HF_HUB_DISABLE_TELEMETRY=1"}
    assert seen >= {"MLFLOW_DISABLE_TELEMETRY=true", "UV_CACHE_DIR=/scratch"}


@pytest.mark.parametrize("module", ["stages", "stages.fetch", "stages.commands.plan"])
def test_outside_of_the_environment_one_sentence_says_so(module):
    words = [sys.executable, "-S", "-m", module]  # -S: without its packages
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .* lacks the project's packages: use make, .*\n", done.stderr)


# facts that stand in two places


def test_help_and_phony_name_every_target(project, path):
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))
    plain = make(project, path).stdout
    assert plain == make(project, path, "help").stdout
    assert set(re.findall(r"(?m)^make ([\w-]+)", plain)) == targets - {"venv"}  # a step of setup
    assert set(re.findall(r"(?m)^\.PHONY: (.*)", makefile)[0].split()) == targets
    assert "--host 127.0.0.1 --port 5055" in make(project, path, "-n", "ui", "PORT=5055").stdout


def test_every_direct_requirement_is_pinned_and_locked_at_that_pin():
    for name in ("requirements", "requirements-extras"):
        lines = (ROOT / f"{name}.in").read_text().splitlines()
        pins = [Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line)]
        assert pins
        for pin in pins:
            assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is not pinned"
            assert {str(each.specifier) for each in lock(name)[canonicalize_name(pin.name)]} == {
                str(pin.specifier)
            }
    locked = lock("requirements")
    for name, extras in lock("requirements-extras").items():  # which leave the lock as it is
        pinned = {each.specifier for each in locked.get(name, extras)}
        assert {each.specifier for each in extras} <= pinned, name


def lock(name: str) -> dict[str, list[Requirement]]:
    """What a lock pins, which is all that it holds, each with hashes and without extras: an old pip
    takes a[x]==1 and a==1 for two packages.
    """
    locked: dict[str, list[Requirement]] = {}
    for entry in re.split(r"(?m)^(?=[^\s#])", (ROOT / f"{name}.txt").read_text())[1:]:
        requirement = Requirement(entry.split(" \\")[0])
        assert re.match(r"[a-z0-9-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, requirement
        locked.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return locked


def test_the_workflow_runs_what_ci_runs_with_the_oldest_python():
    makefile, pyproject = ((ROOT / name).read_text() for name in ("Makefile", "pyproject.toml"))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    *_, rehearsals, _, tests = (ROOT / ".ci/run").read_text().splitlines()
    assert (rehearsals.split("  #")[0], tests) == ("export CI=true", "make test")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    stated = {
        ".".join(re.findall(r"version_info >= \((\d+), (\d+)\)", makefile)[0]),
        re.findall(r"--python-version (\S+)", makefile)[0],
        re.findall(r'python_version = "(.+)"', pyproject)[0],
        re.findall(r'target-version = "py3(\d+)"', pyproject)[0].join(["3.", ""]),
        *(step["with"]["python-version"] for step in steps if "setup-python" in str(step)),
    }
    assert stated == {"3.11"}


# the audit of .ci, with a fake uv for the tool: vulnerable, sound and unreachable are told apart


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
