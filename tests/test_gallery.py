"""The gallery shows extremes of all pairs, each once, with own answers where there are any."""

from stages.evaluation.catalogue import LOG_PROB
from stages.reporting import page
from stages.reporting.markup import rows_of
from tests.experiment import answer_table, inputs_with, score_table


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
