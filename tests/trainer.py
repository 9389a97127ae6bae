"""LLaMA-Factory's own DPO trainer, which scores are held against."""

from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from stages.params.params import Params
from stages.tuning import config as tuning


def dpo_trainer(
    p: Params, model_dir: Path, formatted_dir: Path, images: Path, adapter_dir: Path, folder: Path
) -> Any:
    """The trainer on the test split, as ``llamafactory-cli train`` builds it from the file that the
    train stage writes, with the adapter where training had got to. It works in ``folder``.
    """
    from llamafactory.data import (
        PairwiseDataCollatorWithPadding,
        get_dataset,
        get_template_and_fix_tokenizer,
    )
    from llamafactory.extras.constants import IGNORE_INDEX
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.trainer_utils import create_ref_model

    config = tuning.dpo_config(
        p,
        model=model_dir,
        formatted=formatted_dir,
        images=images,
        output=folder / "output",
        validated=True,
    )
    with (folder / "llamafactory.yaml").open("w") as file:
        YAML().dump(config, file)
    config = YAML(typ="safe").load((folder / "llamafactory.yaml").read_text())
    config |= {"eval_dataset": "test", "adapter_name_or_path": str(adapter_dir)}
    config |= {"preprocessing_num_workers": 1}
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    # From here on as llamafactory/train/dpo/workflow.py goes.
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    data = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)
    model = load_model(module["tokenizer"], model_args, finetuning_args, training_args.do_train)
    trainer = CustomDPOTrainer(
        model=model,
        ref_model=create_ref_model(model_args, finetuning_args),
        args=training_args,
        finetuning_args=finetuning_args,
        data_collator=PairwiseDataCollatorWithPadding(
            template=template,
            model=model,
            pad_to_multiple_of=8,
            label_pad_token_id=IGNORE_INDEX,
            **module,
        ),
        **data,
        **module,
    )
    model.eval()
    return trainer


def trainers_log_probs(trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the trainer finds for policy and reference: each (chosen and rejected, pairs)."""
    import torch

    policy, reference = [], []
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            output = trainer.concatenated_forward(trainer.model, batch)
            policy.append(torch.stack([output["chosen_logps"], output["rejected_logps"]]))
            reference.append(torch.stack(trainer.compute_reference_log_probs(trainer.model, batch)))
    return torch.cat(policy, dim=1).numpy(), torch.cat(reference, dim=1).numpy()
