"""What every section of ``params.yaml`` is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of ``params.yaml``: immutable, complete, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceSection(Section):
    """A source of data or of a base model: ``kind`` names its kind, which has keys of its own."""

    kind: Any
