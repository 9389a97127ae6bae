"""Published benchmarks as lm-eval's tasks: their figures are those worked out by hand, in
miniatures with the data sets' own columns, from a local server, at the pinned revisions.
"""

import base64
import hashlib
import io
import json
import re
import runpy
import shutil
import zipfile
from types import SimpleNamespace

import pandas as pd
import pytest

from stages.answers import lm_eval, task_results
from stages.core.errors import UserError
from stages.model import formatted
from tasks.published import data_sets
from tests.contracts import ROOT, table_under, yaml_of
from tests.hub_server import TASKS, Repo, closed_port, parquet, pope_repo, serve
from tests.pictures import picture

REVISIONS = {
    "_amber_yaml": "d520903109074cdcc174e499b02e4e31b50382f8",
    "hallusion_bench.yaml": "ea5fd49f1b711d12cc8b0ec75be0c0593e17befe",
    "mmstar.yaml": "bc98d668301da7b14f648724866e57302778ab27",
    "coco_chair.yaml": "4db1276663dfa5eb8ad16a52d24c31a09e470896",
    "_pope_yaml": "4db1276663dfa5eb8ad16a52d24c31a09e470896",
}


def shown(number):
    return picture(number, (56 + 8 * number, 48))


def module(path):
    """The functions of a task's own file, as lm-eval loads them: by path."""
    return SimpleNamespace(**runpy.run_path(str(path)))


def task(name):
    return module(next(TASKS.rglob(name)))


# golden answers

ANNOTATED = [  # what is there, and what people would expect that is not
    (["sky", "forest", "person"], ["cloud", "dog"]),
    (["dog", "person"], ["forest"]),
    (["sky"], ["person", "tree"]),
]
AMBER_LISTS = {
    "relation.json": json.dumps(
        {"sky": [], "dog": [], "cloud": [], "can": [], "TV": [], "lamp": ["light"]}
        | {"forest": ["tree", "bush"], "person": ["man", "people"], "tree": ["forest"]}
    ),
    "safe_words.txt": "orange\nlight",
    "annotations.json": json.dumps(
        [
            {"id": at + 1, "type": "generative", "truth": truth, "hallu": hallu}
            for at, (truth, hallu) in enumerate(ANNOTATED)
        ]
        + [{"id": 4, "type": "discriminative-hallucination", "truth": "no"}]
    ),
}
DESCRIPTIONS = (
    # man, people, tree, light, dog (no can: it can be seen): 5. A dog is not there, 1 of 2 that
    # people would expect. Light is never held against it. Forest and person of 3 are named.
    "A man and two people near trees, in the light. A dog can be seen.",
    # dog: 1, which is there, 1 of 2.
    "A dog.",
    # sky, cloud, people, TV: 4. 3 are not there; people stands for person, 1 of 2 expected.
    "The sky with clouds, people and TVs.",
)
AMBER_BY_HAND = {
    "chair": (1 + 0 + 3) / (5 + 1 + 4),
    "cover": (2 + 1 + 1) / (3 + 2 + 1),
    "hal": 2 / 3,
    "cog": (1 + 0 + 1) / (2 + 1 + 2),
    "words": (15 + 2 + 7) / 3,
}


JUDGED = [  # question, answer, category, what is said
    ("Is the sky sunny in this image?", "yes", "discriminative-attribute-state", "Yes"),
    ("Is there a cloud in this image?", "no", "discriminative-hallucination", "No."),
    ("Is there a dog in this image?", "no", "discriminative-hallucination", "yes"),
    ("Does the dog run in this image?", "no", "discriminative-attribute-action", "No"),
    ("Are there two dogs in this image?", "yes", "discriminative-attribute-number", "no"),
    ("Is there direct contact between the sky and dog?", "no", "relation", "Hard to say."),
    ("Is there direct contact between the man and dog?", "yes", "discriminative-relation", "yes"),
]
JUDGED_BY_HAND = {
    "accuracy": 4 / 7,
    # No is true of 4 and was said of 3, of 2 rightly.
    "f1": 2 * 2 / (4 + 3),
    "f1_existence": 2 * 1 / (2 + 1),
    "f1_attribute": 2 * 1 / (1 + 2),
    "f1_relation": 0 / (1 + 0),
    "yes_ratio": 3 / 7,
    "unclear": 1 / 7,
}


CAPTIONED = [  # of POPE's miniature: images 0 to 2
    # person, hot dog, toilet (twice); no chair, no dog: all there.
    "A man with a hot dog on a toilet, the seat of the toilet is up.",
    # dog, cat, dog: the dog is not there.
    "Two dogs, a baby cat and a dog.",
    # Nothing of the list.
    "An empty street with a train track.",
]
CHAIR_BY_HAND = {
    "chair_i": (0 + 2 + 0) / (4 + 3 + 0),
    "chair_s": 1 / 3,
    "recall": (3 + 1 + 0) / (3 + 2 + 1),  # there: person, hot dog, toilet; cat, person; train
    "words": (16 + 8 + 7) / 3,
}
SYNONYMS = (
    "person, man, people\ndog, puppy\ncat\nhot dog\ntoilet\nchair, seat\ntrain\n motor bike,\n"
)


def coco():
    """COCO's annotations of 2014, as far as they are read."""
    categories = {1: "person", 2: "hot dog", 3: "toilet", 4: "cat", 5: "train"}
    instances = [(0, 2), (0, 3), (1, 4), (2, 5), (7, 1)]
    captions = {0: "A man eats.", 1: "People with a cat", 2: "Rails.", 7: "A dog."}
    documents = {
        "instances": {
            "categories": [{"id": at, "name": name} for at, name in categories.items()],
            "annotations": [{"image_id": i, "category_id": c} for i, c in instances],
        },
        "captions": {"annotations": [{"image_id": i, "caption": c} for i, c in captions.items()]},
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, document in documents.items():
            archive.writestr(f"annotations/{name}_val2014.json", json.dumps(document))
    return stream.getvalue()


HALLUSION = [  # category, subcategory, set, figure, question, true answer, what is said
    ("VD", "illusion", "0", "0", "0", "1", "Yes"),
    ("VD", "illusion", "0", "0", "1", "0", "No"),
    ("VD", "illusion", "0", "1", "0", "0", "no."),
    ("VD", "illusion", "0", "1", "1", "1", "No"),  # wrong
    ("VS", "chart", "0", "1", "0", "1", "Yes"),
    ("VS", "chart", "0", "1", "1", "0", "A chart."),  # wrong: unclear
    ("VS", "chart", "0", "2", "0", "0", "No"),
    ("VS", "chart", "0", "2", "1", "1", "Yes"),
    ("VS", "chart", "0", "3", "0", "1", "No"),  # wrong
    ("VS", "chart", "0", "3", "1", "1", "yes"),
]
HALLUSION_BY_HAND = {
    "aAcc": 7 / 10,
    "fAcc": 2 / 5,  # the first figure of VD, the second of VS
    "qAcc": 1 / 4,  # the first question of VD; of VS each question fails for one figure
    "yes_ratio": 4 / 10,
    "unclear": 1 / 10,
}
MMSTAR = [  # answer, what is said
    ("A", "A"),
    ("B", "The answer is B."),
    ("C", "D"),
    ("D", "A dog"),
]
MMSTAR_BY_HAND = {"accuracy": 2 / 4, "unclear": 1 / 4}


# prompts

PROMPTS = {
    "amber_discriminative": "<image>Is it so?\nPlease answer yes or no.",
    "amber_generative": "<image>Describe this image.",
    "hallusion_bench": "<image>Is it so?\nPlease answer yes or no.",
    "mmstar": "<image>Is it so?\nAnswer with the option's letter from the given choices directly.",
    "coco_chair": "<image>Please describe this image in detail.",
    "pope_random": "<image>Is it so?\nAnswer the question using a single word or phrase.",
}
TOKENS = {"amber_generative": 512, "coco_chair": 512, "mmstar": 32}  # else 16


@pytest.mark.slow
def test_prompts_and_decoding_stay_what_they_are():
    """Another prompt is another benchmark: then the task's version goes up, and this changes."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    manager = lm_eval._manager(PROMPTS, TASKS)
    for name, prompt in PROMPTS.items():
        config = load_yaml(manager.task_index[name].yaml_path)
        assert apply_template(config["doc_to_text"], {"question": "Is it so?"}) == prompt, name
        assert config["generation_kwargs"] == {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": TOKENS.get(name, 16),
        }, name
        assert config["metadata"]["version"] == 1.0


def test_data_sets_are_pinned_to_commits_and_files_to_their_content():
    for name, revision in REVISIONS.items():
        text = next(TASKS.rglob(name)).read_text()
        assert re.findall(r"revision: (\S+)", text) == [revision], name
    for path in TASKS.rglob("*.py"):
        addresses = re.findall(r'"https?://[^"]+"', path.read_text())
        assert len(addresses) <= len(re.findall(r'"[0-9a-f]{64}"', path.read_text())), path


def test_every_task_of_the_4b_preset_is_documented():
    document = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = table_under(document, "## Did anything get worse? lm-eval's tasks")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert yaml_of("params/qwen3-vl-4b.yaml")["evaluate"]["lm_eval"].keys() <= named


# files that are pinned


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """``here(url)``: the Hub is there, its caches are empty."""
    return lambda url, **more: hub(monkeypatch, tmp_path, url, **more)


@pytest.mark.slow
def test_a_pinned_file_is_downloaded_once_or_is_one_clear_error(here):
    content, sha = b"words", hashlib.sha256(b"words").hexdigest()
    repo = Repo("a/lists", {"words.txt": content}, type="dataset")
    fix = r"remove the task that needs it from evaluate\.lm_eval"
    with serve([repo]) as url:
        here(url)
        address = f"{url}/datasets/a/lists/resolve/main/words.txt"
        for asked, pinned, message in (
            (address, "0" * 64, "is not the file that is pinned"),
            (address.replace("words", "no"), sha, r"can't be downloaded \(HTTPStatusError\)"),
            (f"{closed_port()}/words.txt", sha, r"can't be downloaded \(ConnectError\)"),
        ):
            with pytest.raises(UserError, match=rf"{message}.*{fix}"):
                data_sets.pinned(asked, pinned)
        before = len(repo.downloads("words.txt"))
        assert data_sets.pinned(address, sha).read_bytes() == content
        assert data_sets.pinned(address, sha).read_bytes() == content
        assert len(repo.downloads("words.txt")) == before + 1
    here(url, offline=True)
    assert data_sets.pinned(address, sha).read_bytes() == content
    with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set.*{fix}"):
        data_sets.pinned(address, "0" * 64)


# through lm-eval


@pytest.fixture
def scripted(monkeypatch):
    """``scripted(answers)``: the text of a prompt, or the width of its image, to the answer."""
    from lm_eval.api.model import LM

    class Scripted(LM):
        MULTIMODAL = True
        tokenizer_name = "scripted"
        answers: dict[str | int, str]

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return chat_history[-1]["content"]

        def generate_until(self, requests, disable_tqdm=False):
            return [self._answer(*request.args) for request in requests]

        def _answer(self, text, options, shown):
            (image,) = shown["visual"]
            assert image.mode == "RGB"
            assert options["do_sample"] is False
            question = text.removeprefix("<image>").partition("\n")[0]
            return self.answers.get(question) or self.answers[image.width]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise NotImplementedError

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            raise NotImplementedError

    model = Scripted()
    monkeypatch.setattr(lm_eval, "_model", lambda *_: model)

    def answering(answers):
        model.answers = answers
        return model

    return answering


@pytest.fixture
def run(params_with, checkpoint_of, tmp_path):
    """``run(policy, {"mmstar": 4}, folder)``"""
    (tmp_path / "questions.json").write_text("[]")

    def running(policy, limits, folder=TASKS):
        p = params_with(**{"evaluate.lm_eval": limits, "evaluate.resamples": 200})
        return lm_eval.run(checkpoint_of(policy, p), folder, tmp_path, tmp_path)

    return running


def amber_repos():
    """AMBER's table, of which each image comes with its questions, and the lists."""
    rows = [
        {
            "index": at,
            "image": base64.b64encode(shown(1 + at % 3)).decode(),
            "question": question,
            "answer": answer.capitalize() if at % 2 else answer,
            "category": category,
            "image_path": f"image/AMBER_{1 + at % 3}.jpg",
        }
        for at, (question, answer, category, _) in enumerate(JUDGED)
    ]
    files = {"AMBER.tsv": pd.DataFrame(rows).to_csv(sep="\t", index=False).encode()}
    commit = REVISIONS["_amber_yaml"]
    return [Repo("yifanzhang114/AMBER_base64", files, type="dataset", commit=commit)]


def hallusion_repo():
    columns = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")
    rows = [
        dict(zip(columns, row[:6], strict=True))
        | {"question": asked(row), "image": {"bytes": shown(int(row[3]) + 3 * (row[0] == "VS"))}}
        for row in HALLUSION
    ]
    parts = {"image": parquet(rows), "non_image": parquet(rows[:1])}
    return data_repo("lmms-lab/HallusionBench", "hallusion_bench.yaml", parts)


def asked(row):
    return f"{row[0]} {row[3]} {row[4]}?"


def mmstar_repo():
    options = "\nOptions: A: one, B: two, C: three, D: four"
    rows = [
        {
            "index": at,
            "question": f"Which {at}?{options}",
            "image": {"bytes": shown(at)},
            "answer": answer,
        }
        for at, (answer, _) in enumerate(MMSTAR)
    ]
    return data_repo("Lin-Chen/MMStar", "mmstar.yaml", {"val": parquet(rows)})


def data_repo(name, pinned, parts):
    """A data set of the Hub with a card that names a file for each split."""
    listed = "".join(f"  - split: {part}\n    path: {part}.parquet\n" for part in parts)
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n"
    if name == "Lin-Chen/MMStar":
        card = card.replace("default", "val")
    files = {f"{part}.parquet": content for part, content in parts.items()}
    files["README.md"] = card.encode()
    return Repo(name, files, type="dataset", commit=REVISIONS[pinned])


def copied(family, folder, url, files):
    """A task's folder with pinned ``files`` of the server, by name, in place of the real ones."""
    shutil.copytree(TASKS / family, folder / family, ignore=shutil.ignore_patterns("__pycache__"))
    (script,) = (folder / family).glob("*.py")
    text = script.read_text()
    for name, content in files.items():
        sha = hashlib.sha256(content).hexdigest()
        text, found = re.subn(
            rf'= \([^()]*{re.escape(name)}",\s*"[0-9a-f]{{64}}",?\s*\)',
            f'= ("{url}/datasets/some/lists/resolve/main/{name}", "{sha}")',
            text,
        )
        assert found == 1, name
    script.write_text(text)
    return folder / family


AMBER_FILES = {name: text.encode() for name, text in AMBER_LISTS.items()}
CASES = {  # folder, repositories, pinned files, what is said, figures, documents, images, commit
    "amber_discriminative": lambda: (
        *("amber", amber_repos(), AMBER_FILES),
        {question: answer for question, _, _, answer in JUDGED},
        *(JUDGED_BY_HAND, 7, 3, "_amber_yaml"),
    ),
    "amber_generative": lambda: (
        *("amber", amber_repos(), AMBER_FILES),
        {64 + 8 * at: text for at, text in enumerate(DESCRIPTIONS)},
        *(AMBER_BY_HAND, 3, 3, "_amber_yaml"),
    ),
    "coco_chair": lambda: (
        *("chair", [pope_repo(commit=REVISIONS["coco_chair.yaml"])]),
        {"synonyms.txt": SYNONYMS.encode(), "annotations_trainval2014.zip": coco()},
        {64 + 8 * at: caption for at, caption in enumerate(CAPTIONED)},
        # POPE asks six questions of an image; here it is shown once.
        *(CHAIR_BY_HAND, 3, 3, "coco_chair.yaml"),
    ),
    "hallusion_bench": lambda: (
        *("hallusion_bench", [hallusion_repo()], {}),
        {asked(row): row[6] for row in HALLUSION},
        *(HALLUSION_BY_HAND, 10, 5, "hallusion_bench.yaml"),
    ),
    "mmstar": lambda: (
        *("mmstar", [mmstar_repo()], {}),
        {f"Which {at}?": text for at, (_, text) in enumerate(MMSTAR)},
        *(MMSTAR_BY_HAND, 4, 4, "mmstar.yaml"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_figures_through_lm_eval_are_those_worked_out_by_hand(here, scripted, run, tmp_path, name):
    family, repos, files, answers, expected, documents, images, pinned = CASES[name]()
    with serve([*repos, Repo("some/lists", files, type="dataset")]) as url:
        here(url)
        scripted(answers)
        results = run(None, {name: None}, copied(family, tmp_path, url, files))
    found = task_results.figures(results)[name]
    assert found.metrics == pytest.approx(expected)
    assert found.documents == documents
    assert len(set(found.clusters)) == images
    assert results.document["datasets"][name]["commit"] == REVISIONS[pinned]
    assert str(tmp_path) not in json.dumps(results.document)
    if name == "coco_chair":
        there = {"hot dog, person, toilet", "cat, person", "train"}
        assert {row["target"] for row in results.samples[name]} == there
    if name == "hallusion_bench":
        rows = results.samples[name]
        assert found.values.keys() == {"aAcc", "yes_ratio", "unclear"}  # the others are of groups
        order = [row["arguments"][0][0][7:9] for row in rows]
        assert order in (["VD"] * 4 + ["VS"] * 6, ["VS"] * 6 + ["VD"] * 4)  # a limit cuts one set


# POPE


# Of each image, the objects 0, 2 and 4 are there; ``adversarial`` ones are always seen.
SCRIPT = ("Yes", "Yes.", "No, there is not.", "no", "It could be.", "A dog.")
POPE_SAID = {
    f"Is there a {setting} object {i} in the image?": answer
    for i, other in enumerate(SCRIPT)
    for setting, answer in (("random", other), ("popular", other), ("adversarial", "yes"))
}


@pytest.fixture
def pope(here, scripted):
    """A miniature of POPE at the pinned revision: 18 questions of 3 images in each setting."""
    with serve([pope_repo(commit=REVISIONS["_pope_yaml"])]) as url:
        here(url)
        yield scripted(POPE_SAID)


@pytest.mark.slow
def test_popes_figures_are_those_worked_out_by_hand(pope, run):
    results = run(None, {"pope": None})
    found = task_results.figures(results)
    # Of six questions: 1 hit, 1 false alarm, 1 miss and 1 unclear of what is there, 1 rightly
    # denied, and 1 unclear.
    half = {"accuracy": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    half |= {"yes_ratio": 2 / 6, "unclear": 2 / 6}
    every = {"accuracy": 1 / 2, "precision": 1 / 2, "recall": 1.0, "f1": 2 / 3}
    every |= {"yes_ratio": 1.0, "unclear": 0.0}
    expected = {"pope_random": half, "pope_popular": half, "pope_adversarial": every}
    expected["pope"] = {metric: (2 * half[metric] + every[metric]) / 3 for metric in half}
    assert found.keys() == expected.keys()
    for name, figures in expected.items():
        assert found[name].metrics == pytest.approx(figures), name
        # The mean of the settings' F1 is not that of all their questions, so it has no interval.
        assert found[name].values.keys() == figures.keys() - ({"f1"} if name == "pope" else set())
        assert found[name].documents == (54 if name == "pope" else 18)
        assert len(set(found[name].clusters)) == 3
        assert found[name].higher_is_better["unclear"] is False
        assert found[name].higher_is_better["yes_ratio"] is None


@pytest.mark.slow
def test_limits_hold_for_each_task_and_documents_come_in_hash_order_as_pinned(pope, run):
    limits = {"pope_random": 6, "pope_popular": None, "pope_adversarial": 4}
    results = run(None, limits)
    assert {name: len(rows) for name, rows in results.samples.items()} == {
        **{"pope_random": 6, "pope_popular": 18, "pope_adversarial": 4}
    }
    assert results.document["limits"] == limits
    group = run(None, {"pope": 6})
    assert {len(rows) for rows in group.samples.values()} == {6}
    samples = results.samples["pope_random"]
    assert group.samples["pope_random"] == samples
    assert results.document["datasets"]["pope_random"]["commit"] == REVISIONS["_pope_yaml"]
    assert results.document["n-samples"]["pope_random"] == {"original": 18, "effective": 6}
    assert len({row["images"][0] for row in samples}) > 1  # the first six rows are of one image
    rows = [{"id": f"{i + 1} {i}", "object": i % 6} for i in range(18)]
    expected = [row["object"] for row in formatted.sample(rows, 6)]
    assert [int(row["arguments"][0][0].split(" in the")[0][-1]) for row in samples] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"commit": "0" * 40}, r"no such revision.*dataset_kwargs"),
        ({"gated": True}, r"is gated.*HF_TOKEN"),
        ({"offline": True}, r"is not here yet and HF_HUB_OFFLINE is set"),
        ({"closed": True}, r"can't be reached or does not answer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_data_set_that_cannot_be_loaded_is_one_clear_error(here, scripted, run, options, message):
    options = {"commit": REVISIONS["_pope_yaml"]} | options
    offline, closed = options.pop("offline", False), options.pop("closed", False)
    with serve([pope_repo(images=1, **options)]) as url:
        here(closed_port() if closed else url, offline=offline)
        with pytest.raises(
            UserError, match=rf"evaluate\.lm_eval\.pope: .*lmms-lab/POPE .*{message}"
        ) as error:
            run(None, {"pope": 2})
    assert "remove the task from evaluate.lm_eval" in str(error.value)


@pytest.mark.slow
def test_a_task_that_scores_given_answers_is_one_clear_error(pope, run, monkeypatch):
    monkeypatch.setattr(pope, "generate_until", pope.loglikelihood)
    with pytest.raises(UserError, match=r"pope_random compares log-probs .* choose tasks"):
        run(None, {"pope_random": 1})
