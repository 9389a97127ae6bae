"""README, CONTRIBUTING and docs say what the code and the pipeline say."""

import json
import re
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from benchmarks import tables, transcripts
from benchmarks.tables import between_markers
from stages import fetch
from stages.evaluation.catalogue import KEYS, METRICS
from stages.pairs import formats, images, layouts
from stages.params import params
from stages.sources import kinds
from tests.contracts import (
    PACKAGES,
    PRESETS,
    ROOT,
    STAGES,
    agree,
    commands,
    is_passed_on,
    key_of,
    source_of,
    text_of,
    tracked_files,
)

RESULTS = ROOT / "reports" / "results" / "metrics.json"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# results


def test_the_results_have_the_keys_of_the_catalogue_in_its_order():
    if not RESULTS.exists():
        pytest.skip("reports/results/metrics.json comes with the first `make repro`")
    keys = list(json.loads(RESULTS.read_text(encoding="utf-8")))
    own = [key for key in keys if not key.startswith("lm_eval/")]
    assert own == [key for key in KEYS if key in keys]
    assert {m.key for m in METRICS.values() if not m.needs} <= set(own)
    assert all(LM_EVAL_KEY.fullmatch(key) for key in keys[len(own) :])


LM_EVAL_KEY = re.compile(
    r"lm_eval/\w+/\w+/"
    r"(base|tuned|change|change_low|change_high|gained|lost|p_value|higher_is_better)"
)


@pytest.mark.parametrize(("document", "name"), tables.TABLES, ids=str)
def test_a_table_in_a_document_is_the_one_that_follows_from_code_and_results(document, name):
    """As the files are, or as they are committed: an experiment in the workspace is no mistake."""

    def holds(read: Callable[[str], str]) -> bool:
        written = tables.TABLES[document, name]()
        if name == "results":
            written = tables.table(json.loads(read("reports/results/metrics.json")))
        return tables.between_markers(read(document.as_posix()), name) == written

    assert agree(holds), "python -m benchmarks.tables writes the tables again"


def test_readme_draws_the_tree_that_git_tracks():
    drawn = re.search(r"(?s)## What is where\n+```\n(.+?)```", README)
    assert drawn
    names = {re.split(r"\s{2,}", line)[0] for line in drawn[1].splitlines()}
    named = {name for together in names for name in together.split()}
    tracked = {name.split("/")[0] + "/" * ("/" in name) for name in tracked_files()}
    shown = {name for name in tracked if not name.startswith(".")}
    made = {"data/", "models/", "reports/", "dvc.lock"}  # by the pipeline
    assert named - made == shown - made


def test_every_command_of_make_in_the_documents_has_its_target_settings_and_preset():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([a-z-]+):.*## ", makefile))
    found = [(document, command) for document, command in commands() if command[:5] == "make "]
    assert len(found) > 10
    for document, command in found:
        target, *settings = shlex.split(command)[1:]
        assert target in targets, f"{document}: `{command}`"
        for setting in settings:
            name, _, value = setting.partition("=")
            assert f"$({name})" in makefile or f"$${name}" in makefile, command
            if name == "PRESET" and value != "name":
                assert value in {path.stem for path in PRESETS}, f"{document}: `{command}`"


def test_every_command_of_dvc_in_the_documents_is_one_and_its_stages_exist():
    """DVC's own parser reads them, options included."""
    from dvc.cli.parser import get_main_parser

    parser = get_main_parser()
    names = {stage.name for stage in STAGES} | {stage.name.split("@")[0] for stage in STAGES}
    found = [(document, command) for document, command in commands() if command[:4] == "dvc "]
    assert len(found) > 10
    for document, command in found:
        try:
            given = parser.parse_args(shlex.split(command)[1:])
        except Exception as error:
            pytest.fail(f"{document}, `{command}`: {error}")
        for target in given.targets if given.cmd == "repro" else []:
            assert target in names or (ROOT / target).is_file(), f"{document}: `{command}`"


def guides_yaml() -> list[dict[str, Any]]:
    """The blocks of YAML in the guide."""
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    return [YAML(typ="safe").load(b) for b in re.findall(r"(?s)```yaml\n(.*?)```", text)]


def test_the_yaml_of_the_guide_fetches_and_reads_data_as_it_describes(tmp_path, monkeypatch):
    project, pairs = tmp_path / "project", tmp_path / "my-pairs"
    for folder in (project, pairs):
        folder.mkdir()
    foreign = "/content/drive/MyDrive/dpo/images/7.png"
    row = {"question": "Q", "chosen": "A", "rejected": "B"}
    (pairs / "rows.jsonl").write_text(json.dumps(row | {"picture": "7.png"}))
    (pairs / "7.png").write_bytes(b"7")
    talk = {"messages": [{"role": "user", "content": "Q"}], "images": [foreign]}
    with zipfile.ZipFile(tmp_path / "prepared.zip", "w") as packed:
        for split in ("train", "validation"):
            packed.writestr(f"{split}.json", json.dumps([row | talk]))
        packed.writestr("images/7.png", b"7")
    monkeypatch.chdir(project)
    read = []
    for block in guides_yaml():
        document = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text("utf-8"))
        with Path("params.yaml").open("w") as file:
            YAML().dump(document | {"data": block["data"]}, file)
        sources = params.load().data.sources
        for name in sources:
            fetch.main(f"data.sources.{name}", Path("raw", name))
        rows, _ = kinds.read({name: Path("raw", name) for name in sources}, sources)
        read.append([(each.images, each.split, each.origin) for each in rows])
    held_out, trained = ((b"7",), "validation", "prepared"), ((b"7",), "train", "prepared")
    assert read[0] == [((b"7",), "", "mine")]
    assert sorted(read[1]) == sorted([held_out, trained, ((b"7",), "", "pairs")])


def test_every_module_that_the_documents_run_can_be_run():
    found = [(d, c) for d, c in commands() if re.match(r"(\w+=\S+ )*python -m ", c)]
    assert found
    for document, command in found:
        module, *words = re.split(r"python -m ", command)[1].split()
        if module == "stages":
            module = f"stages.commands.{words[0]}"
        if module.split(".")[0] in (*PACKAGES, "benchmarks", "tests"):
            assert source_of(module).is_file(), f"{document}: `{command}`"
            assert "__main__" in source_of(module).read_text(encoding="utf-8"), command


def test_every_parameter_in_the_documents_exists_and_takes_the_value(tmp_path):
    seen = 0
    for document, command in commands():
        for setting in re.findall(r"(?:-S|--set-param) [+']*([\w.]+=[^\s']+)", command):
            key, _, values = setting.partition("=")
            for value in values.split(","):
                seen += 1
                text = YAML(typ="safe").load((ROOT / "params" / "demo.yaml").read_text())
                *sections, name = key.split(".")
                place = text
                for section in sections:
                    place = place[section]
                place[name] = YAML(typ="safe").load(value)
                with (tmp_path / "params.yaml").open("w") as file:
                    YAML().dump(text, file)
                params.load(tmp_path / "params.yaml")
                assert key_of(key.split(".")) == key or is_passed_on(key), f"{document}: {key}"
    assert seen >= 3


def test_readme_counts_the_steps_of_the_4b_preset():
    found = re.search(
        r"([\d,]+) pairs. Training uses (\d+)% of the images, (\d+) pairs a step, for (\d+) "
        r"epochs: about ([\d,]+) steps",
        README,
    )
    assert found
    pairs, share, batch, epochs, steps = (int(text.replace(",", "")) for text in found.groups())
    preset = ROOT / "params" / "qwen3-vl-4b.yaml"
    p = params.load(preset)
    options = p.train.passed_through
    assert f"{pairs:,} pairs" in preset.read_text(encoding="utf-8")
    assert share / 100 == pytest.approx(1 - p.preprocess.validation - p.preprocess.test)
    assert batch == p.train.gpus * (
        options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    )
    assert epochs == options["num_train_epochs"]
    assert steps == pytest.approx(pairs * share / 100 * epochs / batch, rel=0.01)


@pytest.mark.parametrize(
    "document", sorted(name for name in tracked_files() if name.endswith(".md"))
)
def test_every_link_in_a_document_leads_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{document}: {target}"


@pytest.mark.parametrize("document", ["README.md", "docs/evaluation.md"])
def test_what_a_document_says_is_defined_in_a_file_is_defined_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, path in re.findall(r"`(\w+)` in\s+\[`([\w/.]+\.py)`\]", text):
        assert re.search(rf"(?m)^(def|class) {name}\b|^{name}\b", text_of(path)), f"{path}: {name}"


# nothing of one machine


PUBLIC_HOSTS = {
    "drive.google.com",
    *("github.com", "git-lfs.github.com", "huggingface.co", "arxiv.org", "doi.org"),
    *("www.apache.org", "keepachangelog.com", "dvc.org", "mlflow.org"),
    *("raw.githubusercontent.com", "images.cocodataset.org"),
    "www.w3.org",
    *("127.0.0.1", "localhost", "host", ""),
}


def test_no_tracked_file_names_a_host_that_is_not_public():
    """Package mirrors above all. ``host`` and names ending in .invalid stand for any."""
    for name in tracked_files():
        for host in re.findall(r"https?://(?:[^/\s@]*@)?([\w.-]*)", text_of(name)):
            known = host in PUBLIC_HOSTS or host.endswith((".invalid", ".example"))
            assert known, f"{name} names {host}"


def test_no_tracked_file_holds_a_path_of_one_machine():
    folders = "|".join(("root", "work", r"home/\w+", r"Users/\w+", "mnt", "scratch"))
    for name in tracked_files():
        found = re.search(rf"(?<![\w.~\]])/(?:{folders})/", text_of(name))
        assert not found, f"{name} holds {found[0] if found else ''}"


# docs/reliability.md: each promise names tests that exist, and limits are as the code has them


RELIABILITY = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
PROMISES = (
    "No row is wrong in silence",
    "Nothing that was fetched runs",
    "Nothing outside the project's folders is written or read",
    "No secret is kept or sent elsewhere",
    "Memory is bounded by stated limits",
    "A kill loses minutes",
    "The same inputs give the same bits",
)


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_names_tests_that_exist(promise):
    (section,) = re.findall(rf"(?ms)^## {promise}\n(.+?)(?=^## |\Z)", RELIABILITY)
    named = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", section)
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test, test


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("JSON value above 67 MB", formats.MOST_LINE / 1e6),
        ("more than 10,000 columns", formats.MOST_COLUMNS),
        ("image file above 134 MB", formats.MOST_BYTES / 1e6),
        ("text above 1,048,576 characters", layouts.MOST_CHARACTERS),
        ("more than 100 scans", images.MOST_SCANS),
    ],
)
def test_limits_are_as_the_code_has_them(text, number):
    assert text in " ".join(RELIABILITY.split())
    (said,) = re.findall(r"[\d,.]*\d", text)
    assert float(said.replace(",", "")) == pytest.approx(number, rel=0.03)


# docs/transcripts.md: what commands print, by running them again


TRANSCRIPTS = (ROOT / transcripts.DOCUMENT).read_text(encoding="utf-8")


def block(name: str) -> str:
    return between_markers(TRANSCRIPTS, name).removeprefix("```text\n").removesuffix("```\n")


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
