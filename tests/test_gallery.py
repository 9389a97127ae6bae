"""The gallery shows extremes, each pair once, with both models' own answers."""

import pandas as pd

from stages import findings, gallery, report
from tests.experiment import Page, answer_table, inputs_with, score_table, uncharted


def card_of(row, inputs):
    by_id = {pair["id"]: pair for pair in inputs.test_pairs}
    return gallery.card(row, by_id[row["id"]], inputs.image)


def test_the_gallery_shows_extremes_and_flips_each_pair_once():
    scores = score_table()
    won, lost, changed = gallery.extremes(scores, answer_table(), 6)
    assert list(won["reward_margin"]) == sorted(scores["reward_margin"], reverse=True)[:6]
    assert list(lost["reward_margin"]) == [m for m in sorted(scores["reward_margin"]) if m < 0][:6]
    assert len(changed) == 6
    ids = [*won["id"], *lost["id"], *changed["id"]]
    assert len(ids) == len(set(ids))
    assert (changed["base_margin"] * changed["tuned_margin"] < 0).all()
    change = (changed["tuned_margin"] - changed["base_margin"]).abs()
    assert change.is_monotonic_decreasing


def test_the_gallery_has_only_pairs_that_both_models_answered():
    answers = answer_table()
    answers.loc[answers["of"] == "pair", "tuned_answer"] = None
    assert all(part.empty for part in gallery.extremes(score_table(), answers, 6))
    some = answer_table(5)
    shown = pd.concat(gallery.extremes(score_table(), some, 6))["id"]
    assert set(shown) <= set(some["id"])


def test_a_card_gives_log_probs_per_token_and_says_which_answer_was_given():
    inputs = inputs_with()
    won, _, _ = gallery.extremes(inputs.scores, inputs.answers, 1)
    (row,) = findings.records(won)
    card = card_of(row, inputs)
    assert card.chosen_logps == (
        findings.number(row["reference_chosen_logps"] / 8),
        findings.number(row["policy_chosen_logps"] / 8),
    )
    assert (card.base_is, card.tuned_is) == ("same as rejected", "same as chosen")
    assert card.margin == f"+{row['reward_margin']:.2f}"
    assert card.controls == ""


def test_a_card_of_the_control_sample_gives_the_margins_without_the_image():
    inputs = inputs_with()
    row = {
        **findings.records(gallery.extremes(inputs.scores, inputs.answers, 40)[1])[0],
        "reward_margin_blank": 0.1,
    }
    assert card_of(row, inputs).controls.startswith("+0.10 with a blank image")


def test_questions_show_each_outcome_and_mark_right_and_wrong_in_words():
    asked = gallery.questions(answer_table(), lambda _: None, 2)
    assert [row["outcome"] for row in asked] == [
        *["newly right"] * 2,
        *["newly wrong"] * 2,
        *["both wrong"] * 2,
        *["both right"] * 2,
    ]
    marks = [tuple(mark for _, _, mark in row["answers"]) for row in asked]
    assert marks[0] == ("wrong", "right")
    assert marks[2] == ("right", "wrong")
    assert dict(gallery.outcomes(answer_table())) == {
        "newly right": 4,
        "newly wrong": 4,
        "both wrong": 4,
        "both right": 4,
    }


def test_questions_without_known_answers_are_shown_unmarked():
    answers = answer_table(0, 4).assign(truth=None, base_correct=None, tuned_correct=None)
    asked = gallery.questions(answers, lambda _: None, 3)
    assert len(asked) == 4
    assert {mark for row in asked for _, _, mark in row["answers"]} == {""}
    assert "not known" in Page(report.render(uncharted(answers=answers))).text
