"""Let the base model answer, and score it on the controls and on lm-eval's tasks.

In: the test pairs and questions, the images, the base model. Out: ``controls.parquet`` (log-probs
of a sample of test pairs with other images), ``answers.parquet`` (greedy answers to the
evaluation's prompts), ``off_policy.parquet`` (how likely the base finds the pairs' answers beside
its own), ``lm_eval/`` (what lm-eval's tasks gave).

Why apart from ``reference``: another control, prompt or task is asked for often, and none of them
changes the log-probs of the pairs.
"""

from pathlib import Path
from typing import Any

from stages.answers import controls, lm_eval, off_policy, prompts, task_results
from stages.core import command
from stages.model import formatted
from stages.model.checkpoint import Checkpoint
from stages.params import params


def main(
    formatted_data: Path, images: Path, model: Path, task_files: Path, out: Path
) -> dict[str, Any]:
    p = params.load()
    base = Checkpoint(model, p)
    # First what can fail: lm-eval downloads the data sets of its tasks.
    probed = lm_eval.run(base, task_files, formatted_data, images)
    pairs = formatted.read(formatted_data, "test")
    controlled = controls.log_probs(base, pairs, images, label="base")
    asked = prompts.selected(formatted_data, p)
    answered = prompts.answers(base, asked, images, label="base answers")
    measured = off_policy.per_token(base, asked, answered, images)

    out.mkdir(parents=True, exist_ok=True)
    controlled.to_parquet(out / "controls.parquet", index=False)
    answered.to_parquet(out / "answers.parquet", index=False)
    measured.to_parquet(out / "off_policy.parquet", index=False)
    task_results.write(probed, out / "lm_eval")
    if found := off_policy.figures(measured):
        print(
            f"off-policy: chosen is {found['off_policy_distance']:.2f} nats a token less likely to "
            f"the base than its own answer (median of {found['own_answers']:,}), below its own 1% "
            f"quantile in {found['off_policy_chosen']:.0%}; it prefers rejected in "
            f"{found['off_policy_rejected']:.0%}"
        )
    return base.cost()


if __name__ == "__main__":
    command.run(main)
