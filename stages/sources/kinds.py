"""The kinds of sources there are. A new kind is one more file in this folder, and its name
in ``KINDS``."""

from stages.core.schema import SourceSection
from stages.sources import easyvqa, hub, local, several, sharegpt
from stages.sources.kind import Kind

_ALL = (hub.KIND, local.KIND, sharegpt.KIND, several.KIND, easyvqa.KIND)
# By the name that params.yaml and SOURCE.json give it.
KINDS: dict[str, Kind] = {kind.tag: kind for kind in _ALL}


def data_sections() -> tuple[type[SourceSection], ...]:
    """What ``data.source`` may hold."""
    return tuple(kind.section for kind in KINDS.values())


def model_sections() -> tuple[type[SourceSection], ...]:
    """What ``model.source`` may hold."""
    return tuple(kind.model_section for kind in KINDS.values() if kind.model_section)
