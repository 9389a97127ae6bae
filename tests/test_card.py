"""The model card: metadata that the Hub's library reads back, licences, and texts that try to break
it."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML

from stages.evaluation.catalogue import KEYS
from stages.evaluation.catalogue import METRICS as CATALOGUE
from stages.families import known, qwen2_5_vl, qwen3_vl
from stages.params import params
from stages.params.losses import LOSSES
from stages.reporting import card
from stages.reporting.card import Licence
from stages.sources.kinds import KINDS
from stages.sources.manifest import Source
from tests.contracts import PRESETS, preset_of

ROOT = Path(__file__).parent.parent
EASY_VQA = {
    "kind": "easy-vqa",
    "repo": "easy-vqa",
    "revision": None,
    "commit": "1.0",
    "licence": "MIT",
    "files": [{"path": "a.png", "size": 100, "sha256": "0"}],
}
TOPICS = EASY_VQA | {
    "kind": "hub",
    "repo": "helehan/topic-overwrite",
    "commit": "8" * 40,
    "licence": "cc-by-nc-4.0",
}
LOCAL = {
    "kind": "path",
    "repo": None,
    "revision": None,
    "commit": None,
    "licence": None,
    "files": [
        {"path": "config.json", "size": 1_000, "sha256": "0"},
        {"path": "model.safetensors", "size": 2_906_512, "sha256": "0123456789abcdef" * 4},
    ],
}
QWEN = LOCAL | {
    "kind": "hub",
    "repo": "Qwen/Qwen3-VL-4B-Instruct",
    "commit": "e" * 40,
    "licence": "apache-2.0",
}
METRICS: dict[str, float] = {
    "pairs": 799,
    "images": 799,
    "win_rate": 0.98373,
    "win_rate_low": 0.973717,
    "win_rate_high": 0.992491,
    "reward_margin": 0.836794,
    "base_accuracy": 0.724656,
    "tuned_accuracy": 0.98373,
    "accuracy_change": 0.259074,
    "accuracy_change_low": 0.227785,
    "accuracy_change_high": 0.290363,
}
MORE = {
    "chosen_logps_change": -1.5,
    "rejected_logps_change": -7.9,
    "rejected_logps_change_low": -8.1,
    "rejected_logps_change_high": -7.7,
    "questions": 1000,
    "base_correct": 0.395,
    "tuned_correct": 0.929,
    "correct_change": 0.534,
    "control_pairs": 400,
    "win_rate_blank": 0.61,
    "win_rate_blank_low": 0.56,
    "win_rate_blank_high": 0.66,
    "win_rate_over_blank": 0.37,
    "longer_wins": 0.5,
    "lm_eval/pope_random/acc/base": 0.8,
    "lm_eval/pope_random/acc/tuned": 0.85,
    "lm_eval/pope_random/acc/change": 0.05,
}
PREPROCESS = {"rows_in": 4000, "rows_kept": 3932, "rows_left_out": 68}
FORMATTED = {
    "kept_by_split": {"train": 2713, "validation": 420, "test": 799},
    "left_out": {"longer_than_cutoff_len": 7},
}
ADAPTER = {
    "base_model_name_or_path": "models/base",
    "peft_type": "LORA",
    "peft_version": "0.18.1",
    "r": 8,
}
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
Render = Callable[..., str]


@pytest.fixture
def rendered(params_with: Callable[..., params.Params]) -> Render:
    """``rendered(parameters, metrics=…)``: the demo's card with other inputs."""

    def render(parameters: Mapping[str, Any] | None = None, **inputs: Any) -> str:
        plain: dict[str, Any] = {
            "metrics": METRICS,
            "preprocess": PREPROCESS,
            "formatted": FORMATTED,
            "data": EASY_VQA,
            "model": LOCAL,
            "configuration": "stage: dpo\npref_beta: 0.1\n",
            "adapter": ADAPTER,
            "family": qwen3_vl.FAMILY,
        }
        return card.render(params_with(**(parameters or {})), **(plain | inputs))

    return render


@pytest.fixture
def four_b(rendered: Render) -> Render:
    """The same for Qwen3-VL-4B on topic-overwrite."""
    preset = params.load(ROOT / "params" / "qwen3-vl-4b.yaml")
    source = preset.model.source.model_dump(mode="json")

    def render(**inputs: Any) -> str:
        return rendered({"model.source": source}, **({"data": TOPICS, "model": QWEN} | inputs))

    return render


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def headings(text: str) -> list[str]:
    """Of the page, not of comments in blocks of code."""
    body = re.sub(r"(?ms)^(`{3,}).*?^\1$", "", ModelCard(text).text)
    return re.findall(r"(?m)^#+ (.*)$", body)


def measured(text: str) -> dict[str, float]:
    """Metric names and values of model-index."""
    return {
        metric["name"]: metric["value"]
        for result in metadata(text)["model-index"][0]["results"]
        for metric in result["metrics"]
    }


# metadata


def test_the_hub_reads_the_facts_of_the_4b_model(four_b):
    found = metadata(four_b(metrics=METRICS | MORE))
    assert found["base_model"] == "Qwen/Qwen3-VL-4B-Instruct"
    assert found["datasets"] == ["helehan/topic-overwrite"]
    assert found["license"] == "cc-by-nc-4.0"
    assert found["library_name"] == "peft"
    assert found["pipeline_tag"] == "image-text-to-text"
    assert found["language"] == ["en"]
    assert {"dpo", "lora", "llama-factory", "preference-tuning", "qwen3-vl"} <= set(found["tags"])
    index = found["model-index"][0]
    assert index["name"] == "Qwen3-VL-4B-Instruct-dpo-adapter"
    assert index["results"][0]["dataset"]["revision"] == "8" * 40


def test_the_index_has_the_measured_values_and_only_those(rendered):
    assert measured(rendered()) == {
        "Win rate over the base": 0.98373,
        "Preference accuracy": 0.98373,
    }
    more = measured(rendered(metrics=METRICS | MORE))
    assert more["Right answers"] == 0.929
    assert more["pope_random acc"] == 0.85
    assert len(more) == 4


def test_the_index_tells_pairs_held_out_by_image_from_the_own_questions_of_the_data(four_b):
    found = metadata(four_b(metrics=METRICS | MORE))["model-index"][0]["results"]
    datasets = {
        metric["name"]: {key: value for key, value in result["dataset"].items() if key != "type"}
        for result in found
        for metric in result["metrics"]
    }
    pairs = {"name": TOPICS["repo"], "split": "held out by image", "revision": "8" * 40}
    assert datasets["Win rate over the base"] == pairs
    assert datasets["Preference accuracy"] == pairs
    assert datasets["Right answers"] == {
        "name": f"{TOPICS['repo']}, its own test questions",
        "revision": "8" * 40,
    }


def test_the_demo_is_called_what_it_is_and_no_repository_of_the_hub_is_named(rendered):
    text = rendered(metrics=METRICS | MORE)
    found = metadata(text)
    assert not {"base_model", "datasets"} & found.keys()
    assert len(ModelCard(text).data.to_dict()["model-index"][0]["results"]) == 3
    assert len(measured(text)) == 4
    assert "**The base is a local model.**" in text
    assert "2 files, 2.9 MB" in text
    assert "say nothing about the Qwen3-VL" in text


def test_of_the_demos_base_it_is_said_that_it_was_taught_the_mistakes(rendered, four_b):
    disclosed = (
        "was deliberately taught the mistakes that the rejected answers\ncontain (`demo/make"
    )
    assert disclosed in rendered()
    assert "not how much direct preference optimization (DPO)\nhelps a real model." in rendered()
    other = {"kind": "path", "path": "my/model", "licence": None}
    assert "make_base" not in rendered({"model.source": other})
    assert "make_base" not in four_b()


def test_easy_vqa_by_lm_eval_is_called_a_cross_check_in_the_demo(rendered, four_b):
    easy = {f"lm_eval/easy_vqa/accuracy/{which}": 0.9 for which in ("base", "tuned", "change")}
    for metrics, skill in (
        (METRICS | MORE | easy, "the questions above"),
        (METRICS | easy, "that of the pairs"),
    ):
        text = rendered(metrics=metrics)
        assert f"`easy_vqa` is the same skill as {skill}, by another path: a cross-check" in text
    assert "cross-check" not in rendered(metrics=METRICS | MORE)  # another task
    assert "cross-check" not in four_b(metrics=METRICS | MORE | easy)


def test_a_base_without_commit_is_pinned_by_the_digest_of_its_first_weights_file(rendered, four_b):
    text = rendered()
    first = "whose `model.safetensors` has a SHA-256 that begins with `0123456789ab` |"
    assert f"| base model | `demo/model` {first}" in text
    shards = [
        {"path": f"model-{i}.safetensors", "size": 1, "sha256": digit * 64}
        for i, digit in ((2, "b"), (1, "a"))
    ]
    sharded = rendered(model=LOCAL | {"files": shards})
    assert "`model-1.safetensors` has a SHA-256 that begins with `aaaaaaaaaaaa` |" in sharded
    assert "| base model | `demo/model` at `unknown` |" in rendered(model=LOCAL | {"files": []})
    assert f"| base model | `{QWEN['repo']}` at `{'e' * 40}` |" in four_b()


def test_a_model_of_the_hub_is_not_called_local(four_b):
    text = four_b()
    assert "local model" not in text
    assert "`Qwen/Qwen3-VL-4B-Instruct` on the Hugging Face Hub, at commit `eeee" in text


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_its_name_and_tag(rendered, loss):
    text = rendered({"train.loss": loss})
    assert metadata(text)["tags"][0] == LOSSES[loss].tag
    assert LOSSES[loss].words in text
    assert LOSSES[loss].citation in text


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_without_a_reference_and_no_others_say_what_the_win_rate_compares(rendered, loss):
    text = rendered({"train.loss": loss})
    assert (card.NO_REFERENCE in text) == (not LOSSES[loss].reference)
    if not LOSSES[loss].reference:
        assert text.index(card.NO_REFERENCE) < text.index("| measure | base |")


# licences


@pytest.mark.parametrize(
    ("data", "base", "expected"),
    [
        ("cc-by-nc-4.0", "apache-2.0", Licence("cc-by-nc-4.0")),
        ("MIT", "apache-2.0", Licence("apache-2.0")),
        ("apache-2.0", "mit", Licence("apache-2.0")),
        ("CC BY-NC 4.0", "Apache-2.0", Licence("cc-by-nc-4.0")),
        ("MIT", "MIT", Licence("mit")),
        (None, "apache-2.0", Licence("unknown")),
        ("cc-by-nc-4.0", None, Licence("unknown")),
        (None, None, Licence("unknown")),
        ("", "mit", Licence("unknown")),
        ("mit", "qwen-research", Licence("other", "mit and qwen-research")),
        ("cc-by-sa-4.0", "cc-by-nc-4.0", Licence("other", "cc-by-sa-4.0 and cc-by-nc-4.0")),
        ("gemma", "gemma", Licence("other", "gemma")),
        ("mit, apache-2.0", "mit", Licence("other", "mit,-apache-2.0 and mit")),
    ],
)
def test_the_more_restrictive_licence_holds_and_what_is_unknown_stays_unknown(data, base, expected):
    assert card.licence_of(data, base) == expected


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "CC BY-NC 4.0", "x-non-commercial", "by-nc"])
def test_a_licence_that_forbids_commerce_is_seen(licence):
    assert card.is_non_commercial(licence)


@pytest.mark.parametrize("licence", [None, "", "mit", "apache-2.0", "license-incl", "ncsa"])
def test_other_licences_are_not_taken_for_it(licence):
    assert not card.is_non_commercial(licence)


def test_restricted_data_put_a_notice_before_everything_else(four_b, rendered):
    notice = "**Not for commercial use.**"
    text = four_b()
    assert 0 < text.index(notice) < text.index("## Use")
    assert "data set under `cc-by-nc-4.0`" in text
    assert notice not in rendered()
    both = four_b(model=QWEN | {"licence": "cc-by-nc-4.0"})
    assert "a data set under `cc-by-nc-4.0` and a base model under `cc-by-nc-4.0`," in both
    # The base's licence being unknown takes the notice away no more than the base's being open.
    unknown = rendered(data=TOPICS)
    assert metadata(unknown)["license"] == "unknown"
    assert notice in unknown


def test_an_unknown_licence_is_said_plainly(rendered):
    text = rendered()
    assert metadata(text)["license"] == "unknown"
    assert "**The licence of this adapter is unknown**, because that of the base model is" in text
    both = rendered(data=EASY_VQA | {"licence": None})
    assert "because that of the data and of the base model is" in both


def test_licences_that_no_rule_orders_are_both_named(four_b):
    text = four_b(model=QWEN | {"licence": "qwen-research"})
    found = metadata(text)
    assert (found["license"], found["license_name"]) == ("other", "cc-by-nc-4.0 and qwen-research")
    assert "The licences of data and base were not reduced to one" in text


def test_data_and_base_keep_their_own_licences_on_the_page(four_b):
    text = four_b()
    assert "| training data, `helehan/topic-overwrite` | `cc-by-nc-4.0` |" in text
    assert "| base model, `Qwen/Qwen3-VL-4B-Instruct` | `apache-2.0` |" in text


# figures


def test_figures_have_their_intervals(rendered):
    text = rendered(metrics=METRICS | MORE)
    assert "98.4% [97.4, 99.2]" in text
    accuracy = "| 72.5% | 98.4% | +25.9 points [+22.8, +29.0] |"
    assert f"| preference accuracy, 799 pairs {accuracy}" in text
    control = CATALOGUE["win_rate_blank"]
    assert f"| {control.meaning} | 61.0% [56.0, 66.0] | {control.alarm} |" in text
    assert "| lm-eval `pope_random`, `acc` | 0.800 | 0.850 | +0.050 |" in text
    assert "| `longer_wins` | 50.0% |" in text


def test_pairs_are_counted_as_they_were_used(rendered):
    text = rendered()
    assert "| pairs used | 2,713 train, 420 validation, 799 test |" in text
    assert "| rows left out | 75 |" in text  # 68 by preprocess, 7 by format


def test_chosen_answers_that_lost_probability_are_told(rendered):
    lost = rendered(metrics=METRICS | MORE).replace("\N{MINUS SIGN}", "-")
    assert "**Log-probs** of the chosen answers changed by -1.50 nats" in lost
    assert "the rejected\n  ones by -7.90 [-8.10, -7.70]." in lost
    assert "The margin grew although" in lost
    gained = rendered(metrics=METRICS | MORE | {"chosen_logps_change": 0.5})
    assert "changed by +0.50 nats" in gained


@pytest.mark.parametrize(
    "others",
    [{"chosen_logps_change": 0.5}, {"reward_margin": -0.2}, {"reward_margin": float("nan")}],
)
def test_a_margin_is_not_said_to_have_grown_where_it_did_not_or_chosen_did_not_fall(
    rendered, others
):
    assert "The margin grew" not in rendered(metrics=METRICS | MORE | others)


def test_log_probs_that_are_not_known_are_not_told(rendered):
    unknown = {"rejected_logps_change": float("nan")}
    assert "**Log-probs**" not in rendered(metrics=METRICS | MORE | unknown)
    assert "**Log-probs**" not in rendered()


def test_pixels_are_a_range_only_where_they_are_one(rendered):
    assert "images of exactly 16,384 pixels (others" in rendered()
    ranged = rendered({"format.image_min_pixels": 1024})
    assert "images of 1,024 to 16,384 pixels (others" in ranged


def test_a_run_without_questions_controls_and_tasks_has_a_card(rendered):
    text = rendered()
    assert headings(text)[1:] == HEADINGS
    assert "None were measured." in text
    assert "**Right answers**" not in text
    assert "lm-eval" not in text


def test_a_figure_that_is_not_a_number_is_left_out(rendered):
    metrics = METRICS | {"win_rate": float("nan"), "tuned_accuracy": None}
    assert "model-index" not in metadata(rendered(metrics=metrics))


def test_what_the_card_gives_the_index_has_a_name_in_the_catalogue():
    assert all(CATALOGUE[key].title for key in card.INDEXED)
    assert {key for key in METRICS | MORE if not key.startswith("lm_eval/")} <= set(KEYS)


def test_a_base_in_few_bits_is_told(rendered):
    assert "on the base in 4 bits" in rendered({"model.quantization_bit": 4})
    assert "bits" not in rendered()


# texts that others wrote


NASTY = (
    "mit\n---\nlicense: cc0-1.0\n# Owned | `x` ``y`` <script>alert(1)</script> {{ p }} [a](b)\x1b"
)


def test_a_card_of_several_sources_describes_each_and_takes_the_strictest_licence(four_b):
    def part(name: str, kind: str, repo: str | None, licence: str) -> dict[str, Any]:
        columns = None if kind == "sharegpt" else {"image": "picture"}
        pinned = {"revision": "main", "commit": "8" * 40} if kind == "hub" else {}
        return (
            dict.fromkeys(("revision", "commit"))
            | pinned
            | {
                "name": name,
                "kind": kind,
                "repo": repo,
                "licence": licence,
                "columns": columns,
            }
        )

    data = EASY_VQA | {
        "kind": "several",
        "repo": "helehan/topic-overwrite, mine",
        "commit": None,
        "licence": "CC BY-NC 4.0",
        "files": [],
        "parts": [
            part("tpo", "hub", "helehan/topic-overwrite", "CC BY-NC 4.0"),
            part("mine", "sharegpt", None, "MIT"),
        ],
    }
    text = four_b(data=data)
    assert "license: cc-by-nc-4.0" in text
    assert "`helehan/topic-overwrite` on the Hugging Face Hub (CC BY-NC 4.0); `mine`, " in text
    assert "prepared for LLaMA-Factory (0, 0 bytes), published nowhere" in text
    assert "2411.17265" in text


def test_no_text_of_a_source_adds_a_heading_a_row_or_a_line_of_metadata(four_b):
    clean = four_b()
    adapter = ADAPTER | {"base_model_name_or_path": NASTY, "peft_version": NASTY}
    text = four_b(
        data=TOPICS | {"licence": NASTY, "commit": NASTY},
        model=QWEN | {"licence": NASTY, "commit": NASTY},
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


def test_a_configuration_can_not_leave_its_block(rendered):
    text = rendered(configuration="a: |\n  ```\n  # Owned\n")
    assert headings(text)[1:] == HEADINGS
    assert "````yaml\n" in text


# what must not be in it


def test_no_path_of_a_machine_is_shown(rendered):
    configuration = (
        "model_name_or_path: models/base\n"
        "deepspeed: /elsewhere/secret/ds.json\n"
        "logging_dir: '~/secret/logs'\n"
        "files:\n- C:\\secret\\a.json\n"
    )
    text = rendered(
        {"model.source": {"kind": "path", "path": "/elsewhere/secret/my-model", "licence": None}},
        configuration=configuration,
    )
    assert "secret" not in text
    assert "base_model" not in metadata(text)
    assert "moves `my-model` towards" in text
    assert "deepspeed: ds.json\n" in text
    assert "logging_dir: 'logs'\n" in text
    assert "- a.json\n" in text
    assert "model_name_or_path: models/base\n" in text


def test_the_same_facts_give_the_same_bytes(rendered):
    assert rendered() == rendered()
    shuffled = dict(reversed(list((METRICS | MORE).items())))
    assert rendered(metrics=shuffled) == rendered(metrics=METRICS | MORE)


# facts that stand in two places


def test_the_template_reads_no_parameter_that_the_module_does_not_hand_it():
    """The contract tests look for parameters in Python files only."""
    template = card.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"\{[{%][^}]*\bp\.", template)


def test_citations_are_those_of_the_citation_file():
    cited = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    entries = [*card.CITATIONS.values(), LOSSES["sigmoid"].citation]
    entries += [family.citation for family in known.FAMILIES]
    numbers = [reference["identifiers"][0]["value"] for reference in cited["references"]]
    assert all(any(number in text for number in numbers) for text in card.CITATIONS.values())
    for number, reference in zip(numbers, cited["references"], strict=True):
        (entry,) = (text for text in entries if number in text)
        flat = " ".join(entry.split())
        assert f"title = {{{reference['title']}}}" in flat
        assert f"year = {{{reference['year']}}}" in flat
        authors = " and ".join(
            f"{a['family-names']}, {a['given-names']}" if "name" not in a else f"{{{a['name']}}}"
            for a in reference["authors"]
        )
        assert f"author = {{{authors}}}" in flat


def test_tag_and_paper_are_those_of_the_bases_family(rendered):
    other = qwen2_5_vl.FAMILY
    text = rendered(family=other)
    assert other.tag in metadata(text)["tags"]
    assert "qwen3-vl" not in metadata(text)["tags"]
    assert "2502.13923" in text
    assert "2511.21631" not in text


def test_the_paper_behind_the_data_is_cited_only_with_the_data(four_b, rendered):
    assert "2411.17265" in four_b()
    assert "2411.17265" not in rendered()


def test_the_data_of_every_preset_are_known():
    for path in PRESETS:
        source = preset_of(path).data.source
        if source.kind == "path":  # one's own, of which nothing is known
            continue
        fetched = Source(source.kind, getattr(source, "repo", None), None, None, None, ())
        assert KINDS[source.kind].about(fetched)


# the code on the page


@pytest.mark.slow
def test_the_code_on_the_page_loads_the_adapter_and_answers(
    rendered, adapter_dir, tmp_path, monkeypatch, capsys
):
    text = rendered()
    (snippet,) = re.findall(r"(?s)```python\n(.*?)```", text)
    assert '"models/adapter"' in snippet
    assert 'base = "demo/model"' in snippet
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "adapter").symlink_to(adapter_dir)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    Image.new("RGB", (128, 128), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
