"""What a training logs: its curves, and the signs that it can't be right."""

import json

import pytest

from stages.core.errors import UserError
from stages.tuning import history

NAN = float("nan")
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


@pytest.mark.parametrize(
    ("entry", "beta", "told"),
    [
        (STEP_1, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.02}, 0.1, None),  # what bfloat16 rounds of 60 nats
        (STEP_1 | {"rewards/margins": 0.2, "step": 5}, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.2}, None, None),  # a loss without a reference
        (VALIDATION, 0.1, None),
        (SUMMARY, 0.1, None),
        (STEP_1 | {"rewards/margins": 0.2}, 0.1, r"margin at step 1 is 0\.2, not about 0"),
        (STEP_1 | {"rewards/margins": -0.2}, 0.1, r"margin at step 1 is -0\.2, not about 0"),
        (STEP_1 | {"loss": NAN}, 0.1, "at step 1: the training diverged.*learning_rate"),
        (STEP_1 | {"loss": float("inf")}, None, "diverged"),
        (STEP_1 | {"logps/chosen": NAN}, 0.1, "diverged"),  # the trainer hides a NaN loss
        (VALIDATION | {"eval_loss": NAN}, None, "eval_loss is nan at step 2: .*diverged"),
        (STEP_1 | {"rewards/rejected": NAN}, 0.1, "reference's .*dvc repro -f reference"),
        (VALIDATION | {"eval_rewards/chosen": NAN}, 0.1, "reference's log-probs are not numbers"),
    ],
)
def test_a_step_that_can_not_be_right_ends_the_training(entry, beta, told):
    if told is None:
        history.check(entry, beta)
        return
    with pytest.raises(UserError, match=told):
        history.check(entry, beta)


def test_curves_are_split_by_what_was_measured_and_the_summary_is_none(tmp_path):
    entries = [STEP_1, VALIDATION, SUMMARY]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert history.point(VALIDATION) == ("validation", {"loss": 0.6, "reward_margin": 0.1})
    tables = history.curves(history.read(tmp_path))
    assert {split: table.to_dict("records") for split, table in tables.items()} == {
        "train": [
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
        ],
        "validation": [{"step": 2, "epoch": 0.1, "loss": 0.6, "reward_margin": 0.1}],
    }
