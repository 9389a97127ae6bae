"""The page: what it shows, that it is well formed, and that it asks for nothing."""

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from stages.evaluation import catalogue
from stages.evaluation.catalogue import BOTH, METRICS
from stages.pairs.refusals import REASONS
from stages.reporting import card, gallery, verdicts
from stages.reporting.page import Origin, forward_pass, funnel, method, parameter_count, render
from tests.experiment import (
    Page,
    answer_table,
    inputs_with,
    metrics_of,
    pair_rows,
    picture_of,
    score_table,
    slice_table,
    uncharted,
)

ROOT = Path(__file__).parent.parent

# A real browser, without a network


class Browser:
    """Headless Chromium, spoken to through its debugging pipe (file descriptors 3 and 4)."""

    def __init__(self, program: str, profile: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()

        def place() -> None:
            os.dup2(theirs_in, 203)  # out of the way first: a pipe may already be 3 or 4
            os.dup2(theirs_out, 204)
            os.dup2(203, 3)
            os.dup2(204, 4)

        self.process = subprocess.Popen(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-dev-shm-usage", "--disable-extensions", "--remote-debugging-pipe"),
                *("--disable-background-networking", "--disable-component-update"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=place,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reading, self.writing = ours_in, ours_out
        self.rest, self.last, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def next(self) -> Any:
        until = time.monotonic() + 15
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.reading], [], [], until - time.monotonic())
            assert ready, "the browser does not answer"
            piece = os.read(self.reading, 1 << 20)
            assert piece, "the browser has ended"
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, width: int, height: int = 800, scheme: str = "light") -> None:
        self.events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if width < 500 else 1,
            mobile=width < 500,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.next())

    def value(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get(
            "value"
        )

    def picture(self, whole: bool = False) -> bytes:
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.reading)
        os.close(self.writing)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if program is None:
        missing = "neither chromium nor google-chrome is installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_the_page_opens_offline_without_error_or_request_and_fits_a_phone(browser, tmp_path):
    page = tmp_path / "report.html"
    texts = answer_table()
    texts.loc[0, "tuned_answer"] = "unbroken" * 200
    page.write_text(render(inputs_with(answers=texts)), encoding="utf-8")
    for width, scheme in ((360, "light"), (1280, "dark")):
        browser.show(page, width, scheme=scheme)
        said = [e["method"] for e in browser.events]
        assert not {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"} & {
            *said
        }
        asked = {
            e["params"]["request"]["url"].partition(":")[0]
            for e in browser.events
            if e["method"] == "Network.requestWillBeSent"
        }
        assert asked <= {"file", "data"}
        assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")


def test_the_page_is_dark_in_dark_mode_and_light_on_paper(browser, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(render(inputs_with()), encoding="utf-8")
    background = "getComputedStyle(document.body).backgroundColor"
    browser.show(page, 1280, scheme="dark")
    assert browser.value(background) == "rgb(17, 21, 26)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    assert browser.value(background) == "rgb(255, 255, 255)"
    browser.ask("Emulation.setEmulatedMedia", media="")


# The page


def test_the_page_is_well_formed_html_with_unique_ids_and_links_that_lead_somewhere():
    page = Page(render(inputs_with()))
    assert not page.wrong
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"].removeprefix("#") for a in page.all("a") if a["href"].startswith("#")}
    targets |= {a["aria-labelledby"] for a in page.all("section")}
    assert len(targets) == 8
    assert targets <= set(ids)


def test_the_policy_of_the_page_forbids_everything_but_its_own_styles_and_images():
    page = Page(render(uncharted()))
    (policy,) = [
        a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("default-src") == "'none'"
    assert directives.pop("img-src") == "data:"
    assert directives.pop("style-src") == "'unsafe-inline'"
    assert set(directives.values()) == {"'none'"}
    assert not page.all("script")


def test_the_page_names_no_address_but_that_of_the_model():
    html = render(inputs_with())
    assert set(re.findall(r"(?i)\b[a-z]+://[^\s\"'<]+", html)) == {
        "https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct/tree/ebb281ec70b0"
    }
    assert not re.search(r"(?i)@import|url\(\s*['\"]?(?!#)", html)


def test_a_data_set_of_the_hub_has_its_address_among_the_data_sets():
    data = Origin("hub", "helehan/topic-overwrite", "818d38f4")
    assert data.link == "https://huggingface.co/datasets/helehan/topic-overwrite/tree/818d38f4"


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
        uncharted(test_pairs=pairs, answers=answers, slices=slice_table().assign(slice=text))
    )
    page = Page(html)
    assert not page.wrong
    assert not page.all("script")
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert {a["src"][:5] for a in page.all("img")} == {"data:"}
    assert " ".join((text or "(empty)").split()) in page.text


def test_a_long_answer_is_folded_and_still_there_in_whole():
    answer = "So it goes on. " * 700
    answers = answer_table().assign(tuned_answer=answer)
    html = render(uncharted(answers=answers))
    folded = re.findall(r"(?s)<details class=\"long\">.*?</details>", html)
    assert folded
    assert all(answer in text and "10,500 characters" in text for text in folded)
    assert '<details class="long">' not in render(uncharted())


def test_a_pair_without_kind_shows_no_none_and_no_nan():
    scores = score_table().assign(kind=None, origin=None)
    answers = answer_table().assign(kind=None)
    text = Page(render(uncharted(scores=scores, answers=answers))).text
    assert not re.search(r"\b(None|nan|NaN|NaT|inf)\b", text)


def test_every_image_is_inside_small_and_described():
    sizes = {"large": 900, "small": 64}
    html = render(
        uncharted(
            image=lambda name: picture_of(1, sizes["large" if "0" * 31 in name else "small"], "PNG")
        )
    )
    images = Page(html).all("img")
    assert images
    for attributes in images:
        with Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))) as one:
            assert str(one.width) == attributes["width"]
            assert max(one.size) <= gallery.LONGEST_SIDE
        assert attributes["alt"].startswith("Image of the question “")
        assert "Chosen answer: “" in attributes["alt"]
    widths = {attributes["width"]: attributes.get("class") for attributes in images}
    assert widths == {"64": "small", "320": None}


def test_an_image_that_is_missing_or_broken_is_said_to_be_missing():
    for content in (None, b"", b"not an image", picture_of(1)[:200]):
        page = Page(render(uncharted(image=lambda _, content=content: content)))
        if not page.all("img"):
            assert "no image" in page.text
            break
    assert gallery.picture(b"not an image") is None
    assert gallery.picture(None) is None


def test_every_table_says_what_it_shows_and_which_cells_are_heads():
    html = render(inputs_with())
    tables = re.findall(r"(?s)<table.*?</table>", html)
    outside_of_cards = [table for table in tables if "log-prob per token</th>" not in table]
    assert len(outside_of_cards) >= 8
    assert all("<caption>" in table for table in outside_of_cards)
    for table in tables:
        assert all('scope="' in head for head in re.findall(r"<th\b[^>]*>", table))


# Metrics in tables


def test_every_metric_is_on_the_page_with_its_documented_meaning():
    values = metrics_of()
    text = Page(render(uncharted(metrics=values))).text
    counted = {"pairs_chosen_shorter", "pairs_equal_length", "pairs_chosen_longer", "control_pairs"}
    counted |= {"audited_pairs", "audited_images"}
    both = {key for one in BOTH for key in (one.base, one.tuned, one.change)}
    for one in BOTH:
        assert " ".join(one.meaning.format(model="the model").split()) in text, one.stem
    for key, metric in METRICS.items():
        if key in values and key not in counted:
            assert catalogue.shown(key, values[key]) in text, key
            assert key in both or " ".join(metric.meaning.split()) in text, key


def test_rows_of_both_models_are_not_described_as_the_bases():
    (table,) = re.findall(r'(?s)aria-label="Base and tuned".*?</table>', render(uncharted()))
    assert "where the model gives chosen the higher log-prob per token" in table
    assert "the base" not in table


def test_metrics_without_optional_groups_or_intervals_still_make_a_page():
    values = {"pairs": 3, "images": 1, "win_rate": 1.0, "ties": 0, "reward_margin": 0.2}
    assert [note.text for note in verdicts.concerns(values)] == [
        "Few test images (1): read every figure with great care."
    ]
    page = Page(
        render(
            uncharted(
                metrics=values,
                answers=answer_table(0, 0).reindex(columns=answer_table().columns),
                slices=None,
                margins=None,
                train_curve=None,
                validation_curve=None,
                lengths=None,
                training={},
                parameters={},
            )
        )
    )
    assert not page.wrong
    for sentence in (
        "No clear change of preference.",
        "no interval",
        "There are no training curves.",
        "There is nothing to draw.",
        "No control was computed.",
        "no questions with known answers",
    ):
        assert sentence in page.text, sentence


# Data, method, provenance


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("sigmoid", "Direct preference optimization (DPO)"),
        ("hinge", "Direct preference optimization with a hinge loss"),
        ("orpo", "Odds ratio preference optimization (ORPO)"),
        ("simpo", "Simple preference optimization (SimPO)"),
    ],
)
def test_a_run_is_called_by_its_loss_and_says_where_the_loss_has_no_reference(loss, name):
    inputs = inputs_with()
    inputs = replace(inputs, training={**inputs.training, "pref_loss": loss})
    rows = dict(method(inputs))
    assert rows["Method"] == name
    assert rows["Loss"] == f"{loss}, beta 0.1"
    assert rows.get("Reference") == (card.NO_REFERENCE if loss in ("orpo", "simpo") else None)


def test_a_run_says_how_its_log_probs_compared_with_stock():
    compared = {"pairs": 16, "policy_difference": 3.1e-6, "largest_logps": 41.2}
    assert forward_pass(compared) == (
        "prompt shared by both answers; on the first 16 pairs the policy's log-probs differ by at "
        "most 3e-06 nats from LLaMA-Factory's own (the largest log-prob is 41 nats)"
    )
    assert "the reference's, looked up, by at most 0.0002" in forward_pass(
        compared | {"reference_difference": 0.0002}
    )
    assert forward_pass({"stock_because": "why"}) == "LLaMA-Factory's own: why"
    assert forward_pass({}) == "LLaMA-Factory's own"
    inputs = replace(inputs_with(), first_batch=compared)
    assert "prompt shared by both answers" in Page(render(inputs)).text


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_the_page_of_another_loss_speaks_of_dpo_only_as_a_scale(loss):
    inputs = inputs_with()
    text = Page(render(replace(inputs, training={**inputs.training, "pref_loss": loss}))).text
    assert "Training loss, with the SFT term" in text
    assert "DPO loss" not in text
    assert "Method DPO" not in text
    assert card.NO_REFERENCE in text


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
    (none,) = [row["detail"] for row in rows if row["left_out"] and not row["count"]]
    assert none.split(", ") == [
        name.replace("_", " ") for name in REASONS if name not in ("missing_field", "empty_answer")
    ]


def test_parameters_are_printed_without_paths_of_this_machine():
    model = {"source": {"kind": "path", "path": "/opt/someone/secret/my-model"}}
    text = Page(render(uncharted(parameters={"train": {"beta": 0.7}, "model": model}))).text
    assert "beta: 0.7" in text
    assert "path: my-model" in text
    assert "secret" not in text


def test_parameters_are_counted_without_loading_them(tmp_path):
    arrays = {"a": np.zeros((3, 4), np.float32), "b": np.zeros((), np.float32)}
    save_file(arrays, tmp_path / "m.safetensors")
    assert parameter_count(tmp_path) == 13
    assert parameter_count(tmp_path / "none") is None


def test_a_number_and_its_interval_are_not_broken_over_lines():
    html = render(uncharted())
    assert "95.0% [92.0,\u00a098.0] of them" in html


def test_a_base_in_few_bits_has_the_page_say_that_merging_makes_another_model():
    inputs = inputs_with()
    quantised = replace(inputs, training={**inputs.training, "quantization_bit": 4})
    assert card.other_once_merged(4) in render(quantised)
    assert "unquantised" not in render(inputs)
