"""Export: the adapter merged into its base, as one folder that needs neither PEFT nor this project.

    python -m stages export    # models/merged

In: the base, the adapter, some test pairs. Out: safetensors, configuration, tokenizer and processor
in ``models/merged``, merged by ``llamafactory-cli export`` and then checked: log-probs are those of
base plus adapter within ``BOUNDS``, tokenizer and processor load with transformers alone, images
become about as many tokens as in training, generation stops where the template does. The folder
appears when all of that holds, or not at all.

A base that was trained on in 4 or 8 bits is merged unquantised, as there is no exact merge into
quantised weights. The adapter learnt to correct the quantised base, so the merged model is another
one than was evaluated; the folder's README says so.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.commands import llamafactory, outputs
from stages.core import command
from stages.core.errors import UserError
from stages.core.text import readable
from stages.model import formatted, scoring
from stages.pairs import output
from stages.params import params
from stages.params.params import Params
from stages.reporting.card import other_once_merged
from stages.sources import source as fetched

OUT = Path("models", "merged")
SAMPLE = 16  # test pairs

# Most that the log-prob of an answer may differ after merging, nats per token, as a mean over the
# sample. Merging rounds W + BA to the weights' precision once more. The demo's three layers gave
# 5e-8 in float32 and 4e-4 in bfloat16; a 4B model has twelve times as many.
BOUNDS = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
# The difference must also be small beside what training changed, or the adapter was lost in it.
MOST_LOST = 0.5
# How far the number of image tokens may be off without LLaMA-Factory, which rounds an image's sides
# twice where transformers rounds them once: a row or column of tokens more or less.
MOST_TOKENS = 0.2


def main(out: Path = OUT) -> None:
    p, at = params.load(), outputs.read()
    outputs.require(at.model, at.adapter / "fingerprint.json")
    unquantized = p.model_copy(
        update={"model": p.model.model_copy(update={"quantization_bit": None})}
    )
    pairs = formatted.sample(formatted.read(at.formatted_data, "test"), SAMPLE)
    with output.all_or_nothing(out) as part:
        merge(p, at.model, at.adapter, part)
        facts = check(unquantized, at, pairs, part)
        (part / "README.md").write_text(readme(p, at.model, at.adapter, facts), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir())
    print("\n".join([*facts, f"{out}: {readable(size)}"]))


def merge(p: Params, model: Path, adapter: Path, out: Path) -> None:
    """Merge into ``out`` by ``llamafactory-cli export``, on the CPU.

    Raises:
        UserError: it failed.
    """
    configured = llamafactory.configuration(p, model, adapter, quantized=False)
    print("merging …", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        configured["export_dir"] = str(out.absolute())
        with llamafactory.started(
            "export", configured, folder, llamafactory.environment(p)
        ) as process:
            if status := process.wait():
                raise llamafactory.failed("export", status, folder)


def check(
    p: Params, at: outputs.Places, pairs: Sequence[dict[str, Any]], merged: Path
) -> list[str]:
    """What holds of the merged model, in sentences; ``p`` has an unquantised base.

    Raises:
        UserError: something does not hold.
    """
    tuned = scored(p, at.model, at.adapter, pairs, at.images, "base plus adapter")
    base = scored(p, at.model, None, pairs, at.images, "base")
    found = scored(p, merged, None, pairs, at.images, "merged")
    off, change, bound = (
        per_token(found, tuned),
        per_token(base, tuned),
        BOUNDS[p.scoring.dtype],
    )
    if off > bound or off > MOST_LOST * change:
        raise UserError(
            f"the merged model is not base plus adapter: log-probs differ by {off:.2g} nats per "
            f"token (bound in {p.scoring.dtype}: {bound:g}), training had changed them by "
            f"{change:.2g}; set scoring.dtype to float32 and export again"
        )
    stops = generation_stops(p, at.model, merged)
    tokens = np.array(plain_image_tokens(p, merged, pairs, at.images))
    most = int(found.image_tokens.sum())
    if abs(int(tokens.sum()) - most) > MOST_TOKENS * most:
        raise UserError(
            f"transformers alone makes {tokens.sum()} tokens of {len(pairs)} pairs' images, "
            f"training made {most}: the model would see other sizes than it was trained on; "
            "use the adapter through LLaMA-Factory (make serve)"
        )
    return [
        f"log-probs of {len(pairs)} test pairs: base plus adapter within {off:.2g} nats per token "
        f"(bound in {p.scoring.dtype}: {bound:g}; training changed them by {change:.2g})",
        "transformers alone loads tokenizer and processor, and makes as many tokens as training of "
        f"the images of {(tokens == found.image_tokens).sum()} of the pairs, {tokens.sum()} of "
        f"all where training made {most}",
        f"generation stops at {' and '.join(stops)}",
    ]


def scored(
    p: Params, model: Path, adapter: Path | None, pairs: Sequence[Any], images: Path, label: str
) -> scoring.PairLogProbs:
    """Log-probs by a model that is loaded for them alone: at the 4B size two may not fit."""
    policy = scoring.load(model, p, adapter)
    return scoring.log_probs(
        policy, pairs, images, batch_tokens=p.scoring.batch_tokens, label=label
    )


def per_token(one: scoring.PairLogProbs, other: scoring.PairLogProbs) -> float:
    """The mean absolute difference of answers' log-probs, in nats per token."""
    off = [
        np.abs(getattr(one, side) - getattr(other, side)) / getattr(one, f"{side}_tokens")
        for side in ("chosen", "rejected")
    ]
    return float(np.mean(off))


def generation_stops(p: Params, base: Path, merged: Path) -> list[str]:
    """The tokens at which ``generation_config.json`` ends an answer; the template's are added."""
    from transformers import AutoTokenizer, GenerationConfig

    from stages.model import tokens

    loaded = tokens.load(base, p)
    wanted = loaded.template.get_stop_token_ids(loaded.tokenizer)
    config = GenerationConfig.from_pretrained(str(merged))
    given = config.eos_token_id
    known = [] if given is None else given if isinstance(given, list) else [given]
    config.eos_token_id = list(dict.fromkeys([*known, *wanted]))
    if config.pad_token_id is None:
        config.pad_token_id = loaded.tokenizer.pad_token_id
    config.save_pretrained(str(merged))
    return AutoTokenizer.from_pretrained(str(merged)).convert_ids_to_tokens(config.eos_token_id)


def plain_image_tokens(
    p: Params, merged: Path, pairs: Sequence[Mapping[str, Any]], images: Path
) -> list[int]:
    """How many tokens transformers alone makes of each pair's images.

    In training LLaMA-Factory brings an image within ``format.image_min_pixels`` and
    ``image_max_pixels``; the processor gets the same limits, else whoever loads the folder shows
    the model larger images than it was trained on.
    """
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(merged))
    own = processor.image_processor
    least = max(own.size["shortest_edge"], p.format.image_min_pixels)
    most = min(own.size["longest_edge"], p.format.image_max_pixels)
    own.size = {"shortest_edge": least, "longest_edge": max(least, most)}
    processor.save_pretrained(str(merged))
    processor = AutoProcessor.from_pretrained(str(merged))
    counts = []
    for pair in pairs:
        shown = [Image.open(images / name).convert("RGB") for name in pair["images"]]
        if not shown:
            counts.append(0)
            continue
        grids = processor.image_processor(images=shown, return_tensors="pt")["image_grid_thw"]
        counts.append(int(grids.prod(dim=1).sum()) // processor.image_processor.merge_size**2)
    return counts


def readme(p: Params, model: Path, adapter: Path, facts: Sequence[str]) -> str:
    """What the folder is, for who finds it."""
    source = fetched.read(model)
    made = json.loads((adapter / "fingerprint.json").read_text(encoding="utf-8"))
    bits = p.model.quantization_bit
    lines = [
        "# A merged model",
        "",
        f"`{source.repo or model}`{f' at commit `{source.commit}`' if source.commit else ''}, with "
        f"the adapter merged whose weights have the SHA-256 `{made['adapter_sha256']}`.",
        "The model card of that adapter says what it was trained on and how it was measured, and "
        "under which licence it may be used.",
        "",
        *(f"- {fact}" for fact in facts),
    ]
    if bits:
        lines += [
            "",
            f"**Not the model that was evaluated.** {other_once_merged(bits)}",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main)
