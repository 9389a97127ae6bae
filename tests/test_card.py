"""The model card: metadata that the Hub's library reads back, licences, and texts that try to break
it."""

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML

from stages.evaluation.catalogue import METRICS
from stages.families import known
from stages.params.losses import LOSSES
from stages.reporting import card, page
from stages.reporting.card import Licence
from tests.contracts import preset_of
from tests.experiment import DEMO, EASY_VQA, QWEN, ROOT, TOPICS, around, inputs_with

HEADINGS = [
    "Use",
    "What was measured",
    "Controls",
    "Training data",
    "Training",
    "Intended use and limits",
    "Licence",
    "Reproduction",
    "Citation",
]
LEAST = {key: 1 for key in ("pairs", "images")} | around("win_rate", 0.95, 0.03)


def rendered(parameters: Any = None, family: Any = known.FAMILIES[0], **changed: Any) -> str:
    """The demo's card with other inputs."""
    return card.render(inputs_with(parameters, **changed), family)


def four_b(**changed: Any) -> str:
    """The same for Qwen3-VL-4B on topic-overwrite."""
    return rendered(**({"data": [TOPICS], "model": QWEN} | changed))


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def headings(text: str) -> list[str]:
    """Of the page, not of comments in blocks of code."""
    body = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", ModelCard(text).text)
    return re.findall(r"(?m)^#+ (.*)$", body)


def measured(text: str) -> dict[str, tuple[float, dict[str, Any]]]:
    """Metric names of model-index with values and data sets."""
    return {
        metric["name"]: (metric["value"], result["dataset"])
        for result in metadata(text)["model-index"][0]["results"]
        for metric in result["metrics"]
    }


# metadata


def test_the_hub_reads_the_facts_of_the_4b_model():
    found = metadata(four_b())
    assert found["base_model"] == "Qwen/Qwen3-VL-4B-Instruct"
    assert found["datasets"] == ["helehan/topic-overwrite"]
    assert found["license"] == "cc-by-nc-4.0"
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "image-text-to-text"
    assert {"dpo", "lora", "llama-factory", "preference-tuning", "qwen3-vl"} <= set(found["tags"])
    assert found["model-index"][0]["name"] == "Qwen3-VL-4B-Instruct-dpo-adapter"


def test_the_index_tells_pairs_held_out_by_image_from_the_own_questions_of_the_data():
    name = TOPICS.repo
    pairs = {"name": name, "type": name, "split": "held out by image", "revision": "8" * 40}
    questions = {"name": f"{name}, its own test questions", "type": name, "revision": "8" * 40}
    assert measured(four_b()) == {
        "Chosen-versus-rejected win rate, by implicit reward": (0.95, pairs),
        "Preference accuracy": (0.95, pairs),
        "Right answers": (0.9, questions),
        "pope_random acc": (0.81, {"name": "pope_random (lm-eval)", "type": "pope_random"}),
    }
    unknown = LEAST | {"win_rate": float("nan"), "tuned_accuracy": None}
    assert "model-index" not in metadata(rendered(metrics=unknown))


def test_the_demo_is_called_what_it_is_and_no_repository_of_the_hub_is_named():
    text = rendered()
    assert not {"base_model", "datasets"} & metadata(text).keys()
    assert "**The base is a local model.**" in text
    assert "2 files, 2.9 MB" in text
    assert "say nothing about the Qwen3-VL" in text
    assert "deliberately taught the mistakes that the rejected answers\ncontain (`demo/make" in text
    assert "not how much direct preference optimization (DPO)\nhelps a real model." in text
    assert "make_base" not in rendered(model=replace(DEMO, name="my/model"))
    assert "make_base" not in four_b()
    assert "local model" not in four_b()
    assert "`Qwen/Qwen3-VL-4B-Instruct` on the Hugging Face Hub, at commit `eeee" in four_b()


def test_a_base_without_commit_is_pinned_by_the_digest_of_its_first_weights_file():
    shards = [
        {"path": f"model-{i}.safetensors", "size": 1, "sha256": digit * 64}
        for i, digit in ((2, "b"), (1, "a"))
    ]
    for base, pinned in (
        (DEMO, "whose `model.safetensors` has a SHA-256 that begins with `0123456789ab`"),
        (replace(DEMO, files=shards), "whose `model-1.safetensors` has a SHA-256 that begins"),
        (replace(DEMO, files=()), "at `unknown`"),
        (QWEN, f"at `{'e' * 40}`"),
    ):
        assert f"| base model | `{base.name}` {pinned}" in rendered(model=base)


@pytest.mark.parametrize(("name", "loss"), LOSSES.items())
def test_every_loss_has_its_name_tag_and_source_and_says_where_it_has_no_reference(name, loss):
    text = rendered({"train.loss": name})
    assert metadata(text)["tags"][0] == loss.tag
    assert loss.words in text
    assert loss.paper in text
    assert (card.NO_REFERENCE in text) == (not loss.reference)
    if not loss.reference:
        assert text.index(card.NO_REFERENCE) < text.index("| measure | base |")


# licences


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("cc-by-nc-4.0", "apache-2.0"), Licence("cc-by-nc-4.0")),
        (("MIT", "apache-2.0"), Licence("apache-2.0")),
        (("MIT", "CC BY-NC 4.0", "Apache-2.0"), Licence("cc-by-nc-4.0")),
        (("MIT", "MIT"), Licence("mit")),
        ((None, "apache-2.0"), Licence("unknown")),
        (("cc-by-nc-4.0", None), Licence("unknown")),
        (("", "mit"), Licence("unknown")),
        (("mit", "qwen-research"), Licence("other", "mit and qwen-research")),
        (("cc-by-sa-4.0", "cc-by-nc-4.0"), Licence("other", "cc-by-sa-4.0 and cc-by-nc-4.0")),
        (("gemma", "gemma"), Licence("other", "gemma")),
        (("mit, apache-2.0", "mit"), Licence("other", "mit,-apache-2.0 and mit")),
    ],
)
def test_the_more_restrictive_licence_holds_and_what_is_unknown_stays_unknown(parts, expected):
    assert card.licence_of(*parts) == expected


def test_restricted_data_put_a_notice_before_everything_else():
    notice = "**Not for commercial use.**"
    text = four_b()
    assert 0 < text.index(notice) < text.index("## Use")
    assert "data set under `cc-by-nc-4.0`" in text
    assert notice not in rendered()
    both = four_b(model=replace(QWEN, licence="cc-by-nc-4.0"))
    assert "a data set under `cc-by-nc-4.0` and a base model under `cc-by-nc-4.0`," in both
    # The base's licence being unknown takes the notice away no more than the base's being open.
    assert notice in rendered(data=[TOPICS])


def test_licences_that_are_unknown_or_in_no_order_are_said_plainly():
    text = rendered()
    assert metadata(text)["license"] == "unknown"
    assert "**The licence of this adapter is unknown**, because that of the base model is" in text
    both = rendered(data=[replace(EASY_VQA, licence=None)])
    assert "because that of the data and of the base model is" in both
    other = four_b(model=replace(QWEN, licence="qwen-research"))
    found = metadata(other)
    assert (found["license"], found["license_name"]) == ("other", "cc-by-nc-4.0 and qwen-research")
    assert "The licences of data and base were not reduced to one" in other
    assert "| training data, `helehan/topic-overwrite` | `cc-by-nc-4.0` |" in other
    assert "| base model, `Qwen/Qwen3-VL-4B-Instruct` | `qwen-research` |" in other


# figures and data


def test_figures_have_their_intervals():
    text = rendered()
    accuracy = "| 72.0% [67.0, 77.0] | 95.0% [92.0, 98.0] | +23.0 points [+17.0, +29.0] |"
    assert f"| preference accuracy, 40 pairs {accuracy}" in text
    control = METRICS["win_rate_blank"]
    assert f"| {control.meaning} | 55.0% [45.0, 65.0] | {control.alarm} |" in text
    assert "| lm-eval `pope_random`, `acc` | 0.800 | 0.810 | +0.010 [-0.020" in text.replace(
        "\N{MINUS SIGN}", "-"
    )
    assert "| `longer_wins` | 50.0% [40.0, 60.0] |" in text
    assert all(METRICS[key].title for key in card.INDEXED)


def test_a_card_of_several_sources_describes_each_and_takes_the_strictest_licence():
    mine = replace(EASY_VQA, kind="path", name="mine", repo=None, commit=None)
    text = four_b(data=[TOPICS, EASY_VQA, mine])
    found = metadata(text)
    assert found["license"] == "cc-by-nc-4.0"
    assert found["datasets"] == ["helehan/topic-overwrite"]
    assert "| source | `helehan/topic-overwrite` on the Hugging Face Hub |" in text
    assert "| source | `easy-vqa`, the PyPI package |" in text
    assert "| source | `mine`, local files (0, 0 bytes), of unknown origin" in text
    assert all(card.KNOWN[each.repo]["note"] in text for each in (TOPICS, EASY_VQA))
    assert measured(text)["Preference accuracy"][1]["name"] == (
        "helehan/topic-overwrite, easy-vqa, local files"
    )


def test_the_data_of_every_preset_are_known():
    for preset in sorted((ROOT / "params").glob("*.yaml")):
        for source in preset_of(preset).data.sources.values():
            if source.kind != "path":  # one's own, of which nothing is known
                assert getattr(source, "repo", source.kind) in card.KNOWN


# texts that others wrote, and what must not be in it


NASTY = (
    "mit\n---\nlicense: cc0-1.0\n# Owned | `x` ``y`` <script>alert(1)</script> {{ p }} [a](b)\x1b"
)


def test_no_text_of_a_source_adds_a_heading_a_row_or_a_line_of_metadata():
    clean = four_b()
    adapter = {"base_model_name_or_path": NASTY, "peft_version": NASTY}
    text = four_b(
        data=[replace(TOPICS, licence=NASTY, commit=NASTY)],
        model=replace(QWEN, licence=NASTY, commit=NASTY),
        adapter=adapter,
    )
    assert metadata(text)["license"] == "other"
    assert metadata(text).keys() == metadata(clean).keys() | {"license_name"}
    assert headings(text) == headings(clean)
    assert "\x1b" not in text
    for line in ModelCard(text).text.splitlines():
        if line.startswith("| ") and "Owned" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    # Outside of code, nothing of it is left that a renderer would act on.
    visible = re.sub(r"(?s)(`+)(?!`).*?(?<!`)\1(?!`)", "", ModelCard(text).text)
    assert "<script>" not in visible
    assert "{{" not in visible


def test_a_configuration_can_not_leave_its_block_and_shows_no_path_of_a_machine():
    configuration = (
        "a: |\n  ```\n  # Owned\n"
        "model_name_or_path: models/base\n"
        "deepspeed: /elsewhere/secret/ds.json\n"
        "logging_dir: '~/secret/logs'\n"
        "files:\n- C:\\secret\\a.json\n"
    )
    text = rendered(configuration=configuration)
    assert headings(text)[1:] == HEADINGS
    assert "````yaml\n" in text
    assert "secret" not in text
    kept = ("deepspeed: ds.json\n", "logging_dir: 'logs'\n", "- a.json\n", "path: models/base\n")
    assert all(line in text for line in kept)


# facts that stand in two places


def test_citations_are_those_of_the_citation_file_and_of_what_was_used():
    cited = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    texts = [four_b(), *(rendered(family=family) for family in known.FAMILIES)]
    entries = re.findall(r"(?ms)^@\w+\{.*?^\}", "\n".join(texts))
    for reference in cited["references"]:
        number = reference["identifiers"][0]["value"]
        (entry,) = {" ".join(text.split()) for text in entries if number in text}
        assert f"title = {{{reference['title']}}}" in entry
        assert f"year = {{{reference['year']}}}" in entry
        authors = " and ".join(
            f"{a['family-names']}, {a['given-names']}" if "name" not in a else f"{{{a['name']}}}"
            for a in reference["authors"]
        )
        assert f"author = {{{authors}}}" in entry
    assert "2411.17265" in four_b()
    assert "2411.17265" not in rendered()
    other = rendered(family=known.FAMILIES[1])
    assert known.FAMILIES[1].tag in metadata(other)["tags"]
    assert "qwen3-vl" not in metadata(other)["tags"]
    assert "2502.13923" in other
    assert "2511.21631" not in other


def test_card_and_page_name_whose_terms_bind_the_data():
    of_topics = page.render(inputs_with(data=[TOPICS], model=QWEN))
    for text in (four_b(), of_topics):
        assert "its output may not be used to improve any other large language model" in text
        assert "Meta Llama 3 Community License, 1.b.v" in text
    assert "Beyond the licence" not in rendered()


# the code on the page


@pytest.mark.slow
def test_the_code_on_the_page_loads_the_adapter_and_answers(
    adapter_dir, tmp_path, monkeypatch, capsys
):
    (snippet,) = re.findall(r"(?s)```python\n(.*?)```", rendered())
    assert '"models/adapter"' in snippet
    assert 'base = "demo/model"' in snippet
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "adapter").symlink_to(adapter_dir)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    Image.new("RGB", (128, 128), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
