"""What a model gave is kept where nothing changed, and computed again where anything did."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from stages.answers import lm_eval, prompts
from stages.core import command, meaning
from stages.core.errors import UserError
from stages.model import checkpoint, formatted, reference_logps, scoring
from stages.model.checkpoint import Checkpoint
from tests.contracts import ROOT, closure, exempt, source_of

PAIRS = [
    {
        "id": f"pair {i}",
        "group": "g",
        "messages": [{"role": "user", "content": f"<image>what is it{'?' * (i % 7)}"}],
        "chosen": {"role": "assistant", "content": f"a {i}"},
        "rejected": {"role": "assistant", "content": f"no {i}"},
        "images": [f"{i}.jpg"],
    }
    for i in range(20)
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The project: a base that was fetched, an adapter, a task; chunks of 8 pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setattr(checkpoint, "CHUNK", 8)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text('{"files": []}')
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 16}')
    return tmp_path


class Model:
    """In place of ``scoring``'s functions: numbers from the ids, and what was asked."""

    def __init__(self):
        self.loaded = 0
        self.batches = []
        self.asked = 0
        self.dies_at = None
        self.value = None

    def load(self, *_):
        self.loaded += 1
        return self

    def log_probs(self, policy, pairs, images, *, batch_tokens, label):
        if self.dies_at is not None and len(self.batches) >= self.dies_at:
            raise KeyboardInterrupt
        self.batches.append([pair["id"] for pair in pairs])
        chosen = np.array([-float(pair["id"].split()[1]) / 3 for pair in pairs])
        if self.value is not None:
            chosen[-1] = self.value
        ids = [pair["id"] for pair in pairs]
        counts = dict.fromkeys([*scoring.LENGTHS, "image_tokens"], 1)
        logps = {"chosen_logps": chosen, "rejected_logps": chosen - 1}
        return pd.DataFrame({"id": ids, **logps, **counts, "key": ids})

    def answer(self, policy, rows, images, **_):
        self.asked += len(rows)
        return [scoring.Answer(row["id"], 2, True) for row in rows]


@pytest.fixture
def model(monkeypatch):
    made = Model()
    for name in ("load", "log_probs", "answer"):
        monkeypatch.setattr(scoring, name, getattr(made, name))
    monkeypatch.setattr(scoring, "device_name", lambda _: "cpu")
    return made


@pytest.fixture
def made_of(folder, params_with):
    """``made_of(**{"scoring.batch_tokens": 256})``: a new checkpoint, as another run has it."""

    def made(adapter=None, **values):
        return Checkpoint(
            folder / "base", params_with(**{"scoring.batch_tokens": 256} | values), adapter
        )

    return made


def log_probs(made, folder, pairs=PAIRS):
    return made.log_probs(pairs, folder, label="test")


def pieces(folder):
    return sorted((folder / "models" / "kept").iterdir())


# keeping


def test_log_probs_come_in_the_order_of_the_pairs_whatever_the_chunks(model, made_of, folder):
    found = log_probs(made_of(), folder)
    assert list(found["id"]) == [pair["id"] for pair in PAIRS]
    assert list(found["chosen_logps"]) == [-i / 3 for i in range(20)]
    assert [len(batch) for batch in model.batches] == [8, 8, 4]
    # Chunks are cut from the order of one call, so its batches stay the same.
    order = [PAIRS[place]["id"] for place in scoring.by_length(PAIRS)]
    assert [name for batch in model.batches for name in batch] == order


def test_what_is_kept_needs_no_model_and_is_the_same(model, made_of, folder, monkeypatch, capsys):
    first = log_probs(made_of(), folder)
    monkeypatch.setattr(scoring, "load", None)
    again = made_of()
    others = [pair | {"group": "another", "origin": "x"} for pair in PAIRS]  # which decide nothing
    pd.testing.assert_frame_equal(log_probs(again, folder, others), first, check_exact=True)
    assert again.cost() == {}
    assert capsys.readouterr().out.count("test: kept from an earlier run") == 1


def test_a_run_that_died_costs_what_was_not_finished(model, made_of, folder):
    model.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        log_probs(made_of(), folder)
    model.dies_at, done = None, list(model.batches)
    again = made_of()
    log_probs(again, folder)
    assert [len(batch) for batch in done] == [8]
    assert [len(batch) for batch in model.batches[1:]] == [8, 4]
    assert again.scored == 12
    assert not [path for path in pieces(folder) if path.suffix == ".partial"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "pair 99"},
        {"images": ["other.jpg"]},
        {"messages": [{"content": "<image>what is it"}]},
        {"chosen": {"content": "a 9"}},
        {"rejected": {"content": "a 9"}},
    ],
    ids=str,
)
def test_another_pair_is_scored_again_with_its_chunk(model, made_of, folder, change):
    log_probs(made_of(), folder)
    log_probs(made_of(), folder, [PAIRS[0] | change, *PAIRS[1:]])
    assert len(model.batches) >= 4


def test_forced_computes_all_of_it_again(model, made_of, folder, monkeypatch):
    for forced, batches in ((False, 3), (True, 6), (False, 6)):
        monkeypatch.setattr(checkpoint, "is_forced", lambda forced=forced: forced)
        log_probs(made_of(), folder)
        assert len(model.batches) == batches


@pytest.mark.parametrize(
    "damaged", [lambda content: content[:99], lambda content: b"", lambda content: content + b"x"]
)
def test_a_damaged_piece_is_computed_again(model, made_of, folder, damaged):
    first = log_probs(made_of(), folder)
    path = pieces(folder)[0]
    content = path.read_bytes()
    path.write_bytes(damaged(content))
    pd.testing.assert_frame_equal(log_probs(made_of(), folder), first)
    assert len(model.batches) == 4
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_costs_a_message(model, made_of, folder, capsys):
    (folder / "models").write_text("a file where the folder belongs")
    assert len(log_probs(made_of(), folder)) == 20
    assert "can't be kept for a later run" in capsys.readouterr().out


# fingerprint; the code is in test_meaning.py


def changed_code(name):
    def change(folder, monkeypatch):
        shutil.copytree(meaning.STAGES, folder / "stages")
        with (folder / "stages" / name).open("a") as file:
            file.write("CHANGED = 1\n")
        monkeypatch.setattr(meaning, "STAGES", folder / "stages")

    return change


@pytest.mark.parametrize(
    ("change", "follows"),
    [
        ({"base/SOURCE.json": '{"files": [{"sha256": "other"}]}'}, True),
        ({"adapter/adapter_model.safetensors": "other"}, True),
        ({"adapter/adapter_config.json": '{"lora_alpha": 32}'}, True),
        ({"package": "torchvision"}, True),
        ({"device": "another"}, True),
        ({"model.template": "qwen2_vl"}, True),  # and all that test_reference.py changes
        ({"scoring.dtype": "bfloat16"}, True),
        ({"scoring.portable": False}, True),
        ({"scoring.batch_tokens": 512}, True),
        ({"train.beta": 0.7}, False),
        ({"evaluate.controls": 5}, False),
        ({"evaluate.lm_eval": {}}, False),
    ],
    ids=str,
)
def test_the_fingerprint_follows_what_decides(made_of, folder, monkeypatch, change, follows):
    adapter = folder / "adapter"
    before = made_of(adapter).fingerprint
    assert made_of(adapter).fingerprint == before
    ((name, value),) = change.items()
    if "/" in name:
        (folder / name).write_text(value)
        change = {}
    elif name == "package":
        version = reference_logps.version
        known = {value: "0.0"}
        monkeypatch.setattr(reference_logps, "version", lambda n: known.get(n) or version(n))
        change = {}
    elif name == "device":
        monkeypatch.setattr(scoring, "device_name", lambda _: value)
        change = {}
    assert (made_of(adapter, **change).fingerprint != before) is follows


# what is not finite


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("adapter", "told"),
    [(None, "the base model .*float32"), ("adapter", "the tuned model .*learning_rate.*float32")],
)
def test_log_probs_that_are_not_finite_are_refused_and_not_kept(
    model, made_of, folder, value, adapter, told
):
    model.value = value
    made = made_of(adapter and folder / adapter)
    with pytest.raises(UserError, match=rf"{told}") as error:
        log_probs(made, folder)
    assert "not finite for 1 of 8 pairs (first: pair " in str(error.value)
    assert not (folder / "models").exists()


# answers, controls, tasks


def test_answers_do_not_depend_on_how_they_are_graded(model, made_of, folder, monkeypatch):
    pairs = [row | {"of": "pair"} for row in PAIRS[:3]]
    asked = [*pairs, PAIRS[4] | {"of": "question", "answer": "red"}]

    def ask(asked, **values):
        return prompts.answers(made_of(**values), asked, folder, label="answers")

    first = ask(asked)
    assert list(first["of"]) == ["pair"] * 3 + ["question"]
    assert list(first["answer"]) == list(first["id"])
    changed_code("answers/grading.py")(folder, monkeypatch)
    other_truth = [*pairs, PAIRS[4] | {"of": "question", "answer": "blue"}]
    pd.testing.assert_frame_equal(ask(other_truth), first)
    assert model.asked == 4
    ask(asked, **{"evaluate.generation.max_new_tokens": 5})
    assert model.asked == 8


@pytest.fixture
def tasks(folder, monkeypatch):
    """``tasks(p)``: run lm-eval's wrapper, whose answers are scripted; which names it answered."""
    index = {}
    for place in ("tasks/easy", "tasks/hard", "elsewhere/of_lm_eval"):
        (folder / place).mkdir(parents=True)
        (folder / place / "grader.py").write_text("")
        entry = {"kind": SimpleNamespace(name="TASK"), "yaml_path": folder / place / "x.yaml"}
        index[Path(place).name] = SimpleNamespace(**entry, cfg={}, tags=())
    monkeypatch.setattr(lm_eval, "_manager", lambda *_, **__: SimpleNamespace(task_index=index))
    (folder / "questions.json").write_text("[]")
    answered = []

    def scripted(checkpoint, name, manager):
        answered.append((name, checkpoint.p.evaluate.lm_eval[name]))
        return json.dumps(
            {"document": {"results": {name: {"acc,none": 1}}}, "samples": {name: []}}
        ).encode()

    monkeypatch.setattr(lm_eval, "_answered", scripted)

    def run(made):
        answered.clear()
        results = lm_eval.run(made, folder / "tasks", folder, folder)
        assert list(results.samples) == list(made.p.evaluate.lm_eval)
        assert set(results.document["results"]) == set(made.p.evaluate.lm_eval)
        return list(answered)

    return run


OWN, BOTH = {"easy": 4, "of_lm_eval": 3}, [("easy", 4), ("of_lm_eval", 3)]


@pytest.mark.parametrize(
    ("change", "limits", "answered"),
    [
        (lambda *_: None, OWN, []),
        (lambda *_: None, {"of_lm_eval": 3}, []),
        (lambda *_: None, {"easy": 5, "of_lm_eval": 3}, [("easy", 5)]),
        (lambda *_: None, OWN | {"hard": None}, [("hard", None)]),
        (changed_code("answers/grading.py"), OWN, BOTH[:1]),
        (changed_code("sources/topics.py"), OWN, BOTH[:1]),
        (lambda folder, _: (folder / "tasks/easy/grader.py").write_text("#"), OWN, BOTH[:1]),
        (lambda folder, _: (folder / "tasks/hard/grader.py").write_text("#"), OWN, []),
        (lambda folder, _: (folder / "tasks/shared.py").write_text("#"), OWN, BOTH[:1]),
        (lambda folder, _: (folder / "questions.json").write_text("[{}]"), OWN, BOTH[:1]),
        (lambda _, patch: patch.setattr(lm_eval, "version", lambda _: "0.0"), OWN, BOTH),
        (changed_code("answers/lm_eval.py"), OWN, BOTH),
    ],
)
def test_a_task_is_answered_again_where_what_decides_it_changed(
    made_of, tasks, folder, monkeypatch, change, limits, answered
):
    """Of a grader: the project's own tasks; of lm-eval or our wrapper: every task."""
    assert tasks(made_of(**{"evaluate.lm_eval": OWN})) == BOTH
    change(folder, monkeypatch)
    assert tasks(made_of(**{"evaluate.lm_eval": limits})) == answered


def test_the_code_of_tasks_is_what_their_files_import():
    """Of the project's own; ``stages.core`` decides nothing that is written."""
    tasks = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "tasks").rglob("*.py")]
    modules = {name for task in tasks for name in closure(".".join(task.parts)) if not exempt(name)}
    files = {source_of(name) for name in modules if name.startswith("stages")}
    found = {path.relative_to(meaning.STAGES).as_posix() for path in files}
    assert {name for name in found if not name.endswith("__init__.py")} == set(lm_eval.OF_TASKS)


# forced


class Process:
    def __init__(self, line):
        self.line = line

    def parents(self):
        return [Process("sh -c 'python -m stages.train -f'"), Process(self.line), Process("bash")]

    def cmdline(self):
        return self.line.split()


@pytest.mark.parametrize(
    ("line", "forced"),
    [
        ("python /venv/bin/dvc repro", False),
        ("python /venv/bin/dvc repro -f", True),
        ("python /venv/bin/dvc repro -sf train", True),
        ("python -m dvc exp run --force -S train.beta=0.2", True),
        ("python /venv/bin/dvc exp run -S train.bf16=false --name f", False),
        ("python /venv/bin/dvc repro --force-downstream", False),
        ("dvc repro -f reference", True),
        (None, False),  # outside of DVC
    ],
)
def test_forced_is_what_dvc_was_told(monkeypatch, line, forced):
    if line:
        monkeypatch.setenv("DVC_STAGE", "reference")
        monkeypatch.setattr("psutil.Process", lambda: Process(line))
    command.is_forced.cache_clear()
    assert command.is_forced() is forced
    command.is_forced.cache_clear()


# a real model


def each_here(work, items, **_):
    """``do_each`` in this process."""
    work, items = pickle.loads(pickle.dumps((work, items)))
    for item in items:
        work(item)
    return True


@pytest.mark.rehearsal
@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_give_the_file_of_one(
    base, made_of, folder, formatted_dir, pairs_dir, model_dir, monkeypatch, capfd, fails
):
    pairs = formatted.read(formatted_dir, "train")
    images = pairs_dir / "images"
    own = shutil.copytree(Path(__file__).parent.parent / "tasks" / "easy_vqa", folder / "tasks")
    again = (own / "easy_vqa.yaml").read_text().replace("task: easy_vqa", "task: again")
    (own / "again.yaml").write_text(again)

    def results(made):
        return lm_eval.run(made, own, formatted_dir, images)

    tasks = {"evaluate.lm_eval": {"easy_vqa": 4, "again": 3}}
    alone = made_of(**tasks)
    alone.policy = base
    expected = alone.log_probs(pairs, images, label="test")
    monkeypatch.setattr(checkpoint, "ANSWERS", 8)
    ask = {"images": images, "max_new_tokens": 6, "label": "asked"}
    answered = alone.answers(pairs[:20], **ask)
    graded = results(alone)
    whole = scoring.log_probs(base, pairs, images, batch_tokens=256, label="test")
    pd.testing.assert_frame_equal(expected, whole, atol=1e-4)
    shutil.rmtree(folder / "models" / "kept")
    shutil.copytree(model_dir, folder / "base", dirs_exist_ok=True)
    monkeypatch.setenv("PYTHONPATH", "" if fails else str(Path(__file__).parent.parent))
    monkeypatch.setattr(checkpoint, "processes", lambda p: 2)
    made = made_of(**tasks)
    if fails:
        made.policy = base  # else it must not be loaded here
    found = made.log_probs(pairs, images, label="test")
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    if not fails:  # the same way for what else they make, without their minute of loading
        monkeypatch.setattr(checkpoint, "do_each", each_here)
        pd.testing.assert_frame_equal(made.answers(pairs[:20], **ask), answered, check_exact=True)
        assert results(made) == graded
        assert len(graded.samples["again"]) == 3
    assert ("policy" in made.__dict__) is fails
    assert made.scored == len(pairs)
    said = capfd.readouterr().out
    assert "kept from an earlier run" not in said
    assert ("one computes what is missing" in said) is fails
    assert made_of(**tasks).log_probs(pairs, images, label="test").equals(found)
    assert "kept from an earlier run" in capfd.readouterr().out
