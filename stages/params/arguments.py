"""What LLaMA-Factory takes in the ``train`` section, without importing it, which takes 20 s.

Names and types of its options are read from the source of the classes that it parses a YAML file
into (0.1 s), so they are those of the installed versions. A test compares them with the classes.
``refused.yaml`` says what is refused: what would be wrong in silence, or would stop the training
after hours of the stages before it.
"""

import ast
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, create_model
from ruamel.yaml import YAML

# Where the classes are, after the enumerations that they name.
SOURCES = {
    "transformers": ("debug_utils", "trainer_utils", "training_args", "training_args_seq2seq"),
    "llamafactory": (
        *("extras/constants", "hparams/model_args", "hparams/data_args"),
        *("hparams/training_args", "hparams/finetuning_args", "hparams/generating_args"),
    ),
}

# Keys of an earlier release; options that the pipeline sets; options that undo a promise of it;
# what an option needs: a package, or another option; and bounds.
_TABLES = YAML(typ="safe", pure=True).load(Path(__file__).with_name("refused.yaml"))
MOVED, SET_ELSEWHERE, REFUSED = (
    {name: entry["why"] for entry in _TABLES[table] for name in entry["names"]}
    for table in ("moved", "set_elsewhere", "refused")
)
PACKAGES, PARTNERS = _TABLES["packages"], _TABLES["partners"]
BOUNDS = [(entry.pop("names"), entry) for entry in _TABLES["bounds"]]
INSTALL = ".venv/bin/uv pip install --python .venv/bin/python -c requirements.txt"

FILES = ("deepspeed", "fsdp_config")  # of which the value is a path, if it is a text

# Names of modules, which LLaMA-Factory splits at commas, so that a list will do as well.
MODULES = ("lora_target", "oft_target", "additional_target")


def moved(key: str, value: Any) -> str | None:
    """The new way for a key of an earlier release, as the end of a sentence."""
    return entry(MOVED, key, value or True)


def refusal(key: str, value: Any) -> str | None:
    """Why the ``train`` section can't hold an option, as the end of a sentence; None: it can."""
    if instead := entry(SET_ELSEWHERE, key, True):
        return f"is not set here: {instead}"
    return entry(REFUSED, key, value)


def entry(table: Mapping[str, str], key: str, value: Any) -> str | None:
    """What a table says of an option with a value. The table names an option that is not off
    (``fp8``), or one with a value (``flash_attn: fa2``); ``*`` stands for any text.
    """
    is_on = value not in (None, False, "")  # 0 is False
    for pattern, said in table.items():
        if ": " in pattern:
            found = fnmatchcase(f"{key}: {value}", pattern)
        else:
            found = is_on and fnmatchcase(key, pattern)
        if found:
            return said
    return None


def problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What options need that is not there (another option, a package, a file), and which of them
    exclude each other.
    """
    for option, value in options.items():
        partner = entry(PARTNERS, option, value)
        if partner and not options.get(partner.partition(":")[0]):
            yield f"'train.{option}' also needs {partner}"
        if package := entry(PACKAGES, option, value):
            try:
                version(package)
            except PackageNotFoundError:
                yield (
                    f"'train.{option}' needs a package that is not in the lock: "
                    f"`{INSTALL} {package}` installs it beside the locked versions"
                )
        if option in FILES and isinstance(value, str) and not Path(value).is_file():
            yield f"'train.{option}': there is no file {value}"
    if options.get("bf16") and options.get("fp16"):
        yield "'train': bf16 and fp16 are both true; keep one"
    saved, evaluated = options.get("save_strategy"), options.get("eval_strategy")
    if options.get("load_best_model_at_end") and saved != "best":
        times = (options.get("save_steps") or 500) / (options.get("eval_steps") or 500)
        if saved != evaluated or (saved == "steps" and abs(times - round(times)) > 1e-9):
            yield (
                "'train.load_best_model_at_end' needs a save_strategy like eval_strategy, and a "
                "save_steps that is a multiple of eval_steps"
            )


@cache
def options() -> type[BaseModel]:
    """The options that ``llamafactory-cli train`` takes, with their types, as a model.

    It is strict, because LLaMA-Factory gets a value as it is: to it, the text 'no' is true.
    """
    names: dict[str, Any] = {"Any": Any, "Literal": Literal, "Optional": Optional}
    fields: dict[str, Any] = {}
    for node in _classes():
        if any(ast.unparse(base).endswith("Enum") for base in node.bases):
            values = [line.value for line in node.body if isinstance(line, ast.Assign)]
            names[node.name] = Literal[tuple(map(ast.literal_eval, values))]
        for line in node.body if "Argument" in node.name else ():
            if isinstance(line, ast.AnnAssign) and "init=False" not in ast.unparse(line):
                name, annotation = ast.unparse(line.target), ast.unparse(line.annotation)
                bounds: Any = _bounds(name, annotation)
                fields[name] = (_type(name, annotation, names), Field(None, **bounds))
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return create_model("Options", __config__=config, **fields)


def _classes() -> Iterator[ast.ClassDef]:
    """The classes of ``SOURCES``, from the source of the installed packages."""
    for package, modules in SOURCES.items():
        spec = find_spec(package)  # which imports nothing
        folders = spec.submodule_search_locations if spec else None
        for module in modules:
            path = Path((folders or [package])[0], f"{module}.py")
            nodes = ast.parse(path.read_text(encoding="utf-8")).body
            yield from (node for node in nodes if isinstance(node, ast.ClassDef))


def _type(name: str, annotation: str, names: dict[str, Any]) -> Any:
    """The type that an annotation means to someone who writes YAML."""
    if annotation.removesuffix(" | str") in names:
        # An enumeration's name and str: a text becomes a member, or fails when training starts.
        annotation = annotation.removesuffix(" | str")
    if name in MODULES:
        annotation += " | list[str]"
    try:
        return eval(annotation, names)  # of packages that a training imports anyway
    except NameError:
        return Any  # an object that YAML can't hold


def _bounds(name: str, annotation: str) -> dict[str, Any]:
    """Those of the table, else none below 0; pydantic refuses what is not a finite number."""
    for names, bounds in BOUNDS:
        if any(fnmatchcase(name, pattern) for pattern in names):
            return bounds
    return {"ge": 0} if annotation.removesuffix(" | None") in ("int", "float") else {}
