"""costs: the table of what each stage took."""

from stages.commands import costs


def test_a_rate_below_one_a_second_is_not_shown_as_nothing():
    rates = {"fast": {"pairs_per_second": 1234.56}, "slow": {"pairs_per_second": 0.016}}
    _, _, *rows = costs.table(list(rates), rates).splitlines()
    assert [row.split()[-1] for row in rows] == ["1,234.6", "0.016"]
