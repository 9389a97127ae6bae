"""docs/transcripts.md: what commands print, by running them again."""

import re

import pytest

from benchmarks import transcripts
from benchmarks.tables import between_markers
from tests.contracts import ROOT

TEXT = (ROOT / transcripts.DOCUMENT).read_text(encoding="utf-8")
WITHOUT = {
    "repro": "dvc repro, by the transcript of exp run",
    "test": "for developers",
    "check": "for developers",
    "lint": "for developers",
    "lock": "for developers",
    "setup": "installs, without a word of its own",
    "extras": "installs",
    "clean": "deletes, in silence",
    "use": "copies a file; tests/test_setup.py",
    "ui": "a server with a page; docs/comparing.md has its pictures",
}


def block(name: str) -> str:
    return between_markers(TEXT, name).removeprefix("```\n").removesuffix("```\n")


@pytest.mark.slow
@pytest.mark.parametrize("session", transcripts.HELD)
def test_the_commands_of_a_session_print_what_the_document_shows(session):
    if not transcripts.cached():
        pytest.skip("DVC's cache lacks the demo's adapter; `make repro` makes it")
    for name, text, _, _ in transcripts.run(session):
        assert transcripts.same(block(name), text), f"{name}:\n{text}\nnot as in the document"


def test_every_block_of_a_session_is_in_the_document_with_its_commands():
    for blocks in transcripts.SESSIONS.values():
        for name, lines in blocks.items():
            for line in lines:
                assert f"$ {line}\n" in block(name), f"{name}: {line}"


def test_every_target_of_the_makefile_has_a_transcript_or_a_reason():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+):.*## ", makefile)) - {"help"}
    shown = set(re.findall(r"(?m)^\$ make ([a-z-]+)", TEXT))
    assert targets == shown | set(WITHOUT)
    assert not shown & set(WITHOUT)


def test_a_changed_word_or_figure_is_found_and_rounding_is_not():
    shown = block("plan-demo")
    assert transcripts.same(shown, shown)
    assert not transcripts.same(shown, shown.replace("orders", "sorts"))
    assert not transcripts.same(shown, shown.replace("72.5%", "75.5%"))
    assert not transcripts.same(shown, shown.replace("2,713", "2,714"))
    assert transcripts.same("0.465 nats", "0.470 nats")
