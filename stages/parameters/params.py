"""``params.yaml`` as frozen models: every knob of the pipeline, checked before any stage does any
work.

Unknown keys are refused with the nearest known name. Nothing has a hidden default: a key of ours
that is missing is refused too, so ``params.yaml`` says all there is to say. What each key does is
written where people meet it, in the comments of ``params/*.yaml``.

The ``train`` section is mostly LLaMA-Factory's own: ``beta``, ``loss``, ``gpus``,
``shared_prefix`` and ``keep_vision_features`` are ours, every other key is passed through under
LLaMA-Factory's name and checked against its argument classes (``stages.parameters.arguments``),
without importing them: that takes 20 s, this 0.2 s.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import UserError, did_you_mean
from stages.core.schema import Section, SourceSection
from stages.parameters import arguments
from stages.sources import registry

PARAMS_FILE = Path("params.yaml")

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Loss = Literal["sigmoid", "hinge", "ipo", "orpo", "simpo"]
REFERENCE_FREE: frozenset[str] = frozenset({"orpo", "simpo"})


class Columns(Section):
    """Names of the columns in a tabular source; ``image``, ``origin`` and ``kind`` may be null."""

    image: str | None
    question: str
    chosen: str
    rejected: str
    origin: str | None
    kind: str | None


if TYPE_CHECKING:
    DataSource: TypeAlias = SourceSection
    ModelSource: TypeAlias = SourceSection
else:  # one of the kinds of sources that are registered, told by ``kind``
    DataSource = Union[registry.data_sections()]  # noqa: UP007
    ModelSource = Union[registry.model_sections()]  # noqa: UP007


class Data(Section):
    source: Annotated[DataSource, Field(discriminator="kind")]
    columns: Columns


class Trust(Section):
    """What of a model's author is trusted: files that can run code when they are loaded."""

    pickle: bool
    remote_code: bool


class Model(Section):
    source: Annotated[ModelSource, Field(discriminator="kind")]
    trust: Trust
    template: str
    quantization_bit: Literal[4, 8] | None


class Wanted(Section):
    """Which pairs are wanted (``stages.ingest.refusals``)."""

    text_only: bool
    images: Positive
    turns: Positive
    system_prompt: bool


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

    @model_validator(mode="after")
    def _some_pairs_remain_for_training(self) -> "Preprocess":
        if self.validation + self.test >= 1:
            raise PydanticCustomError(
                "split",
                "validation and test add up to {total}; leave something below 1 for train",
                {"total": self.validation + self.test},
            )
        return self


class Format(Section):
    cutoff_len: Positive
    image_max_pixels: Positive
    image_min_pixels: Positive

    @model_validator(mode="after")
    def _pixel_bounds_are_ordered(self) -> "Format":
        if self.image_min_pixels > self.image_max_pixels:
            raise PydanticCustomError(
                "pixels", "image_min_pixels is larger than image_max_pixels", {}
            )
        return self


class Scoring(Section):
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_tokens: Positive


class Train(Section):
    """Our own keys; the rest (``extra``) is LLaMA-Factory's, under its own names."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    beta: Annotated[float, Field(gt=0)]
    loss: Loss
    gpus: Annotated[int, Field(ge=0)]
    shared_prefix: bool
    keep_vision_features: bool

    @property
    def passed_through(self) -> dict[str, Any]:
        """The keys that go to LLaMA-Factory as they are."""
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _llamafactorys_own_trainer_can_do_it(self) -> "Train":
        if self.keep_vision_features and not self.shared_prefix:
            raise PydanticCustomError(
                "train",
                "{key}: {problem}",
                {
                    "key": "keep_vision_features",
                    "problem": "is true, and LLaMA-Factory's own trainer keeps none; it needs "
                    "train.shared_prefix: true",
                },
            )
        # LLaMA-Factory 0.9.5 calls TRL's dpo_loss without the name: its trainer takes sigmoid.
        if self.loss in ("hinge", "ipo") and not self.shared_prefix:
            raise PydanticCustomError(
                "train",
                "{key}: {problem}",
                {
                    "key": "loss",
                    "problem": f"is {self.loss}, and LLaMA-Factory's own trainer would train "
                    "sigmoid under that name; train.shared_prefix: true passes the name on",
                },
            )
        return self

    @model_validator(mode="after")
    def _llamafactory_knows_the_rest(self) -> "Train":
        for key, value in self.passed_through.items():
            if problem := arguments.problem_with(key, value):
                raise PydanticCustomError(
                    "train", "{key}: {problem}", {"key": key, "problem": problem}
                )
        return self


class Generation(Section):
    prompts: Annotated[int, Field(ge=0)]
    questions: Annotated[int, Field(ge=0)]
    max_new_tokens: Positive


class Evaluate(Section):
    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    resamples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]
    controls: Annotated[int, Field(ge=0)]
    generation: Generation
    task_files: Path
    lm_eval: dict[str, Positive | None]


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
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors()]
        raise UserError("; ".join(f"{path}: {problem}" for problem in problems)) from None


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
    # pydantic's location names the kind of a source, which is not a key in the file.
    location = [part for i, part in enumerate(detail["loc"]) if not _is_kind(detail["loc"], i)]
    key = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        return (
            f"unknown key '{key}'{did_you_mean(str(location[-1]), _siblings(detail['loc'][:-1]))}"
        )
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
        misspelt = difflib.get_close_matches(str(location[-1]), given, n=1)
        return f"key '{key}' is missing" + (
            f"; is '{misspelt[0]}' meant for it?" if misspelt else ""
        )
    if detail["type"] == "train":
        context = detail.get("ctx", {})
        return f"'{key}.{context.get('key')}' {context.get('problem')}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return (
        f"'{key}' = {detail['input']!r}: {message}"
        if _is_leaf(detail["input"])
        else f"'{key}': {message}"
    )


def _is_kind(location: tuple[int | str, ...], index: int) -> bool:
    return index > 0 and location[index - 1] == "source" and location[index] in registry.KINDS


def _is_leaf(value: object) -> bool:
    return not isinstance(value, dict | list | BaseModel)


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    """The keys known at a place in the file."""
    section: type[BaseModel] = Params
    for i, part in enumerate(location):
        if _is_kind(location, i):
            section = registry.KINDS[str(part)].section
        elif str(part) in section.model_fields:
            annotation = section.model_fields[str(part)].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
    return list(section.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
