"""What every section of ``params.yaml`` is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of ``params.yaml``: immutable, complete, and closed to unknown keys."""

    # Strict: 1 is not true, and "0.1" is not a number.
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SourceSection(Section):
    """A source of data or of a base model: ``kind`` names its kind, which has keys of its own."""

    model_config = ConfigDict(strict=False)  # a text becomes a path

    kind: Any
