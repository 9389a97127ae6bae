"""Doctor: do the installed packages have one of upstream's silent faults? A line for each.

    make doctor

In: the demo's base model, which is in Git. Out: a line for each check on standard output, "ok" or
what is wrong and what to do; exit status 1 if anything is. It takes under a minute, most of it
LLaMA-Factory's import. Each fault was met upstream: nothing crashes, and the numbers are wrong.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stages.core import command
from stages.core.errors import UserError
from stages.model import scoring
from stages.model.reference_logps import PACKAGES
from stages.params import params
from stages.params.params import Params

DEMO, PRESET = Path("demo/model"), Path("params/demo.yaml")
STEPS = 3
ROUNDING = 1e-4  # nats, of log-probs of some -30 in float32


@dataclass(frozen=True)
class Patient:
    """The demo's base as scoring loads it, and formatted pairs on images in ``images``; the second
    has a longer question than the first."""

    policy: scoring.Policy
    p: Params
    model: Path
    pairs: list[dict[str, Any]]
    images: Path

    def log_probs(self, *pairs: dict[str, Any]) -> np.ndarray:
        """(2, n), chosen first."""
        found = scoring.log_probs(
            self.policy, pairs, self.images, batch_tokens=4096, label="doctor"
        )
        return np.stack([found.chosen, found.rejected])


def main(model: Path = DEMO, preset: Path = PRESET) -> None:
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is missing; run from the project's root, in a complete clone")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES if name != "bitsandbytes"))
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        patient = admitted(model, params.load(preset), Path(folder))
        for claim, check in CHECKS:
            problem = check(patient)
            wrong += problem is not None
            print(f"{'ok  ' if problem is None else 'BAD '} {claim}")
            if problem is not None:
                print(f"     {problem}")
    if wrong:
        raise UserError(
            f"{wrong} of {len(CHECKS)} checks failed; `make setup` installs the versions of "
            "requirements.txt, on which all pass"
        )


def admitted(model: Path, p: Params, folder: Path) -> Patient:
    """The model, loaded, and pairs on two images made here."""
    from PIL import Image, ImageDraw

    for name, colour, box in (
        ("a.png", "red", (8, 8, 40, 40)),
        ("b.png", "blue", (20, 30, 60, 50)),
    ):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle(box, colour)
        image.save(folder / name)
    questions = ("What color is it?", "What color is the shape in the middle of this image?")
    pairs = [
        {
            "id": str(i),
            "messages": [{"role": "user", "content": f"<image>{question}"}],
            "chosen": {"role": "assistant", "content": "The shape is red."},
            "rejected": {"role": "assistant", "content": "It is a blue circle."},
            "images": ["a.png"],
        }
        for i, question in enumerate(questions)
    ]
    return Patient(scoring.load(model, p), p, model, pairs, folder)


# checks: None, or what is wrong and what to do


def image_is_seen(patient: Patient) -> str | None:
    first = patient.pairs[0]
    own, other = patient.log_probs(first), patient.log_probs(first | {"images": ["b.png"]})
    if np.abs(own - other).max() > ROUNDING:
        return None
    return (
        "another image gives the same log-probs: the model does not see it (QwenLM/Qwen3-VL#2007). "
        "Nothing that is trained or scored now depends on images."
    )


def image_has_positions(patient: Patient) -> str | None:
    """In generation, which takes what it is not told for text."""
    import torch

    policy, pair = patient.policy, patient.pairs[0]
    asked = scoring._prompt_tokens(policy, pair, patient.images)
    batch = scoring._left_padded(policy, [pair], [asked], patient.images)
    given: list[Any] = []
    body = policy.model.model
    hook = body.language_model.register_forward_pre_hook(
        lambda _, __, named: given.append(named["position_ids"]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            policy.model.generate(**batch, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
    right, _ = body.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=(batch["input_ids"] == policy.image_token_id).int(),
        image_grid_thw=batch["image_grid_thw"],
    )
    if given[0].ndim == 3 and torch.equal(given[0][-3:].cpu(), right.cpu()):
        return None
    return (
        "generation gives an image's tokens the positions of text: its inputs have no "
        "mm_token_type_ids, or it does not read them. Answers would be of a model that sees no "
        "rows and columns."
    )


def positions_restart(patient: Patient) -> str | None:
    from stages.model import prefix

    if patient.policy.two_rows_because:
        return f"a pair can't be one row ({patient.policy.two_rows_because}); training will be slow"
    policy, one = patient.policy, patient.log_probs(*patient.pairs)
    features = scoring.encode(policy, patient.pairs, patient.images)

    def images(paths: list[Any]) -> dict[str, Any]:
        return prefix.process_images(policy.template, policy.processor, paths)

    batch = prefix.pack(features[:1], policy.model, images)
    starts = [
        batch["position_ids"][:, batch["segments"] == part][:, :1].tolist()
        for part in (prefix.CHOSEN, prefix.REJECTED)
    ]
    if starts[0] != starts[1]:
        return "rejected does not start where chosen does; set train.shared_prefix: false"
    two = scoring._two_rows(policy, policy.collator(features))[0]
    if np.abs(one - two).max() > ROUNDING * max(1.0, np.abs(two).max()):
        return (
            f"one row of both answers differs from a row each by {np.abs(one - two).max():.2g} "
            "nats; set train.shared_prefix: false"
        )
    return None


def frozen_tower_stays(patient: Patient) -> str | None:
    """Three steps of DPO by LLaMA-Factory's own LoRA set-up, at a large learning rate."""
    import torch
    from llamafactory.model import load_model

    from stages.model import prefix, tokens
    from stages.tuning.trainer import tower_digest

    loaded = tokens.load(
        patient.model,
        patient.p,
        infer_dtype="float32",
        finetuning_type="lora",
        lora_rank=8,
        lora_target="all",
    )
    loaded.model_args.device_map = {"": torch.device("cpu")}
    model = load_model(
        loaded.tokenizer, loaded.model_args, loaded.finetuning_args, is_trainable=True
    )
    before = tower_digest(model)
    if before is None:
        return (
            "LLaMA-Factory trains the vision tower with freeze_vision_tower: true "
            "(LLaMA-Factory#9399, #10139); its weights would not be in the adapter"
        )
    policy = patient.policy
    features = scoring.encode(policy, patient.pairs, patient.images)

    def images(paths: list[Any]) -> dict[str, Any]:
        return prefix.process_images(policy.template, policy.processor, paths)

    batch = prefix.pack(features, model, images)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    start = [weight.detach().clone() for weight in trained]
    for _ in range(STEPS):
        chosen, rejected = prefix.forward(prefix.plain(model), **batch)["logps"].sum(dim=-1)
        (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if all(torch.equal(a, b) for a, b in zip(start, trained, strict=True)):
        return "three steps changed nothing: no gradient reaches the adapter"
    if tower_digest(model) != before:
        return (
            "three steps changed the vision tower, which is frozen (LLaMA-Factory#9399, #10139); "
            "the adapter alone would not make the trained model"
        )
    return None


def liger_does_nothing(patient: Patient) -> str | None:
    from llamafactory.model.model_utils import liger_kernel

    source = Path(str(liger_kernel.__file__)).read_text(encoding="utf-8")
    if '"qwen3_vl"' not in source:
        return None
    return (
        "LLaMA-Factory has Liger kernels for qwen3_vl now: what train says of "
        "train.enable_liger_kernel (stages/tuning/config.py) is out of date"
    )


def padding_does_not_matter(patient: Patient) -> str | None:
    def asked(batch_tokens: int) -> list[str]:
        answers = scoring.answer(
            patient.policy,
            patient.pairs,
            patient.images,
            max_new_tokens=12,
            batch_tokens=batch_tokens,
            label="doctor",
        )
        return [answer.text for answer in answers]

    alone, together = asked(1), asked(4096)
    if alone == together:
        return None
    return (
        f"in a batch the model answers {together}, and alone {alone}: prompts are padded on the "
        "wrong side, or padding is seen; set scoring.batch_tokens to 1"
    )


def rope_deltas_are_not_stale(patient: Patient) -> str | None:
    """After an answer to a longer prompt with an image."""
    before = patient.log_probs(patient.pairs[0])
    padding_does_not_matter(patient)
    after = patient.log_probs(patient.pairs[0])
    if np.abs(before - after).max() <= ROUNDING:
        return None
    return (
        f"after generating, log-probs differ by {np.abs(before - after).max():.2g} nats: positions "
        "of the last prompt are used again (rope_deltas); score and generate in processes apart"
    )


Check = Callable[[Patient], str | None]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("another image changes the log-probs", image_is_seen),
    ("generation gives the image its rows and columns", image_has_positions),
    ("rejected starts where the prompt ends, and one row is as good as two", positions_restart),
    (f"the frozen vision tower is unchanged after {STEPS} steps", frozen_tower_stays),
    ("Liger is a no-op for qwen3_vl, as train says", liger_does_nothing),
    ("an answer in a padded batch is the answer alone", padding_does_not_matter),
    ("log-probs after generating are those before (rope deltas)", rope_deltas_are_not_stale),
)


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command.run(main)
