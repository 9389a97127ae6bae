"""lm-eval answers as the pipeline itself does, writes the same bytes each time, and its figures
are those worked out by hand; POPE comes from a local server, in that data set's own layout.
"""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from ruamel.yaml import YAML

from stages.answers import lm_eval
from stages.answers.grading import is_correct, said
from stages.answers.lm_eval import Results
from stages.answers.published import ratio
from stages.core.errors import UserError
from stages.evaluation import regression, statistics
from stages.model import formatted, scoring
from stages.model.checkpoint import Checkpoint
from tests.hub_server import closed_port, pope_repo, serve

TASKS = Path(__file__).parent.parent / "tasks"
POPE = TASKS / "published" / "pope"
SETTINGS = ("random", "popular", "adversarial")
REVISION = YAML().load((POPE / "_pope_yaml").read_text())["dataset_kwargs"]["revision"]


# names


def test_the_projects_own_tasks_are_known_without_lm_eval(monkeypatch):
    monkeypatch.setattr(lm_eval, "_manager", None)
    lm_eval.check(["easy_vqa", "pope"], TASKS)
    lm_eval.check(["pope_random", "pope_popular"], TASKS)
    lm_eval.check([], TASKS)


def test_a_task_asked_for_twice_is_refused():
    with pytest.raises(UserError, match=r"'pope' and 'pope_popular' both hold .* pope_popular"):
        lm_eval.check(["pope", "pope_popular"], TASKS)
    with pytest.raises(UserError, match="'pope_popular' and 'pope' both hold"):
        lm_eval.check(["pope_popular", "pope"], TASKS)


def test_a_task_that_asks_the_data_sets_own_questions_is_skipped_where_there_are_none(
    tmp_path, params_with, capsys
):
    (tmp_path / "questions.json").write_text("[]")
    p = params_with(**{"evaluate.lm_eval": {"easy_vqa": 200}})
    checkpoint = Checkpoint(tmp_path / "no model", p)  # which can answer nothing
    assert lm_eval.run(checkpoint, TASKS, tmp_path, tmp_path) == Results({}, {})
    assert "evaluate.lm_eval.easy_vqa is skipped: it asks the data set" in capsys.readouterr().out
    assert lm_eval._asking_own_questions(TASKS) == {"easy_vqa"}


def test_no_task_asks_for_no_questions(tmp_path, params_with):
    checkpoint = Checkpoint(tmp_path / "no model", params_with(**{"evaluate.lm_eval": None}))
    assert lm_eval.run(checkpoint, TASKS, tmp_path, tmp_path) == Results({}, {})


@pytest.fixture(scope="module")
def everything():
    """A manager of lm-eval's own tasks and the project's; its index takes 10 s."""
    return lm_eval._manager(TASKS, defaults=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "meant"), [("easy_vqua", "easy_vqa"), ("mmmu_vol", "mmmu_val"), ("pop", "pope")]
)
def test_an_unknown_task_is_named_with_the_nearest_known_one(everything, monkeypatch, name, meant):
    monkeypatch.setattr(lm_eval, "_manager", lambda *_, **__: everything)
    with pytest.raises(UserError, match=rf"evaluate\.lm_eval: .*'{name}'; did you mean '{meant}'"):
        lm_eval.check(["easy_vqa", name], TASKS)


@pytest.mark.slow
def test_lm_evals_own_image_tasks_can_be_asked_for(everything, monkeypatch):
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.setattr(lm_eval, "_manager", lambda *_, **__: everything)
    lm_eval.check(["mmmu_val", "chartqa", "pope"], TASKS)
    members = lm_eval._indexed(everything)
    assert len(lm_eval._leaves("mmmu_val", members)) == 30
    for name in (*lm_eval._leaves("mmmu_val", members), "chartqa"):
        config = load_yaml(everything.task_index[name].yaml_path)
        assert config["output_type"] == "generate_until"
        assert config["doc_to_image"]
    with pytest.raises(UserError, match="'mmmu_val' and 'mmmu_val_science' both hold"):
        lm_eval.check(["mmmu_val", "mmmu_val_science"], TASKS)


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
    """``run(policy, {"easy_vqa": 20})``: answered now, nothing taken up."""

    def running(policy, limits, folder=TASKS):
        checkpoint = checkpoint_of(policy, params_with(**{"evaluate.lm_eval": limits}))
        return lm_eval.run(checkpoint, folder, asked, images)

    return running


@pytest.fixture(scope="module")
def base_results(base, run):
    return run(base, {"easy_vqa": 20})


@pytest.fixture(scope="module")
def tuned_results(tuned, run):
    return run(tuned, {"easy_vqa": 20})


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
def test_the_adapter_is_active_and_what_was_asked_is_the_same(base_results, tuned_results):
    base, tuned = (results.samples["easy_vqa"] for results in (base_results, tuned_results))
    assert [row["arguments"] for row in base] == [row["arguments"] for row in tuned]
    assert [row["images"] for row in base] == [row["images"] for row in tuned]
    assert [row["resps"] for row in base] != [row["resps"] for row in tuned]


@pytest.mark.slow
def test_with_the_adapter_switched_off_lm_eval_finds_the_base(base_results, tuned, run):
    with tuned.model.disable_adapter():
        assert run(tuned, {"easy_vqa": 20}) == base_results


@pytest.mark.slow
def test_the_models_chat_template_and_the_pixel_bounds_of_format_apply(
    base, base_results, params_with
):
    (prompt,) = base_results.samples["easy_vqa"][0]["arguments"][0]
    question = prompt.partition("<|vision_end|>")[2].partition("<|im_end|>")[0]
    assert question in QUESTIONS
    assert prompt.startswith("<|im_start|>user\n<|vision_start|>")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    pixels = {"format.image_min_pixels": 4096, "format.image_max_pixels": 9216}
    size = lm_eval._model(base, params_with(**pixels)).processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (4096, 9216)


@pytest.mark.slow
def test_repeated_runs_write_the_same_bytes_without_paths(
    base, run, base_results, asked, images, tmp_path
):
    lm_eval.write(base_results, tmp_path / "one")
    lm_eval.write(run(base, {"easy_vqa": 20}), tmp_path / "two")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.json*"))
    assert [str(file) for file in files] == ["results.json", "samples/easy_vqa.jsonl"]
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        for folder in (asked, images, TASKS, TASKS.parent):
            assert str(folder) not in content.decode()
    assert lm_eval.read(tmp_path / "one") == base_results


def test_documents_come_in_hash_order_and_show_many_images(asked, images):
    documents = module(TASKS / "easy_vqa" / "easy_vqa.py").documents(str(asked), str(images))[
        "test"
    ]
    rows = formatted.read(asked, "questions")
    assert list(documents["id"]) == [row["id"] for row in formatted.sample(rows, len(rows))]
    assert len(set(documents["image"][:8])) > 2  # in the file's order it would be two


def test_a_data_set_without_questions_is_one_clear_error(tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    with pytest.raises(UserError, match=r"remove easy_vqa from evaluate\.lm_eval"):
        module(TASKS / "easy_vqa" / "easy_vqa.py").documents(str(tmp_path), str(tmp_path))


# POPE


def module(path):
    """The functions of a task's own file, as lm-eval loads them: by path."""
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_precision_recall_and_f1_by_hand():
    pope = module(POPE / "pope.py")
    # 3 hits, 1 false alarm, 2 misses, 4 rightly denied
    answers = [("yes", "Yes")] * 3 + [("no", "yes")] + [("yes", "No.")] * 2 + [("no", "no")] * 4
    rows = [pope.graded({"answer": truth}, [said]) for truth, said in answers]
    found = {key: ratio([row[key] for row in rows]) for key in ("precision", "recall", "f1")}
    assert found == pytest.approx(
        {
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5),
        }
    )


@pytest.fixture(scope="module")
def pope_hub(hub, tmp_path_factory):
    """A miniature of POPE at the pinned revision: 18 questions of 3 images in each setting."""
    repo = pope_repo(commit=REVISION)
    with serve([repo]) as url, pytest.MonkeyPatch.context() as patch:
        hub(patch, tmp_path_factory.mktemp("pope"), url)
        yield repo


# Of each image, the objects 0, 2 and 4 are there.
SCRIPT = {0: "Yes", 1: "Yes.", 2: "No, there is not.", 3: "no", 4: "It could be.", 5: "A dog."}


@pytest.fixture
def scripted(monkeypatch):
    """Answers by SCRIPT in place of a model's; ``adversarial`` objects are always seen."""
    from lm_eval.api.model import LM

    class Scripted(LM):
        MULTIMODAL = True
        tokenizer_name = "scripted"

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return chat_history[-1]["content"]

        def generate_until(self, requests, disable_tqdm=False):
            return [self._answer(request) for request in requests]

        @staticmethod
        def _answer(request):
            text, options, shown = request.args
            assert options["do_sample"] is False
            assert [image.mode for image in shown["visual"]] == ["RGB"]
            assert text.startswith("<image>Is there a ")
            assert text.endswith(
                " in the image?\nAnswer the question using a single word or phrase."
            )
            return "yes" if "adversarial" in text else SCRIPT[int(text.split(" in the")[0][-1])]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    model = Scripted()
    monkeypatch.setattr(lm_eval, "_model", lambda *_: model)
    return model


@pytest.mark.slow
def test_popes_figures_are_those_worked_out_by_hand(pope_hub, scripted, run):
    results = run(None, {"pope": None})
    found = lm_eval.figures(results)
    # Of six questions: 1 hit, 1 false alarm, 1 miss and 1 unclear of what is there, 1 rightly
    # denied, and 1 unclear.
    half = {"accuracy": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    half |= {"yes_ratio": 2 / 6, "unclear": 2 / 6}
    every = {"accuracy": 1 / 2, "precision": 1 / 2, "recall": 1.0, "f1": 2 / 3}
    every |= {"yes_ratio": 1.0, "unclear": 0.0}
    expected = {"pope_random": half, "pope_popular": half, "pope_adversarial": every}
    expected["pope"] = {metric: (2 * half[metric] + every[metric]) / 3 for metric in half}
    assert found.keys() == expected.keys()
    for task, figures in expected.items():
        assert found[task].metrics == pytest.approx(figures), task
        # The mean of the settings' F1 is not that of all their questions, so it has no interval.
        assert found[task].values.keys() == figures.keys() - ({"f1"} if task == "pope" else set())
        assert found[task].documents == (54 if task == "pope" else 18)
        assert len(set(found[task].clusters)) == 3
        assert found[task].higher_is_better["unclear"] is False
        assert found[task].higher_is_better["yes_ratio"] is None


@pytest.mark.slow
def test_popes_documents_come_in_hash_order_at_the_pinned_revision(pope_hub, scripted, run):
    results = run(None, {"pope_random": 6})
    assert results.document["datasets"]["pope_random"]["commit"] == REVISION
    assert results.document["n-samples"] == {"pope_random": {"original": 18, "effective": 6}}
    samples = results.samples["pope_random"]
    assert len({row["images"][0] for row in samples}) > 1  # the first six rows are of one image
    rows = [{"id": f"{i + 1} {i}", "object": i % 6} for i in range(18)]
    expected = [row["object"] for row in formatted.sample(rows, 6)]
    assert [int(row["arguments"][0][0].split(" in the")[0][-1]) for row in samples] == expected


@pytest.mark.slow
def test_limits_hold_for_each_task_of_a_group_and_differ_between_names(pope_hub, scripted, run):
    limits = {"pope_random": 4, "pope_popular": None, "pope_adversarial": 4}
    results = run(None, limits)
    assert {task: len(rows) for task, rows in results.samples.items()} == {
        "pope_random": 4,
        "pope_popular": 18,
        "pope_adversarial": 4,
    }
    assert results.document["limits"] == limits
    group = run(None, {"pope": 4})
    assert {len(rows) for rows in group.samples.values()} == {4}
    assert group.samples["pope_random"] == results.samples["pope_random"]


@pytest.mark.slow
def test_a_model_answers_pope(pope_hub, base, run, tmp_path):
    results = run(base, {"pope": 3})
    for setting in SETTINGS:
        rows = results.samples[f"pope_{setting}"]
        words = [said(row["resps"][0][0]) for row in rows]
        right = [word == row["target"] for word, row in zip(words, rows, strict=True)]
        found = results.document["results"][f"pope_{setting}"]
        assert found["accuracy,none"] == pytest.approx(sum(right) / 3)
        assert found["unclear,none"] == pytest.approx(words.count(None) / 3)
    lm_eval.write(results, tmp_path / "written")
    assert lm_eval.read(tmp_path / "written") == results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"commit": "0" * 40}, r"no such revision.*dataset_kwargs"),
        ({"commit": REVISION, "gated": True}, r"is gated.*HF_TOKEN"),
        ({"commit": REVISION, "private": True}, r"was not found, or needs a token"),
        ({"name": "someone/else"}, r"was not found, or needs a token"),
        (
            {"commit": REVISION, "gone": ["Full/random-00000-of-00001.parquet"]},
            r"lists a file that can't be downloaded",
        ),
        ({"commit": REVISION, "status": 503}, r"can't be downloaded now .*HTTP 503"),
        ({"offline": True}, r"is not here yet and HF_HUB_OFFLINE is set"),
        ({"closed": True}, r"can't be reached or does not answer"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_data_set_that_cannot_be_had_is_one_clear_error(
    hub, scripted, run, monkeypatch, tmp_path, options, said
):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between tries
    options = dict(options)
    offline, closed = options.pop("offline", False), options.pop("closed", False)
    repo = pope_repo(images=1, **options)
    with serve([repo]) as url:
        hub(monkeypatch, tmp_path, closed_port() if closed else url, offline)
        with pytest.raises(
            UserError, match=rf"evaluate\.lm_eval\.pope: .*lmms-lab/POPE .*{said}"
        ) as error:
            run(None, {"pope": 2})
    assert "remove the task from evaluate.lm_eval" in str(error.value)
    known = ("http://127.0.0.1:", "https://huggingface.co/settings/tokens")  # of files: signed
    for address in re.findall(r"https?://[^\s),;]+", str(error.value)):
        assert address.startswith(known), address
        assert "?" not in address


@pytest.mark.slow
def test_a_task_that_scores_given_answers_is_one_clear_error(pope_hub, scripted, run, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(scripted, "generate_until", refuse)
    with pytest.raises(UserError, match=r"pope_random compares log-probs .* choose tasks"):
        run(None, {"pope_random": 1})


# figures


def results_of(values, images, task="t", **more):
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
        "higher_is_better": {task: dict.fromkeys(values, True)},
    }
    return Results(document, {task: rows})


@pytest.fixture
def compare(params_with):
    """``compare(base, tuned)`` with 500 resamples."""
    p = params_with(**{"evaluate.resamples": 500, "evaluate.seed": 0, "evaluate.confidence": 0.95})
    return lambda base, tuned: regression.comparison(base, tuned, p.evaluate)


def test_a_comparison_by_hand(compare):
    # 40 images, two documents each; the first eight documents are gained, the next two lost.
    images = [f"image {i // 2}" for i in range(80)]
    before = [0.0] * 8 + [1.0] * 2 + [1.0] * 40 + [0.0] * 30
    after = [1.0] * 8 + [0.0] * 2 + before[10:]
    base = results_of({"accuracy": before, "f1": [[1, 0]] * 80}, images, **{"f1,none": 0.25})
    tuned = results_of({"accuracy": after, "f1": [[1, 1]] * 80}, images, **{"f1,none": 1.0})
    found = compare(base, tuned)
    change = np.array(after) - np.array(before)
    interval = statistics.bootstrap_interval(change, images, seed=0, resamples=500)
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


def test_which_way_is_better_is_lm_evals_word(compare):
    results = results_of({"unclear": [0.0, 1.0], "yes_ratio": [0.0, 1.0]}, ["a", "b"])
    results.document["higher_is_better"] = {"t": {"unclear": False, "yes_ratio": None}}
    found = compare(results, results)
    assert found["lm_eval/t/unclear/higher_is_better"] == 0
    assert "lm_eval/t/yes_ratio/higher_is_better" not in found


def test_documents_without_images_are_each_their_own_cluster():
    found = lm_eval.figures(results_of({"acc": [0, 1, 1]}, [None, None, None]))
    assert len(set(found["t"].clusters)) == 3


def test_few_images_give_no_interval(compare):
    base, tuned = (results_of({"acc": values}, ["a", "a"]) for values in ([0, 1], [1, 1]))
    assert compare(base, tuned) == {
        "lm_eval/t/acc/base": 0.5,
        "lm_eval/t/acc/tuned": 1.0,
        "lm_eval/t/acc/change": 0.5,
        "lm_eval/t/acc/higher_is_better": 1,
    }


def test_figures_that_json_has_no_word_for_are_left_out():
    results = results_of({"acc": [0, 1]}, ["a", "b"], **{"ppl,none": None, "other,strict": 3})
    assert lm_eval.figures(results)["t"].metrics == {"acc": 0.5, "other_strict": 3.0}


def test_other_documents_are_not_compared(compare):
    base, tuned = (results_of({"acc": [0, 1]}, images) for images in (["a", "b"], ["a", "c"]))
    with pytest.raises(UserError, match=r"same documents of t; `dvc repro -f baseline`"):
        compare(base, tuned)
    with pytest.raises(UserError, match="same documents of t, u"):
        compare(base, results_of({"acc": [0, 1]}, ["a", "b"], task="u"))


def test_no_task_writes_an_empty_file_without_lm_eval(monkeypatch, run, compare, tmp_path):
    monkeypatch.setattr(lm_eval, "_manager", None)
    results = run(None, {})
    lm_eval.write(results, tmp_path / "lm_eval")
    assert (tmp_path / "lm_eval" / "results.json").read_text() == "{}\n"
    assert lm_eval.read(tmp_path / "lm_eval") == results
    assert compare(results, results) == {}


def test_text_of_any_kind_is_read_back(tmp_path):
    results = results_of({"acc": [0, 1]}, ["a", "b"])
    results.samples["t"][0]["resps"] = [["two\nlines\u2028and \u00e9 \U0001f600"]]
    lm_eval.write(results, tmp_path)
    assert lm_eval.read(tmp_path) == results
    lm_eval.write(Results({}, {}), tmp_path)
    assert not list((tmp_path / "samples").iterdir())


def test_missing_or_broken_results_are_named(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is missing"):
        lm_eval.read(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is not what"):
        lm_eval.read(tmp_path)
    (tmp_path / "results.json").write_text('{"datasets": {"t": {}}}')
    with pytest.raises(UserError, match=r"t\.jsonl is missing"):
        lm_eval.read(tmp_path)
