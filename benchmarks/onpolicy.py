"""Does the off-policy meter foretell what training gains? The demo, with answers in foreign styles.

    python -m benchmarks.onpolicy
    python -m benchmarks.onpolicy --project ../a-finished-clone --pairs 2000

Some of the pairs have both answers said in another style, of the same content: with their words
shuffled, or wrapped in another model's phrases. The base measures all (``answers.off_policy``),
DPO trains on them, and the gain is of right answers to the data set's own held-out questions. Needs
a finished ``dvc repro``; takes about a minute and a half a setting on two cores.
"""

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pipeline import set_parameters
from stages import reference, train
from stages.answers import off_policy, prompts
from stages.core import command
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.model.formatted import dataset_info
from stages.params import params

DEMO = Path(__file__).parent.parent / "params" / "demo.yaml"
SHARES = (0.25, 0.5, 1.0)  # of the pairs


def shuffled(text: str, draw: random.Random) -> str:
    return " ".join(draw.sample(words := text.split(), len(words)))


def wordy(text: str, draw: random.Random) -> str:
    start = draw.choice(
        ("Certainly! As we can see here,", "Upon a close look at it, I believe that")
    )
    return f"{start} {text} I hope that this helps you, and please ask me again."


STYLES: dict[str, Callable[[str, random.Random], str]] = {"shuffled": shuffled, "wordy": wordy}


def main(
    project: Path = Path(), pairs: int = 1200, questions: int = 500, prompted: int = 200
) -> None:
    project = project.resolve()
    images, model = project / "data/pairs/images", project / "models/base"
    rows = {
        split: formatted.read(project / "data/formatted", split)
        for split in ("train", "test", "questions")
    }
    rows["train"] = formatted.sample(rows["train"], pairs)
    settings = [("none", 0.0), *((style, share) for style in STYLES for share in SHARES)]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for style, share in settings:
            folder = Path(scratch, f"{style}-{share}")
            prepared(folder, rows, style, share, questions, prompted)
            os.chdir(folder)  # the stages read params.yaml and keep results here
            found.append((style, share, *measured(folder, images, model)))
            print(json.dumps(found[-1]), flush=True)
        os.chdir(project)
    report(found)


def prepared(
    folder: Path,
    rows: dict[str, list[dict[str, Any]]],
    style: str,
    share: float,
    questions: int,
    prompted: int,
) -> None:
    """A project's folder as ``format`` leaves it, with that share of the pairs in that style."""
    draw = random.Random(0)

    def said(row: dict[str, Any]) -> dict[str, Any]:
        if draw.random() >= share:
            return row
        return row | {
            side: row[side] | {"content": STYLES[style](row[side]["content"], draw)}
            for side in ("chosen", "rejected")
        }

    out = folder / "data/formatted"
    out.mkdir(parents=True)
    for split in ("train", "test"):
        (out / f"{split}.json").write_text(json.dumps([said(row) for row in rows[split]]))
    (out / "validation.json").write_text("[]")
    (out / "questions.json").write_text(json.dumps(rows["questions"]))
    (out / "dataset_info.json").write_text(json.dumps(dataset_info(system_prompts=False)))
    (folder / "params.yaml").write_text(DEMO.read_text(encoding="utf-8"))
    asks = {"prompts": prompted, "questions": questions, "max_new_tokens": 48}
    changed: dict[str, Any] = {f"evaluate.generation.{key}": n for key, n in asks.items()}
    changed |= {"train.num_train_epochs": 1.0}
    changed |= {"train.eval_strategy": "no", "train.save_strategy": "no"}
    set_parameters(folder / "params.yaml", changed)


def measured(folder: Path, images: Path, model: Path) -> tuple[dict[str, float], float, float]:
    """The meter, and the shares of right answers of base and tuned."""
    p, data = params.load(), folder / "data/formatted"
    asked = prompts.selected(data, p)
    base = Checkpoint(model, p)
    said = prompts.answers(base, asked, images, label="base")
    meter = off_policy.figures(off_policy.per_token(base, asked, said, images))
    reference.main(data, images, model, folder / "data/reference")
    adapter = folder / "models/adapter"
    train.main(data, images, model, folder / "data/reference", adapter, folder / "curves")
    tuned = prompts.answers(Checkpoint(model, p, adapter), asked, images, label="tuned")
    both = prompts.beside_each_other(asked, said, tuned)
    right = both[both["of"] == "question"]
    before, after = (float(right[f"{one}_correct"].mean()) for one in ("base", "tuned"))
    return meter, before, after


def report(found: list[tuple[str, float, dict[str, float], float, float]]) -> None:
    """A Markdown table, and how the meter's ranks agree with those of the gains."""
    from scipy.stats import spearmanr

    print(
        "| style | share | distance (nats) | chosen below 1% | rejected preferred | right answers |"
    )
    print("|---|---|---|---|---|---|")
    for style, share, meter, before, after in found:
        print(
            f"| {style} | {share:.0%} | {meter['off_policy_distance']:.2f} | "
            f"{meter['off_policy_chosen']:.0%} | {meter['off_policy_rejected']:.0%} | "
            f"{before:.1%} → {after:.1%} |"
        )
    gains = [after - before for *_, before, after in found]
    for name in ("off_policy_distance", "off_policy_chosen", "off_policy_rejected"):
        for chosen in ("", *STYLES):
            those = [i for i, each in enumerate(found) if chosen in ("", each[0]) or not each[1]]
            nearness = [-found[i][2][name] for i in those]
            rank = spearmanr(nearness, [gains[i] for i in those]).statistic
            print(f"Spearman of -{name} and gain, {chosen or 'all'}: {rank:.2f} of {len(those)}")


if __name__ == "__main__":
    command.run(main)
