"""LLaMA-Factory's trainer, fed with shared prompts, trains as the stock one does."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest

from benchmarks import devices
from stages.core.errors import UserError
from stages.model import prefix
from stages.model.prefix import pair_key
from stages.params.losses import LOSSES, VIEWS
from stages.tuning import attention, views
from stages.tuning import config as tuning
from stages.tuning.inside import sitecustomize
from tests.trainer import dpo_trainer

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def built(
    llamafactory, params_with, model_dir, formatted_dir, pairs_dir, adapter_dir, tmp_path_factory
):
    """``built(trainer class)``: a trainer as LLaMA-Factory makes it, where training had got to."""
    from llamafactory.train.dpo import trainer

    def build(kind):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "CustomDPOTrainer", kind)
            return dpo_trainer(
                params_with(),
                model_dir,
                formatted_dir,
                pairs_dir / "images",
                adapter_dir,
                tmp_path_factory.mktemp("trainer"),
            )

    return build


@pytest.fixture(scope="module")
def trainers(built):
    """Stock and shared."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from stages.tuning.trainer import SharedPrefixTrainer

    return built(CustomDPOTrainer), built(SharedPrefixTrainer)


def step(trainer, features):
    """Loss, metrics and gradients of a batch."""
    import torch

    batch = trainer._prepare_inputs(trainer.data_collator(copy.deepcopy(features)))
    trainer.model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    weights = [w for w in trainer.model.parameters() if w.requires_grad]
    return loss.item(), metrics, torch.cat([w.grad.flatten() for w in weights])


def without_logits(metrics):
    """Means of logits count padding in stock, and there are none in ours."""
    return {name: value for name, value in metrics.items() if "logits/" not in name}


def first(trainer, count=4):
    return [dict(trainer.train_dataset[i]) for i in range(count)]


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        ("sigmoid", {}),
        ("sigmoid", {"ftx_gamma": 0.7, "label_smoothing": 0.1}),
        ("sigmoid", {"ld_alpha": 0.3}),
        ("sigmoid", {"ftx_gamma": 1.0, "bco_gemma": 0.25}),  # mpo
        ("hinge", {"ftx_gamma": 0.0}),  # stock adds the SFT term in place, which fails for hinge
        ("ipo", {"ld_alpha": 0.3}),
        ("orpo", {"ftx_gamma": 0.2}),
        ("simpo", {}),
    ],
)
def test_every_loss_has_the_loss_metrics_and_gradients_of_stock(trainers, loss, more):
    from trl.trainer.utils import RunningMoments

    found = []
    for trainer in trainers:
        with pytest.MonkeyPatch.context() as patch:
            if trainer is trainers[0]:  # ours passes the loss's name on; see below
                named = partial(trainer.dpo_loss, loss_type=loss)
                patch.setattr(trainer, "dpo_loss", named)
            patch.setattr(trainer, "loss_type", loss)
            patch.setattr(trainer.finetuning_args, "use_ref_model", loss not in ("orpo", "simpo"))
            for name, value in more.items():
                patch.setattr(trainer, name, value)
            patch.setattr(trainer, "running", RunningMoments(trainer.accelerator), raising=False)
            found.append(step(trainer, first(trainer)))
    (stock, stock_metrics, stock_gradient), (ours, metrics, gradient) = found
    assert ours == pytest.approx(stock, rel=1e-4)
    assert (gradient - stock_gradient).norm() < 1e-3 * stock_gradient.norm()
    assert metrics == pytest.approx(without_logits(stock_metrics), rel=1e-4, abs=1e-4)


def test_a_tensor_of_a_batch_that_is_left_on_the_cpu_is_found_without_a_gpu(trainers, monkeypatch):
    _, trainer = trainers
    monkeypatch.setattr(type(trainer.args), "device", devices.CUDA)
    monkeypatch.setattr(trainer.accelerator.state, "device", devices.CUDA)
    with devices.OnCuda(trainer.model):
        batch = trainer._prepare_inputs(trainer.data_collator(first(trainer)))
        trainer.get_batch_loss_metrics(trainer.model, dict(batch))
        for name in ("input_ids", "pixel_values", "targets"):
            planted = batch | {name: batch[name].cpu()}
            with pytest.raises(devices.LeftOnTheCPU):
                trainer.get_batch_loss_metrics(trainer.model, planted)


def test_mpo_is_its_three_terms_as_trl_computes_them(trainers):
    import torch
    from trl.trainer.utils import RunningMoments

    for trainer in trainers:
        batch = trainer._prepare_inputs(trainer.data_collator(first(trainer)))

        def afresh(patch, trainer=trainer):
            patch.setattr(trainer, "running", RunningMoments(trainer.accelerator), raising=False)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            afresh(patch)
            policy = trainer.concatenated_forward(trainer.model, dict(batch))
            logps = [policy[side] for side in ("chosen_logps", "rejected_logps")]
            logps = [logp - shift for logp, shift in zip(logps, (0.3, -0.2), strict=True)]
            logps += trainer.compute_reference_log_probs(trainer.model, dict(batch))
            sigmoid, bco = (
                trainer.dpo_loss(*logps, loss_type=name)[0] for name in ("sigmoid", "bco_pair")
            )
            expected = 0.8 * sigmoid + 0.2 * bco - policy["chosen_logps_avg"]
            afresh(patch)
            weights = LOSSES["mpo"].options
            patch.setattr(trainer, "bco_gemma", weights["pref_bco_weight"])
            patch.setattr(trainer, "loss_type", weights["pref_loss"])
            found, *_ = trainer.compute_preference_loss(*logps)
            found = found - weights["pref_ftx"] * policy["chosen_logps_avg"]
            torch.testing.assert_close(found, expected)


def seen_by_stock(stock, features, view, paths):
    """Log-probs of chosen under a view by the policy and by the reference, a row at a time."""
    import torch
    from llamafactory.train.trainer_utils import get_batch_logps

    features = copy.deepcopy(features)
    if view != "masked":
        for feature in features:
            shown = views.row(feature, view, paths)["images"]
            feature["images"] = [views.image(each) for each in shown]
    batch = stock._prepare_inputs(stock.data_collator(features))
    labels = batch.pop("labels")
    if view == "masked":
        length = labels.shape[1]
        text = batch["input_ids"] != stock.model.config.image_token_id
        sees = (text & batch["attention_mask"].bool())[:, None] | torch.eye(length).bool()
        batch["attention_mask"] = (sees & torch.ones(length, length).tril().bool())[:, None]
    found = []
    for without in (nullcontext, stock.model.disable_adapter):
        with torch.no_grad(), without():
            logits = stock.model(**batch, use_cache=False).logits
        found.append(get_batch_logps(logits, labels)[0][: len(features)])
    return found


def test_the_mean_of_rewards_is_of_training_alone_and_survives_a_resume(trainers, tmp_path):
    import torch
    from transformers import Trainer
    from trl.trainer.utils import RunningMoments

    ours, logps = trainers[1], [torch.tensor([float(-n)]) for n in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "running", RunningMoments(ours.accelerator), raising=False)
        for name in ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"):
            patch.setattr(Trainer, name, lambda *_: None)
        ours.model.train()
        ours.bco_loss(*logps)
        mean = ours.running.mean
        assert mean == pytest.approx(2 * ours.beta)
        ours._save_optimizer_and_scheduler(str(tmp_path))
        ours.model.eval()
        ours.bco_loss(logps[3], *logps[1:])
        assert ours.running.mean == mean
        ours.running = RunningMoments(ours.accelerator)
        ours._load_optimizer_and_scheduler(str(tmp_path))
        assert ours.running.mean == mean


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_mdpo_is_its_three_terms_as_its_authors_compute_them(trainers, view, cached, tmp_path):
    """``dpo_loss`` of luka-group/mDPO, ``mdpo_trainer.py``, on log-probs of plain forwards."""
    import torch
    from torch.nn.functional import logsigmoid

    stock, ours = trainers
    features = first(ours)
    batch = stock._prepare_inputs(stock.data_collator(copy.deepcopy(features)))
    with torch.no_grad():
        output = stock.concatenated_forward(stock.model, dict(batch))
        base = stock.compute_reference_log_probs(stock.model, dict(batch))
    chosen, rejected = output["chosen_logps"], output["rejected_logps"]
    imageless, base_imageless = seen_by_stock(stock, features, view, ours._paths())
    assert (imageless - chosen).abs().max() > 0.01
    expected = (
        -logsigmoid(ours.beta * ((chosen - rejected) - (base[0] - base[1])))
        - logsigmoid(ours.beta * ((chosen - imageless) - (base[0] - base_imageless)))
        - logsigmoid(ours.beta * (chosen - base[0]))
    )
    expected = expected - stock.ftx_gamma * output["chosen_logps_avg"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "view", view)
        patch.setattr(ours, "under_view", {})
        patch.setattr(ours.data_collator, "view", view)
        patch.setattr(ours.data_collator, "paths", ours._paths())
        if cached:
            logps = torch.stack(base).T.tolist()
            cache = {pair_key(f): tuple(c) for f, c in zip(features, logps, strict=True)}
            patch.setattr(ours.data_collator, "reference", cache)
            patch.setenv(sitecustomize.UNDER_VIEW, str(tmp_path / "logps.json"))
            ours._look_up_view()
            kept = ours.data_collator.seen
            assert kept.keys() >= {pair_key(row) for row in ours.train_dataset}
            with patch.context() as none_computed:
                none_computed.setattr(views, "keep", None)
                ours._look_up_view()
            assert ours.data_collator.seen == kept
        loss, metrics, gradient = step(ours, features)
        apart = ours.compared_with_stock(features)
    assert loss == pytest.approx(expected.mean().item(), abs=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-4)
    assert gradient.isfinite().all()
    assert apart["policy_difference"] < 1e-3


def test_validation_figures_are_means_over_pairs_not_over_batches(trainers):
    _, trainer = trainers
    features = [trainer.train_dataset[i] for i in range(5)]
    margins = []
    for batch in (features[:4], features[4:]):
        inputs = trainer._prepare_inputs(trainer.data_collator(copy.deepcopy(batch)))
        _, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs, train_eval="eval")
        trainer.store_metrics(metrics, train_eval="eval")
        margins += [metrics["eval_rewards/margins"]] * len(batch)
    assert trainer._stored_metrics.pop("eval")["eval_rewards/margins"] == margins


def test_a_cached_reference_replaces_its_forward(trainers):
    import torch

    from stages.tuning import trainer as tuning_trainer

    stock, ours = trainers
    features = first(ours)
    batch = stock._prepare_inputs(stock.data_collator(copy.deepcopy(features)))
    cached = torch.stack(stock.compute_reference_log_probs(stock.model, batch)).T.tolist()
    cache = {pair_key(f): tuple(c) for f, c in zip(features, cached, strict=True)}
    for loss in ("sigmoid", "ipo"):
        with pytest.MonkeyPatch.context() as patch:
            for trainer in trainers:
                patch.setattr(trainer, "loss_type", loss)
            expected = step(ours, features)
            patch.setattr(ours.data_collator, "reference", cache)
            patch.setattr(ours.model, "disable_adapter", None)
            assert step(ours, features)[0] == pytest.approx(expected[0], rel=1e-5), loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.data_collator, "reference", cache)
        apart = ours.compared_with_stock(features)
        assert apart["policy_difference"] < 1e-3
        assert apart["reference_difference"] < 1e-3
        assert (apart["pairs"], apart["dtype"]) == (len(features), "float32")
        tuning_trainer.refuse_difference(apart)
        key = pair_key(features[0])
        wrong = cache | {key: (cache[key][0] + 1, cache[key][1])}
        patch.setattr(ours.data_collator, "reference", wrong)
        apart = ours.compared_with_stock(features)
        assert apart["reference_difference"] == pytest.approx(1, abs=1e-3)
        with pytest.raises(UserError, match="dvc repro -f reference"):
            tuning_trainer.refuse_difference(apart)
        patch.setattr(ours.data_collator, "reference", {})
        with pytest.raises(UserError, match="dvc repro -f reference"):
            ours.data_collator(features)


def test_what_is_not_exact_goes_the_stock_way_and_says_so(built, trainers):
    from llamafactory.data import PairwiseDataCollatorWithPadding

    from stages.model import prefix
    from stages.tuning.trainer import SharedPrefixTrainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "why_not", lambda model: "it is Tuesday")
        trainer = built(SharedPrefixTrainer)
    assert trainer.stock_because == "it is Tuesday"
    assert isinstance(trainer.data_collator, PairwiseDataCollatorWithPadding)
    expected = step(trainers[0], first(trainers[0]))
    assert step(trainer, first(trainer))[0] == expected[0]


def test_attention_is_chosen_once_among_the_ways_that_work(trainers, monkeypatch):
    ours = trainers[1]
    choose = partial(attention.choose, ours, first(ours), allowed=1e-3)
    batch = ours._prepare_inputs(ours.data_collator(first(ours)))
    text = prefix.plain(ours.model).model.language_model.config
    seconds = attention.measured(ours, batch, allowed=1e-3)
    assert 0 < seconds["sdpa"] < seconds["flex_attention"] == float("inf")  # it has no backward
    prefix.attend(ours.model, "sdpa")
    assert attention.measured(ours, batch, allowed=-1)["sdpa"] == float("inf")
    prefix.attend(ours.model, "sdpa")
    assert choose(told={}) == {}  # as on every CPU
    assert choose(told={"attention": "flex_attention"})["attention"] == "flex_attention"
    assert text._attn_implementation == "flex_attention"
    monkeypatch.setenv(attention.ATTENTION, "sdpa")
    assert choose(told={})["attention"] == text._attn_implementation == "sdpa"


def test_pairs_of_like_lengths_go_together_in_an_order_of_seed_and_epoch(trainers):
    from stages.tuning.trainer import LikeLengths

    ours = trainers[1]

    def order(epoch):
        ours.state.epoch = epoch
        return list(LikeLengths(ours))

    def tokens(places):
        widths = [LikeLengths(ours).lengths[i] for i in places]
        return sum(2 * max(both) for both in zip(widths[::2], widths[1::2], strict=False))

    assert order(0) == order(0.5) != order(1.0) == order(1.7)
    assert sorted(order(1)) == list(range(len(ours.train_dataset)))
    assert tokens(order(0)) < tokens(range(len(ours.train_dataset)))


def test_eight_steps_have_the_losses_of_stock(
    llamafactory, params_with, model_dir, formatted_dir, pairs_dir, tmp_path
):
    from llamafactory.train.dpo import trainer as dpo
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    from stages.tuning.trainer import SharedPrefixTrainer

    def train(trainer_class):
        history = []

        class Watch(TrainerCallback):
            def on_log(self, args, state, control, **more):
                history.append(state.log_history[-1])

        config = tuning.dpo_config(
            params_with(),
            model=model_dir,
            formatted=formatted_dir,
            images=pairs_dir / "images",
            output=tmp_path / trainer_class.__name__,
            validated=True,
        )
        config |= {
            "eval_dataset": "test",
            "preprocessing_num_workers": 1,
            "max_steps": STEPS,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 2e-4,
            "eval_strategy": "steps",
            "eval_steps": STEPS,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "CustomDPOTrainer", trainer_class)
            run_exp(config, callbacks=[Watch()])
        return history

    stock, ours = train(dpo.CustomDPOTrainer), train(SharedPrefixTrainer)
    assert [set(logged) for logged in ours] == [set(without_logits(logged)) for logged in stock]
    losses = [[logged["loss"] for logged in run if "loss" in logged] for run in (stock, ours)]
    assert len(losses[0]) == STEPS
    assert max(losses[0]) - min(losses[0]) > 0.1
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    evaluated = [[e for e in run if "eval_loss" in e][-1] for run in (stock, ours)]
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert evaluated[1][name] == pytest.approx(evaluated[0][name], abs=1e-3), name


def test_stock_takes_sigmoid_whatever_the_loss_is_called_and_ours_does_not(trainers):
    # LLaMA-Factory 0.9.5 does not pass pref_loss on to trl 0.24's dpo_loss, whose default it is.
    stock, ours = trainers
    sigmoid = step(stock, first(stock))[0]
    with pytest.MonkeyPatch.context() as patch:
        for trainer in trainers:
            patch.setattr(trainer, "loss_type", "hinge")
        assert step(stock, first(stock))[0] == sigmoid
        assert step(ours, first(ours))[0] != pytest.approx(sigmoid, rel=1e-2)
