"""Small versions of ``benchmarks.parity``, and what it wrote is about the code as it is."""

import pytest
import torch

from benchmarks import parity
from stages.model import prefix
from tests import rounding
from tests.contracts import ROOT, text_of
from tests.one_by_one import unmasked

pytestmark = pytest.mark.slow
PARITY = text_of("benchmarks/PARITY.md")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.chdir(ROOT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.rehearsal
@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_every_switch_keeps_its_bounds(dtype):
    which = parity.ways()
    found = parity.random_part(dtype, parity.random_batches(3, 40), 3, which)
    assert parity.broken(dtype, found, which) == []
    steps = 0 if dtype == "bfloat16" else 3
    assert all(len(found[name].steps) == steps for name, way in which.items() if way.gradients)


@pytest.mark.rehearsal
@pytest.mark.parametrize("dtype", parity.DTYPES)
def test_an_answer_that_sees_the_other_breaks_them(dtype, monkeypatch):
    monkeypatch.setattr(prefix, "attention_mask", unmasked)
    every = parity.ways()
    which = {name: every[name] for name in (parity.STOCK, parity.SHARED)}
    found = parity.compare(dtype, parity.random_batches(4, 40), which)
    assert any(parity.SHARED in sentence for sentence in parity.broken(dtype, found, which))


def test_parity_md_has_a_row_for_every_way_and_training_and_no_broken_bound():
    for dtype in parity.DTYPES:
        section = PARITY.partition(f"### {dtype}\n")[2].partition("#")[0]
        assert [line.split(" | ")[0][2:] for line in section.splitlines()[3:] if line] == list(
            parity.ways()
        )
    for title, *_ in parity.SAME:
        assert f"\n| {title} | " in PARITY
    assert f"`{rounding.COMMITTED}`" in PARITY
    assert PARITY.endswith("All are kept.\n")


def test_each_training_that_is_compared_is_run_and_the_other_way_round():
    compared = {name for _, *names, _ in parity.SAME for name in names}
    assert compared == set(parity.TRAININGS)
