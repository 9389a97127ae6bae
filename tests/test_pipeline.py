"""dvc.yaml and the code agree: deps, parameters, commands, and what a change reruns."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import size
from stages.params import arguments, params
from stages.params.params import Params
from stages.tuning import config as tuning
from stages.tuning import history
from tests.contracts import (
    COSTS,
    FOLDERS,
    MODULES,
    PRESETS,
    ROOT,
    STAGES,
    closure,
    code_deps,
    covers,
    covers_path,
    exempt,
    files_of,
    git,
    imported,
    interpolated,
    leaves_of,
    parameters_read,
    preset_of,
    source_of,
    stages_in,
    tracked_files,
    tree,
    types_of,
    yaml_of,
)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_depends_on_exactly_the_files_that_it_imports(stage):
    """DVC does not follow imports (dvc#9195). A folder stands for all of its files."""
    wanted = set(code_deps(stage.module))
    lacking, idle = wanted - stage.code, stage.code - wanted
    assert not lacking, f"{stage.name} in {stage.file}: add to deps: {sorted(lacking)}"
    assert not idle, f"{stage.name} in {stage.file}: remove from deps: {sorted(idle)}"
    assert len(stage.deps) == len(set(stage.deps)), f"{stage.name} names a dependency twice"


def test_a_folder_imports_only_folders_before_it():
    found = {path.name for path in (ROOT / "stages").iterdir() if path.is_dir()} - {"__pycache__"}
    assert found == set(FOLDERS)
    for place, folder in enumerate(FOLDERS):
        for path in (ROOT / "stages" / folder).rglob("*.py"):
            for name in imported(module_of(path)):
                other = name.split(".")[1] if "." in name else folder
                is_stage = source_of(name).parent == ROOT / "stages" and folder == "commands"
                assert other in FOLDERS[: place + 1] or is_stage, f"{path.name} imports {name}"


@pytest.mark.parametrize("measure", size.MEASURES, ids=lambda measure: measure.name)
def test_the_project_is_no_larger_than_its_ceilings(measure):
    """Take away elsewhere, or say in the change why the ceiling has to rise."""
    assert measure.count() <= measure.ceiling


def module_of(path: Path) -> str:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return name.removesuffix(".__init__")


# What a change reruns, at most: CONTRIBUTING shows the same table.


@pytest.mark.parametrize("row", range(len(COSTS)), ids=[cost[0] for cost in COSTS])
def test_a_change_reruns_at_most_what_contributing_says(row):
    changed, files, reruns = COSTS[row]
    allowed = set(re.findall(r"`([\w-]+)`", reruns))
    for file in re.findall(r"`([^`]+)`", files):
        assert any(ROOT.glob(file)), f"{changed}: there is no {file}"
        for path in [name for name in tracked_files() if covers_path(file, name)]:
            rerun = {name.partition("@")[0] for name in stale(path)}
            assert rerun <= allowed, f"{changed}: {path} reruns {sorted(rerun - allowed)} as well"


def test_every_module_has_a_place_in_the_table_of_costs():
    patterns = [name for _, files, _ in COSTS for name in re.findall(r"`([^`]+)`", files)]
    told = {path for pattern in patterns for path in ROOT.glob(pattern)}
    untold = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "stages").rglob("*.py"))
        if path not in told and not any(folder in told for folder in path.parents)
    ]
    assert not untold, f"CONTRIBUTING.md, What a change reruns: say what these cost: {untold}"


def test_what_editors_leave_in_a_code_folder_is_no_dependency():
    names = [".scoring.py.swp", "scoring.py~", "#scoring.py#", ".DS_Store", "Thumbs.db"]
    names += [".ipynb_checkpoints/scoring.py", "__pycache__/scoring.pyc"]
    paths = [f"stages/model/{name}" for name in names]
    asked = [sys.executable, "-m", "dvc", "check-ignore", "stages/model/scoring.py", *paths]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == paths


def test_code_keeps_its_line_ends_whatever_git_is_set_to():
    """With ``core.autocrlf=true`` every stage would run again."""
    code = [dep for stage in STAGES for dep in stage.code]
    files = [name for name in tracked_files() if any(covers_path(dep, name) for dep in code)]
    kept = git("check-attr", "eol", "text", "--", *files, "params.yaml", "demo/params.yaml")
    for line in kept.splitlines():
        name, attribute, value = line.split(": ")
        assert value == "lf" or attribute == "text" or name.startswith("demo/"), line
        assert not (name.startswith("demo/") and attribute == "text" and value != "unset"), line


def stale(file: str) -> set[str]:
    """Stages that DVC runs when a file changed, with all that follows."""
    stages = list(stages_in("dvc.yaml"))
    found = {s.name for s in stages if any(covers_path(dep, file) for dep in s.deps)}
    while more := {
        s.name
        for s in stages
        for other in stages
        if s.name not in found and other.name in found
        if any(covers_path(o, d) or covers_path(d, o) for o in other.outs for d in s.data)
    }:
        found |= more
    return found


def test_what_lm_evals_task_files_import_is_known_to_the_stages_that_run_them():
    """DVC sees the folder; what its files import must be among the modules of those stages."""
    running = [stage for stage in STAGES if interpolated()["evaluate.task_files"] in stage.data]
    assert {stage.name for stage in running} == {"baseline", "evaluate"}
    for file in (ROOT / "tasks").rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for name in imported(module):
            for stage in running:
                assert files_of(name) <= files_of(stage.module), (
                    f"{stage.name} needs {name} for {file.name}"
                )


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("stages.")])
def test_a_stage_declares_the_parameters_that_it_reads_and_no_others(module):
    declared = {
        "data.sources" if key.startswith("data.sources.") else key  # an entry for each item
        for s in STAGES
        if s.module == module
        for key in s.params.get("params.yaml", ())
    }
    # Plumbing reads parameters to decide whether a stage runs, not what it writes.
    read = {key for name in closure(module) if not exempt(name) for key in parameters_read(name)}
    undeclared = {key for key in read if not any(covers(d, key) for d in declared)}
    unread = {d for d in declared if not any(covers(d, key) for key in read)}
    assert not undeclared, f"dvc.yaml, {module}: add to params: {sorted(undeclared)}"
    assert not unread, f"dvc.yaml, {module}: remove from params, nothing reads it: {sorted(unread)}"


def test_the_demo_model_declares_the_parameters_that_it_reads_and_no_others():
    (base,) = stages_in("demo/dvc.yaml")
    assert base.params == {"demo/params.yaml": ("base",)}
    read = {
        constant.value
        for node in ast.walk(tree(base.module))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "knobs"
        for constant in ast.walk(node.slice)
        if isinstance(constant, ast.Constant)
    }
    assert read == set(yaml_of("demo/params.yaml")["base"])


def test_every_parameter_is_read_by_some_stage():
    read = {key for module in MODULES for m in closure(module) for key in parameters_read(m)}
    idle = {leaf for leaf in leaves_of(Params) if not any(covers(key, leaf) for key in read)}
    assert not idle, f"nothing reads {sorted(idle)}: remove it from params.py and params/"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_command_gives_every_argument_of_the_stage_and_no_other(stage):
    assert stage.arguments.keys() == types_of(stage.module).keys()


# A folder whose files are named by their content, and what lists their names: a stage that depends
# on the list runs again when they change (test_preprocess holds the names against the content).
NAMED_BY_CONTENT = {"data/pairs/images": "data/formatted"}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_path_in_a_command_is_a_dependency_or_an_output_and_the_reverse(stage):
    types = types_of(stage.module)
    paths = {value for name, value in stage.arguments.items() if types[name] == "Path"}
    declared = stage.data | set(stage.outs)
    # A folder may be declared by its files, where other stages write beside them.
    given = {path for path in paths if any(covers_path(path, one) for one in declared)}
    given |= {path for path in paths if NAMED_BY_CONTENT.get(path) in declared}
    told = {one for one in declared if any(covers_path(path, one) for path in paths)}
    assert given == paths, f"{stage.name}: add to deps or outs: {sorted(paths - given)}"
    assert told == declared, f"{stage.name}: not in its command: {sorted(declared - told)}"


def test_every_plot_draws_columns_of_an_output():
    outs = {out for stage in STAGES for out in stage.outs}
    for plot in yaml_of("reports/dvc.yaml")["plots"]:
        ((name, settings),) = plot.items()
        for plotted, columns in settings["y"].items():
            file = f"reports/{plotted}"
            assert any(covers_path(out, file) for out in outs), f"{name}: nothing writes {file}"
            drawn = {settings["x"], *([columns] if isinstance(columns, str) else columns)}
            if file.startswith("reports/curves/"):
                assert drawn <= {"step", "epoch", *history.CURVES.values()}, name
            if (ROOT / file).is_file():
                header = (ROOT / file).read_text(encoding="utf-8").splitlines()[0]
                assert drawn <= set(header.split(",")), name


def test_no_stage_imports_torch_or_the_trainer_before_it_needs_them():
    """Importing them takes 20 s on two cores, longer than most stages run."""
    modules = [
        module_of(path)
        for path in sorted((ROOT / "stages").rglob("*.py"))
        # They run inside llamafactory-cli, or where plan measures.
        if path.stem not in ("sitecustomize", "trainer", "step_memory")
    ]
    heavy = ["torch", "transformers", "llamafactory", "mlflow", "peft", "trl", "datasets", "scipy"]
    code = (
        "import importlib, sys\n"
        "from stages.params import params\n"
        "params.load()\n"  # which every command does
        "assert not {'pandas', 'pyarrow'} & set(sys.modules)\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    early = [heavy for heavy in {heavy!r} if heavy in sys.modules]\n"
        "    if early: raise SystemExit(f'{name} imports {early} when it is imported itself')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# LLaMA-Factory's own argument classes


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_llamafactory_accepts_every_preset(path):
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    p = preset_of(path)
    config = tuning.dpo_config(
        p,
        model=Path("models/base"),
        formatted=Path("data/formatted"),
        images=Path("data/pairs/images"),
        output=Path("models/training"),
        validated=True,
    )
    # Its classes refuse bfloat16 where there is no GPU; which device there is, is not the question.
    known = HfArgumentParser(parser._TRAIN_ARGS).parse_dict(config | {"use_cpu": True})
    for name, value in p.train.passed_through.items():
        (given,) = (getattr(a, name) for a in known if hasattr(a, name))
        assert given in (value, [value]), name  # its classes make lists of some texts


def test_every_key_that_the_pipeline_sets_itself_is_refused_in_a_preset():
    p = params.load(ROOT / "params" / "demo.yaml")
    config = tuning.dpo_config(
        p, model=Path(), formatted=Path(), images=Path(), output=Path(), validated=True
    )
    for key in config.keys() - p.train.passed_through.keys():
        assert arguments.refusal(key, 1), key
