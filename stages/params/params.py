"""``params.yaml`` as frozen models: every knob of the pipeline, checked before any stage does any
work.

Unknown keys are refused with the nearest known name. Nothing has a hidden default: a key of ours
that is missing is refused too, so ``params.yaml`` says all there is to say. (A source may lack what
few need: without ``columns`` they have their usual names.) What each key does is written where
people meet it, in the comments of ``params/*.yaml``.

The ``train`` section is mostly LLaMA-Factory's own: ``beta``, ``loss``, ``gpus``,
``nodes``, ``shared_prefix`` and ``keep_vision_features`` are ours, every other key is passed
through under LLaMA-Factory's name and checked against its argument classes
(``stages.params.arguments``), without importing them: that takes 20 s, this 0.2 s. What does
not go together is in ``stages.params.rules``.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import UserError, did_you_mean
from stages.core.schema import Section, SourceSection
from stages.params import arguments, rules
from stages.sources.kinds import KINDS

PARAMS_FILE = Path("params.yaml")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/|gdrive:", re.IGNORECASE)
STRICT = ConfigDict(strict=True)  # 1 is not true, and "0.1" is not a number

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Loss = Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"]
REFERENCE_FREE: frozenset[str] = frozenset({"orpo", "simpo"})


if TYPE_CHECKING:
    DataSource: TypeAlias = SourceSection
    ModelSource: TypeAlias = SourceSection
else:  # one of the kinds of sources that are registered, told by ``kind``
    DataSource = Union[tuple(kind.section for kind in KINDS.values())]  # noqa: UP007
    ModelSource = Union[tuple(k.model_section for k in KINDS.values() if k.model_section)]  # noqa: UP007


class Data(Section):
    """Sources by name: DVC's item, a folder below data/raw, and the origin of the rows."""

    sources: Annotated[
        dict[str, Annotated[DataSource, Field(discriminator="kind")]], Field(min_length=1)
    ]

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: dict[str, Any]) -> dict[str, Any]:
        for name in sources:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,39}", name):  # else -S can't name it
                message = "a name is a letter, then letters, digits, - and _"
                raise PydanticCustomError("names", message)
        if len({name.lower() for name in sources}) < len(sources):
            raise PydanticCustomError("names", "two names differ in case alone")
        return sources


class Trust(Section):
    """What of a model's author is trusted: files that can run code when they are loaded."""

    model_config = STRICT

    pickle: bool
    remote_code: bool


class Model(Section):
    source: Annotated[ModelSource, Field(discriminator="kind")]
    trust: Trust
    template: str
    quantization_bit: Literal[4, 8] | None


class Wanted(Section):
    """Which pairs are wanted (``stages.pairs.refusals``)."""

    model_config = STRICT

    text_only: bool
    images: Positive
    turns: Positive
    system_prompt: bool


class Preprocess(Section):
    model_config = STRICT

    split_key: Annotated[str, Field(min_length=1, max_length=64)]
    validation: Fraction
    test: Annotated[float, Field(gt=0, lt=1)]
    min_side: Positive
    max_pixels: Positive
    max_input_pixels: Positive
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]
    workers: Positive
    max_dropped: Annotated[float, Field(ge=0, le=1)]
    wanted: Wanted


class Format(Section):
    model_config = STRICT

    cutoff_len: Positive
    image_max_pixels: Positive
    image_min_pixels: Positive
    allowed_tokens: list[str]


class Scoring(Section):
    model_config = STRICT

    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Positive


class Train(Section):
    """Our own keys; the rest (``extra``) is LLaMA-Factory's, under its own names."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)

    beta: Annotated[float, Field(gt=0)]
    loss: Loss
    gpus: Annotated[int, Field(ge=0)]
    nodes: Annotated[int, Field(ge=1)]
    shared_prefix: bool
    keep_vision_features: bool

    @property
    def processes(self) -> int:
        """Over all machines; the pairs of a step are so many times those of one process."""
        return max(self.gpus, 1) * self.nodes

    @property
    def passed_through(self) -> dict[str, Any]:
        """The keys that go to LLaMA-Factory as they are."""
        return dict(self.__pydantic_extra__ or {})


class Generation(Section):
    model_config = STRICT

    prompts: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive


def _none_is_empty(tasks: Any) -> Any:
    return {} if tasks is None else tasks


class Evaluate(Section):
    model_config = STRICT

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]
    controls: Annotated[int, Field(ge=0)]
    generation: Generation
    task_files: Annotated[Path, Field(strict=False)]
    lm_eval: Annotated[dict[str, Positive | None], BeforeValidator(_none_is_empty)]


class Params(Section):
    """All of ``params.yaml``, one field for each section."""

    data: Data
    model: Model
    preprocess: Preprocess
    format: Format
    scoring: Scoring
    train: Train
    evaluate: Evaluate


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and check a parameters file.

    Raises:
        UserError: the file is missing or not YAML, or a key is unknown, missing or out of range;
            the message names the file and the key and, for a misspelling, the nearest known name.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; run from the project's root, or `make use PRESET=demo` makes it"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {_one_line(error)}") from None
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} must hold the sections {', '.join(Params.model_fields)}")
    return checked(document, str(path))


def checked(document: Mapping[str, Any], name: str) -> Params:
    """The parameters in a document, by section and key, all of whose problems are told at once.

    Raises:
        UserError: a key is unknown, missing or out of range, or does not go with another one.
    """
    if told := list(dict.fromkeys(_gone(document))):
        raise UserError("; ".join(f"{name}: {each}" for each in told))
    problems, wrong, found = [], set(), None
    try:
        found = Params.model_validate(document)
    except ValidationError as error:
        for detail in error.errors():
            problems.append(_explain(detail))
            wrong.add(_key(detail["loc"]))
    given = document.get("train")
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if key not in Train.model_fields and (problem := arguments.problem_with(str(key), value)):
            problems.append(f"'train.{key}' {problem}")
            wrong.add(f"train.{key}")
    problems += rules.problems(document, wrong)
    if problems or found is None:
        raise UserError("; ".join(f"{name}: {problem}" for problem in dict.fromkeys(problems)))
    return found


def _gone(document: Mapping[str, Any]) -> Iterator[str]:
    """What the file has from before there was ``data.sources``, and what to write instead."""
    data, model = document.get("data"), document.get("model")
    data = data if isinstance(data, Mapping) else {}
    entries = data.get("sources")
    if "source" in data:
        yield "'data.source' is now one entry of data.sources: data.sources.<a name>: {kind: …}"
    if "columns" in data:
        yield "'data.columns' is now a key of each source: data.sources.<name>.columns"
    sources = [data.get("source"), *(entries.values() if isinstance(entries, Mapping) else ())]
    sources.append(model.get("source") if isinstance(model, Mapping) else None)
    for source in sources:
        if not isinstance(source, Mapping):
            continue
        if source.get("kind") == "several":
            yield "kind several is gone: each of its sources is an entry of data.sources"
        if source.get("kind") == "sharegpt":
            yield (
                "kind sharegpt is gone: kind path reads these files; its path is a folder, an "
                "archive or a list of files, and it takes remap and datasets too"
            )
        if "image_urls" in source:
            yield (
                "image_urls is gone: img2dataset downloads images by their addresses into tars, "
                "which kind path reads (docs/guide.md)"
            )
        places = [source.get("path"), source.get("files")]
        places += [each for place in places if isinstance(place, list) for each in place]
        if any(isinstance(place, str) and _ADDRESS.match(place) for place in places):
            yield (
                "an address is no path: `dvc import-url` brings a file from https or S3, gdown one "
                "from Google Drive, and kind path reads it (docs/guide.md)"
            )


def flattened(document: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level, keys joined by dots; an empty section is a value."""
    if not isinstance(document, Mapping) or not document:
        return {prefix.removesuffix("."): document}
    return {
        key: value
        for name, section in document.items()
        for key, value in flattened(section, f"{prefix}{name}.").items()
    }


def _explain(detail: ErrorDetails) -> str:
    """One clause for one of pydantic's errors, with the key as it is written in the file."""
    key, name = _key(detail["loc"]), str(detail["loc"][-1])
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'{did_you_mean(name, _siblings(detail['loc'][:-1]))}"
    if detail["type"] == "union_tag_not_found":
        return f"key '{key}.kind' is missing"
    if detail["type"] == "union_tag_invalid":
        context = detail["ctx"]
        known = context["expected_tags"].replace("'", "").split(", ")
        hint = did_you_mean(context["tag"], known)
        return f"'{key}.kind' = {context['tag']!r}: must be one of {', '.join(known)}{hint}"
    if detail["type"] == "model_attributes_type":
        return f"'{key}' must hold keys, one of them kind"
    if detail["type"] == "model_type":
        return f"'{key}' must hold keys, such as {_siblings(detail['loc'])[0]}"
    if detail["type"] == "missing":
        given = [str(name) for name in detail["input"] if name not in _siblings(detail["loc"][:-1])]
        misspelt = difflib.get_close_matches(name, given, n=1)
        return f"key '{key}' is missing" + (
            f"; is '{misspelt[0]}' meant for it?" if misspelt else ""
        )
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return (
        f"'{key}' = {arguments.shown(detail['input'])}: {message}"
        if _is_leaf(detail["input"])
        else f"'{key}': {message}"
    )


def _key(location: tuple[int | str, ...]) -> str:
    """A place as it is written in the file; pydantic's also names the kind of a source."""
    return ".".join(str(part) for i, part in enumerate(location) if not _is_kind(location, i))


def _is_kind(location: tuple[int | str, ...], index: int) -> bool:
    return (*map(str, location[:2]), index) in (("model", "source", 2), ("data", "sources", 3))


def _is_leaf(value: object) -> bool:
    return not isinstance(value, dict | list | BaseModel)


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """The keys known at a place in the file."""
    section: type[BaseModel] = Params
    for i, part in enumerate(location):
        if _is_kind(location, i):
            kind = KINDS[str(part)]
            section = (location[0] == "model" and kind.model_section) or kind.section
        elif str(part) in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return list(section.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
