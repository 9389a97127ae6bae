"""The kinds of sources there are. A new kind is one more file in this folder, and its name here."""

from stages.core.schema import SourceSection
from stages.sources import easyvqa, hub, local
from stages.sources.source import Kind

# By the name that params.yaml and SOURCE.json give it.
KINDS: dict[str, Kind] = {kind.tag: kind for kind in (hub.KIND, local.KIND, easyvqa.KIND)}


def data_sections() -> tuple[type[SourceSection], ...]:
    """What an entry of ``data.sources`` may hold."""
    return tuple(kind.section for kind in KINDS.values())


def model_sections() -> tuple[type[SourceSection], ...]:
    """What ``model.source`` may hold."""
    return tuple(kind.model_section for kind in KINDS.values() if kind.model_section)
