"""doctor: all checks pass on the locked versions, and each notices its fault."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages.commands import doctor
from stages.core.errors import UserError
from stages.params import params
from tests.contracts import ROOT


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    p = params.load(ROOT / "params" / "demo.yaml")
    return doctor.admitted(ROOT / "demo" / "model", p, tmp_path_factory.mktemp("images"))


@pytest.mark.slow
@pytest.mark.parametrize(("claim", "check"), doctor.CHECKS, ids=[c for c, _ in doctor.CHECKS])
def test_a_check_passes_on_the_locked_versions(patient, claim, check):
    assert check(patient) is None


@pytest.mark.slow
def test_a_model_that_does_not_see_is_noticed(patient):
    pairs = [pair | {"images": ["b.png"]} for pair in patient.pairs]
    assert "does not see it" in str(doctor.image_is_seen(replace(patient, pairs=pairs)))


@pytest.mark.slow
def test_a_batch_that_does_not_say_which_tokens_are_an_images_is_noticed(patient):
    family = replace(patient.policy.family, position_inputs=lambda *_: {})
    untold = replace(patient, policy=replace(patient.policy, family=family))
    assert "no mm_token_type_ids" in str(doctor.image_has_positions(untold))


@pytest.mark.slow
def test_a_rejected_answer_that_goes_on_counting_is_noticed(patient, monkeypatch):
    from stages.model import prefix

    pack = prefix.pack

    def counting_on(*given):
        batch = pack(*given)
        rejected = batch["segments"] == prefix.REJECTED
        batch["position_ids"] = batch["position_ids"] + 5 * rejected
        return batch

    monkeypatch.setattr(prefix, "pack", counting_on)
    assert "does not start where chosen does" in str(doctor.positions_restart(patient))


@pytest.mark.slow
def test_kernels_that_do_something_now_are_noticed(patient, monkeypatch, tmp_path):
    from llamafactory.model.model_utils import liger_kernel

    (tmp_path / "liger_kernel.py").write_text('elif model_type == "qwen3_vl":\n')
    monkeypatch.setattr(liger_kernel, "__file__", str(tmp_path / "liger_kernel.py"))
    assert "is out of date" in str(doctor.liger_does_nothing(patient))


@pytest.mark.slow
def test_prompts_padded_on_the_other_side_are_noticed(patient, monkeypatch):
    import torch

    padded = doctor.scoring._left_padded

    def on_the_right(*given):
        batch = padded(*given)
        padding = (batch["attention_mask"] == 0).sum(dim=1).tolist()
        aligned = [t for t in batch.values() if t.shape == batch["input_ids"].shape]
        for tensor in aligned:
            for i, shift in enumerate(padding):
                tensor[i] = torch.roll(tensor[i], -shift)
        return batch

    monkeypatch.setattr(doctor.scoring, "_left_padded", on_the_right)
    assert "padded on the wrong side" in str(doctor.padding_does_not_matter(patient))


@pytest.mark.slow
def test_log_probs_that_move_after_generating_are_noticed(patient, monkeypatch):
    given = iter([np.zeros((2, 1)), np.ones((2, 1))])
    monkeypatch.setattr(doctor.Patient, "log_probs", lambda *_: next(given))
    assert "rope_deltas" in str(doctor.rope_deltas_are_not_stale(patient))


@pytest.mark.slow
def test_a_tower_that_training_changes_is_noticed(patient, monkeypatch):
    from stages.tuning import trainer

    digests = iter(["one", "other"])
    monkeypatch.setattr(trainer, "tower_digest", lambda _: next(digests))
    assert "changed the vision tower" in str(doctor.frozen_tower_stays(patient))
    monkeypatch.setattr(trainer, "tower_digest", lambda _: None)
    assert "trains the vision tower" in str(doctor.frozen_tower_stays(patient))


def test_what_is_wrong_is_printed_with_what_to_do_and_the_command_fails(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(doctor, "admitted", lambda *_: None)
    checks = (("it is well", lambda _: None), ("it sees", lambda _: "it does not; look again"))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    with pytest.raises(UserError, match="1 of 2 checks failed"):
        doctor.main()
    out = capsys.readouterr().out
    assert "ok   it is well\n" in out
    assert "BAD  it sees\n     it does not; look again" in out


def test_without_the_demos_model_there_is_one_sentence():
    with pytest.raises(UserError, match="a complete clone"):
        doctor.main(model=Path("nowhere"))
