"""``params.yaml`` as frozen models: every knob of the pipeline, checked before any stage does any
work.

Nothing has a hidden default: a key of ours that is missing is refused, as one that is unknown is,
so ``params.yaml`` says all there is to say. What each key does is written where people meet it, in
the comments of ``params/demo.yaml`` and ``params/qwen3-vl-4b.yaml``.

In the ``train`` section a few keys are ours (``Train``). Every other key is passed through under
LLaMA-Factory's name, checked against its options without importing it (``arguments``). A section
refuses keys of its own that do not go together; tables of LLaMA-Factory's are in ``arguments``.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import UserError, did_you_mean, shown
from stages.families import known
from stages.params import arguments
from stages.params.losses import LOSSES, VIEWS
from stages.sources.kinds import KINDS
from stages.sources.source import Section, SourceSection

PARAMS_FILE = Path("params.yaml")

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


if TYPE_CHECKING:
    DataSource: TypeAlias = SourceSection
    ModelSource: TypeAlias = SourceSection
    LossName: TypeAlias = str
    View: TypeAlias = str
    Template: TypeAlias = str
else:  # one of the kinds of sources that are registered, told apart by ``kind``
    LossName = Literal[tuple(LOSSES)]
    View = Literal[VIEWS]
    DataSource = Union[tuple(kind.section for kind in KINDS.values())]  # noqa: UP007
    ModelSource = Union[tuple(k.model_section for k in KINDS.values() if k.model_section)]  # noqa: UP007
    Template = Literal[tuple(name for family in known.FAMILIES for name in family.templates)]


# Of a source of data: DVC's item, a folder below data/raw, and the origin of its rows. With a digit
# at the beginning, dvc exp run -S could not name it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,39}$")]


class Data(Section):
    sources: Annotated[
        dict[Name, Annotated[DataSource, Field(discriminator="kind")]], Field(min_length=1)
    ]

    @model_validator(mode="after")
    def _one_folder_each(self) -> Self:
        if len({name.lower() for name in self.sources}) < len(self.sources):
            raise ValueError("two sources have names that differ only in case")
        return self


class Trust(Section):
    """What of a model's author is trusted: files that can run code when they are loaded."""

    pickle: bool
    remote_code: bool


class Model(Section):
    source: Annotated[ModelSource, Field(discriminator="kind")]
    trust: Trust
    template: Template
    quantization_bit: Literal[4, 8] | None


class Wanted(Section):
    """Which pairs are wanted (``stages.pairs.refusals``)."""

    text_only: bool
    images: Positive
    turns: Positive
    system_prompt: bool


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return pattern


class Preprocess(Section):
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
    refuse: dict[Name, Annotated[str, AfterValidator(_regular)]]

    @model_validator(mode="after")
    def _leaves_some_to_train(self) -> Self:
        if (total := self.validation + self.test) >= 1:
            raise ValueError(
                f"validation and test add up to {total:g}, which leaves nothing for train"
            )
        return self


class Format(Section):
    cutoff_len: Positive
    image_max_pixels: Annotated[int, Field(ge=min(each.token_side for each in known.FAMILIES) ** 2)]
    image_min_pixels: Positive
    allowed_tokens: list[str]

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.image_min_pixels > self.image_max_pixels:
            raise ValueError("image_min_pixels is larger than image_max_pixels")
        return self


class Scoring(Section):
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    portable: bool
    batch_tokens: Positive


class Train(Section):
    """Our own keys; the rest (``extra``) is LLaMA-Factory's, under its own names."""

    model_config = ConfigDict(extra="allow")

    beta: Annotated[float, Field(gt=0)]
    loss: LossName
    view: View
    gpus: Annotated[int, Field(ge=0)]
    portable: bool
    shared_prefix: bool

    @property
    def processes(self) -> int:
        """Of the training; the pairs of a step are so many times those of one."""
        return max(self.gpus, 1)

    @property
    def passed_through(self) -> dict[str, Any]:
        """The keys that go to LLaMA-Factory as they are, and what the loss sets of them."""
        return {**(self.__pydantic_extra__ or {}), **LOSSES[self.loss].options}

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        problems = []
        if not LOSSES[self.loss].stock and not self.shared_prefix:
            problems.append(
                f"loss is {self.loss}, but LLaMA-Factory's own trainer would train sigmoid under "
                "that name; set shared_prefix: true"
            )
        sampling = self.passed_through.get("train_sampling_strategy")
        if sampling == "group_by_length" and not self.shared_prefix:
            problems.append(
                "train_sampling_strategy: LLaMA-Factory's own trainer can't group pairs by length; "
                "set shared_prefix: true"
            )
        if self.passed_through.get("dpo_label_smoothing") and not LOSSES[self.loss].smoothed:
            problems.append(f"loss: {self.loss} takes no dpo_label_smoothing; remove it")
        if self.passed_through.get("ld_alpha") and LOSSES[self.loss].view:
            problems.append(f"loss: {self.loss} takes no ld_alpha; remove it")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Generation(Section):
    prompts: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive
    engine: Literal["transformers", "vllm"]


class Evaluate(Section):
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]
    controls: Annotated[int, Field(ge=0)]
    generation: Generation
    task_files: Annotated[Path, Field(strict=False)]
    lm_eval: Annotated[
        dict[str, Positive | None], BeforeValidator(lambda tasks: {} if tasks is None else tasks)
    ]


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
            f"{path} is missing; run from the project's root, or `make use PRESET=demo`"
        ) from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    return checked(document, str(path))


def checked(document: Any, name: str) -> Params:
    """The parameters in a document, by section and key; one message names all problems.

    Raises:
        UserError: a key is unknown, missing or out of range, or does not go with another one.
    """
    if not isinstance(document, Mapping):
        raise UserError(f"{name} must hold the sections {', '.join(Params.model_fields)}")
    flat = flattened(document)
    found_moved = {way: key for key in flat if (way := arguments.moved(key, flat[key]))}
    if found_moved:
        raise UserError("; ".join(f"{name}: '{key}' {way}" for way, key in found_moved.items()))
    train = document.get("train")
    given = {str(key): train[key] for key in train} if isinstance(train, Mapping) else {}
    options = {key: value for key, value in given.items() if key not in Train.model_fields}
    refused = {key: why for key in options if (why := arguments.refusal(key, options[key]))}
    problems = {f"train.{key}": f"'train.{key}' {why}" for key, why in refused.items()}
    passed = {key: value for key, value in options.items() if key not in refused}
    for error in _errors(Params, document):
        key = _key(error["loc"])
        problems.setdefault(key, _explain(key, error))
    for error in _errors(arguments.options(), passed):
        key = f"train.{error['loc'][0]}"  # what follows is which of several types it is not
        problems.setdefault(key, _explain(key, error))
    passed = {key: value for key, value in passed.items() if f"train.{key}" not in problems}
    if told := [*problems.values(), *arguments.problems(passed)]:
        raise UserError("; ".join(f"{name}: {problem}" for problem in told))
    found = Params.model_validate(document)
    on_gpus = {f"train.{key}": passed.get(key) for key in ("fp16", "pure_bf16", "tf32")}
    on_gpus["model.quantization_bit"] = found.model.quantization_bit
    if found.train.gpus == 0 and any(on_gpus.values()):
        key = next(key for key, value in on_gpus.items() if value)
        raise UserError(f"{name}: '{key}' needs a GPU, but train.gpus is 0")
    tower = passed.get("freeze_vision_tower") is False
    if found.evaluate.generation.engine == "vllm" and (tower or found.model.quantization_bit):
        raise UserError(
            f"{name}: vLLM would leave out a trained vision tower, and it has not LLaMA-Factory's "
            "4 and 8 bits; set 'evaluate.generation.engine' to transformers"
        )
    return found


def _errors(model: type[BaseModel], document: Any) -> list[ErrorDetails]:
    try:
        model.model_validate(document)
    except ValidationError as error:
        return error.errors()
    return []


def flattened(document: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level, keys joined by dots; an empty section is a value."""
    if not isinstance(document, Mapping) or not document:
        return {prefix.removesuffix("."): document}
    return {
        key: value
        for name, section in document.items()
        for key, value in flattened(section, f"{prefix}{name}.").items()
    }


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[tuple[str, str, str], ...]:
    """Keys whose values differ, with both values as JSON writes them; ``-`` where there is none."""

    def shown(parameters: Mapping[str, Any], key: str) -> str:
        return json.dumps(parameters[key], default=str) if key in parameters else "-"

    return tuple(
        (key, shown(before, key), shown(after, key))
        for key in {**before, **after}
        if key not in before or key not in after or before[key] != after[key]
    )


def _explain(key: str, detail: ErrorDetails) -> str:
    """One clause for one of pydantic's errors."""
    kind, given, message = detail["type"], detail["input"], detail["msg"]
    if kind == "extra_forbidden":
        name = key.rpartition(".")[2]
        return f"unknown key '{key}'{did_you_mean(name, _known_names() - {name})}"
    if kind == "union_tag_invalid":
        tags = detail["ctx"]["expected_tags"].replace("'", "")
        hint = did_you_mean(detail["ctx"]["tag"], tags.split(", "))
        return f"'{key}.kind' = {detail['ctx']['tag']!r}: must be one of {tags}{hint}"
    if kind in ("missing", "union_tag_not_found"):
        return f"key '{key}{'.kind' * (kind != 'missing')}' is missing"
    if kind.startswith("model_"):
        return f"'{key}' must be a section with keys of its own"
    if kind == "value_error":  # one of ours
        message = str(detail["ctx"]["error"])
    shown_value = f" = {shown(repr(given))}" if not isinstance(given, dict | list) else ""
    return f"'{key}'{shown_value}: {message[0].lower()}{message[1:]}"


def _key(location: tuple[int | str, ...]) -> str:
    """A place as it is written in the file; pydantic's also names the kind of a source."""
    kind = {"model.source": 2, "data.sources": 3}.get(".".join(map(str, location[:2])))
    return ".".join(str(part) for i, part in enumerate(location) if i != kind)


def _known_names() -> set[str]:
    """The names of all keys, of every section and of every kind of source."""
    sections: list[type[BaseModel]] = [Section, arguments.options()]
    for section in sections:
        sections += section.__subclasses__()
    return {name for section in sections for name in section.model_fields}
