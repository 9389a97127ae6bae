"""The doctor: upstream's silent faults, looked for in the installed packages on this machine.

    make doctor    # pytest -m doctor

Each fault was met upstream: nothing crashes, and the numbers are wrong. The demo's model is asked,
on the GPU if there is one. `make setup` installs the versions of requirements.txt, which have none.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages.params import params
from tests.contracts import ROOT

pytestmark = [pytest.mark.doctor, pytest.mark.slow]

STEPS = 3
ROUNDING = 1e-4  # nats, of log-probs of some -30 in float32


@pytest.fixture(scope="module")
def p() -> params.Params:
    p = params.load(ROOT / "params" / "demo.yaml")
    return p.model_copy(update={"scoring": p.scoring.model_copy(update={"device": "auto"})})


@pytest.fixture(scope="module")
def policy(p: params.Params) -> Any:
    from stages.model import scoring

    return scoring.load(ROOT / "demo" / "model", p)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("images")
    for name, colour, box in (("a", "red", (8, 8, 40, 40)), ("b", "blue", (20, 30, 60, 50))):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle(box, colour)
        image.save(folder / f"{name}.png")
    return folder


SHORT, LONG = (
    {
        "id": question,
        "messages": [{"role": "user", "content": f"<image>{question}"}],
        "chosen": {"role": "assistant", "content": "The shape is red."},
        "rejected": {"role": "assistant", "content": "It is a blue circle."},
        "images": ["a.png"],
    }
    for question in ("What color is it?", "What color is the shape in the middle of this image?")
)


def log_probs(policy: Any, images: Path, *pairs: dict[str, Any]) -> np.ndarray:
    """(2, n), chosen first."""
    from stages.model import scoring

    found = scoring.log_probs(policy, pairs, images, batch_tokens=4096, label="")
    return np.array(found[scoring.LOGPS]).T


def answers(policy: Any, images: Path, batch_tokens: int, most: int = 12) -> list[str]:
    from stages.model import scoring

    asked: Any = {"max_new_tokens": most, "batch_tokens": batch_tokens, "label": ""}
    return [answer.text for answer in scoring.answer(policy, [SHORT, LONG], images, **asked)]


def packed(policy: Any, images: Path, model: Any) -> dict[str, Any]:
    """Both pairs as ``prefix.pack`` makes them."""
    from stages.model import prefix, scoring

    process = functools.partial(prefix.process_images, policy.template, policy.processor)
    return prefix.pack(scoring.encode(policy, [SHORT, LONG], images), model, process)


def test_another_image_changes_the_log_probs(policy, images):
    """Else the model does not see it: QwenLM/Qwen3-VL#2007, trl#2660."""
    own, other = (
        log_probs(policy, images, SHORT | {"images": [name]}) for name in ("a.png", "b.png")
    )
    assert np.abs(own - other).max() > ROUNDING


def test_generation_gives_an_image_its_rows_and_columns(policy, images):
    """Without ``mm_token_type_ids`` transformers 5 gives its tokens the positions of text."""
    import torch

    body = policy.model.model
    given: list[dict[str, Any]] = []

    def note(_: Any, __: Any, named: dict[str, Any]) -> None:
        given.append(named)

    for module in (body, body.language_model):
        module.register_forward_pre_hook(note, with_kwargs=True)
    answers(policy, images, batch_tokens=1, most=1)
    asked, inside = given[:2]
    right, _ = body.get_rope_index(
        asked["input_ids"],
        mm_token_type_ids=(asked["input_ids"] == policy.image_token_id).int(),
        image_grid_thw=asked["image_grid_thw"],
    )
    assert inside["position_ids"].ndim == 3
    assert torch.equal(inside["position_ids"][-3:], right)


def test_rejected_starts_where_chosen_does(policy, images):
    """Positions that count on behind chosen would make rejected less likely; if it fails, set
    train.shared_prefix: false."""
    from stages.model import prefix

    batch = packed(policy, images, policy.model)
    for positions, segments in zip(batch["position_ids"].unbind(1), batch["segments"], strict=True):
        chosen, rejected = (
            positions[:, segments == part][:, 0].tolist()
            for part in (prefix.CHOSEN, prefix.REJECTED)
        )
        assert chosen == rejected


def test_one_row_of_both_answers_is_as_good_as_a_row_each(policy, images):
    """If it fails, set train.shared_prefix: false."""
    import torch
    from llamafactory.data import PairwiseDataCollatorWithPadding
    from llamafactory.train.trainer_utils import get_batch_logps

    from stages.model import scoring

    parts = {name: getattr(policy, name) for name in ("template", "model", "tokenizer")}
    collator = PairwiseDataCollatorWithPadding(processor=policy.processor, **parts)
    batch = collator(scoring.encode(policy, [SHORT, LONG], images)).to(policy.model.device)
    labels = batch.pop("labels")
    with torch.inference_mode():
        logps, _ = get_batch_logps(policy.model(**batch).logits.float(), labels)
    one, two = log_probs(policy, images, SHORT, LONG), logps.reshape(2, -1).cpu().numpy()
    assert np.abs(one - two).max() <= ROUNDING * max(1.0, np.abs(two).max())


def test_the_frozen_vision_tower_is_unchanged_after_a_few_steps(policy, images, p):
    """LLaMA-Factory#9399, #10139: what it trains of a tower that it calls frozen is not in the
    adapter. Steps of DPO by its own LoRA set-up, at a large learning rate."""
    import torch
    from llamafactory.model import load_model

    from stages.model import prefix, tokens

    lora: Any = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
    loaded = tokens.load(ROOT / "demo" / "model", p, infer_dtype="float32", **lora)
    loaded.model_args.device_map = {"": torch.device("cpu")}
    model = load_model(
        loaded.tokenizer, loaded.model_args, loaded.finetuning_args, is_trainable=True
    )
    tower = [w for name, w in model.named_parameters() if "visual" in name.split(".")]
    assert tower
    assert not any(weight.requires_grad for weight in tower), "LLaMA-Factory trains the tower"
    before = [weight.detach().clone() for weight in tower]
    batch = packed(policy, images, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(STEPS):
        chosen, rejected = prefix.forward(prefix.plain(model), **batch)["logps"].sum(dim=-1)
        (-torch.nn.functional.logsigmoid(chosen - rejected).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not all(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tower, strict=True))


def test_liger_is_a_no_op_for_qwen3_vl():
    """LLaMA-Factory 0.9.5 takes the option and ignores it, as train says; else what train says of
    train.enable_liger_kernel (stages/tuning/config.py) is out of date."""
    from llamafactory.model.model_utils import liger_kernel

    assert '"qwen3_vl"' not in Path(str(liger_kernel.__file__)).read_text(encoding="utf-8")


def test_an_answer_in_a_padded_batch_is_the_answer_alone(policy, images):
    """Prompts padded on the wrong side, or padding that is seen: set scoring.batch_tokens to 1."""
    assert answers(policy, images, batch_tokens=4096) == answers(policy, images, batch_tokens=1)


def test_log_probs_after_generating_are_those_before(policy, images):
    """transformers keeps the positions of the last prompt (``rope_deltas``)."""
    before = log_probs(policy, images, SHORT)
    answers(policy, images, batch_tokens=4096)
    assert np.abs(before - log_probs(policy, images, SHORT)).max() <= ROUNDING
