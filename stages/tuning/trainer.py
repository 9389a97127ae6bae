"""LLaMA-Factory's DPO trainer on rows of both answers of a pair (``stages.model.prefix``).

It runs inside ``llamafactory-cli``, where ``inside/sitecustomize.py`` puts it in the place of
``CustomDPOTrainer``. Only what feeds and reads the model differs: the collator,
``concatenated_forward`` and, with a cache, ``compute_reference_log_probs``. Losses, metrics,
optimizer, accumulation, evaluation, checkpoints and callbacks are LLaMA-Factory 0.9.5's own. Where
the shared prompt is not exact or was not tried, the trainer says why and goes the stock way.

Otherwise than in stock, on purpose: ``train.loss`` reaches the loss (``dpo_loss``); there are no
means of logits, which in stock depend on the padding; figures of the validation pairs are means
over pairs, not over batches; and BCO's mean of rewards is of training alone and survives a resume.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamafactory.extras.logging import get_logger
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from PIL import Image

from stages.core.errors import UserError
from stages.model import prefix, reference_logps
from stages.params.losses import LOSSES
from stages.tuning import attention, views
from stages.tuning.inside.sitecustomize import FIRST_BATCH, REFERENCE, UNDER_VIEW, VIEW

RUNNING = "running.json"  # of a checkpoint: the mean of all rewards so far (BCO)
SIDES = ("chosen_logps", "rejected_logps")
BY_LENGTH = "group_by_length"  # of train_sampling_strategy: batches of rows of like lengths

# Larger differences from stock than rounding makes, as a share of the log-probs: float32 has 24
# bits, bfloat16 8, and an answer's log-prob is a sum that went through every layer.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}

logger = get_logger(__name__)


class SharedPrefixTrainer(CustomDPOTrainer):
    """``reference``: summed log-probs (chosen, rejected) of the reference by ``pair_key``; without
    it the reference is computed in each step, as in stock. ``view``: what mDPO shows in place of a
    pair's image; its rows follow those of the pairs in a batch. ``under_view``: log-probs (n,) of
    chosen there, of the batch that went through last: by the policy, and by the reference.
    """

    reference: Mapping[str, tuple[float, float]] | None = None
    view: str | None = None
    under_view: dict[str, Any]
    data_collator: Any
    running: Any  # BCO's mean of rewards, where the loss has it
    pairs = 0  # of the batch that the model saw last

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, **more: Any) -> None:
        if prefix.why_not(model) is None:
            prefix.install(model)  # before accelerate wraps it
        super().__init__(model=model, ref_model=ref_model, finetuning_args=finetuning_args, **more)
        self.like_lengths = self.args.train_sampling_strategy == BY_LENGTH
        self.args.train_sampling_strategy = "random"  # which says where validation pairs lie, too
        # Dropout is off by now.
        self.stock_because = prefix.why_not(model) or self._untried()
        self.view, self.under_view = self.view or os.environ.get(VIEW), {}
        if self.view and self.stock_because:
            raise UserError(f"train.loss: mdpo needs shared prompts, but {self.stock_because}")
        if self.stock_because:
            logger.warning_rank0(f"Training the stock way: {self.stock_because}.")
            return
        if not finetuning_args.use_ref_model:
            self.reference = None
        elif self.reference is None and REFERENCE in os.environ:
            self.reference = reference_logps.by_pair(Path(os.environ[REFERENCE]))
        self.data_collator = SharedPrefixCollator(
            self.data_collator,
            reference=self.reference,
            with_placeholder=self.accelerator.num_processes > 1,
            view=self.view,
            paths=self._paths() if self.view == "other" else (),
        )

    def _paths(self) -> Sequence[str]:
        return sorted({path for images in self.train_dataset["images"] for path in images or []})

    def _untried(self) -> str | None:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            return "parameters are sharded, and a shared prompt was not tried with that"
        return None

    def _get_train_sampler(self, *arguments: Any, **more: Any) -> Any:
        if self.like_lengths:
            return LikeLengths(self)
        return super()._get_train_sampler(*arguments, **more)

    def train(self, *arguments: Any, **more: Any) -> Any:
        """Compare the first pairs with stock, then train.

        Raises:
            UserError: they differ by more than rounding explains.
        """
        file = Path(self.args.output_dir, FIRST_BATCH)
        if self.stock_because:
            compared: dict[str, Any] = {"stock_because": self.stock_because}
        else:
            if self.view and self.reference is not None:
                self._look_up_view()
            count = min(self.args.per_device_train_batch_size, len(self.train_dataset))
            features = [self.train_dataset[i] for i in range(count)]
            compared = self.compared_with_stock(features)
            refuse_difference(compared)
            told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            compared |= attention.choose(self, features, told=told, allowed=allowed(compared))
            compared["reference"] = "computed" if self.reference is None else "cached"
        # A resumed training keeps what its start found.
        if self.is_world_process_zero() and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(compared, indent=2) + "\n", encoding="utf-8")
        logger.info_rank0(f"The first batch, compared with stock: {compared}.")
        return super().train(*arguments, **more)

    def concatenated_forward(
        self, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Any]:
        """Log-probs (n,) of both answers; means instead of sums where the loss takes them."""
        if "segments" not in batch:
            found = dict(super().concatenated_forward(model, batch, is_ref_model))
            self.pairs = len(found["chosen_logps"])
            return found
        inputs = {name: tensor for name, tensor in batch.items() if name != "reference"}
        output = model(**inputs)
        per_token, lengths = output["logps"], output["lengths"]
        if self.ld_alpha is not None and not is_ref_model:
            # LD-DPO (arXiv 2409.06411): what one answer is longer than the other counts less.
            place = per_token.new_ones(per_token.shape).cumsum(dim=-1) - 1
            both = place < lengths.amin(dim=0)[:, None]
            per_token = per_token.where(both, self.ld_alpha * per_token)
        logps = per_token.sum(dim=-1)
        if LOSSES[self.loss_type].mean:
            logps = logps / lengths
        if self.view:
            (chosen, under_view), (rejected, _) = (side.chunk(2) for side in logps)
            self.under_view["reference" if is_ref_model else "policy"] = under_view
            lengths = lengths[:, : len(chosen)]
        else:
            chosen, rejected = logps
        self.pairs = len(chosen)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": logps.new_zeros(()),
            "rejected_logits": logps.new_zeros(()),
            "chosen_logps_avg": chosen if LOSSES[self.loss_type].mean else chosen / lengths[0],
        }

    def get_batch_loss_metrics(self, *arguments: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
        """Loss and metrics, without the means of logits."""
        loss, metrics = super().get_batch_loss_metrics(*arguments, **more)
        return loss, {name: value for name, value in metrics.items() if "logits/" not in name}

    def store_metrics(self, metrics: dict[str, float], train_eval: str = "train") -> None:
        """Of an evaluated batch a value for each of its pairs: the last batch is shorter, and
        LLaMA-Factory averages over batches.
        """
        for _ in range(self.pairs if train_eval == "eval" else 1):
            super().store_metrics(metrics, train_eval)

    def compute_reference_log_probs(self, model: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        """The reference's log-probs (n,), from the cache where the collator found them."""
        if "reference" not in batch:
            found: tuple[Any, Any] = super().compute_reference_log_probs(model, batch)
            return found
        logps = batch["reference"]
        if self.view:
            self.under_view["reference"] = logps[2]
        if LOSSES[self.loss_type].mean:
            logps = logps / (batch["targets"] != prefix.IGNORE).sum(dim=-1)
        return logps[0], logps[1]

    def _look_up_view(self) -> None:
        """Give the collator what the reference gives chosen under the view, of every pair: kept by
        an earlier training, or computed now, a share by each process, and kept.
        """
        import torch
        from accelerate.utils import gather_object

        known = views.kept(file := Path(os.environ[UNDER_VIEW]))
        places = {
            prefix.pair_key(row): (rows, i)
            for rows in self._datasets()
            for i, row in enumerate(rows)
        }
        missing = sorted(places.keys() - known.keys())
        share = missing[self.args.process_index :: self.accelerator.num_processes]
        found: list[tuple[str, float]] = []
        model, size = self.ref_model or self.model, self.args.per_device_eval_batch_size
        without = nullcontext() if self.ref_model else model.disable_adapter()
        was_training = model.training
        model.eval()
        with without, torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(share), size):
                keys = share[start : start + size]
                features = [rows[i] for rows, i in map(places.__getitem__, keys)]
                batch = self.data_collator.under_view(features)
                logps = prefix.log_probs(model, batch)["logps"][0].sum(dim=-1)
                found += zip(keys, logps.tolist(), strict=True)
        model.train(was_training)
        if missing:
            known |= dict(gather_object(found))
            if self.is_world_process_zero():
                views.keep(known, file)
        self.data_collator.seen = known
        logger.info_rank0(
            f"The reference under the view: {len(missing)} of {len(places)} pairs now."
        )

    def _datasets(self) -> list[Any]:
        given = self.eval_dataset
        more = list(given.values()) if isinstance(given, dict) else [given or []]
        return [self.train_dataset, *more]

    def compute_preference_loss(self, *logps: Any) -> tuple[Any, Any, Any]:
        """Losses (n,) and rewards; with a view, mDPO's two other terms are added (equations 3 and 4
        of arXiv 2406.11839, with an anchor of 0 as in its code).
        """
        from torch.nn.functional import logsigmoid

        losses, *rewards = super().compute_preference_loss(*logps)
        if self.view:
            chosen, _, base_chosen, _ = logps
            seen = chosen - base_chosen
            unseen = self.under_view["policy"] - self.under_view["reference"]
            losses = losses - logsigmoid(self.beta * (seen - unseen)) - logsigmoid(self.beta * seen)
        return losses, *rewards

    def dpo_loss(self, *logps: Any, **more: Any) -> Any:
        """The loss that was asked for: LLaMA-Factory 0.9.5 calls TRL 0.24 without its name, and
        TRL takes sigmoid then. What adds to the losses later does so in place, which autograd
        refuses of hinge's own tensor.
        """
        losses, *rewards = super().dpo_loss(*logps, **{"loss_type": self.loss_type, **more})
        return losses.clone(), *rewards

    def bco_loss(self, *logps: Any) -> Any:
        """LLaMA-Factory's, but validation does not move the mean of rewards, as in TRL's BCO."""
        before = replace(self.running)
        losses = super().bco_loss(*logps)
        if not self.model.training:
            self.running = before
        return losses

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if running := getattr(self, "running", None):
            running.save_to_json(Path(output_dir, RUNNING))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """And the rewards' mean of BCO, which LLaMA-Factory starts afresh."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and hasattr(self, "running"):
            self.running = self.running.load_from_json(self.accelerator, Path(checkpoint, RUNNING))

    def compared_with_stock(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The largest differences (nats) of log-probs between this way and stock on these pairs:
        ``policy_difference``, and with a cache ``reference_difference``; ``largest_logps`` is the
        largest log-prob itself, ``pairs`` their number, ``dtype`` the precision.
        """
        import torch

        ways = [self.data_collator.stock, self.data_collator]
        stock, ours = (
            self._prepare_inputs(way([dict(feature) for feature in features])) for way in ways
        )
        was_training = self.model.training
        self.model.eval()  # noise of training, such as NEFTune's, is another in each pass
        with torch.no_grad(), self.compute_loss_context_manager():
            policy = [self.concatenated_forward(self.model, batch) for batch in (stock, ours)]
            found = {"policy_difference": apart(*([way[side] for side in SIDES] for way in policy))}
            if "reference" in ours:
                base = [
                    self.compute_reference_log_probs(self.model, each) for each in (stock, ours)
                ]
                found["reference_difference"] = apart(*base)
        self.model.train(was_training)
        largest = max(float(policy[0][side].abs().max()) for side in SIDES)
        dtype = str(self.model.dtype).removeprefix("torch.")
        return found | {"largest_logps": largest, "pairs": len(features), "dtype": dtype}


def apart(one: Sequence[Any], other: Sequence[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def allowed(compared: Mapping[str, Any]) -> float:
    """Nats by which rounding may move a log-prob."""
    return float(TOLERANCE[compared["dtype"]] * max(compared["largest_logps"], 1.0))


def refuse_difference(compared: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if a difference of ``compared_with_stock`` is more than rounding."""
    most = allowed(compared)
    for name in ("policy_difference", "reference_difference"):
        if not compared.get(name, 0.0) <= most:  # not a number is not within it
            raise UserError(
                f"the shared prompt gives other log-probs than LLaMA-Factory: {name} is "
                f"{compared[name]:.3g} nats, and rounding explains {most:.2g}; "
                + (
                    "set train.shared_prefix: false, and report it"
                    if name == "policy_difference"
                    else "`dvc repro -f reference` makes the reference again"
                )
            )


class SharedPrefixCollator:
    """Pairwise features to a batch of ``prefix.pack``, images by LLaMA-Factory's plugin.

    ``stock`` is LLaMA-Factory's collator, of which template, processor and model are used.
    """

    def __init__(
        self,
        stock: Any,
        *,
        reference: Mapping[str, tuple[float, float]] | None = None,
        with_placeholder: bool = False,
        view: str | None = None,
        paths: Sequence[str] = (),
    ) -> None:
        self.stock = stock
        self.reference = reference
        self.view, self.paths = view, paths
        self.seen: Mapping[str, float] = {}  # the reference's log-probs of chosen under the view
        # As in stock: every process looks at an image, so that none waits for the others.
        self.placeholder = Image.new("RGB", (64, 64), "white") if with_placeholder else None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        import torch

        rows = [*features, *self._other_rows(features)]
        batch = prefix.pack(rows, self.stock.model, self._images, always_look=self.placeholder)
        if self.reference is not None:
            keys = [prefix.pair_key(feature) for feature in features]
            logps: list[Any] = [self.reference.get(key) for key in keys]
            if None in logps:
                raise UserError(
                    "data/reference lacks the log-probs of a pair that is trained on; compute them "
                    "by `dvc repro -f reference`"
                )
            if self.view:
                logps = [(*both, self.seen[key]) for both, key in zip(logps, keys, strict=True)]
            batch["reference"] = torch.tensor(logps, dtype=torch.float32).T.contiguous()
        return batch

    def under_view(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of the pairs' views alone; what it says of rejected is of no answer."""
        return prefix.pack(self._other_rows(features), self.stock.model, self._images)

    def _other_rows(self, features: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        view = self.view
        return [views.row(feature, view, self.paths) for feature in features] if view else []

    def _images(self, images: list[Any]) -> dict[str, Any]:
        return views.process(self.stock.template, self.stock.processor, images)


class LikeLengths:
    """A sampler: pairs are shuffled, and each 50 steps' are sorted by length, longest first
    (``get_length_grouped_indices`` of transformers). Seed and epoch decide. transformers' own looks
    for lengths that a data set of pairs has not, and a resumed training can't repeat its order.
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
