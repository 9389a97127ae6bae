"""The Makefile, the lock file and the files around them keep their promises.

Set-up is tested with the real Makefile in a copy of the project, where the interpreter and uv are
fakes written here: a shell script that answers the Makefile's questions through a real Python whose
facts (version, modules) are altered, and one that writes down how it was called.
"""

import importlib.metadata
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

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["awk", "cat", "cmp", "cp", "cut", "df", "dirname", "du", "env", "git", "make"]
TOOLS += ["mkdir", "rm", "sh"]
FIXED = ["llamafactory", "torch", "transformers", "datasets", "pillow", "pandas", "dvc", "mlflow"]
FIXED += ["lm-eval"]

Result = subprocess.CompletedProcess[str]

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exec {real} -c {facts} "$2" ;;
  "-m venv") rm -rf .venv; mkdir -p .venv/bin; echo "$*" >> venv.log; cp "$0" .venv/bin/python ;;
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


@pytest.fixture
def project(tmp_path):
    """A clone, in a folder with a space in its name: the Makefile, two presets, a tiny lock."""
    folder = tmp_path / "a clone"
    (folder / "params").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "requirements.txt").write_text("nothing==1.0\n")
    (folder / "params" / "demo.yaml").write_text("beta: 0.1\n")
    (folder / "params" / "large.yaml").write_text("beta: 0.2\n")
    (folder / "params.yaml").write_text("beta: 0.1\n")
    script(folder / "uv.fake", FAKE_UV)
    git(folder, "init", "-q")
    git(folder, "add", "Makefile", "requirements.txt", "params", "params.yaml")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "start")
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
    file.write_text(text)
    file.chmod(0o755)


def python(file: Path, facts: str = "pass") -> None:
    """Write a fake interpreter whose ``-c`` runs in a real one after the statements ``facts``."""
    before = f"import sys; sys._base_executable = {str(file)!r}; {facts}; exec(sys.argv[1])"
    script(file, FAKE_PYTHON.format(real=shlex.quote(sys.executable), facts=shlex.quote(before)))


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def make(project: Path, path: Path, *arguments: str, **env: str) -> Result:
    command = ["make", *arguments]
    env = {"PATH": str(path), "HOME": str(project), **env}
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)


def complaint(result: Result) -> str:
    """The one sentence of a refusal; make's own closing line is the only other output."""
    assert result.returncode == 2
    assert result.stdout == ""
    sentence, closing = result.stderr.splitlines()
    assert closing.startswith("make: ***")
    return sentence


def installs(project: Path) -> int:
    log = project / "uv.log"
    return log.read_text().count("pip sync") if log.exists() else 0


def venvs(project: Path) -> int:
    return len((project / "venv.log").read_text().splitlines())


# What the machine lacks


def test_a_machine_without_python_is_told_so(project, path):
    assert "Python 3.11 or newer is needed" in complaint(make(project, path, "repro"))


@pytest.mark.parametrize("target", ["repro", "test", "lint", "ui", "setup", "lock"])
def test_an_old_python_is_named_with_its_version(project, path, target):
    python(path / "python3", "sys.version_info = (3, 9, 2, 'final', 0)")
    sentence = complaint(make(project, path, target))
    assert "Python 3.11 or newer is needed" in sentence
    assert "python3 is 3.9" in sentence


def test_a_newer_python_is_found_beside_an_old_one(project, path):
    python(path / "python3", "sys.version_info = (3, 9, 2, 'final', 0)")
    script(path / "python3.11", "#!/bin/sh\necho 'pyenv: command not found' >&2; exit 127\n")
    python(path / "python3.12", "sys.version_info = (3, 12, 1, 'final', 0)")
    assert make(project, path, "setup").returncode == 0
    assert (project / ".venv/bin/python").read_bytes() == (path / "python3.12").read_bytes()


def test_python_can_be_chosen_and_a_wrong_choice_is_not_replaced(project, path, tmp_path):
    python(path / "python3.11")
    python(tmp_path / "chosen")
    assert make(project, path, "setup", f"PYTHON={tmp_path / 'chosen'}").returncode == 0
    assert (project / ".venv/bin/python").read_bytes() == (tmp_path / "chosen").read_bytes()
    shutil.rmtree(project / ".venv")
    assert "/no/such" in complaint(make(project, path, "setup", PYTHON="/no/such"))


def test_a_missing_venv_module_names_the_package_that_brings_it(project, path):
    facts = "sys.version_info = (3, 12, 1, 'final', 0); sys.modules['ensurepip'] = None"
    python(path / "python3", facts)
    assert "apt install python3.12-venv" in complaint(make(project, path, "repro"))


def test_missing_git_is_named(project, path):
    python(path / "python3")
    (path / "git").unlink()
    assert "install git" in complaint(make(project, path, "repro"))


def test_a_folder_that_is_no_clone_is_refused_before_anything_is_installed(project, path):
    python(path / "python3")
    shutil.rmtree(project / ".git")
    assert "not a Git clone" in complaint(make(project, path, "repro"))
    assert not (project / ".venv").exists()


def test_a_full_disk_is_told_with_what_is_free_and_what_is_needed(project, path):
    python(path / "python3")
    (path / "df").unlink()
    script(path / "df", FULL_DISK)
    sentence = complaint(make(project, path, "repro"))
    assert "3 GB free" in sentence
    assert "needs 8 GB" in sentence
    assert not (project / ".venv").exists()


# Installing


def test_setting_up_again_costs_nothing_even_after_a_checkout_changed_the_times(project, path):
    python(path / "python3")
    assert make(project, path, "setup").returncode == 0
    os.utime(project / "requirements.txt")
    again = make(project, path, "setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert (installs(project), venvs(project)) == (1, 1)


def test_a_changed_lock_is_installed_even_if_it_looks_old(project, path):
    python(path / "python3")
    make(project, path, "setup")
    (project / "requirements.txt").write_text("nothing==2.0\n")
    os.utime(project / "requirements.txt", (0, 0))
    make(project, path, "setup")
    assert (installs(project), venvs(project)) == (2, 1)


def test_an_interrupted_installation_starts_again(project, path):
    python(path / "python3")
    (project / "unreachable").touch()
    result = make(project, path, "setup")
    assert result.returncode == 2
    assert "Run the same command again" in result.stderr
    (project / "unreachable").unlink()
    assert make(project, path, "setup").returncode == 0
    assert (installs(project), venvs(project)) == (2, 1)


@pytest.mark.parametrize("accident", ["python is gone", "folder was moved", "another uv is pinned"])
def test_a_venv_that_no_longer_works_is_made_anew(project, path, accident):
    python(path / "python3")
    make(project, path, "setup")
    if accident == "python is gone":
        (project / ".venv/bin/python").unlink()
    elif accident == "folder was moved":
        project = project.rename(project.with_name("moved"))
    else:
        makefile = project / "Makefile"
        makefile.write_text(re.sub(r"(?m)^UV := .*", "UV := 99.0", makefile.read_text()))
    assert make(project, path, "setup").returncode == 0
    assert (installs(project), venvs(project)) == (2, 2)


def test_the_users_shell_leaks_nothing_in_and_nothing_reports_home(project, path):
    python(path / "python3")
    active = {
        "VIRTUAL_ENV": "/venv",
        "CONDA_PREFIX": "/conda",
        "PYTHONPATH": "/a",
        "PYTHONHOME": "/b",
    }
    make(project, path, "setup", **active, UV_CACHE_DIR="/scratch")
    seen = set((project / "uv.env").read_text().splitlines())
    assert not active.keys() & {line.split("=")[0] for line in seen}
    assert seen >= {"DVC_NO_ANALYTICS=1", "DO_NOT_TRACK=1", "HF_HUB_DISABLE_TELEMETRY=1"}
    assert seen >= {"MLFLOW_DISABLE_TELEMETRY=true", "UV_CACHE_DIR=/scratch"}


def test_uv_is_told_to_check_hashes_and_to_use_the_projects_own_venv(project, path):
    python(path / "python3")
    make(project, path, "setup")
    called = (project / "uv.log").read_text()
    assert called == "pip sync --python .venv/bin/python --require-hashes requirements.txt\n"


# Presets


def test_use_switches_to_a_preset(project, path):
    assert make(project, path, "use", "PRESET=large").returncode == 0
    assert (project / "params.yaml").read_text() == "beta: 0.2\n"
    assert make(project, path, "use", "PRESET=demo").returncode == 0  # uncommitted, but a preset
    assert (project / "params.yaml").read_text() == "beta: 0.1\n"


@pytest.mark.parametrize("preset", [None, "", "larg", "../params", "demo large"])
def test_use_lists_the_presets_when_none_or_an_unknown_one_is_named(project, path, preset):
    sentence = complaint(
        make(project, path, "use", *([] if preset is None else [f"PRESET={preset}"]))
    )
    assert sentence.endswith("one of: demo large")
    assert (project / "params.yaml").read_text() == "beta: 0.1\n"


def test_use_never_overwrites_edits_unless_forced(project, path):
    (project / "params.yaml").write_text("beta: 0.7\n")
    assert "FORCE=1" in complaint(make(project, path, "use", "PRESET=large"))
    assert (project / "params.yaml").read_text() == "beta: 0.7\n"
    assert make(project, path, "use", "PRESET=large", "FORCE=1").returncode == 0
    assert (project / "params.yaml").read_text() == "beta: 0.2\n"


def test_use_replaces_edits_that_are_committed(project, path):
    (project / "params.yaml").write_text("beta: 0.7\n")
    git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-a", "-m", "edit")
    assert make(project, path, "use", "PRESET=large").returncode == 0
    assert (project / "params.yaml").read_text() == "beta: 0.2\n"


# Facts that stand in two places


def targets() -> set[str]:
    return set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))


def test_help_is_the_default_and_lists_every_command(project, path):
    plain = make(project, path).stdout
    assert plain == make(project, path, "help").stdout
    assert set(re.findall(r"(?m)^make ([\w-]+)", plain)) == targets() - {"venv"}  # a step of setup


def test_phony_names_every_target():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    phony = re.search(r"(?m)^\.PHONY: (.*)", makefile)
    assert phony is not None
    assert set(phony[1].split()) == targets()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".ci/run"])
def test_documented_make_commands_exist(page):
    file = ROOT / page
    if not file.exists():
        pytest.skip(f"{page} is not written yet")
    # Commands stand in backquotes or begin a line of a fenced block; "make sure" in prose is none.
    text = file.read_text()
    fenced = "".join(re.findall(r"(?s)```.*?```", text)) or (text if file.suffix == "" else "")
    target = r"make ([a-z-]+)\b"
    named = set(re.findall(f"`{target}", text) + re.findall(f"(?m)^{target}", fenced))
    assert named
    assert named <= targets()


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.in").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def lock() -> dict[str, list[Requirement]]:
    locked: dict[str, list[Requirement]] = {}
    for line in re.findall(r"(?m)^([a-z0-9].*?) \\$", (ROOT / "requirements.txt").read_text()):
        locked.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return locked


def test_every_direct_requirement_is_pinned_and_locked_at_that_pin():
    locked = lock()
    for name, requirement in pins().items():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{name} is not pinned"
        assert {str(entry.specifier) for entry in locked[name]} == {str(requirement.specifier)}


def test_the_packages_that_the_project_is_made_of_are_all_required():
    assert set(FIXED) <= set(pins())


def test_the_extras_are_pinned_with_hashes_at_the_versions_of_the_lock():
    """`make extras` installs them on top of it, and must change nothing that is there."""
    text = (ROOT / "requirements-extras.txt").read_text()
    for entry in re.split(r"(?m)^(?=[a-z0-9])", text)[1:]:
        requirement = Requirement(entry.split(" \\")[0])
        assert "--hash=sha256:" in entry, requirement
        for locked in lock().get(canonicalize_name(requirement.name), ()):
            if str(locked.marker) == str(requirement.marker):
                assert locked.specifier == requirement.specifier, requirement


def test_the_lock_holds_pins_with_hashes_and_nothing_else():
    entries = re.split(r"(?m)^(?=\S)", (ROOT / "requirements.txt").read_text())
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    assert len(entries) > 200
    for entry in entries:
        assert re.match(r"[a-z0-9-]+(\[.*\])?==\S+", entry), entry[:80]
        assert "--hash=sha256:" in entry, entry[:80]


def test_the_lock_has_every_form_in_which_an_old_pip_is_asked_for_a_package():
    # pip 23.2, with hashes, refuses `typepy[datetime]` as unpinned when the lock has only
    # `typepy==…`, and `fsspec` when it has only `fsspec[http]==…`.
    locked = lock()
    asked: dict[str, set[frozenset[str]]] = {}
    for name, entries in locked.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        extras = {"", *(extra for entry in entries for extra in entry.extras)}
        for needed in map(Requirement, distribution.requires or []):
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                asked.setdefault(canonicalize_name(needed.name), set()).add(
                    frozenset(needed.extras)
                )
    assert frozenset({"datetime"}) in asked["typepy"]
    for name, forms in asked.items():
        if (
            name in locked
        ):  # all but setuptools and the like, which the lock may leave to the machine
            assert forms <= {frozenset(entry.extras) for entry in locked[name]}, name


@pytest.mark.parametrize(
    "file",
    [
        *("requirements.in", "requirements.txt", "requirements-extras.in"),
        *("requirements-extras.txt", "Makefile", ".ci/run", "pyproject.toml"),
    ],
)
def test_no_package_host_is_written_anywhere(file):
    text = (ROOT / file).read_text()
    assert "://" not in re.sub(r"sqlite:///|https?://127\.0\.0\.1", "", text)
    assert not re.search(r"(?m)^\s*(-i|-f|--(extra-)?index-url|--find-links)\b", text)


def test_the_oldest_python_is_the_same_wherever_it_is_stated():
    makefile = (ROOT / "Makefile").read_text()
    pyproject = (ROOT / "pyproject.toml").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = {step.get("uses", "").split("@")[0]: step for step in workflow["jobs"]["test"]["steps"]}
    stated = {
        ".".join(re.findall(r"version_info >= \((\d+), (\d+)\)", makefile)[0]),
        re.findall(r"--python-version (\S+)", makefile)[0],
        re.findall(r'python_version = "(.+)"', pyproject)[0],
        re.findall(r'target-version = "py3(\d+)"', pyproject)[0].join(["3.", ""]),
        steps["actions/setup-python"]["with"]["python-version"],
    }
    assert stated == {"3.11"}


def test_the_workflow_runs_what_ci_runs_and_that_is_make_test():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "make test"
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("file", ["reports/a.csv", "demo/model/tokenizer.json", "a.safetensors"])
def test_git_hands_back_the_bytes_that_dvc_has_pinned(file):
    answer = subprocess.run(
        ["git", "check-attr", "text", file], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip().endswith("unset")


def test_the_mlflow_server_is_bound_to_this_machine(project, path):
    command = make(project, path, "--dry-run", "ui", "PORT=5055").stdout
    assert "--host 127.0.0.1 --port 5055" in command
    assert "sqlite:///mlflow.db" in command


def test_pre_commit_hooks_are_local_and_run_the_tools_of_the_lock():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        assert Path(hook["entry"].split()[0]).name in pins()
