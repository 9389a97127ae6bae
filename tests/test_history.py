"""What a training logs: its curves, its cost, and the signs that it can't be right."""

import json
import shutil
from contextlib import nullcontext

import pytest

from stages.core.errors import UserError
from stages.tuning import history

STEP_1 = {
    "step": 1,
    "epoch": 0.051234567,
    "loss": 0.6931,
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.0,
    "logps/chosen": -60.0,
    "logps/rejected": -50.0,
    "learning_rate": 0.0,
}
VALIDATION = {"step": 2, "epoch": 0.1, "eval_loss": 0.6, "eval_rewards/margins": 0.1}
SUMMARY = {"step": 2, "epoch": 0.1, "train_loss": 0.6, "train_runtime": 9.5}


def state(folder, *entries):
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


def test_the_history_is_the_trainers(tmp_path):
    assert history.read(state(tmp_path, STEP_1, VALIDATION)) == [STEP_1, VALIDATION]


@pytest.mark.parametrize(
    "entry",
    [
        STEP_1 | {"loss": float("nan")},
        STEP_1 | {"loss": float("inf")},
        STEP_1 | {"logps/chosen": float("nan")},  # what a NaN loss leaves: the trainer hides it
        VALIDATION | {"eval_loss": float("nan")},
    ],
)
@pytest.mark.parametrize("beta", [0.1, None])
def test_a_training_that_diverged_is_refused(entry, beta):
    with pytest.raises(UserError, match=f"diverged: .* at step {entry['step']}.*learning_rate"):
        history.check(entry, beta)


@pytest.mark.parametrize("entry", [STEP_1, VALIDATION])
def test_a_reference_that_is_not_a_number_ends_the_training(entry):
    name = "eval_rewards/rejected" if entry is VALIDATION else "rewards/rejected"
    with pytest.raises(UserError, match=r"those of the reference.*dvc repro -f reference"):
        history.check(entry | {name: float("nan"), "rewards/margins": float("nan")}, 0.1)


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_training_without_a_history_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(UserError, match=r"trainer_state.json"):
        history.read(tmp_path)


@pytest.mark.parametrize(
    ("entry", "beta"),
    [
        (STEP_1, 0.1),
        (STEP_1 | {"rewards/margins": 0.02}, 0.1),  # what bfloat16 rounds of 60 nats
        (STEP_1 | {"rewards/margins": 0.2, "step": 5}, 0.1),
        (STEP_1 | {"rewards/margins": 0.2}, None),  # a loss without a reference
        (VALIDATION, 0.1),
        (SUMMARY, 0.1),
    ],
)
def test_a_policy_that_starts_at_the_reference_passes(entry, beta):
    history.check(entry, beta)


@pytest.mark.parametrize("margin", [0.2, -0.2])
def test_a_policy_that_starts_elsewhere_is_refused(margin):
    with pytest.raises(UserError, match=r"margin at step 1 is -?0\.2, not about 0"):
        history.check(STEP_1 | {"rewards/margins": margin}, 0.1)


@pytest.mark.parametrize(("told", "last", "full"), [(900, 0, 0), (1100, 0, 1), (9, 1100, 1)])
def test_a_disk_that_the_next_checkpoint_would_fill_ends_the_training(
    tmp_path, monkeypatch, told, last, full
):
    (tmp_path / "checkpoint-1" / "part").mkdir(parents=True)
    (tmp_path / "checkpoint-1" / "part" / "optimizer.pt").write_bytes(b"x" * last)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    expected = pytest.raises(UserError, match=r"0\.0 MB free.*free some space.*resumes from its")
    with expected if full else nullcontext():
        history.require_room(STEP_1 | {"checkpoint_bytes": told}, tmp_path)


def test_a_history_without_step_1_proves_nothing():
    assert history.first_margin([STEP_1, VALIDATION]) == 0.0
    for entries in ([], [VALIDATION], [STEP_1 | {"step": 5}]):
        with pytest.raises(UserError, match="no reward margin for step 1"):
            history.first_margin(entries)


def test_a_live_point_has_the_names_of_the_curves():
    assert history.point(VALIDATION) == ("validation", {"loss": 0.6, "reward_margin": 0.1})
    assert history.point(SUMMARY) is None


def test_curves_are_split_by_what_was_measured_and_the_summary_is_none():
    tables = history.curves([STEP_1, VALIDATION, SUMMARY])
    assert list(tables) == ["train", "validation"]
    train, validation = tables.values()
    assert train.to_dict("records") == [
        {
            "step": 1,
            "epoch": 0.0512,
            "loss": 0.6931,
            "reward_margin": 0.0,
            "reward_accuracy": 0.0,
            "chosen_logps": -60.0,
            "rejected_logps": -50.0,
            "learning_rate": 0.0,
        }
    ]
    assert validation.to_dict("records") == [
        {"step": 2, "epoch": 0.1, "loss": 0.6, "reward_margin": 0.1}
    ]


def test_a_training_without_validation_still_names_the_columns_of_its_plots():
    validation = history.curves([STEP_1])["validation"]
    assert validation.empty
    assert {"step", "loss", "reward_margin", "reward_accuracy"} <= set(validation.columns)
