"""Facts that stand in two places agree: pipeline and code, presets and schema, README and both."""

import ast
import json
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from benchmarks import readme_table
from stages.evaluation import metrics
from stages.parameters import arguments, params
from stages.parameters.params import Params
from stages.tuning import training

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("stages", "demo")
PRESETS = sorted((ROOT / "params").glob("*.yaml"))
RESULTS = ROOT / "reports" / "metrics.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


# dvc.yaml, read with its templates filled in


@dataclass(frozen=True)
class Stage:
    """A stage as DVC runs it; an item of a ``foreach`` is one.

    ``arguments`` are what its command gives to ``main``, by name; ``params`` are keys by file.
    """

    name: str
    file: str
    desc: str
    module: str
    arguments: dict[str, str]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: dict[str, tuple[str, ...]]

    @property
    def code(self) -> set[str]:
        return {path for path in self.deps if path.split("/")[0] in PACKAGES and "." in path}

    @property
    def data(self) -> set[str]:
        return set(self.deps) - self.code


def stages_in(file: str) -> Iterator[Stage]:
    for name, entry in yaml_of(file)["stages"].items():
        if "foreach" not in entry:
            yield stage(file, name, entry)
            continue
        for key, item in entry["foreach"].items():
            values = {"key": key} | {f"item.{field}": value for field, value in item.items()}
            yield stage(file, f"{name}@{key}", filled(entry["do"], values))


def stage(file: str, name: str, entry: dict[str, Any]) -> Stage:
    # A wdir leads back to the root, so that every path in every dvc.yaml is read from there.
    assert (ROOT / file).parent.joinpath(entry.get("wdir", ".")).resolve() == ROOT
    python, flag, module, *given = shlex.split(entry["cmd"])
    assert [python, flag] == ["python", "-m"], f"{file}, {name}: run it as a module"
    declared: dict[str, list[str]] = {}
    for one in entry.get("params", []):
        for source, keys in one.items() if isinstance(one, dict) else [("params.yaml", [one])]:
            declared.setdefault(source, []).extend(keys)
    return Stage(
        name=name,
        file=file,
        desc=entry["desc"],
        module=module,
        arguments=named(given, module),
        deps=tuple(entry["deps"]),
        outs=tuple(path_of(out) for kind in ("outs", "metrics") for out in entry.get(kind, [])),
        params={source: tuple(keys) for source, keys in declared.items()},
    )


def named(given: list[str], module: str) -> dict[str, str]:
    """Options by the names that ``core.command`` gives them, bare arguments by their place."""
    if not given[0].startswith("--"):
        return dict(zip(types_of(module), given, strict=True))
    options, values = given[::2], given[1::2]
    names = [option.removeprefix("--").replace("-", "_") for option in options]
    return dict(zip(names, values, strict=True))


def filled(value: Any, values: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {filled(k, values): filled(v, values) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v, values) for v in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([\w.]+)\}", lambda found: values[found[1]], value)
    return value


def path_of(out: Any) -> str:
    return next(iter(out)) if isinstance(out, dict) else str(out)


@cache
def yaml_of(file: str) -> Any:
    return YAML(typ="safe").load((ROOT / file).read_text(encoding="utf-8"))


# what the code imports and reads, from its syntax tree


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source_of(module).read_text(encoding="utf-8"))


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def exists(module: str) -> bool:
    return module.split(".")[0] in PACKAGES and source_of(module).is_file()


def imported(module: str) -> set[str]:
    """Project modules that a module imports anywhere, inside functions too, and its packages."""
    names = {module.rpartition(".")[0]}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by full name"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if exists(name)}


@cache
def closure(module: str) -> frozenset[str]:
    found: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= imported(name) - found
    return frozenset(found)


def files_of(module: str) -> set[str]:
    """The sources of a module and of all it imports, with what stands beside them by that name: the
    template ``stages/report.html`` belongs to ``stages/report.py``.
    """
    files = {file for name in closure(module) for file in beside(source_of(name))}
    return {file.relative_to(ROOT).as_posix() for file in files}


def beside(source: Path) -> set[Path]:
    return {file for file in source.parent.glob(f"{source.stem}.*") if file.is_file()}


def parameters_read(module: str) -> set[str]:
    """Keys of params.yaml, such as ``train.beta``, that a module reads from a ``Params``.

    Followed are names bound to ``params.load()`` and arguments annotated as ``Params``. All of it
    together (``p.model_dump``) is no reading: MLflow mirrors every parameter whatever is read.
    """
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef)]
    return {key for function in functions for key in _keys_read_in(function)} - {""}


def _keys_read_in(function: ast.FunctionDef) -> Iterator[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {
        a.arg
        for a in arguments
        if a.annotation and ast.unparse(a.annotation) in ("Params", "params.Params")
    }
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "params.load()":
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    inner = {id(node.value) for node in attributes}
    for node in attributes:
        variable, *chain = ast.unparse(node).split(".")
        if id(node) not in inner and variable in names:
            yield key_of(chain)


def key_of(chain: Iterable[str]) -> str:
    """The part of an attribute chain that is a key of params.yaml: no methods, no properties."""
    section: Any = Params
    key = []
    for name in chain:
        if not is_section(section) or name not in section.model_fields:
            break
        key.append(name)
        section = section.model_fields[name].annotation
    return ".".join(key)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def leaves_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        if is_section(annotation):
            yield from leaves_of(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def covers(declared: str, key: str) -> bool:
    return f"{key}.".startswith(f"{declared}.")


def types_of(module: str) -> dict[str, str]:
    """Names and annotations of the arguments of a module's ``main``."""
    (main,) = (n for n in tree(module).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    return {a.arg: ast.unparse(a.annotation) for a in main.args.args if a.annotation}


STAGES = [*stages_in("dvc.yaml"), *stages_in("demo/dvc.yaml")]
MODULES = sorted({stage.module for stage in STAGES})


# the pipeline and the code


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_depends_on_every_module_that_it_imports_and_no_other(stage):
    """DVC does not follow imports (dvc#9195)."""
    expected = files_of(stage.module)
    block = "\n".join(f"      - {path}" for path in sorted(stage.data) + sorted(expected))
    assert stage.code == expected, f"deps of {stage.name} in {stage.file} should be:\n{block}"
    assert len(stage.deps) == len(set(stage.deps)), f"{stage.name} names a dependency twice"


def test_what_lm_evals_task_files_import_is_known_to_the_stages_that_run_them():
    """DVC sees the folder; what its files import must be among the modules of those stages."""
    running = [stage for stage in STAGES if "tasks" in stage.data]
    assert {stage.name for stage in running} == {"reference", "evaluate"}
    for file in (ROOT / "tasks").rglob("*.py"):
        module = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for name in imported(module):
            for stage in running:
                assert files_of(name) <= stage.code, f"{stage.name} needs {name} for {file.name}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("stages.")])
def test_a_stage_declares_the_parameters_that_it_reads_and_no_others(module):
    declared = {
        key for s in STAGES if s.module == module for key in s.params.get("params.yaml", ())
    }
    read = {key for name in closure(module) for key in parameters_read(name)}
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
    assert not idle, f"nothing reads {sorted(idle)}: remove it from stages/params.py and params/"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_command_gives_every_argument_of_the_stage_and_no_other(stage):
    assert stage.arguments.keys() == types_of(stage.module).keys()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_path_in_a_command_is_a_dependency_or_an_output_and_the_reverse(stage):
    types = types_of(stage.module)
    paths = {value for name, value in stage.arguments.items() if types[name] == "Path"}
    declared = stage.data | set(stage.outs)
    # A folder may be declared by its files, where other stages write beside them.
    given = {path for path in paths if any(covers_path(path, one) for one in declared)}
    told = {one for one in declared if any(covers_path(path, one) for path in paths)}
    assert given == paths, f"{stage.name}: add to deps or outs: {sorted(paths - given)}"
    assert told == declared, f"{stage.name}: not in its command: {sorted(declared - told)}"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_what_a_stage_reads_another_writes(stage):
    outs = {out for other in STAGES if other.name != stage.name for out in other.outs}
    for path in stage.data:
        written = any(covers_path(out, path) for out in outs)
        in_git = any(covers_path(path, file) for file in tracked_files())
        assert written or in_git, f"{stage.name}: nothing writes {path}"


def covers_path(folder: str, path: str) -> bool:
    return Path(path).is_relative_to(folder)


def test_no_two_stages_write_the_same_place():
    outs = [out for stage in STAGES for out in stage.outs]
    clashes = [(a, b) for a in outs for b in outs if a != b and covers_path(a, b)]
    assert len(outs) == len(set(outs))
    assert not clashes


def test_every_plot_draws_columns_of_an_output():
    outs = {out for stage in STAGES for out in stage.outs}
    for plot in yaml_of("dvc.yaml")["plots"]:
        ((name, settings),) = plot.items()
        for file, columns in settings["y"].items():
            assert any(covers_path(out, file) for out in outs), f"{name}: nothing writes {file}"
            drawn = {settings["x"], *([columns] if isinstance(columns, str) else columns)}
            if file.startswith("reports/curves/"):
                assert drawn <= {"step", "epoch", *training.CURVES.values()}, name
            if (ROOT / file).is_file():
                header = (ROOT / file).read_text(encoding="utf-8").splitlines()[0]
                assert drawn <= set(header.split(",")), name


def test_no_stage_imports_torch_or_the_trainer_before_it_needs_them():
    """Importing them takes 20 s on two cores, longer than most stages run."""
    modules = [f"stages.{path.stem}" for path in sorted((ROOT / "stages").glob("*.py"))]
    heavy = ["torch", "transformers", "llamafactory", "mlflow", "peft", "trl", "datasets", "scipy"]
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        f"    early = [heavy for heavy in {heavy!r} if heavy in sys.modules]\n"
        "    if early: raise SystemExit(f'{name} imports {early} when it is imported itself')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_curve_is_one_that_the_trainer_logs():
    trainers = [
        package_folder("llamafactory") / "train" / "dpo" / "trainer.py",
        package_folder("transformers") / "trainer.py",
    ]
    source = "".join(path.read_text(encoding="utf-8") for path in trainers)
    for name in training.CURVES:
        assert re.search(rf"""["']({{prefix}})?{re.escape(name).replace('"', "")}["']""", source), (
            f"training.CURVES: neither trainer logs {name}"
        )


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# LLaMA-Factory's own argument classes


@cache
def real_arguments() -> dict[str, Any]:
    """Name and resolved type of every argument, from the classes themselves (20 s to import)."""
    from llamafactory.hparams import parser

    found: dict[str, Any] = {}
    for group in parser._TRAIN_ARGS:
        types = typing.get_type_hints(group)
        found |= {field.name: types[field.name] for field in fields(group) if field.init}
    return found


def values_of(annotation: Any) -> Any:
    """An enumeration (``SchedulerType | str``) as the values that it takes; else as it is."""
    first = (typing.get_args(annotation) or (annotation,))[0]
    if isinstance(first, type) and issubclass(first, Enum):
        return typing.Literal[tuple(item.value for item in first)]
    return annotation


@pytest.mark.slow
def test_the_arguments_that_we_read_from_the_source_are_those_of_the_classes():
    read, real = arguments.arguments(), real_arguments()
    assert read.keys() == real.keys()
    untold = {name for name, annotation in read.items() if annotation is Any}
    assert {name: read[name] for name in read if name not in untold} == {
        name: values_of(real[name]) for name in real if name not in untold
    }
    assert len(untold) < 20  # a change of style upstream must not blind the check


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_llamafactory_accepts_every_preset(preset):
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    p = params.load(preset)
    config = training.dpo_config(
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


def test_the_keys_that_the_pipeline_sets_are_arguments_of_llamafactory():
    assert not set(arguments.RESERVED) - set(arguments.arguments())
    assert not set(arguments._LOWEST) - set(arguments.arguments())


def test_every_key_that_the_pipeline_sets_itself_is_refused_in_a_preset():
    p = params.load(ROOT / "params" / "demo.yaml")
    config = training.dpo_config(
        p, model=Path(), formatted=Path(), images=Path(), output=Path(), validated=True
    )
    assert not config.keys() - p.train.passed_through.keys() - arguments.RESERVED.keys()


# presets


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid(preset):
    assert params.load(preset).train.loss == "sigmoid"


def test_params_yaml_starts_as_the_demo_preset():
    """As the files are, or as they are committed: an experiment in the workspace is no mistake."""
    assert agree(
        lambda read: read("params.yaml") == read("params/demo.yaml"),
    ), "cp params/demo.yaml params.yaml"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_has_the_keys_of_the_demo(preset):
    """Of our own keys, that is; sources differ, and ``train`` passes on what a preset wants."""

    def ours(path: Path) -> set[str]:
        return {
            key
            for key, _, _ in key_lines(path)
            if ".source." not in key and ".lm_eval." not in key and not is_passed_on(key)
        }

    assert ours(preset) == ours(ROOT / "params" / "demo.yaml")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_parameter_of_ours_is_explained_where_people_meet_it(preset):
    """By a comment on its line, or by one that its section's line has for all of it."""
    clear_from_their_values = {"kind", "revision", "files"}  # of a source
    told = {key for key, _, comment in key_lines(preset) if comment}
    for key, value, _ in key_lines(preset):
        section, _, name = key.rpartition(".")
        if (
            value
            and not is_passed_on(key)
            and not (section.endswith(".source") and name in clear_from_their_values)
        ):
            assert {key, section} & told, f"{preset.name}: say what {key} does, in a comment"


def test_presets_explain_equal_settings_in_equal_words():
    """What a comment says of a value is true in every preset that has the value."""
    said: dict[tuple[str, str], dict[str, str]] = {}
    for preset in PRESETS:
        for key, value, comment in key_lines(preset):
            if ".source" not in key and not key.startswith(("train.", "data.columns")):
                said.setdefault((key, value), {}).setdefault(comment, preset.name)
    differing = {setting: comments for setting, comments in said.items() if len(comments) > 1}
    assert not differing


def is_passed_on(key: str) -> bool:
    return key.startswith("train.") and key.removeprefix("train.") not in params.Train.model_fields


def key_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of every line of a preset that has a key."""
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"( *)(\w+):(?: +([^#\s].*?))?(?: +# (.+))?", line)
        if not found:
            assert not line.strip() or line.lstrip().startswith("#"), f"{path.name}: {line}"
            continue
        depth = len(found[1])
        above = [(d, name) for d, name in above if d < depth] + [(depth, found[2])]
        yield ".".join(name for _, name in above), found[3] or "", found[4] or ""


# results


def test_the_results_have_the_documented_keys_in_their_order():
    if not RESULTS.exists():
        pytest.skip("reports/metrics.json comes with the first `make repro`")
    keys = list(json.loads(RESULTS.read_text(encoding="utf-8")))
    documented = [
        key
        for name in metrics.MEANING
        for key in (
            [name, f"{name}_low", f"{name}_high"] if name in metrics.WITH_INTERVAL else [name]
        )
    ]
    own = [key for key in keys if not key.startswith("lm_eval/")]
    assert own == [key for key in documented if key in keys]
    assert set(metrics.MEANING) - metrics.OPTIONAL <= set(own)
    assert all(LM_EVAL_KEY.fullmatch(key) for key in keys[len(own) :])


LM_EVAL_KEY = re.compile(
    r"lm_eval/\w+/\w+/"
    r"(base|tuned|change|change_low|change_high|gained|lost|p_value|higher_is_better)"
)


def test_every_metric_is_documented_with_its_meaning():
    rows = {k: v for k, v in table_under(EVALUATION, "## Every key of `reports/metrics.json`")}
    assert list(rows) == [f"`{key}`" for key in metrics.MEANING]
    for key, meaning in metrics.MEANING.items():
        assert rows[f"`{key}`"] == meaning, f"docs/evaluation.md: {key}"


def test_the_documented_intervals_are_those_that_are_computed():
    sentence = re.search(r"An interval stands beside ([^.]+)\.", EVALUATION)
    assert sentence
    assert re.findall(r"`(\w+)`", sentence[1]) == list(metrics.WITH_INTERVAL)


# README


def test_readme_shows_the_results_that_are_committed():
    """As the files are, or as they are committed: an experiment in the workspace is no mistake."""
    if not RESULTS.exists():
        pytest.skip("reports/metrics.json comes with the first `make repro`")
    assert agree(
        lambda read: (
            readme_table.between_markers(read("README.md"))
            == readme_table.table(json.loads(read("reports/metrics.json")))
        )
    ), "python -m benchmarks.readme_table writes README's table anew"


def test_readme_tells_of_every_stage_what_dvc_yaml_says():
    rows = table_under(README, "## The pipeline")
    expected: dict[str, tuple[str, str]] = {}
    for one in stages_in("dvc.yaml"):
        name = one.name.partition("@")[0]
        before = expected.get(name, ("", ""))[1]
        knobs = [*re.findall(r"`([\w.]+)`", before), *one.params["params.yaml"]]
        expected[name] = (one.desc, ", ".join(f"`{knob}`" for knob in dict.fromkeys(knobs)))
    lines = "\n".join(
        f"| `{name}` | {what} | {knobs} |" for name, (what, knobs) in expected.items()
    )
    assert rows == [(f"`{name}`", *cells) for name, cells in expected.items()], (
        f"README's table under The pipeline should be:\n{lines}"
    )


def test_readme_lists_every_preset_as_its_first_line_describes_it():
    rows = {name: described for name, described in table_under(README, "## Presets")}
    for path in PRESETS:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        described = first.removeprefix(f"# Preset {path.stem}: ")
        assert described != first, f"{path.name}: begin with '# Preset {path.stem}: …'"
        assert rows[f"[`{path.stem}`](params/{path.name})"] == described
    assert len(rows) == len(PRESETS)


def test_readme_draws_the_tree_that_git_tracks():
    drawn = re.search(r"(?s)## What is where\n+```\n(.+?)```", README)
    assert drawn
    names = {re.split(r"\s{2,}", line)[0] for line in drawn[1].splitlines()}
    named = {name for together in names for name in together.split()}
    tracked = {name.split("/")[0] + "/" * ("/" in name) for name in tracked_files()}
    shown = {name for name in tracked if not name.startswith(".")}
    made = {"data/", "models/", "reports/", "dvc.lock"}  # by the pipeline
    assert named - made == shown - made


def test_every_dvc_command_in_the_documents_is_one():
    """DVC's own parser reads them, options included."""
    from dvc.cli.parser import get_main_parser

    parser = get_main_parser()
    found = [c for _, c in commands() if c.startswith("dvc ")]
    assert len(found) > 10
    for command in found:
        try:
            parser.parse_args(shlex.split(command)[1:])
        except Exception as error:
            pytest.fail(f"`{command}`: {error}")


def test_every_target_and_preset_of_a_make_command_in_the_documents_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z]+):.*## ", makefile))
    used = set()
    for document, command in commands():
        if command.startswith("make "):
            target, *settings = shlex.split(command)[1:]
            used.add(target)
            assert target in targets, f"{document}: `{command}`"
            for setting in settings:
                name, _, value = setting.partition("=")
                assert f"$({name})" in makefile or f"$${name}" in makefile, command
                if name == "PRESET" and value != "name":
                    assert value in {path.stem for path in PRESETS}, f"{document}: `{command}`"
    assert used >= {"repro", "test", "use", "ui"}


def test_every_module_that_the_documents_run_can_be_run():
    found = [(d, c) for d, c in commands() if re.match(r"(\w+=\S+ )*python -m ", c)]
    assert found
    for document, command in found:
        module = re.split(r"python -m ", command)[1].split()[0]
        if module.split(".")[0] in (*PACKAGES, "benchmarks", "tests"):
            assert source_of(module).is_file(), f"{document}: `{command}`"
            assert "__main__" in source_of(module).read_text(encoding="utf-8"), command


def test_every_parameter_in_the_documents_exists_and_takes_the_value(tmp_path):
    seen = 0
    for document, command in commands():
        for setting in re.findall(r"(?:-S|--set-param) [+']*([\w.]+=[^\s']+)", command):
            key, _, values = setting.partition("=")
            for value in values.split(","):
                seen += 1
                text = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
                *sections, name = key.split(".")
                place = text
                for section in sections:
                    place = place[section]
                place[name] = YAML(typ="safe").load(value)
                with (tmp_path / "params.yaml").open("w") as file:
                    YAML().dump(text, file)
                params.load(tmp_path / "params.yaml")
                assert key_of(key.split(".")) == key or is_passed_on(key), f"{document}: {key}"
    assert seen >= 3


def test_every_stage_that_a_command_in_the_documents_names_exists():
    names = {stage.name for stage in STAGES} | {stage.name.split("@")[0] for stage in STAGES}
    for document, command in commands():
        if command.startswith("dvc repro"):
            for word in shlex.split(command)[2:]:
                if not word.startswith("-"):
                    assert word in names or (ROOT / word).is_file(), f"{document}: `{command}`"


def test_changing_beta_reruns_train_evaluate_and_their_report_alone():
    said = "`dvc exp run -S train.beta=0.2` runs train, evaluate and report anew, and nothing else"
    assert said in README
    stages = list(stages_in("dvc.yaml"))
    stale = {"train"}
    for _ in stages:  # whatever reads an output of these, and so on
        outs = {out for one in stages if one.name in stale for out in one.outs}
        stale |= {s.name for s in stages if any(covers_path(o, d) for o in outs for d in s.data)}
    reading = {
        s.name for s in stages if any(covers(k, "train.beta") for k in s.params["params.yaml"])
    }
    assert stale | reading == {"train", "evaluate", "report"}


def test_readme_counts_the_steps_of_the_4b_preset():
    found = re.search(
        r"([\d,]+) pairs, (\d+)% of the images for training, (\d+) pairs a step, (\d+) epochs: "
        r"about ([\d,]+) steps",
        README,
    )
    assert found
    pairs, share, batch, epochs, steps = (int(text.replace(",", "")) for text in found.groups())
    preset = ROOT / "params" / "qwen3-vl-4b.yaml"
    p = params.load(preset)
    options = p.train.passed_through
    assert f"{pairs:,} pairs" in preset.read_text(encoding="utf-8")
    assert share / 100 == pytest.approx(1 - p.preprocess.validation - p.preprocess.test)
    assert batch == p.train.gpus * (
        options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    )
    assert epochs == options["num_train_epochs"]
    assert steps == pytest.approx(pairs * share / 100 * epochs / batch, rel=0.01)


def commands() -> Iterator[tuple[str, str]]:
    """Every command in the documents: lines of fenced shell blocks, and what backquotes hold."""
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text(encoding="utf-8")
        fenced = "\n".join(re.findall(r"(?s)```sh\n(.*?)```", text))
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?s)```.*?```", "", text))
        for line in [*fenced.splitlines(), *inline]:
            for part in re.sub(r"\s+# .*", "", line).split(" && "):
                if re.match(r"(make|dvc|(\w+=\S+ )*python) ", part) and "…" not in part:
                    yield document.name, part.strip()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/evaluation.md"])
def test_every_link_in_a_document_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{document}: {target}"


@pytest.mark.parametrize("document", ["README.md", "docs/evaluation.md"])
def test_what_a_document_says_is_defined_in_a_file_is_defined_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, path in re.findall(r"`(\w+)` in\s+\[`([\w/.]+\.py)`\]", text):
        assert re.search(rf"(?m)^(def|class) {name}\b|^{name}\b", text_of(path)), f"{path}: {name}"


def table_under(text: str, heading: str) -> list[tuple[str, ...]]:
    """The cells of the first table under a heading, row by row, without its head."""
    assert heading in text, heading
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split(" | ")))
    return rows


# nothing of one machine


PUBLIC_HOSTS = {
    *("github.com", "git-lfs.github.com", "huggingface.co", "arxiv.org", "doi.org"),
    *("www.apache.org", "keepachangelog.com", "dvc.org", "mlflow.org"),
    *("127.0.0.1", "localhost", "host", ""),
}


def test_no_tracked_file_names_a_host_that_is_not_public():
    """Package mirrors above all. ``host`` and names ending in .invalid stand for any."""
    for name in tracked_files():
        for host in re.findall(r"https?://(?:[^/\s@]*@)?([\w.-]*)", text_of(name)):
            known = host in PUBLIC_HOSTS or host.endswith((".invalid", ".example"))
            assert known, f"{name} names {host}"


def test_no_tracked_file_holds_a_path_of_one_machine():
    folders = "|".join(("root", "work", r"home/\w+", r"Users/\w+", "mnt", "scratch"))
    for name in tracked_files():
        found = re.search(rf"(?<![\w.~\]])/(?:{folders})/", text_of(name))
        assert not found, f"{name} holds {found[0] if found else ''}"


def text_of(name: str) -> str:
    path = ROOT / name
    if not path.is_file() or path.suffix in {".parquet", ".safetensors", ".png", ".jpg"}:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def tracked_files() -> tuple[str, ...]:
    return tuple(git("ls-files").splitlines())


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def agree(claim: typing.Callable[[typing.Callable[[str], str]], bool]) -> bool:
    """Whether a claim about files holds of them as they are, or else as they are committed."""
    return claim(lambda name: (ROOT / name).read_text(encoding="utf-8")) or claim(
        lambda name: git("show", f"HEAD:{name}")
    )
