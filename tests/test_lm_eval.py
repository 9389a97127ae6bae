"""lm-eval answers as the pipeline itself does, writes the same bytes each time, and its figures
are those worked out by hand.
"""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages.answers import lm_eval, task_results
from stages.answers.grading import is_correct
from stages.answers.task_results import Results
from stages.core.errors import UserError
from stages.evaluation import paired, statistics
from stages.model import formatted, scoring
from stages.model.checkpoint import Checkpoint
from tests.experiment import ROOT
from tests.test_metrics import SETTINGS
from tests.test_published import module

TASKS = ROOT / "tasks"


# names


def test_a_task_that_asks_the_data_sets_own_questions_is_skipped_where_there_are_none(
    tmp_path, params_with, capsys
):
    (tmp_path / "questions.json").write_text("[]")

    def run(tasks):
        p = params_with(**{"evaluate.lm_eval": tasks})
        checkpoint = Checkpoint(tmp_path / "no model", p)  # which can answer nothing
        return lm_eval.run(checkpoint, TASKS, tmp_path, tmp_path)

    assert run(None) == Results({}, {})
    assert run({"easy_vqa": 200}) == Results({}, {})
    assert "evaluate.lm_eval.easy_vqa is skipped: it asks the data set" in capsys.readouterr().out


@pytest.fixture(scope="module")
def everything():
    """A manager of lm-eval's own tasks and the project's; its index takes 10 s."""
    return lm_eval._manager(["mmmu_val"], TASKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["easy_vqa", "easy_vqua"], "has a task 'easy_vqua'; did you mean 'easy_vqa'"),
        (["mmmu_vol"], "has a task 'mmmu_vol'; did you mean 'mmmu_val'"),
        (["pope", "pope_popular"], "'pope' and 'pope_popular' both hold the task pope_popular"),
        (["pope_popular", "pope"], "'pope_popular' and 'pope' both hold"),
        (["mmmu_val", "mmmu_val_science"], "'mmmu_val' and 'mmmu_val_science' both hold"),
    ],
)
def test_an_unknown_task_and_one_asked_for_twice_are_refused(everything, names, message):
    with pytest.raises(UserError, match=rf"evaluate\.lm_eval: .*{message}"):
        lm_eval._tasks(names, everything, TASKS)


@pytest.mark.slow
def test_lm_evals_own_image_tasks_can_be_asked_for(everything):
    from lm_eval.tasks._yaml_loader import load_yaml

    found = lm_eval._tasks(["mmmu_val", "chartqa", "pope"], everything, TASKS)
    assert len(found["mmmu_val"]) == 30
    assert found["pope"] == [f"pope_{setting}" for setting in ("random", "popular", "adversarial")]
    for name in (*found["mmmu_val"], *found["chartqa"]):
        config = load_yaml(everything.task_index[name].yaml_path)
        assert config["output_type"] == "generate_until"
        assert config["doc_to_image"]


# easy-VQA's questions

QUESTIONS = {
    "what color is the shape?": "colour",
    "what shape does the image contain?": "shape",
    "is there a red shape?": "presence",
    "is there not a rectangle?": "presence",
}
TRUTHS = {"colour": ("red", "blue", "teal"), "shape": ("rectangle", "circle"), "presence": ("yes",)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six square images, as easy-VQA's are. Of others, LLaMA-Factory may round the sides elsewhere
    than the model's own processor, because it resizes them first.
    """
    folder = tmp_path_factory.mktemp("images")
    for i, colour in enumerate(("red", "blue", "teal", "black", "green", "brown")):
        image = Image.new("RGB", (44 + 9 * i, 44 + 9 * i), "white")
        ImageDraw.Draw(image).rectangle((8, 8, 20 + 2 * i, 26), fill=colour)
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The format stage's folder with 24 questions, four of each image, as easy-VQA lists them."""
    folder = tmp_path_factory.mktemp("asked")
    rows = [
        {
            "id": f"{image}-{kind}-{question}",
            "kind": kind,
            "answer": TRUTHS[kind][image % len(TRUTHS[kind])],
            **formatted.prompt(question, [f"{image}.png"]),
        }
        for image in range(6)
        for question, kind in QUESTIONS.items()
    ]
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def run(params_with, checkpoint_of, asked, images):
    """``run(policy)``: 20 questions answered now, nothing taken from an earlier run."""
    p = params_with(**{"evaluate.lm_eval": {"easy_vqa": 20}})
    return lambda policy: lm_eval.run(checkpoint_of(policy, p), TASKS, asked, images)


@pytest.fixture(scope="module")
def base_results(base, run):
    return run(base)


@pytest.fixture(scope="module")
def tuned_results(tuned, run):
    return run(tuned)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["base", "tuned"])
def test_lm_eval_gets_the_answers_that_scoring_gets(request, asked, images, of):
    policy, results = (request.getfixturevalue(name) for name in (of, f"{of}_results"))
    rows = formatted.sample(formatted.read(asked, "questions"), 20)
    answers = scoring.answer(
        policy, rows, images, max_new_tokens=32, batch_tokens=4096, label="test"
    )
    samples = results.samples["easy_vqa"]
    texts = [sample["filtered_resps"][0].strip() for sample in samples]
    assert texts == [answer.text for answer in answers]
    assert len(set(texts)) > 1
    right = [
        is_correct(row["messages"][0]["content"].removeprefix("<image>"), row["answer"], text)
        for row, text in zip(rows, texts, strict=True)
    ]
    assert results.document["results"]["easy_vqa"]["accuracy,none"] == sum(right) / 20
    assert [sample["metrics"]["accuracy"] for sample in samples] == right


@pytest.mark.slow
def test_the_adapter_is_active_and_what_was_asked_is_the_same(
    base_results, tuned_results, tuned, run
):
    base, tuned_ = (results.samples["easy_vqa"] for results in (base_results, tuned_results))
    for key in ("arguments", "images"):
        assert [row[key] for row in base] == [row[key] for row in tuned_]
    assert [row["resps"] for row in base] != [row["resps"] for row in tuned_]
    with tuned.model.disable_adapter():
        assert run(tuned) == base_results


@pytest.mark.slow
def test_repeated_runs_write_the_same_bytes_without_paths(
    base, run, base_results, asked, images, tmp_path
):
    task_results.write(base_results, tmp_path / "one")
    task_results.write(run(base), tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.json*"))
    assert [str(file) for file in files] == ["results.json", "samples/easy_vqa.jsonl"]
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        for folder in (asked, images, TASKS, TASKS.parent):
            assert str(folder) not in content.decode()
    assert task_results.read(tmp_path / "one") == base_results


def test_documents_come_in_hash_order_and_no_questions_are_one_clear_error(asked, images, tmp_path):
    documents = module(TASKS / "easy_vqa" / "easy_vqa.py").documents
    found = documents(str(asked), str(images))["test"]
    rows = formatted.read(asked, "questions")
    assert list(found["id"]) == [row["id"] for row in formatted.sample(rows, len(rows))]
    assert len(set(found["image"][:8])) > 2  # in the file's order it would be two
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(UserError, match=r"remove easy_vqa from evaluate\.lm_eval"):
        documents(str(tmp_path), str(tmp_path))


# figures


def results_of(values, images, task="t", better=True, **more):
    """Results by hand: ``values``: metric to the documents' values; ``images``: their images."""
    rows = [
        {
            "doc_id": i,
            "images": [image] if image else [],
            "filter": "none",
            "metrics": {metric: each[i] for metric, each in values.items()},
        }
        for i, image in enumerate(images)
    ]
    means = {
        f"{metric},none": sum(each) / len(each)
        for metric, each in values.items()
        if not isinstance(each[0], list)
    }
    document = {
        "results": {task: {"alias": task, "sample_len": len(rows), **means, **more}},
        "datasets": {task: {"shown": " ".join(map(str, images))}},
        "higher_is_better": {task: dict.fromkeys(values, better)},
    }
    return Results(document, {task: rows})


def compare(base, tuned):
    return paired.of_tasks(base, tuned, SETTINGS)


def test_a_comparison_by_hand():
    # 40 images, two documents each; the first eight documents are gained, the next two lost.
    images = [f"image {i // 2}" for i in range(80)]
    before = [0.0] * 8 + [1.0] * 2 + [1.0] * 40 + [0.0] * 30
    after = [1.0] * 8 + [0.0] * 2 + before[10:]
    base = results_of({"accuracy": before, "f1": [[1, 0]] * 80}, images, **{"f1,none": 0.25})
    tuned = results_of({"accuracy": after, "f1": [[1, 1]] * 80}, images, **{"f1,none": 1.0})
    found = compare(base, tuned)
    columns = {"change": np.array(after) - np.array(before)}
    interval = statistics.bootstrap_intervals(columns, images, SETTINGS)["change"]
    expected = {
        "lm_eval/t/accuracy/base": 42 / 80,
        "lm_eval/t/accuracy/tuned": 48 / 80,
        "lm_eval/t/accuracy/change": 6 / 80,
        "lm_eval/t/accuracy/change_low": interval.low,
        "lm_eval/t/accuracy/change_high": interval.high,
        "lm_eval/t/accuracy/gained": 8,
        "lm_eval/t/accuracy/lost": 2,
        "lm_eval/t/accuracy/p_value": 2 * (1 + 10 + 45) / 2**10,
        "lm_eval/t/accuracy/higher_is_better": 1,
        "lm_eval/t/f1/base": 0.25,
        "lm_eval/t/f1/tuned": 1.0,
        "lm_eval/t/f1/change": 0.75,
        "lm_eval/t/f1/higher_is_better": 1,
    }
    assert found == pytest.approx(expected, abs=1e-6)
    assert interval.low < 6 / 80 < interval.high
    accuracy, f1 = paired.read_tasks({"win_rate": 1.0} | found)
    assert (accuracy.task, accuracy.metric, accuracy.better) == ("t", "accuracy", "higher")
    assert (accuracy.change.gained, accuracy.change.p_value) == (8, pytest.approx(0.109375))
    assert (f1.change.difference, f1.change.low) == (0.75, None)


def test_the_change_of_a_ratio_has_the_interval_of_its_mean_by_image():
    """Where every whole is the same; the figure is the ratio's."""

    def results(parts):
        values = {"chair": [[part, 4] for part in parts], "mean": [part / 4 for part in parts]}
        images = [f"image {at // 2}" for at in range(80)]
        figure = {"chair,none": sum(parts) / 4 / 80}
        return results_of(values, images, better=False, **figure)

    found = compare(results([3, 1] * 20 + [2] * 40), results([1, 1] * 20 + [2] * 40))
    for what in ("base", "tuned", "change", "change_low", "change_high"):
        assert found[f"lm_eval/t/chair/{what}"] == pytest.approx(found[f"lm_eval/t/mean/{what}"])
    assert found["lm_eval/t/chair/change"] == pytest.approx(-40 / 4 / 80)
    assert found["lm_eval/t/chair/change_high"] < 0


def test_documents_without_images_are_each_their_own_cluster_and_no_number_is_left_out():
    results = results_of({"acc": [0, 1, 1]}, [None] * 3, **{"ppl,none": None, "other,strict": 3})
    found = task_results.figures(results)["t"]
    assert len(set(found.clusters)) == 3
    assert found.metrics == {"acc": pytest.approx(2 / 3), "other_strict": 3.0}


def test_other_documents_are_not_compared():
    base, tuned = (results_of({"acc": [0, 1]}, images) for images in (["a", "b"], ["a", "c"]))
    with pytest.raises(UserError, match=r"same documents of t; `dvc repro -f baseline`"):
        compare(base, tuned)
    with pytest.raises(UserError, match="same documents of t, u"):
        compare(base, results_of({"acc": [0, 1]}, ["a", "b"], task="u"))


def test_what_is_written_is_read_back(tmp_path):
    results = results_of({"acc": [0, 1]}, ["a", "b"])
    results.samples["t"][0]["resps"] = [["two\nlines\u2028and \u00e9 \U0001f600"]]
    task_results.write(results, tmp_path)
    assert task_results.read(tmp_path) == results
    nothing = Results({}, {})
    task_results.write(nothing, tmp_path)
    assert (tmp_path / "results.json").read_text() == "{}\n"
    assert not list((tmp_path / "samples").iterdir())
    assert task_results.read(tmp_path) == nothing
    assert compare(nothing, nothing) == {}
