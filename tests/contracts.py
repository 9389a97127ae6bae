"""What the contract tests share: dvc.yaml with its templates filled in, what code imports and
which parameters it reads (from its syntax tree), and the tracked files."""

import ast
import re
import shlex
import subprocess
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

import stages
from stages.commands import use
from stages.params import params
from stages.params.params import Params

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("stages", "demo")
PRESETS = sorted((ROOT / "params").glob("*.yaml"))

# Folders of stages/, each of which may import only those before it, in the order of their list.
FOLDERS = re.findall(r"(?m)^    (\w+)  ", str(stages.__doc__))

# Plumbing, which no stage depends on: it decides whether a stage runs or who watches it, not what
# it writes.
EXEMPT = {
    "stages": "a docstring, and a sentence where the packages are missing",
    "stages.core": "the command line, errors and texts of numbers; where the project is",
    "stages.params": "checks parameters; their values are DVC's to watch, under params",
    "stages.tracking": "mirrors results to MLflow; no stage reads them there",
}
# What of these folders decides numbers all the same.
DECIDES = {"stages.params.losses"}
# Prints all parameters, so that each of them decides what it writes.
PRINTS = "stages.reporting.page"
# Imported by a program that a stage starts, so by no module that the stage imports.
LOADED_ELSEWHERE = {"stages.tuning.process": {"stages.tuning.trainer"}}


# dvc.yaml, read with its templates filled in


@dataclass(frozen=True)
class Stage:
    """A stage as DVC runs it; an item of a ``foreach`` is one.

    ``arguments`` are what its command gives to ``main``, by name; ``params`` are keys by file.
    """

    name: str
    file: str
    module: str
    arguments: dict[str, str]
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: dict[str, tuple[str, ...]]

    @property
    def code(self) -> set[str]:
        """Files and folders of code: ``stages/train.py``, ``stages/tuning``."""
        return {path for path in self.deps if path.split("/")[0] == "stages" or path[-3:] == ".py"}

    @property
    def data(self) -> set[str]:
        return set(self.deps) - self.code


def stages_in(file: str) -> Iterator[Stage]:
    for name, entry in yaml_of(file)["stages"].items():
        if "foreach" not in entry:
            yield stage(file, name, entry)
            continue
        assert entry["foreach"] == "${data.sources}"
        for key in yaml_of("params.yaml")["data"]["sources"]:
            yield stage(file, f"{name}@{key}", filled(entry["do"], {"key": key}))


def stage(file: str, name: str, entry: dict[str, Any]) -> Stage:
    # A wdir leads back to the root, so that every path in every dvc.yaml is read from there.
    assert (ROOT / file).parent.joinpath(entry.get("wdir", ".")).resolve() == ROOT
    python, flag, module, *given = shlex.split(filled(entry["cmd"], interpolated()))
    assert [python, flag] == ["python", "-m"], f"{file}, {name}: run it as a module"
    declared: dict[str, list[str]] = {}
    for one in entry.get("params", []):
        for source, keys in one.items() if isinstance(one, dict) else [("params.yaml", [one])]:
            declared.setdefault(source, []).extend(keys)
    return Stage(
        name=name,
        file=file,
        module=module,
        arguments=named(given, module),
        deps=tuple(filled(entry["deps"], interpolated())),
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
        return re.sub(r"\$\{([\w.]+)\}", lambda found: values.get(found[1], found[0]), value)
    return value


@cache
def interpolated() -> dict[str, str]:
    """Values that dvc.yaml takes from params.yaml, by dotted name."""
    return {"evaluate.task_files": yaml_of("params.yaml")["evaluate"]["task_files"]}


def path_of(out: Any) -> str:
    return next(iter(out)) if isinstance(out, dict) else str(out)


@cache
def yaml_of(file: str) -> Any:
    text = use.whole(ROOT / file) if file.startswith("params/") else (ROOT / file).read_text()
    return YAML(typ="safe").load(text)


def preset_of(path: Path) -> Params:
    """The parameters of a file in ``params/``."""
    return params.checked(yaml_of(path.relative_to(ROOT).as_posix()), path.name)


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
    names = {module.rpartition(".")[0]} - {""}
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
        if not exempt(name):
            waiting |= (imported(name) | LOADED_ELSEWHERE.get(name, set())) - found
    return frozenset(found)


def exempt(module: str) -> str | None:
    """Under which entry of EXEMPT a module is plumbing, if it is."""
    if module in DECIDES:
        return None
    inside = (name for name in EXEMPT if name != "stages" and f"{module}.".startswith(f"{name}."))
    return "stages" if module == "stages" else next(inside, None)


def files_of(module: str) -> set[str]:
    """The sources of a module and of all it imports, plumbing aside, with what stands beside them
    by that name: the template ``reporting/page.html`` belongs to ``reporting/page.py``.
    """
    files: set[Path] = set()
    for name in closure(module):
        if not exempt(name):
            files |= beside(source_of(name))
    return {file.relative_to(ROOT).as_posix() for file in files}


def code_deps(module: str) -> list[str]:
    """The shortest exact list for ``deps``: a folder where a module imports all of its files."""
    needed = files_of(module)
    folders = {
        folder.relative_to(ROOT).as_posix()
        for folder in {(ROOT / file).parent for file in needed} - {ROOT / "stages"}
        if code_in(folder) <= needed
    }
    folders = {f for f in folders if not any(f != o and covers_path(o, f) for o in folders)}
    inside = {f for f in needed if any(covers_path(folder, f) for folder in folders)}
    return sorted(folders) + sorted(needed - inside)


def code_in(folder: Path) -> set[str]:
    """The files below a folder of code."""
    return {
        file.relative_to(ROOT).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def beside(source: Path) -> set[Path]:
    return {file for file in source.parent.glob(f"{source.stem}.*") if file.is_file()}


def parameters_read(module: str) -> set[str]:
    """Keys of params.yaml, such as ``train.beta``, that a module reads from a ``Params``.

    Followed are names bound to ``params.load()``, arguments annotated as ``Params``, and ``p`` in
    the template beside it. All of it together (``p.model_dump``) is no reading, but for ``PRINTS``:
    MLflow mirrors every parameter whatever is read.
    """
    functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef)]
    keys = {key for function in functions for key in _keys_read_in(function)}
    for template in beside(source_of(module)):
        if template.suffix in (".html", ".md"):
            chains = re.findall(r"\bp\.([\w.]+)", template.read_text(encoding="utf-8"))
            keys |= {key_of(chain.split(".")) for chain in chains}
    return (keys | (set(Params.model_fields) if module == PRINTS else set())) - {""}


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
        if chain[:1] == ["p"]:  # a Checkpoint holds the parameters under this name
            variable, *chain = chain
        if id(node) not in inner and variable in {*names, "p"}:
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


def covers_path(folder: str, path: str) -> bool:
    return Path(path).is_relative_to(folder)


def types_of(module: str) -> dict[str, str]:
    """Names and annotations of the arguments of a module's ``main``."""
    (main,) = (n for n in tree(module).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    return {a.arg: ast.unparse(a.annotation) for a in main.args.args if a.annotation}


STAGES = [*stages_in("dvc.yaml"), *stages_in("demo/dvc.yaml")]
MODULES = sorted({stage.module for stage in STAGES})


# tracked files


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


# documents and presets


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


def is_passed_on(key: str) -> bool:
    return key.startswith("train.") and key.removeprefix("train.") not in params.Train.model_fields


def key_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of every line of a preset that has a key."""
    above: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.fullmatch(r"( *)([\w-]+):(?: +([^#\s].*?))?(?: +# (.+))?", line)
        if not found:
            assert not line.strip() or line.lstrip().startswith("#"), f"{path.name}: {line}"
            continue
        depth = len(found[1])
        above = [(d, name) for d, name in above if d < depth] + [(depth, found[2])]
        yield ".".join(name for _, name in above), found[3] or "", found[4] or ""


# What a change reruns: rows of what is changed, where that is, and the stages that run again.
COSTS = table_under(
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "## What a change reruns"
)


if __name__ == "__main__":  # what dvc.yaml has to list: python -m tests.contracts
    for each in STAGES:
        print(f"{each.name}: [{', '.join(code_deps(each.module))}]")
