"""Training on batches of rows of like lengths: ``train.train_sampling_strategy: group_by_length``.

transformers' own sampler looks for lengths that a data set of pairs has not, and what it draws
depends on what was drawn before, which a resumed training can't repeat.
"""

from collections.abc import Iterator
from typing import Any

from stages.model import prefix

STRATEGY = "group_by_length"


class LikeLengths:
    """A sampler: pairs are shuffled, and each 50 steps' are sorted by length, longest first
    (``get_length_grouped_indices`` of transformers). Seed and epoch decide.
    """

    def __init__(self, trainer: Any) -> None:
        args, rows = trainer.args, trainer.train_dataset
        self.trainer = trainer
        self.step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.step *= args.world_size
        names = ("chosen_input_ids", "rejected_input_ids", "chosen_labels")
        self.lengths = [
            len(chosen) + len(rejected) - labels.count(prefix.IGNORE)
            for chosen, rejected, labels in zip(*(rows[name] for name in names), strict=True)
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(seed + epoch)
        order: list[int] = get_length_grouped_indices(self.lengths, self.step, generator=generator)
        return iter(order)
