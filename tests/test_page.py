"""The page: what it shows, that it is well formed, and that it asks for nothing."""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from stages.evaluation import catalogue
from stages.evaluation.catalogue import BOTH, LOG_PROB, METRICS
from stages.pairs.refusals import REASONS
from stages.params.losses import LOSSES
from stages.reporting import card, page
from stages.reporting.inputs import folder_name, origin, parameter_count
from stages.reporting.markup import rows_of
from stages.reporting.page import LONGEST_SIDE, funnel, picture, render
from tests.experiment import (
    DEMO,
    EASY_VQA,
    QWEN,
    TOPICS,
    Page,
    answer_table,
    inputs_with,
    metrics_of,
    pair_rows,
    picture_of,
    score_table,
    slice_table,
)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_shows_its_images_and_fits_a_phone_in_a_real_browser(tmp_path, width):
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        missing = "neither chromium nor google-chrome is installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    texts = answer_table()
    texts.loc[0, "tuned_answer"] = "unbroken" * 200
    page = html.escape(render(inputs_with(answers=texts)))
    look = (
        "const inner = this.contentDocument, { scrollWidth, clientWidth } = inner.documentElement; "
        "this.title = [scrollWidth <= clientWidth, [...inner.images].every(i => i.naturalWidth)]"
    )
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{page}" '
    (tmp_path / "frame.html").write_text(f'{frame} onload="{look}"></iframe>', encoding="utf-8")
    done = subprocess.run(
        [
            *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *(f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert 'title="true,true"' in done.stdout


# The page


def test_the_page_is_well_formed_html_with_unique_ids_and_links_that_lead_somewhere():
    html = render(inputs_with())
    page = Page(html)
    assert not page.wrong
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"].removeprefix("#") for a in page.all("a") if a["href"].startswith("#")}
    targets |= {a["aria-labelledby"] for a in page.all("section")}
    assert len(targets) == 8
    assert targets <= set(ids)
    tables = re.findall(r"(?s)<table.*?</table>", html)
    outside_of_cards = [table for table in tables if "log-prob per token</th>" not in table]
    assert len(outside_of_cards) >= 7
    assert all("<caption>" in table for table in outside_of_cards)
    assert all('scope="' in head for head in re.findall(r"<th\b[^>]*>", html))


def test_the_policy_of_the_page_forbids_everything_but_its_own_styles_and_images():
    page = Page(render(inputs_with()))
    (policy,) = [
        a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert directives.pop("img-src") == "data:"
    assert directives.pop("style-src") == "'unsafe-inline'"
    assert set(directives.values()) == {"'none'"}
    assert not page.all("script")


def test_the_page_names_no_address_but_those_of_model_and_data_on_the_hub():
    html = render(inputs_with(model=QWEN, data=[TOPICS, EASY_VQA]))
    assert set(re.findall(r"(?i)\b[a-z]+://[^\s\"'<]+", html)) == {
        f"https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct/tree/{'e' * 40}",
        f"https://huggingface.co/datasets/helehan/topic-overwrite/tree/{'8' * 40}",
    }
    assert not re.search(r"(?i)@import|url\(\s*['\"]?(?!#)", html)
    text = Page(html).text
    assert "on helehan/topic-overwrite, easy-vqa" in text
    assert "easy-vqa, version 1.0, licence MIT" in text


HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>' &amp; {{ 7 * 7 }} {% raw %}",
    "مرحبا بالعالم \u202e",
    "🦊 👩‍👩‍👧 日本語 $x^2$",
    "",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_the_data_are_shown_as_they_are_and_never_run(text):
    pairs, answers = pair_rows(), answer_table()
    for pair in pairs:
        pair["chosen"] = {"role": "assistant", "content": text}
    answers["tuned_answer"] = text
    answers["question"] = text
    html = render(
        inputs_with(test_pairs=pairs, answers=answers, slices=slice_table().assign(slice=text))
    )
    page = Page(html)
    assert not page.wrong
    assert not page.all("script")
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert {a["src"][:5] for a in page.all("img")} == {"data:"}
    assert " ".join((text or "(empty)").split()) in page.text


def test_a_long_answer_is_folded_and_still_there_in_whole():
    answer = "So it continues. " * 700
    answers = answer_table().assign(tuned_answer=answer)
    html = render(inputs_with(answers=answers))
    folded = re.findall(r"(?s)<details class=\"long\">.*?</details>", html)
    assert folded
    assert all(answer in text and "11,900 characters" in text for text in folded)
    assert '<details class="long">' not in render(inputs_with())


def test_every_image_is_inside_small_and_described():
    sizes = {"large": 900, "small": 64}
    html = render(
        inputs_with(
            image=lambda name: picture_of(1, sizes["large" if "0" * 31 in name else "small"], "PNG")
        )
    )
    images = Page(html).all("img")
    assert images
    for attributes in images:
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as one:
            assert str(one.width) == attributes["width"]
            assert max(one.size) <= LONGEST_SIDE
        assert attributes["alt"].startswith("Image of the question “")
        assert "Chosen answer: “" in attributes["alt"]
    widths = {attributes["width"]: attributes.get("class") for attributes in images}
    assert widths == {"64": "small", "320": None}


@pytest.mark.parametrize("content", [None, b"", b"not an image", picture_of(1)[:200]])
def test_an_image_that_is_missing_or_broken_is_said_to_be_missing(content):
    assert picture(content) is None
    page = Page(render(inputs_with(image=lambda _: content)))
    assert not page.all("img")
    assert "no image" in page.text


# Metrics in tables


def test_every_metric_is_on_the_page_with_its_documented_meaning():
    values = metrics_of()
    text = Page(render(inputs_with(metrics=values))).text
    counted = {"control_pairs", "audited_pairs", "audited_images"}
    both = {key for one in BOTH for key in (one.base, one.tuned, one.change)}
    for one in BOTH:
        assert " ".join(one.meaning.format(model="the model").split()) in text, one.key
    for key, metric in METRICS.items():
        if key in values and key not in counted:
            assert catalogue.shown(key, values[key]) in text, key
            assert key in both or " ".join(metric.meaning.split()) in text, key


def test_metrics_without_optional_groups_or_intervals_still_make_a_page():
    values = {"pairs": 3, "images": 1, "win_rate": 1.0, "ties": 0, "reward_margin": 0.2}
    answers = answer_table(0, 0).reindex(columns=answer_table().columns)
    page = Page(render(inputs_with(metrics=values, answers=answers)))
    assert not page.wrong
    for sentence in (
        "No clear change of preference.",
        "Few test images (1): read every figure with great care.",
        "no interval",
        "No control was computed.",
        "no questions with known answers",
    ):
        assert sentence in page.text, sentence


# Data, method, provenance


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "simpo"])
def test_a_run_is_called_by_its_loss_and_says_where_the_loss_has_no_reference(loss):
    text = Page(render(inputs_with({"train.loss": loss}))).text
    name = LOSSES[loss].words
    assert f"Method {name[0].upper()}{name[1:]}" in text
    assert f"Loss {loss}, beta 0.1, plus 0.5 times the SFT loss on chosen" in text
    assert (card.NO_REFERENCE in text) == (not LOSSES[loss].reference)
    assert "lora, rank 8, 12,345 trained parameters" in text


COMPARED = {"pairs": 16, "policy_difference": 3.1e-6, "largest_logps": 41.2}


@pytest.mark.parametrize(
    ("first_batch", "words"),
    [
        (COMPARED, "differ by at most 3e-06 nats from LLaMA-Factory's own (the largest log-prob"),
        (COMPARED | {"reference_difference": 0.0002}, "looked up, by at most 0.0002 (the largest"),
        ({"stock_because": "why"}, "Forward pass LLaMA-Factory's own: why Test"),
        ({}, "Forward pass LLaMA-Factory's own Test"),
    ],
)
def test_a_run_says_how_its_log_probs_compared_with_stock(first_batch, words):
    assert words in Page(render(inputs_with(first_batch=first_batch))).text


def test_the_funnel_accounts_for_every_row():
    inputs = inputs_with()
    rows = funnel(inputs.preprocess, inputs.format)
    left = 0
    for row in rows:
        if row["left_out"]:
            left -= row["count"]
        else:
            assert left in (0, row["count"]), row
            left = row["count"]
    assert [row["count"] for row in rows if not row["left_out"]] == [60, 56, 55]
    assert REASONS["missing_field"] in {row["detail"] for row in rows}
    told = "Pairs of each image: 2 on average; of each of 5 different questions: 11; by origin: "
    assert told in Page(render(inputs)).text


@pytest.mark.parametrize(
    ("path", "name"), [("demo/model", "demo/model"), ("/opt/secret/m", "m"), ("../up/m", "m")]
)
def test_a_model_of_a_folder_has_its_name_and_no_place_on_this_machine(tmp_path, path, name):
    arrays = {"a": np.zeros((3, 4), np.float32), "b": np.zeros((), np.float32)}
    save_file(arrays, tmp_path / "m.safetensors")
    source = {key: getattr(DEMO, key) for key in ("kind", "repo", "commit", "licence", "files")}
    (tmp_path / "SOURCE.json").write_text(json.dumps(source))
    found = origin(tmp_path, folder_name(SimpleNamespace(path=Path(path))))
    assert (found.name, found.parameters, found.size) == (name, 13, "2.9 MB")
    assert found.weights == DEMO.files[1]
    assert parameter_count(tmp_path / "none") is None


# The gallery: extremes of all pairs, each once, with own answers where there are any


def card_of(row, inputs):
    by_id = {pair["id"]: pair for pair in inputs.test_pairs}
    return page.pair_card(row, by_id[row["id"]], inputs.image)


def test_the_gallery_shows_extremes_and_flips_each_pair_once():
    scores = score_table()
    won, lost, changed = page.extremes(scores, answer_table(), 6)
    assert list(won["reward_margin"]) == sorted(scores["reward_margin"], reverse=True)[:6]
    assert list(lost["reward_margin"]) == [m for m in sorted(scores["reward_margin"]) if m < 0][:6]
    assert len(changed) == 6
    ids = [*won["id"], *lost["id"], *changed["id"]]
    assert len(ids) == len(set(ids))
    assert (changed["base_margin"] * changed["tuned_margin"] < 0).all()
    change = (changed["tuned_margin"] - changed["base_margin"]).abs()
    assert change.is_monotonic_decreasing


def test_a_card_gives_log_probs_per_token_and_says_which_answer_was_given():
    inputs = inputs_with()
    (row,) = rows_of(page.extremes(inputs.scores, inputs.answers, 1)[0])
    card = card_of(row, inputs)
    side, _, logps = card["answers"][0]
    assert side == "chosen"
    assert logps == [LOG_PROB.text(row[f"{of}_chosen_logps"] / 8) for of in ("reference", "policy")]
    (pair,) = [pair for pair in inputs.test_pairs if pair["id"] == row["id"]]
    said = {"base": pair["rejected"]["content"], "tuned": pair["chosen"]["content"]}
    assert dict(card["own"]) == said
    assert card["margin"] == f"+{row['reward_margin']:.2f}"


def test_questions_show_each_grade_and_mark_right_and_wrong_in_words():
    asked = page.questions(answer_table(), lambda _: None, 2)
    grades = ("newly right", "newly wrong", "both wrong", "both right")
    assert [row["grade"] for row in asked] == [grade for grade in grades for _ in range(2)]
    assert asked[0]["answers"][1][0].startswith("The shape is ")
    marks = [tuple(right for _, right in row["answers"]) for row in asked]
    assert marks[::2] == [(False, True), (True, False), (False, False), (True, True)]
    assert dict(page.grades(answer_table())) == dict.fromkeys(grades, 4)
