"""One trainer of ``benchmarks.peers``, run by the Python of its own environment.

It trains by the peer's own entry point, which gets a callback that waits for its turn: each line on
standard input is one step, and each line of JSON on standard output is what became of it. Whatever
the peer prints goes to standard error.
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5
TRL_LOSSES = {  # by our names
    "sigmoid": {},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


def main(given: dict[str, Any]) -> None:
    """Train as ``benchmarks.peers.start`` says, until standard input ends."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=lines, flush=True)

    shared = {
        "output_dir": given["output"],
        "per_device_train_batch_size": given["batch_size"],
        "gradient_accumulation_steps": 1,
        "max_steps": 1000,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": given["dtype"] == "bfloat16",
        **given["options"],
    }
    try:
        TRAINERS[given["trainer"]](given, shared, turns(tell))
    except Exception as error:
        tell(refused=f"{type(error).__name__}: {' '.join(str(error).split())}")


def turns(tell: Callable[..., None]) -> Any:
    """A callback that waits before each step, and tells time, memory, loss and gradient norm."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **more: Any) -> None:
            # One adapter for all, away from the zero at which every loss is log 2.
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    noise = torch.empty(weight.shape).normal_(0, 0.02, generator=chance)
                    weight.data.copy_(noise)
            self.held = peak_memory(restart=True)
            tell(trained=sum(w.numel() for w in model.parameters() if w.requires_grad))
            self.wait()

        def wait(self) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            peak_memory(restart=True)
            self.start, self.processor = time.perf_counter(), time.process_time()

        def on_log(self, *_: Any, logs: dict[str, float], **more: Any) -> None:
            memory = peak_memory() - self.held
            seconds = time.perf_counter() - self.start
            loss, norm = float(logs["loss"]), float(logs["grad_norm"])
            processor = time.process_time() - self.processor
            tell(seconds=seconds, processor=processor, memory=memory, loss=loss, norm=norm)
            self.wait()

    return Turns()


def llamafactory(given: dict[str, Any], shared: dict[str, Any], callback: Any) -> None:
    from llamafactory.train.tuner import run_exp

    from stages.params.losses import LOSSES

    run_exp(
        {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": given["model"],
            "template": "qwen3_vl_nothink",
            "dataset": "train",
            "dataset_dir": given["data"],
            "media_dir": given["data"],
            "cutoff_len": 4096,
            "disable_shuffling": True,
            "finetuning_type": "lora",
            "lora_rank": given["rank"],
            "lora_alpha": 2 * given["rank"],
            "lora_target": "all",
            "pref_beta": given["beta"],
            **LOSSES[given["loss"]].options,
            **shared,
        },
        callbacks=[callback],
    )


def ours(given: dict[str, Any], shared: dict[str, Any], callback: Any) -> None:
    """LLaMA-Factory with the trainer on shared prompts, as in the stage train."""
    from stages.tuning.inside.sitecustomize import use_trainer

    use_trainer(os.getcwd())
    llamafactory(given, shared, callback)


def trl(given: dict[str, Any], shared: dict[str, Any], callback: Any) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    pairs = [
        {
            "images": [Image.open(Path(given["data"], name)) for name in row["images"]],
            "prompt": [
                {"role": "user", "content": row["messages"][0]["content"].removeprefix("<image>")}
            ],
            "chosen": [row["chosen"]],
            "rejected": [row["rejected"]],
        }
        for row in rows(given)
    ]
    DPOTrainer(
        given["model"],
        args=DPOConfig(
            **shared,
            **TRL_LOSSES[given["loss"]],
            beta=given["beta"],
            max_length=None,
            train_sampling_strategy="sequential",
            model_init_kwargs={"dtype": given["dtype"]},
        ),
        train_dataset=Dataset.from_list(pairs),
        callbacks=[callback],
        peft_config=LoraConfig(
            r=given["rank"],
            lora_alpha=2 * given["rank"],
            # The language model, as in the others.
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
    ).train()


def swift(given: dict[str, Any], shared: dict[str, Any], callback: Any) -> None:
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    # It is written down for Qwen's vocabulary, and the tokenizer here is a small one.
    config = json.loads(Path(given["model"], "config.json").read_text(encoding="utf-8"))
    Qwen2VLTemplate.image_token_id = config["image_token_id"]
    file = Path(given["output"]).with_suffix(".jsonl")
    with file.open("w", encoding="utf-8") as lines:
        for row in rows(given):
            pair = {
                "messages": [*row["messages"], row["chosen"]],
                "rejected_response": row["rejected"]["content"],
                "images": [str(Path(given["data"], name)) for name in row["images"]],
            }
            print(json.dumps(pair), file=lines)
    callbacks_map["turns"] = lambda *_: callback
    options = shared | {
        "callbacks": "turns",
        "rlhf_type": "dpo",
        "model": given["model"],
        "model_type": "qwen3_vl",
        "use_hf": True,
        "torch_dtype": given["dtype"],
        "dataset": str(file),
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataloader_num_workers": 0,
        "split_dataset_ratio": 0,
        "tuner_type": "lora",
        "lora_rank": given["rank"],
        "lora_alpha": 2 * given["rank"],
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "beta": given["beta"],
    }
    rlhf_main([word for name, value in options.items() for word in (f"--{name}", str(value))])


TRAINERS = {function.__name__: function for function in (llamafactory, trl, swift, ours)}


def rows(given: dict[str, Any]) -> list[dict[str, Any]]:
    return list(json.loads(Path(given["data"], "train.json").read_text(encoding="utf-8")))


def peak_memory(restart: bool = False) -> float:
    """The most memory used since the last restart (GB), of the GPU or of this process (Linux)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.max_memory_allocated()) / 2**30
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
