"""The report: what the page shows, that it is whole, and that it asks for nothing."""

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

import pytest
from PIL import Image

from stages import report
from stages.core.errors import UserError
from stages.dataset.pairs import REASONS
from stages.evaluation.metrics import MEANING
from stages.reporting import card, findings, gallery
from stages.tracking import runs
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
        pytest.skip("neither chromium nor google-chrome is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_the_page_opens_offline_without_error_or_request_and_fits_a_phone(browser, tmp_path):
    page = tmp_path / "report.html"
    texts = answer_table()
    texts.loc[0, "tuned_answer"] = "unbroken" * 200
    page.write_text(report.render(inputs_with(answers=texts)), encoding="utf-8")
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
    page.write_text(report.render(inputs_with()), encoding="utf-8")
    background = "getComputedStyle(document.body).backgroundColor"
    browser.show(page, 1280, scheme="dark")
    assert browser.value(background) == "rgb(17, 21, 26)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.ask("Emulation.setEmulatedMedia", media="print", features=dark)
    assert browser.value(background) == "rgb(255, 255, 255)"
    browser.ask("Emulation.setEmulatedMedia", media="")


# The page


def test_the_page_is_well_formed_html_with_unique_ids_and_links_that_lead_somewhere():
    page = Page(report.render(inputs_with()))
    assert not page.wrong
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"].removeprefix("#") for a in page.all("a") if a["href"].startswith("#")}
    targets |= {a["aria-labelledby"] for a in page.all("section")}
    assert len(targets) == 9
    assert targets <= set(ids)


def test_the_policy_of_the_page_forbids_everything_but_its_own_styles_and_images():
    page = Page(report.render(uncharted()))
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
    html = report.render(inputs_with())
    assert set(re.findall(r"(?i)\b[a-z]+://[^\s\"'<]+", html)) == {
        "https://huggingface.co/Qwen/Qwen3-VL-4B-Instruct/tree/ebb281ec70b0"
    }
    assert not re.search(r"(?i)@import|url\(\s*['\"]?(?!#)", html)


def test_the_same_inputs_give_the_same_page():
    assert report.render(inputs_with()) == report.render(inputs_with())


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
    html = report.render(
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
    html = report.render(uncharted(answers=answers))
    folded = re.findall(r"(?s)<details class=\"long\">.*?</details>", html)
    assert folded
    assert all(answer in text and "10,500 characters" in text for text in folded)
    assert '<details class="long">' not in report.render(uncharted())


def test_a_pair_without_kind_shows_no_none_and_no_nan():
    scores = score_table().assign(kind=None, origin=None)
    answers = answer_table().assign(kind=None)
    text = Page(report.render(uncharted(scores=scores, answers=answers))).text
    assert not re.search(r"\b(None|nan|NaN|NaT|inf)\b", text)


def test_every_image_is_inside_small_and_described():
    sizes = {"large": 900, "small": 64}
    html = report.render(
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
        page = Page(report.render(uncharted(image=lambda _, content=content: content)))
        if not page.all("img"):
            assert "no image" in page.text
            break
    assert gallery.picture(b"not an image") is None
    assert gallery.picture(None) is None


def test_every_table_says_what_it_shows_and_which_cells_are_heads():
    html = report.render(inputs_with())
    tables = re.findall(r"(?s)<table.*?</table>", html)
    outside_of_cards = [table for table in tables if "log-prob per token</th>" not in table]
    assert len(outside_of_cards) >= 9
    assert all("<caption>" in table for table in outside_of_cards)
    for table in tables:
        assert all('scope="' in head for head in re.findall(r"<th\b[^>]*>", table))


# Metrics in tables


def test_every_metric_is_on_the_page_with_its_documented_meaning():
    values = metrics_of()
    text = Page(report.render(uncharted(metrics=values))).text
    hidden = {"pairs_chosen_shorter", "pairs_equal_length", "pairs_chosen_longer", "control_pairs"}
    for key in findings.bare_keys(values):
        if key.startswith(("lm_eval/", "tuned_")) or "change" in key or key in hidden:
            continue
        if key in MEANING:
            assert " ".join(MEANING[key].split()) in text, key
    for key, value in values.items():
        if "/" not in key and key not in hidden and not key.endswith(("_low", "_high")):
            assert findings.shown(key, value) in text, key


def test_metrics_without_optional_groups_or_intervals_still_make_a_page():
    values = {"pairs": 3, "images": 1, "win_rate": 1.0, "ties": 0, "reward_margin": 0.2}
    assert [note.text for note in findings.concerns(values)] == [
        "Few test images (1): read every figure with great care."
    ]
    page = Page(
        report.render(
            uncharted(
                metrics=values,
                answers=answer_table(0, 0).reindex(columns=answer_table().columns),
                slices=None,
                margins=None,
                train_curve=None,
                validation_curve=None,
                lengths=None,
                training={},
                diary={},
                stages=(),
                tags={},
                versions={},
                preset=None,
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
        "Nothing is known of the cost.",
        "There is no commit",
        "params.yaml is not a preset",
    ):
        assert sentence in page.text, sentence


# Data, costs, provenance


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
    rows = dict(report.method(inputs))
    assert rows["Method"] == name
    assert rows["Loss"] == f"{loss}, beta 0.1"
    assert rows.get("Reference") == (card.NO_REFERENCE if loss in ("orpo", "simpo") else None)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_the_page_of_another_loss_speaks_of_dpo_only_as_a_scale(loss):
    inputs = inputs_with()
    text = Page(
        report.render(replace(inputs, training={**inputs.training, "pref_loss": loss}))
    ).text
    assert "Training loss, with the SFT term" in text
    assert "DPO loss" not in text
    assert "Method DPO" not in text
    assert card.NO_REFERENCE in text


def test_the_funnel_accounts_for_every_row():
    inputs = inputs_with()
    rows = report.funnel(inputs.preprocess, inputs.format)
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
    assert none.split(", ") == [name.replace("_", " ") for name in REASONS][2:]


def test_a_stage_without_a_diary_came_from_the_cache():
    rows = {row["stage"]: row for row in report.costs(("format", "train"), inputs_with().diary)}
    assert not rows["format"]["ran"]
    assert rows["train"]["seconds"] == "1 min 31 s"
    text = Page(report.render(uncharted())).text
    assert "fetch@data from cache, not run here" in text
    assert "train 1 min 31 s cpu 2.1 GB" in text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3725, "1 h 02 min"), (None, "–")],  # noqa: RUF001
)
def test_a_duration_is_written_for_people(seconds, expected):
    assert report.duration(seconds) == expected


def test_commands_reproduce_a_preset_and_say_what_stands_in_the_way():
    clean = report.reproduction(inputs_with())
    assert clean["commands"].splitlines() == [
        "git checkout 0123456789abcdef0123456789abcdef01234567",
        "make use PRESET=demo",
        "make repro",
    ]
    assert clean["caveats"] == []
    tags = {"git.commit": "0123", "git.state": "dirty: stages/train.py"}
    other = report.reproduction(inputs_with(preset=None, tags=tags))
    assert "PRESET" not in other["commands"]
    assert [text.partition(":")[0] for text in other["caveats"]] == [
        "Files differed from the commit",
        "params.yaml is not a preset; it is printed below.",
    ]


def test_parameters_that_are_no_preset_are_printed():
    other = inputs_with(preset=None, parameters="train:\n  beta: 0.7\n")
    assert "beta: 0.7" in Page(report.render(other)).text
    assert "beta: 0.7" not in report.render(replace(other, preset="demo"))


def test_a_preset_is_recognised_by_its_values_not_by_its_comments(tmp_path, params_with):
    assert report.preset_of(params_with(), ROOT / "params") == "demo"
    assert report.preset_of(params_with(**{"train.beta": 0.7}), ROOT / "params") is None
    (tmp_path / "broken.yaml").write_text("nonsense: 1\n")
    assert report.preset_of(params_with(), tmp_path) is None


def test_the_stages_are_those_of_the_pipeline(tmp_path):
    names = report.stage_names(ROOT / "dvc.yaml")
    assert names[:3] == ["fetch@data", "fetch@model", "preprocess"]
    assert "report" not in names
    assert report.stage_names(tmp_path / "dvc.yaml") == []


def test_a_damaged_diary_is_left_out(tmp_path):
    (tmp_path / "train.json").write_text('{"stage": "train", "seconds": 1}')
    (tmp_path / "format.json").write_text("{")
    (tmp_path / "other.json").write_text("[]")
    assert report.diary(tmp_path) == {"train": {"stage": "train", "seconds": 1}}
    assert report.diary(tmp_path / "none") == {}


def test_parameters_are_counted_without_loading_them(tmp_path):
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
            "b": {"dtype": "F32", "shape": [], "data_offsets": [48, 52]},
        }
    ).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert report.parameter_count(tmp_path) == 13
    assert report.parameter_count(tmp_path / "none") is None


# The stage


def write_inputs(folder: Path) -> dict[str, Path]:
    """Files as the stages write them; the arguments of ``main``."""
    inputs = inputs_with()
    for name in ("curves", "formatted", "images", "raw", "base", "adapter", "presets"):
        (folder / name).mkdir()
    for name in ("metrics", "preprocess", "format"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(inputs, name)))
    inputs.scores.to_parquet(folder / "scores.parquet")
    inputs.answers.to_parquet(folder / "answers.parquet")
    tables = {"slices": inputs.slices, "margins": inputs.margins, "lengths": inputs.lengths}
    tables |= {"curves/train": inputs.train_curve, "curves/validation": inputs.validation_curve}
    for name, table in tables.items():
        assert table is not None
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "formatted" / "test.json").write_text(json.dumps(inputs.test_pairs))
    for i, pair in enumerate(inputs.test_pairs):
        (folder / "images" / pair["images"][0]).write_bytes(picture_of(i))
    for name, kind, licence in (("raw", "easy-vqa", "MIT"), ("base", "path", None)):
        source: dict[str, Any] = {
            "kind": kind,
            "repo": None,
            "revision": None,
            "commit": None,
            "files": [],
        }
        (folder / name / "SOURCE.json").write_text(json.dumps(source | {"licence": licence}))
    (folder / "adapter" / "llamafactory.yaml").write_text("stage: dpo\npref_beta: 0.1\n")
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter" / "fingerprint.json").write_text('{"fingerprint": "0123abcd"}')
    return {
        **{name: folder / f"{name}.json" for name in ("metrics", "preprocess")},
        **{name: folder / f"{name}.parquet" for name in ("scores", "answers")},
        **{name: folder / f"{name}.csv" for name in ("slices", "margins", "lengths")},
        **{name: folder / name for name in ("curves", "images", "raw", "adapter", "presets")},
        "format_report": folder / "format.json",
        "formatted_data": folder / "formatted",
        "model": folder / "base",
        "report": folder / "out" / "report.html",
        "model_card": folder / "adapter" / "README.md",
    }


@pytest.fixture
def arguments(tmp_path, monkeypatch, write_params) -> dict[str, Path]:
    write_params(tmp_path / "params.yaml", **{"train.beta": 0.25})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_EXP_NAME", "brave-lion")
    monkeypatch.setattr(runs, "attach", lambda fingerprint, files: None)
    return write_inputs(tmp_path)


def test_page_card_and_charts_join_the_run(arguments, monkeypatch):
    joined = {}

    def attach(fingerprint: str, files: tuple[Path, ...]) -> None:
        joined[fingerprint] = {
            name: [path.name] if path.is_file() else sorted(inner.name for inner in path.iterdir())
            for name, path in ((path.name, path) for path in files)
        }

    monkeypatch.setattr(runs, "attach", attach)
    report.main(**arguments)
    (files,) = joined.values()
    assert list(joined) == ["0123abcd"]
    assert set(files) == {"report.html", "README.md", "figures"}
    assert {"curve-loss.png", "margins.png", "slices.png", "lengths.png"} <= set(files["figures"])
    assert "library_name: peft" in arguments["model_card"].read_text(encoding="utf-8")


def test_the_stage_writes_one_page_without_a_path_of_this_machine(arguments, tmp_path):
    report.main(**arguments)
    html = arguments["report"].read_text(encoding="utf-8")
    page = Page(html)
    assert list(arguments["report"].parent.iterdir()) == [arguments["report"]]
    assert "Preference tuning of demo/model on easy-vqa" in page.text
    assert "brave-lion" in page.text
    assert "beta: 0.25" in page.text  # no preset, so the parameters are printed
    assert len(page.all("img")) >= 20
    assert str(tmp_path) not in html
    assert len(html) < 1_500_000


def test_the_stage_copes_without_files_that_only_feed_charts(arguments):
    for name in ("slices", "margins", "lengths"):
        arguments[name].unlink()
    (arguments["curves"] / "validation.csv").unlink()
    (arguments["curves"] / "train.csv").write_text("")
    report.main(**arguments)
    assert "There is nothing to draw." in arguments["report"].read_text(encoding="utf-8")


def test_an_adapter_without_its_configuration_is_refused(arguments):
    (arguments["adapter"] / "llamafactory.yaml").unlink()
    with pytest.raises(UserError, match=r"llamafactory\.yaml is missing"):
        report.main(**arguments)
