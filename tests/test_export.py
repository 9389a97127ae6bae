"""The merged model: checked before it appears, and usable without PEFT and LLaMA-Factory."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest

from stages.commands import export
from stages.core.errors import UserError
from stages.model import formatted
from stages.params.params import Scoring
from stages.reporting import card
from tests.contracts import ROOT

MOST = 8  # tokens of an answer


def log_probs(chosen: list[float], rejected: list[float]) -> pd.DataFrame:
    logps = pd.DataFrame({"chosen_logps": chosen, "rejected_logps": rejected}, dtype=float)
    return logps.assign(chosen_tokens=[2, 4], rejected_tokens=1)


def test_the_difference_is_a_mean_over_answers_per_token_and_has_a_bound_in_every_precision():
    one, other = log_probs([-1, -2], [-3, -4]), log_probs([-1.5, -2], [-3, -3])
    assert export.per_token(one, other) == pytest.approx((0.25 + 0 + 0 + 1) / 4)
    assert export.per_token(one, one) == 0
    assert set(export.BOUNDS) == set(get_args(Scoring.model_fields["dtype"].annotation))


@pytest.mark.parametrize("merged", [-1.5, float("nan"), -2.0])
def test_what_is_not_base_plus_adapter_is_refused(params_with, monkeypatch, merged):
    """Far off, no number, or with the change of the training lost; tuned has -2 + 1e-6."""
    given = iter([-2 + 1e-6, -2.0, merged])
    monkeypatch.setattr(export.scoring, "load", lambda *_: None)
    monkeypatch.setattr(
        export.scoring, "log_probs", lambda *_, **__: log_probs([next(given)] * 2, [0, 0])
    )
    with pytest.raises(UserError, match=r"Set scoring\.dtype to float32"):
        export.check(params_with(), [], Path())


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
    merged, tuned, formatted_dir, pairs_dir
):
    from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    from stages.model import scoring

    images, rows = pairs_dir / "images", formatted.read(formatted_dir, "test")
    counts = scoring.log_probs(tuned, rows, images, batch_tokens=4096, label="").image_tokens
    settings: Any = {"max_new_tokens": MOST, "batch_tokens": 1, "label": "tuned"}
    expected = scoring.answer(tuned, rows, images, **settings)
    processor = AutoProcessor.from_pretrained(merged)
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    compared = 0
    for row, count, answer in zip(rows, counts, expected, strict=True):
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
        seen = int((inputs["input_ids"] == tuned.image_token_id).sum())
        assert seen <= 1.5 * count  # LLaMA-Factory rounds the sides of some otherwise
        if seen == count:
            compared += 1
            out = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(new, skip_special_tokens=True).strip() == answer.text
    assert compared >= 4
    stops = GenerationConfig.from_pretrained(merged).eos_token_id
    assert set(tuned.template.get_stop_token_ids(tuned.tokenizer)) <= set(stops)


@pytest.mark.slow
def test_the_folder_says_what_it_is_names_no_path_of_this_machine_and_is_there_whole_or_not_at_all(
    merged, project, monkeypatch
):
    before = (merged / "README.md").read_text()
    assert "SHA-256 `" + "ab" * 32 in before
    for file in merged.iterdir():
        assert str(project).encode() not in file.read_bytes(), file.name
    monkeypatch.chdir(project)
    monkeypatch.setattr(
        export, "merge", lambda _, out: shutil.copytree("models/base", out, dirs_exist_ok=True)
    )
    with pytest.raises(UserError, match="differ from those of base plus adapter"):
        export.main()
    assert (merged / "README.md").read_text() == before
    assert sorted(path.name for path in merged.parent.iterdir()) == ["adapter", "base", "merged"]
    for bits in (4, None):
        text = export.readme("", bits)
        assert (card.other_once_merged(4) in text) == bool(bits)


@pytest.mark.slow
def test_a_trained_head_of_tied_embeddings_is_not_said_to_be_tied(
    base, project, params_with, tmp_path, monkeypatch
):
    """With ``additional_target: embed_tokens,lm_head``."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig(
        r=4, target_modules=r".*language_model.*q_proj", modules_to_save=["embed_tokens", "lm_head"]
    )
    model = get_peft_model(copy.deepcopy(base.model), config)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight.add_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(project)
    export.merge(params_with(), tmp_path / "merged", tmp_path / "adapter")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    head, embeddings = (
        weights["lm_head.weight"],
        weights["model.language_model.embed_tokens.weight"],
    )
    assert not torch.equal(head, embeddings)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False
