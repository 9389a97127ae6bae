"""docs/transcripts.md: what commands print, by running them again."""

import pytest

from benchmarks import transcripts
from benchmarks.tables import between_markers
from tests.contracts import ROOT

TEXT = (ROOT / transcripts.DOCUMENT).read_text(encoding="utf-8")


def block(name: str) -> str:
    return between_markers(TEXT, name).removeprefix("```text\n").removesuffix("```\n")


@pytest.mark.slow
def test_commands_print_what_the_document_shows(tmp_path):
    clone = transcripts.cloned(tmp_path.resolve())
    if not transcripts.with_outputs(clone):
        pytest.skip("DVC's cache lacks the demo's adapter; `make repro` makes it")
    for name in transcripts.HELD:
        text = transcripts.transcript(transcripts.BLOCKS[name], clone)
        assert transcripts.same(block(name), text), f"{name}:\n{text}\nnot as in the document"


@pytest.mark.parametrize("name", transcripts.BLOCKS)
def test_a_block_of_the_document_has_its_commands(name):
    for line in transcripts.BLOCKS[name]:
        assert f"$ {line}\n" in block(name)
