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
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ruamel.yaml import YAML

from stages.answers import lm_eval, published
from stages.answers.published import ratio
from stages.core.errors import UserError
from stages.evaluation import regression
from tests.contracts import PRESETS, ROOT, table_under, yaml_of
from tests.hub_server import TASKS, Repo, closed_port, pope_repo, serve

REVISIONS = {
    "_amber_yaml": "d520903109074cdcc174e499b02e4e31b50382f8",
    "hallusion_bench.yaml": "ea5fd49f1b711d12cc8b0ec75be0c0593e17befe",
    "mmstar.yaml": "bc98d668301da7b14f648724866e57302778ab27",
    "coco_chair.yaml": "4db1276663dfa5eb8ad16a52d24c31a09e470896",
}


def picture(number):
    stream = io.BytesIO()
    Image.new("RGB", (56 + 8 * number, 48), (60 * number % 255, 90, 150)).save(stream, "PNG")
    return stream.getvalue()


def parquet(rows):
    """Rows with an ``image`` as the Hub's parquet files hold it."""
    held = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
    table = pa.Table.from_pylist(held)
    features = {name: {"dtype": "string", "_type": "Value"} for name in table.column_names}
    features = {"image": {"_type": "Image"}} | {
        name: {"dtype": str(table.schema.field(name).type), "_type": "Value"}
        for name in features
        if name != "image"
    }
    stream = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        ),
        stream,
    )
    return stream.getvalue()


def module(name):
    return SimpleNamespace(**runpy.run_path(str(next(TASKS.rglob(name)))))


# golden answers

AMBER_LISTS = {
    "relation.json": json.dumps(
        {
            "sky": [],
            "forest": ["tree", "bush"],
            "person": ["man", "people"],
            "tree": ["forest"],
            "dog": [],
            "cloud": [],
            "can": [],
            "lamp": ["light"],
            "TV": [],
        }
    ),
    "safe_words.txt": "orange\nlight",
    "annotations.json": json.dumps(
        [
            {
                "id": 1,
                "type": "generative",
                "truth": ["sky", "forest", "person"],
                "hallu": ["cloud", "dog"],
            },
            {"id": 2, "type": "generative", "truth": ["dog", "person"], "hallu": ["forest"]},
            {"id": 3, "type": "generative", "truth": ["sky"], "hallu": ["person", "tree"]},
            {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
        ]
    ),
}
DESCRIPTIONS = {
    # man, people, tree, light, dog (no can: it can be seen): 5. A dog is not there, 1 of 2 that
    # people would expect. Light is never held against it. Forest and person of 3 are named.
    "AMBER_1": "A man and two people near trees, in the light. A dog can be seen.",
    # dog: 1, which is there, 1 of 2.
    "AMBER_2": "A dog.",
    # sky, cloud, people, TV: 4. 3 are not there; people stands for person, 1 of 2 expected.
    "AMBER_3": "The sky with clouds, people and TVs.",
}
AMBER_BY_HAND = {
    "chair": (1 + 0 + 3) / (5 + 1 + 4),
    "cover": (2 + 1 + 1) / (3 + 2 + 1),
    "hal": 2 / 3,
    "cog": (1 + 0 + 1) / (2 + 1 + 2),
    "words": (15 + 2 + 7) / 3,
}


@pytest.fixture
def amber(monkeypatch, tmp_path):
    """AMBER's functions, with the lists above in place of the pinned files."""

    def held(url, sha256):
        path = tmp_path / url.rpartition("/")[2]
        path.write_text(AMBER_LISTS[path.name])
        return path

    monkeypatch.setattr(published, "pinned", held)
    return module("amber.py")


def test_ambers_figures_of_descriptions_are_those_worked_out_by_hand(amber):
    docs = [d for d in json.loads(AMBER_LISTS["annotations.json"]) if d["type"] == "generative"]
    rows = [amber.described(doc, [DESCRIPTIONS[f"AMBER_{doc['id']}"]]) for doc in docs]
    assert rows[0] | {"words": 0} == {
        **{"chair": (1, 5), "cover": (2, 3), "hal": 1.0, "cog": (1, 2), "words": 0}
    }
    for metric in ("chair", "cover", "cog"):
        assert ratio([row[metric] for row in rows]) == pytest.approx(AMBER_BY_HAND[metric])


def test_a_word_stands_for_the_first_object_that_lists_it_as_in_ambers_script(amber):
    # tree is on the list of forest, so it counts as forest where both are there.
    doc = {"truth": ["tree", "forest"], "hallu": []}
    assert amber.described(doc, ["A tree."])["cover"] == (1, 2)
    assert amber.meant("tree", doc["truth"], amber.lists()[0]) == "forest"


def test_nothing_said_invents_nothing(amber):
    found = amber.described({"truth": ["sky"], "hallu": ["dog"]}, [""])
    assert found == {"chair": (0, 0), "cover": (0, 1), "hal": 0.0, "cog": (0, 1), "words": 0.0}


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


@pytest.mark.parametrize("name", ["chair", "hal", "cog", "chair_i", "chair_s", "unclear"])
def test_fewer_hallucinations_are_better(name):
    said = [
        metric["higher_is_better"]
        for path in TASKS.rglob("*.yaml")
        for metric in YAML(typ="rt").load(path.read_text()).get("metric_list", ())
        if metric["metric"] == name
    ]
    assert said
    assert not any(said), name


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
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(
            "annotations/instances_val2014.json",
            json.dumps(
                {
                    "categories": [{"id": at, "name": name} for at, name in categories.items()],
                    "annotations": [{"image_id": i, "category_id": c} for i, c in instances],
                }
            ),
        )
        archive.writestr(
            "annotations/captions_val2014.json",
            json.dumps(
                {"annotations": [{"image_id": i, "caption": c} for i, c in captions.items()]}
            ),
        )
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


@pytest.fixture
def manager(monkeypatch, tmp_path):
    return lm_eval._manager(TASKS, defaults=False)


@pytest.mark.slow
def test_prompts_and_decoding_stay_what_they_are(manager):
    """Another prompt is another benchmark: then the task's version goes up, and this changes."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    for task, prompt in PROMPTS.items():
        config = load_yaml(manager.task_index[task].yaml_path)
        assert apply_template(config["doc_to_text"], {"question": "Is it so?"}) == prompt, task
        assert config["generation_kwargs"] == {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": TOKENS.get(task, 16),
        }, task
        assert config["metadata"]["version"] == 1.0


def test_data_sets_are_pinned_to_commits_and_files_to_their_content():
    for name, revision in REVISIONS.items():
        text = next(TASKS.rglob(name)).read_text()
        assert re.findall(r"revision: (\S+)", text) == [revision], name
    for path in TASKS.rglob("*.py"):
        addresses = re.findall(r'"https?://[^"]+"', path.read_text())
        assert len(addresses) <= len(re.findall(r'"[0-9a-f]{64}"', path.read_text())), path


def test_the_4b_presets_ask_for_every_task_of_their_folder():
    """What is not asked for must rerun nothing, and DVC looks at the folder."""
    for preset in PRESETS:
        evaluate = yaml_of(preset.relative_to(ROOT).as_posix())["evaluate"]
        if not evaluate["lm_eval"]:  # a preset for data of which nothing is known
            continue
        members = lm_eval._local(ROOT / evaluate["task_files"])
        asked = {leaf for name in evaluate["lm_eval"] for leaf in lm_eval._leaves(name, members)}
        leaves = {leaf for name in members for leaf in lm_eval._leaves(name, members)}
        assert leaves <= asked, preset.name


def test_every_task_of_the_4b_preset_is_documented():
    document = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = table_under(document, "## Did anything get worse? lm-eval's tasks")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert yaml_of("params/qwen3-vl-4b.yaml")["evaluate"]["lm_eval"].keys() <= named


def test_what_decides_a_task_are_the_files_next_to_it(tmp_path):
    (tmp_path / "questions.json").write_text("[]")
    shutil.copytree(TASKS, tmp_path / "tasks", ignore=shutil.ignore_patterns("__pycache__"))

    def decides(*tasks):
        return lm_eval._decides(tmp_path / "tasks", tasks, tmp_path)

    before, others = decides("mmstar"), decides("coco_chair", "pope_random")
    assert {path.partition("/")[0] for path in before["files"]} == {"mmstar"}
    assert {path.partition("/")[0] for path in others["files"]} == {"chair", "pope"}
    with (tmp_path / "tasks" / "mmstar" / "mmstar.py").open("a") as file:
        file.write("# changed\n")
    assert decides("coco_chair", "pope_random") == others
    assert decides("mmstar") != before


# files that are pinned


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """``here(url)``: the Hub is there, its caches are empty."""
    return lambda url, **more: hub(monkeypatch, tmp_path, url, **more)


@pytest.mark.slow
def test_a_pinned_file_is_downloaded_once_and_needs_no_network_then(here):
    content, sha = b"words", hashlib.sha256(b"words").hexdigest()
    repo = Repo("a/lists", {"words.txt": content}, type="dataset")
    with serve([repo]) as url:
        here(url)
        address = f"{url}/datasets/a/lists/resolve/main/words.txt"
        assert published.pinned(address, sha).read_bytes() == content
        assert published.pinned(address, sha).read_bytes() == content
    assert len(repo.downloads("words.txt")) == 1
    here(url, offline=True)
    assert published.pinned(address, sha).read_bytes() == content


@pytest.mark.slow
def test_a_file_that_cannot_be_had_or_is_another_is_one_clear_error(here):
    fix = r"remove the task that needs it from evaluate\.lm_eval"
    with serve([Repo("a/lists", {"words.txt": b"other"}, type="dataset")]) as url:
        here(url)
        address = f"{url}/datasets/a/lists/resolve/main/words.txt"
        with pytest.raises(UserError, match=rf"is not the file that is pinned.*{fix}"):
            published.pinned(address, "0" * 64)
        with pytest.raises(UserError, match=rf"can't be downloaded .*{fix}"):
            published.pinned(address.replace("words", "no"), "0" * 64)
        here(url, offline=True)
        with pytest.raises(UserError, match=rf"HF_HUB_OFFLINE is set.*{fix}"):
            published.pinned(address, "0" * 64)
    here(closed_port())
    with pytest.raises(UserError, match=rf"can't be downloaded \(ConnectError\).*{fix}"):
        published.pinned(f"{closed_port()}/words.txt", "0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        ("mmstar", {"index": [0]}, r"mmstar: the data set has no column answer, image, question;"),
        (
            "mmstar",
            {"index": [0], "question": ["?"], "answer": ["E"], "image": [""]},
            r"mmstar: the data set has 'E' as answer, where the task knows A, B, C, D;",
        ),
        ("hallusion_bench", {"question": ["?"]}, r"hallusion_bench: .* no column category, "),
        ("pope", {"question": ["?"]}, r"pope: .* no column answer, "),
    ],
)
def test_a_data_set_that_is_not_what_it_was_is_one_clear_error(name, columns, said):
    from datasets import Dataset

    with pytest.raises(UserError, match=said):
        module(f"{name}.py").in_hash_order(Dataset.from_dict(columns))


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
            "image": base64.b64encode(picture(1 + at % 3)).decode(),
            "question": question,
            "answer": answer.capitalize() if at % 2 else answer,
            "category": category,
            "image_path": f"image/AMBER_{1 + at % 3}.jpg",
        }
        for at, (question, answer, category, _) in enumerate(JUDGED)
    ]
    table = pd.DataFrame(rows).to_csv(sep="\t", index=False).encode()
    lists = {f"data/{name}": text.encode() for name, text in AMBER_LISTS.items()}
    return [
        Repo(
            "yifanzhang114/AMBER_base64",
            {"AMBER.tsv": table},
            type="dataset",
            commit=REVISIONS["_amber_yaml"],
        ),
        Repo("lists/AMBER", lists, type="dataset"),
    ]


def copied(family, folder, url, files):
    """A task's folder with pinned ``files`` (name, to address and content) of the server in place
    of the real ones.
    """
    shutil.copytree(TASKS / family, folder / family, ignore=shutil.ignore_patterns("__pycache__"))
    (script,) = (folder / family).glob("*.py")
    text = script.read_text()
    for name, (address, content) in files.items():
        sha = hashlib.sha256(content).hexdigest()
        text, found = re.subn(
            rf'= \([^()]*{re.escape(name)}",\s*"[0-9a-f]{{64}}",?\s*\)',
            f'= ("{url}/{address}", "{sha}")',
            text,
        )
        assert found == 1, name
    script.write_text(text)
    return folder / family


def amber_task(folder, url):
    return copied(
        "amber",
        folder,
        url,
        {
            name: (f"datasets/lists/AMBER/resolve/main/data/{name}", text.encode())
            for name, text in AMBER_LISTS.items()
        },
    )


@pytest.mark.slow
def test_amber_through_lm_eval(here, scripted, run, tmp_path):
    with serve(amber_repos()) as url:
        here(url)
        folder = amber_task(tmp_path, url)
        scripted({question: said for question, _, _, said in JUDGED})
        discriminative = run(None, {"amber_discriminative": None}, folder)
        scripted({64: DESCRIPTIONS["AMBER_1"], 72: "A dog.", 80: DESCRIPTIONS["AMBER_3"]})
        generative = run(None, {"amber_generative": None}, folder)
    found = lm_eval.figures(discriminative)["amber_discriminative"]
    assert found.metrics == pytest.approx(JUDGED_BY_HAND)
    assert found.documents == 7
    assert len(set(found.clusters)) == 3
    assert found.higher_is_better["yes_ratio"] is None
    found = lm_eval.figures(generative)["amber_generative"]
    assert found.metrics == pytest.approx(AMBER_BY_HAND)
    assert found.higher_is_better == {
        **{"chair": False, "cover": True, "hal": False, "cog": False, "words": None}
    }
    for results in (discriminative, generative):
        (data,) = results.document["datasets"].values()
        assert data["commit"] == REVISIONS["_amber_yaml"]
        assert str(tmp_path) not in json.dumps(results.document)


ROW = {
    **{"index": "7", "image": "AAAA", "question": "Is it?", "answer": "yes"},
    **{"category": "relation", "image_path": "AMBER_1.jpg"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (
            "amber_discriminative",
            {"index": "7", "question": "Is it?"},
            r"has no column answer, category",
        ),
        (
            "amber_discriminative",
            ROW | {"answer": "maybe"},
            r"row 7, has the answer 'maybe' in the category 'relation'",
        ),
        ("amber_generative", ROW, r"has no image for 2 of 3 annotations, such as AMBER_2"),
    ],
)
def test_a_table_that_is_not_ambers_is_one_clear_error(
    here, scripted, run, tmp_path, task, row, said
):
    repo, lists = amber_repos()
    repo.files = {"AMBER.tsv": pd.DataFrame([row]).to_csv(sep="\t", index=False).encode()}
    with serve([repo, lists]) as url:
        here(url)
        with pytest.raises(UserError, match=said):
            run(None, {task: None}, amber_task(tmp_path, url))


@pytest.mark.slow
def test_chair_through_lm_eval(here, scripted, run, tmp_path):
    lists = {"synonyms.txt": SYNONYMS.encode(), "annotations_trainval2014.zip": coco()}
    repos = [
        pope_repo(commit=REVISIONS["coco_chair.yaml"]),
        Repo("lists/coco", lists, type="dataset"),
    ]
    with serve(repos) as url:
        here(url)
        at = "datasets/lists/coco/resolve/main"
        files = {name: (f"{at}/{name}", content) for name, content in lists.items()}
        scripted({64 + 8 * at: caption for at, caption in enumerate(CAPTIONED)})
        results = run(None, {"coco_chair": None}, copied("chair", tmp_path, url, files))
    found = lm_eval.figures(results)["coco_chair"]
    assert found.metrics == pytest.approx(CHAIR_BY_HAND)
    assert found.documents == 3  # POPE asks six questions of an image; here it is shown once
    assert {row["target"] for row in results.samples["coco_chair"]} == {
        *("hot dog, person, toilet", "cat, person", "train")
    }


def hallusion_repo():
    rows = [
        {
            "category": category,
            "subcategory": subcategory,
            "visual_input": "1",
            "set_id": of,
            "figure_id": figure,
            "sample_note": "",
            "question_id": question,
            "question": f"{category} {figure} {question}?",
            "gt_answer_details": "",
            "gt_answer": truth,
            "filename": f"./{category}/{subcategory}/{of}_{figure}.png",
            "image": picture(int(figure) + 3 * (category == "VS")),
        }
        for category, subcategory, of, figure, question, truth, _ in HALLUSION
    ]
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: image\n    path: data/image-*\n  - split: non_image\n"
        "    path: data/non_image-*\n---\n"
    )
    files = {
        "README.md": card.encode(),
        "data/image-00000-of-00001.parquet": parquet(rows),
        "data/non_image-00000-of-00001.parquet": parquet(rows[:1]),
    }
    commit = REVISIONS["hallusion_bench.yaml"]
    return Repo("lmms-lab/HallusionBench", files, type="dataset", commit=commit)


def mmstar_repo():
    rows = [
        {
            "index": at,
            "question": f"Which {at}?\nOptions: A: one, B: two, C: three, D: four",
            "image": picture(at),
            "answer": answer,
            "category": "math",
            "l2_category": "geometry",
            "meta_info": "",
        }
        for at, (answer, _) in enumerate(MMSTAR)
    ]
    card = (
        "---\nconfigs:\n- config_name: val\n  data_files:\n  - split: val\n"
        "    path: mmstar.parquet\n---\n"
    )
    files = {"README.md": card.encode(), "mmstar.parquet": parquet(rows)}
    return Repo("Lin-Chen/MMStar", files, type="dataset", commit=REVISIONS["mmstar.yaml"])


@pytest.mark.slow
def test_hallusion_bench_through_lm_eval(here, scripted, run):
    with serve([hallusion_repo()]) as url:
        here(url)
        scripted({f"{row[0]} {row[3]} {row[4]}?": row[6] for row in HALLUSION})
        results = run(None, {"hallusion_bench": None})
        cut = run(None, {"hallusion_bench": 4})
    found = lm_eval.figures(results)["hallusion_bench"]
    assert found.metrics == pytest.approx(HALLUSION_BY_HAND)
    assert found.values.keys() == {"aAcc", "yes_ratio", "unclear"}  # the others are of groups
    rows = results.samples["hallusion_bench"]
    for metric, sets in (("fAcc", 5), ("qAcc", 2)):  # figures, sets
        (_, right), labels = regression.of_groups(metric, rows, rows)
        assert right.mean() == pytest.approx(HALLUSION_BY_HAND[metric])
        assert len(set(labels)) == sets
    order = [row["arguments"][0][0][7:9] for row in results.samples["hallusion_bench"]]
    assert order in (["VD"] * 4 + ["VS"] * 6, ["VS"] * 6 + ["VD"] * 4)  # sets stay together
    assert len({row["arguments"][0][0][7:9] for row in cut.samples["hallusion_bench"]}) == 1
    assert (
        results.document["datasets"]["hallusion_bench"]["commit"]
        == (REVISIONS["hallusion_bench.yaml"])
    )


@pytest.mark.slow
def test_mmstar_through_lm_eval(here, scripted, run):
    with serve([mmstar_repo()]) as url:
        here(url)
        scripted({f"Which {at}?": said for at, (_, said) in enumerate(MMSTAR)})
        results = run(None, {"mmstar": None})
    assert lm_eval.figures(results)["mmstar"].metrics == pytest.approx(MMSTAR_BY_HAND)
    text = results.samples["mmstar"][0]["arguments"][0][0]
    assert re.fullmatch(
        r"<image>Which \d\?\nOptions: A: one, B: two, C: three, D: four\n"
        r"Answer with the option's letter from the given choices directly\.",
        text,
    )


@pytest.mark.slow
def test_a_model_answers_them_all(here, base, run, tmp_path):
    repos = [hallusion_repo(), mmstar_repo(), *amber_repos()]
    with serve(repos) as url:
        here(url)
        found = run(base, {"hallusion_bench": 2, "mmstar": 2})
        described = run(base, {"amber_generative": 1}, amber_task(tmp_path, url))
    lm_eval.write(found, tmp_path / "written")
    assert lm_eval.read(tmp_path / "written") == found
    assert found.document["results"].keys() == {"hallusion_bench", "mmstar"}
    assert described.document["results"]["amber_generative"]["hal,none"] in (0.0, 1.0)


# change


def test_a_ratio_is_of_sums():
    assert ratio([(1, 2), (0, 0), (2, 4)]) == 3 / 6
    assert ratio([(0, 0)]) == ratio([]) == 0


def test_the_change_of_a_ratio_has_an_interval_by_image(params_with):
    """Of a ratio whose every whole is the same, the mean's interval; the figure is the ratio's."""
    p = params_with(**{"evaluate.resamples": 500, "evaluate.seed": 0, "evaluate.confidence": 0.95})

    def results(pairs, whole):
        rows = [
            {
                "doc_id": at,
                "images": [f"image {at // 2}"],
                "filter": "none",
                "metrics": {"chair": [part, whole], "mean": part / whole},
            }
            for at, part in enumerate(pairs)
        ]
        figure = sum(pairs) / whole / len(pairs)
        return lm_eval.Results(
            {
                "results": {"t": {"chair,none": figure, "mean,none": figure}},
                "datasets": {"t": {"shown": ""}},
                "higher_is_better": {"t": {"chair": False, "mean": False}},
            },
            {"t": rows},
        )

    before, after = [3, 1] * 20 + [2] * 40, [1, 1] * 20 + [2] * 40
    found = regression.comparison(results(before, 4), results(after, 4), p.evaluate)
    for what in ("base", "tuned", "change", "change_low", "change_high"):
        assert found[f"lm_eval/t/chair/{what}"] == pytest.approx(found[f"lm_eval/t/mean/{what}"])
    assert found["lm_eval/t/chair/change"] == pytest.approx(-40 / 4 / 80)
    assert found["lm_eval/t/chair/change_high"] < 0
    assert found["lm_eval/t/chair/higher_is_better"] == 0


def test_a_ratios_linear_values_have_the_spread_of_its_bootstrap():
    """With wholes that differ, against resampling of the ratio itself."""
    import numpy as np

    random = np.random.default_rng(0)
    wholes = random.integers(1, 9, 400)
    pairs = [(float(random.binomial(of, 0.3)), float(of)) for of in wholes]
    values = np.array(published.linear([list(pair) for pair in pairs]))
    assert values.mean() == pytest.approx(ratio(pairs))
    drawn = [ratio([pairs[i] for i in random.integers(0, 400, 400)]) for _ in range(400)]
    assert values.std() / 20 == pytest.approx(np.std(drawn), rel=0.1)


def groups_answered(right):
    """Results of a task whose ``all`` counts sets: a row is (set, question, image, right)."""
    rows: list[dict[str, Any]] = [
        {
            "doc_id": at,
            "images": [image],
            "filter": "none",
            "metrics": {"all": [f"{of} {question}", bool(told)]},
        }
        for at, (of, question, image, told) in enumerate(right)
    ]
    groups: dict[str, bool] = {}
    for row in rows:
        group, told = row["metrics"]["all"]
        groups[group] = groups.get(group, True) and told
    figure = sum(groups.values()) / len(groups)
    return lm_eval.Results(
        {"results": {"t": {"all,none": figure}}, "datasets": {"t": {"shown": ""}}}, {"t": rows}
    )


def test_groups_that_are_all_right_change_by_set_with_an_interval_and_a_test(params_with):
    """Two questions of each of 40 sets, each asked of two figures. 12 sets are newly right."""
    p = params_with(**{"evaluate.resamples": 2000, "evaluate.seed": 0})
    asked = [
        (of, question, f"image {of} {figure}", figure)
        for of in range(40)
        for question in range(2)
        for figure in range(2)
    ]
    before = groups_answered([(*row[:3], row[3] == 0) for row in asked])  # one figure wrong
    after = groups_answered([(*row[:3], row[3] == 0 or row[0] < 12) for row in asked])
    found = regression.comparison(before, after, p.evaluate)
    (base, tuned, change, low, high, gained, lost) = (
        found[f"lm_eval/t/all/{what}"]
        for what in ("base", "tuned", "change", "change_low", "change_high", "gained", "lost")
    )
    assert (base, tuned, change, gained, lost) == (0, 0.3, 0.3, 24, 0)
    # Of a share of 40 sets, not of 80 questions: both questions of a set change together.
    spread = (0.3 * 0.7 / 40) ** 0.5
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_groups_that_share_an_image_are_resampled_together():
    def row(group, image):
        return {"doc_id": 0, "images": [image], "metrics": {"all": [group, True]}}

    rows = [row("a", "1"), row("b", "2"), row("c", "3"), row("b", "1"), row("d", "4")]
    rows += [row("c", "5"), row("d", "2")]  # a, b and d are joined, c is not
    (before, after), labels = regression.of_groups("all", rows, rows)
    assert before.tolist() == after.tolist() == [1.0] * 4
    assert labels[0] == labels[1] == labels[3] != labels[2]
    assert regression.of_groups("other", rows, rows)[1] == []


def test_f1s_change_has_the_interval_of_resampling_f1_itself(params_with, amber):
    """AMBER's, of 60 images with several questions each: the linear parts against the ratio."""
    import numpy as np

    p = params_with(**{"evaluate.resamples": 2000, "evaluate.seed": 0})
    random = np.random.default_rng(1)
    asked = [
        (image, {"answer": str(truth), "dimension": "existence"})
        for image in range(60)
        for truth in random.choice(["yes", "no"], size=random.integers(4, 16))
    ]

    def answered(share):
        rows: list[dict[str, Any]] = []
        for at, (image, doc) in enumerate(asked):
            other = "no" if doc["answer"] == "yes" else "yes"
            said = doc["answer"] if random.random() < share else other
            f1 = list(amber.judged(doc, [said])["f1"])
            rows.append(
                {"doc_id": at, "images": [str(image)], "filter": "none", "metrics": {"f1": f1}}
            )
        figure = ratio([row["metrics"]["f1"] for row in rows])
        return lm_eval.Results(
            {"results": {"t": {"f1,none": figure}}, "datasets": {"t": {"shown": ""}}}, {"t": rows}
        )

    before, after = answered(0.6), answered(0.75)
    found = regression.comparison(before, after, p.evaluate)
    parts = [
        np.array(
            [
                np.sum([r["metrics"]["f1"] for r in of.samples["t"] if r["images"] == [str(i)]], 0)
                for i in range(60)
            ]
        )
        for of in (before, after)
    ]
    drawn = []
    for _ in range(2000):
        images = random.integers(0, 60, 60)
        old, new = (part[images].sum(axis=0) for part in parts)
        drawn.append(new[0] / new[1] - old[0] / old[1])
    ends = (found["lm_eval/t/f1/change_low"], found["lm_eval/t/f1/change_high"])
    assert ends == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.008)
