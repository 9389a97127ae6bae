"""The merged model: checked before it appears, and usable without PEFT and LLaMA-Factory."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from stages.commands import export, outputs
from stages.core.errors import UserError
from stages.model import formatted
from stages.model.scoring import PairLogProbs
from stages.params.params import Scoring
from stages.reporting import card
from tests.contracts import ROOT

MOST = 8  # tokens of an answer


def log_probs(chosen: list[float], rejected: list[float]) -> PairLogProbs:
    two, one = np.array([2, 4]), np.array([1, 1])
    none = np.array(["", ""], dtype=object)
    return PairLogProbs(np.array(chosen), np.array(rejected), two, one, one, none)


def test_the_difference_is_a_mean_over_answers_per_token():
    one, other = log_probs([-1, -2], [-3, -4]), log_probs([-1.5, -2], [-3, -3])
    assert export.per_token(one, other) == pytest.approx((0.25 + 0 + 0 + 1) / 4)
    assert export.per_token(one, one) == 0


def test_there_is_a_bound_for_every_precision():
    assert set(export.BOUNDS) == set(get_args(Scoring.model_fields["dtype"].annotation))


@pytest.fixture(scope="module")
def project(
    model_dir: Path,
    adapter_dir: Path,
    formatted_dir: Path,
    pairs_dir: Path,
    write_params: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with base, adapter and formatted pairs where the pipeline has them."""
    folder: Path = tmp_path_factory.mktemp("project")
    (folder / "models").mkdir()
    (folder / "data" / "pairs").mkdir(parents=True)
    shutil.copytree(model_dir, folder / "models" / "base")
    source = {"kind": "path", "repo": "demo/model", "revision": None, "commit": None}
    (folder / "models" / "base" / "SOURCE.json").write_text(
        json.dumps({**source, "licence": "Apache-2.0", "files": []})
    )
    shutil.copytree(adapter_dir, folder / "models" / "adapter")
    (folder / "models" / "adapter" / "fingerprint.json").write_text(
        json.dumps({"fingerprint": "0" * 16, "adapter_sha256": "ab" * 32})
    )
    (folder / "data" / "formatted").symlink_to(formatted_dir)
    (folder / "data" / "pairs" / "images").symlink_to(pairs_dir / "images")
    shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
    write_params(folder / "params.yaml")
    return folder


@pytest.fixture(scope="module")
def merged(project: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        export.main()
    return project / "models" / "merged"


@pytest.mark.slow
def test_transformers_alone_answers_as_base_plus_adapter_and_stops(
    merged, tuned, formatted_dir, pairs_dir, params_with
):
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    from stages.model import scoring

    images, rows = pairs_dir / "images", formatted.read(formatted_dir, "test")
    counts = scoring.log_probs(tuned, rows, images, batch_tokens=4096, label="").image_tokens
    plain = export.plain_image_tokens(params_with(), merged, rows, images)
    rows = [row for row, *both in zip(rows, counts, plain, strict=True) if len(set(both)) == 1]
    assert len(rows) >= 4  # of the others, LLaMA-Factory rounds the sides otherwise
    expected = scoring.answer(
        tuned, rows, images, max_new_tokens=MOST, batch_tokens=1, label="tuned"
    )
    processor = AutoProcessor.from_pretrained(merged)
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    for row, answer in zip(rows, expected, strict=True):
        content = [
            {"type": "image", "image": str(images / row["images"][0])},
            {"type": "text", "text": formatted.question(row)},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == answer.text
    stops = GenerationConfig.from_pretrained(merged).eos_token_id
    assert set(tuned.template.get_stop_token_ids(tuned.tokenizer)) <= set(stops)


@pytest.mark.slow
def test_the_folder_says_what_it_is_and_names_no_path_of_this_machine(merged, project):
    assert "SHA-256 `" + "ab" * 32 in (merged / "README.md").read_text()
    assert {"config.json", "model.safetensors", "generation_config.json"} <= {
        file.name for file in merged.iterdir()
    }
    for file in merged.iterdir():
        assert str(project).encode() not in file.read_bytes(), file.name
    assert sorted(path.name for path in merged.parent.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.slow
def test_what_is_not_base_plus_adapter_never_appears(merged, project, monkeypatch):
    """The base alone stands for a merge that lost the adapter; what was there stays."""

    def lost(p: Any, model: Path, adapter: Path, out: Path) -> None:
        shutil.copytree(model, out, dirs_exist_ok=True)

    monkeypatch.chdir(project)
    monkeypatch.setattr(export, "merge", lost)
    with pytest.raises(UserError, match="is not base plus adapter: log-probs differ by"):
        export.main(Path("models/other"))
    assert not Path("models/other").exists()
    before = (merged / "README.md").read_text()
    with pytest.raises(UserError, match="is not base plus adapter"):
        export.main()
    assert (merged / "README.md").read_text() == before
    assert sorted(path.name for path in merged.parent.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.slow
def test_a_processor_that_shows_other_sizes_than_training_did_is_refused(
    merged, project, monkeypatch
):
    monkeypatch.chdir(project)
    monkeypatch.setattr(export, "plain_image_tokens", lambda *_: [1] * export.SAMPLE)
    monkeypatch.setattr(export, "merge", lambda p, model, adapter, out: shutil.copytree(
        merged, out, dirs_exist_ok=True))  # fmt: skip
    with pytest.raises(UserError, match="the model would see other sizes"):
        export.main(Path("models/other"))


@pytest.mark.slow
def test_a_base_in_4_bits_is_merged_whole_and_the_readme_says_so(project, params_with, monkeypatch):
    monkeypatch.chdir(project)
    at = outputs.read()
    text = export.readme(params_with(**{"model.quantization_bit": 4}), at.model, at.adapter, [])
    assert card.other_once_merged(4) in text
    assert "4 bits" not in export.readme(params_with(), at.model, at.adapter, [])
