"""What the pipeline has to know of one kind of source. Each kind's own file says it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from stages.core.schema import SourceSection
from stages.sources.manifest import Source

if TYPE_CHECKING:  # pyarrow takes longer to import than all of the parameters
    from stages.pairs.pairs import Question, Record


@dataclass(frozen=True)
class About:
    """What people are told of a data set that ``SOURCE.json`` does not say.

    ``language`` is an ISO code, ``citations`` are keys of the model card's citations.
    """

    language: str
    note: str
    citations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """How one kind of source is written in params.yaml, fetched, read and described.

    Functions get the kind's own section of params.yaml or the folder's ``SOURCE.json`` as read.
    """

    section: type[SourceSection]
    """The keys in params.yaml; one is ``kind: Literal["its name"]``."""
    fetch_data: Callable[[Any, Path], Source]
    """``fetch_data(section, out)`` fills ``out`` through ``manifest.begin`` and ``finish``."""
    name: Callable[[Any, Source], str]
    """What people call it: a repository, a package, a folder; no place on this machine."""
    words: Callable[[Source], str]
    """The same as part of a sentence of a data set's description, in Markdown."""
    fetch_model: Callable[..., Source] | None = None
    """``fetch_model(section, out, allow_pickle=…, allow_code=…)``."""
    model_section: type[SourceSection] | None = None
    """The keys of a base model's source; None: it has no models."""
    read: Callable[[Path], tuple[Iterator["Record"], Iterator["Question"]]] | None = None
    """Records and held-out questions of a fetched folder; None: tables (``pairs.tables``)."""
    address: Callable[[str, str, bool], str] | None = None
    """Where a name at a commit is published, given whether it is a data set; None: nowhere that
    the name alone would lead to."""
    about: Callable[[Source], About | None] = lambda _: None

    @property
    def tag(self) -> str:
        """Its name in params.yaml and SOURCE.json."""
        return str(get_args(self.section.model_fields["kind"].annotation)[0])
