"""What an edit of our own code costs: kept results, trainings, or nothing."""

import shutil
from dataclasses import replace

import pytest

from stages.core import meaning
from stages.core.meaning import meaning as parsed  # each time: see conftest.parsed_once
from stages.families import known
from stages.model.checkpoint import Checkpoint
from stages.params.losses import LOSSES
from stages.params.params import Params
from stages.tuning import config
from tests.conftest import document

COMMENT, CODE = "# said otherwise\n", "SAID_OTHERWISE = 1\n"
SCORES, TRAINING = "kept log-probs and answers", "training"


def edited(text, edit):
    """The source of a module after an edit; the first line of each is its docstring's."""
    if edit == "docstring":
        return text.replace('"""', '"""Said otherwise. ', 1)
    if edit == "layout":
        return text.replace("(\n", "(\n\n", 1)
    return text + edit


@pytest.fixture
def base(tmp_path, model_dir):
    """The demo's base model, which is a Qwen3-VL, as far as fingerprints look at it."""
    shutil.copy(model_dir / "config.json", tmp_path)
    (tmp_path / "SOURCE.json").write_text("{}")
    return tmp_path


def training(formatted, model, shared_prefix):
    p = Params.model_validate(document(**{"train.shared_prefix": shared_prefix}))
    return config.fingerprint({}, p, formatted, model, None)


@pytest.mark.parametrize(
    ("file", "edit", "discarded"),
    [
        ("model/scoring.py", COMMENT, ()),
        ("model/scoring.py", "docstring", ()),
        ("model/scoring.py", "layout", ()),
        ("model/scoring.py", CODE, (SCORES,)),
        ("model/tokens.py", CODE, (SCORES,)),
        ("model/formatted.py", CODE, (SCORES,)),
        ("model/prefix.py", "docstring", ()),
        ("model/prefix.py", CODE, (SCORES, TRAINING)),
        ("model/reference_logps.py", CODE, ()),  # how log-probs lie on disk
        ("model/checkpoint.py", CODE, ()),
        ("core/processes.py", CODE, ()),
        ("families/family.py", CODE, (SCORES, TRAINING)),
        ("families/known.py", CODE, ()),
        ("params/losses.py", CODE, ()),  # a training's name has the loss's own values
        ("model/recurrence.py", CODE, ()),  # of another family
        ("tuning/trainer.py", "docstring", ()),
        ("tuning/trainer.py", CODE, (TRAINING,)),
        ("tuning/inside/sitecustomize.py", COMMENT, ()),
        ("tuning/inside/sitecustomize.py", CODE, (TRAINING,)),
        ("tuning/process.py", CODE, ()),
        ("answers/grading.py", CODE, ()),
        ("evaluation/metrics.py", CODE, ()),
    ],
)
def test_an_edit_discards_what_it_decides_and_nothing_else(
    base, params_with, tmp_path, monkeypatch, file, edit, discarded
):
    p = params_with()

    def names():
        trained = training(tmp_path, base, shared_prefix=True)
        return {SCORES: Checkpoint(base, p).fingerprint, TRAINING: trained}

    before = names()
    shutil.copytree(meaning.STAGES, tmp_path / "stages")
    monkeypatch.setattr(meaning, "STAGES", tmp_path / "stages")
    assert names() == before
    source = (tmp_path / "stages" / file).read_text()
    assert edited(source, edit) != source
    (tmp_path / "stages" / file).write_text(edited(source, edit))
    after = names()
    assert {name for name in before if after[name] != before[name]} == set(discarded)


def test_training_the_stock_way_does_not_depend_on_our_trainer(base, tmp_path, monkeypatch):
    before = training(tmp_path, base, shared_prefix=False)
    shutil.copytree(meaning.STAGES, tmp_path / "stages")
    monkeypatch.setattr(meaning, "STAGES", tmp_path / "stages")
    with (tmp_path / "stages/tuning/trainer.py").open("a") as file:
        file.write(CODE)
    assert training(tmp_path, base, shared_prefix=False) == before


def test_words_about_a_family_or_a_loss_discard_nothing_and_its_tokens_do():
    for family in known.FAMILIES:
        assert replace(family, paper="another", published={}).fingerprint == family.fingerprint
        assert replace(family, image_token="another").fingerprint != family.fingerprint
    assert "model/recurrence.py" in known.of_type("qwen3_5", name="it").fingerprint
    assert replace(LOSSES["mpo"], paper="another").decides == LOSSES["mpo"].decides
    assert replace(LOSSES["mpo"], options={}).decides != LOSSES["mpo"].decides


def test_what_a_loss_computes_names_the_training(base, tmp_path, monkeypatch):
    before = training(tmp_path, base, shared_prefix=True)
    monkeypatch.setitem(LOSSES, "sigmoid", replace(LOSSES["sigmoid"], paper="another"))
    assert training(tmp_path, base, shared_prefix=True) == before
    monkeypatch.setitem(LOSSES, "sigmoid", replace(LOSSES["sigmoid"], mean=True))
    assert training(tmp_path, base, shared_prefix=True) != before


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("def f():\n  'says'\n  return 1", "def f(): return 1  # says", True),
        ("class A:\n  'says'\n  x: int\n  'of x'", "class A:\n\n    x: int", True),
        ("u'a'", "'b'", True),  # neither does anything
        ("x = u'a'", "x = 'a'", True),
        ("x = 'a'", "x = 'b'", False),
        ("x = 0", "x = None", False),
        ("x = False", "x = 0", False),
        ("f(a)", "f(a, b=1)", False),
        ("f'{x:{w}}'", "f'{x:{w}}' ''", True),
        ("x: int = 1", "x: float = 1", False),
    ],
)
def test_what_means_the_same_has_the_same_hash(one, other, same):
    assert (meaning.meaning(one) == meaning.meaning(other)) is same


def test_what_a_newer_python_adds_to_the_tree_changes_no_hash(monkeypatch):
    import ast

    source = "def f(x): return f'{x}'\nimport a"
    before = parsed(source)
    for node, empty in ((ast.FunctionDef, []), (ast.Import, 0)):
        monkeypatch.setattr(node, "_fields", (*node._fields, "newer"))
        monkeypatch.setattr(node, "newer", empty, raising=False)
    assert parsed(source) == before
