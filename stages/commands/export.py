"""Merge the adapter into its base: one folder that needs neither PEFT nor this project.

    python -m stages export    # models/merged

In: the base, the adapter, some test pairs. Out: ``models/merged``, by LLaMA-Factory's export on the
CPU. The folder appears if its log-probs are those of base plus adapter, or not at all. A base that
was trained on in 4 or 8 bits is merged unquantised, since there is no exact merge into quantised
weights. That is another model than the evaluated one, as the folder's README says.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.commands import ADAPTER, BASE, FORMATTED, IMAGES, require
from stages.core import command, console
from stages.core.errors import UserError, readable
from stages.model import formatted, scoring, tokens
from stages.pairs import output
from stages.params import params
from stages.params.params import Params
from stages.reporting.card import other_once_merged
from stages.sources import source

OUT = Path("models", "merged")
SAMPLE = 16  # test pairs
# Most that answers' log-probs may differ, nats per token, as a mean over the sample: W + BA is
# rounded once more. The demo's three layers gave 5e-8 in float32 and 4e-4 in bfloat16; a 4B model
# has twelve times as many. If it is not small beside what training changed, the adapter was lost.
BOUNDS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
MOST_LOST = 0.5


def main(out: Path = OUT) -> None:
    p = params.load()
    require(BASE, ADAPTER / "fingerprint.json")
    pairs = formatted.sample(formatted.read(FORMATTED, "test"), SAMPLE)
    whole = p.model_copy(update={"model": p.model.model_copy(update={"quantization_bit": None})})
    with output.all_or_nothing(out) as part:
        print("merging …", flush=True)
        merge(whole, part)
        checked = check(whole, pairs, part)
        text = readme(checked, p.model.quantization_bit)
        (part / "README.md").write_text(text, encoding="utf-8")
    print(f"{checked}\n{out}: {readable(sum(file.stat().st_size for file in out.iterdir()))}")


def merge(p: Params, out: Path, adapter: Path = ADAPTER) -> None:
    """Merge into ``out``, and let its configuration say what holds: whether the embeddings are tied
    (an adapter may have trained ``lm_head`` apart, which a program that believes the base's flag
    would drop), the sizes of images that LLaMA-Factory made in training, and where answers end."""
    from llamafactory.train.tuner import export_model
    from safetensors import safe_open
    from transformers import AutoProcessor, GenerationConfig

    arguments = {
        "model_name_or_path": str(BASE),
        "adapter_name_or_path": str(adapter),
        "template": p.model.template,
        "trust_remote_code": p.model.trust.remote_code,
        "infer_dtype": p.scoring.dtype,
        "export_dir": str(out),
    }
    trained = tokens.load(BASE, p)
    with console.logged(Path(os.devnull)):
        export_model(arguments)
    names: set[str] = set()
    for file in out.glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            names |= set(weights.keys())
    if "lm_head.weight" in names:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = AutoProcessor.from_pretrained(str(out))
    limits = processor.image_processor.size
    least = max(limits["shortest_edge"], p.format.image_min_pixels)
    most = max(least, min(limits["longest_edge"], p.format.image_max_pixels))
    processor.image_processor.size = {"shortest_edge": least, "longest_edge": most}
    processor.save_pretrained(str(out))
    generation = GenerationConfig.from_pretrained(str(out))
    generation.eos_token_id = trained.template.get_stop_token_ids(trained.tokenizer)
    generation.pad_token_id = trained.tokenizer.pad_token_id
    generation.save_pretrained(str(out))


def check(p: Params, pairs: Sequence[dict[str, Any]], merged: Path) -> str:
    """By how much log-probs differ from those of base plus adapter, in a sentence.

    Raises:
        UserError: by too much, or by what is no number.
    """

    def scored(model: Path, adapter: Path | None, label: str) -> pd.DataFrame:
        policy, most = scoring.load(model, p, adapter), p.scoring.batch_tokens  # one at a time
        return scoring.log_probs(policy, pairs, IMAGES, batch_tokens=most, label=label)

    tuned = scored(BASE, ADAPTER, "base plus adapter")
    change = per_token(scored(BASE, None, "base"), tuned)
    off, bound = per_token(scored(merged, None, "merged"), tuned), BOUNDS[p.scoring.dtype]
    said = (
        f"The merged model's log-probs of {len(pairs)} test pairs differ from those of base plus "
        f"adapter by {off:.2g} nats per token. Training changed them by {change:.2g}, and "
        f"{p.scoring.dtype} allows {bound:g}."
    )
    if not (off <= bound and off <= MOST_LOST * change):
        raise UserError(f"{said} Set scoring.dtype to float32 and export again.")
    return said


def per_token(one: pd.DataFrame, other: pd.DataFrame) -> float:
    """The mean absolute difference of answers' log-probs, in nats per token."""
    off = (one[scoring.LOGPS] - other[scoring.LOGPS]).abs().to_numpy()
    return float(np.mean(off / one[scoring.LENGTHS].to_numpy()))


def readme(checked: str, bits: int | None) -> str:
    """What the folder is; ``bits`` of the base in training, if it was quantised."""
    base = source.read(BASE)
    made = json.loads((ADAPTER / "fingerprint.json").read_text(encoding="utf-8"))
    name = f"`{base.repo or BASE}`" + (f" at `{base.commit}`" if base.commit else "")
    warning = f"\n**Not the model that was evaluated.** {other_once_merged(bits)}\n" if bits else ""
    return (
        f"# A merged model\n\n{name}, merged with the adapter whose weights have the SHA-256 "
        f"`{made['adapter_sha256']}`. The model card of that adapter says what it was trained on, "
        f"how it was measured, and under which licence it may be used.\n{warning}\n{checked}\n"
    )


if __name__ == "__main__":
    command.run(main)
