"""Clipping, warm-up and Adam's rule: closed forms, slow twins, every kind of optimization, what is logged."""

import csv
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import EPOCH_SCHEDULES, Regression, loader, run

from lightning_gap.regime import LargeBatchRegime

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


class Gradients(Callback):
    """The gradient's norm with which each update is made; after LargeBatchRegime in the list of callbacks."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm().item())


def rows(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("lightning_gap/regime/updates")]


# ----------------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("first", [None, 20])
def test_gradients_are_clipped_and_the_share_is_logged(first, tmp_path):
    logger = CSVLogger(tmp_path)
    clipped, gradients = LargeBatchRegime(4, clip_norm=0.5, clip_updates=first), Gradients()
    run(Regression(lr=1e-2), loader(30), clipped, gradients, logger=logger, log_every_n_steps=1)
    raw, _, module = [], None, Regression(lr=1e-2)

    class Twin(Callback):
        """torch's own clipping, by hand."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if first is None or trainer.global_step < first:
                raw.append(float(torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.5)))

    twin = Gradients()
    run(module, loader(30), LargeBatchRegime(4), Twin(), twin)
    assert gradients.norms == twin.norms
    assert sum(norm > 0.5 for norm in raw) >= 5
    assert max(gradients.norms[: len(raw)]) < 0.5 + 1e-6
    shares = [float(row["lightning_gap/regime/clipped_fraction"]) for row in rows(logger)]
    expected = [sum(norm > 0.5 for norm in raw[:n]) / n for n in range(1, len(raw) + 1)]
    assert shares[: len(raw)] == pytest.approx(expected, rel=1e-6)
    assert set(shares[len(raw) :]) <= {shares[len(raw) - 1]}


# ------------------------------------------------------------------------------------------------------------ warm-up


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", ["CosineAnnealingLR", "MultiplicativeLR", "OneCycleLR", "SequentialLR"])
@pytest.mark.filterwarnings("ignore:.*OneCycleLR. scheduler is using.*", "ignore:.*reaches past.*")
def test_the_warm_up_composes_with_any_schedule(name, interval):
    def module():
        return Regression(EPOCH_SCHEDULES[name], interval=interval)

    epochs = 6 if interval == "epoch" or name != "OneCycleLR" else 1
    length = {} if interval == "epoch" or name != "OneCycleLR" else {"max_epochs": -1, "max_steps": 6}
    _, reference = run(module(), loader(4), **(length or {"max_epochs": epochs}))
    regime = LargeBatchRegime(4, lr_rule=float, warmup_updates=20)
    _, trace = run(module(), loader(30), regime, **(length or {"max_epochs": epochs}))
    t = torch.arange(len(reference.rates), dtype=torch.float64)
    factor = 1 + 6.5 * (t / 20).clamp(max=1)
    torch.testing.assert_close(trace.tensor, factor[:, None] * reference.tensor, rtol=1e-9, atol=0)


def test_a_tensor_learning_rate_keeps_its_identity_through_the_warm_up():
    class Same(Callback):
        rates = ()

        def on_train_batch_end(self, trainer, *args):
            self.rates = (*self.rates, trainer.optimizers[0].param_groups[0]["lr"])

    module = Regression(EPOCH_SCHEDULES["StepLR"], lr=torch.tensor(1e-3, dtype=torch.float64))
    run(module, loader(30), same := Same(), LargeBatchRegime(4, warmup_updates=10))
    assert len({id(rate) for rate in same.rates}) == 1


def test_a_failed_update_gives_the_learning_rate_back():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        run(module, loader(30), LargeBatchRegime(4, warmup_updates=10))
    assert module.optimizers(use_pl_optimizer=False).param_groups[0]["lr"] == pytest.approx(1e-3 * math.sqrt(7.5))


# --------------------------------------------------------------------------------------------------------- Adam's rule


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_adams_rule_scales_moments(kind):
    memory = {"alpha": 0.99} if kind is torch.optim.RMSprop else {"betas": (0.95, 0.99)}
    module = Regression(optimizer=partial(kind, eps=1e-6, **memory))
    trainer, trace = run(module, loader(24), LargeBatchRegime(4, lr_rule="adam"))
    assert trace.rates[0] == pytest.approx([1e-3 * math.sqrt(6), 5e-4 * math.sqrt(6)])
    for group in (*trainer.optimizers[0].param_groups, trainer.optimizers[0].defaults):
        assert group["eps"] == pytest.approx(1e-6 / math.sqrt(6))
        if "alpha" in memory:
            assert group["alpha"] == pytest.approx(0.94)
        else:
            assert group["betas"] == pytest.approx((0.7, 0.94))


@pytest.mark.filterwarnings("ignore:.*OneCycleLR. scheduler is using.*", "ignore:.*for the same samples.*")
@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_adams_rule_scales_moments_that_a_scheduler_moves(name):
    class Betas(Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(optimizer.param_groups[0]["betas"][0])

    regime = LargeBatchRegime(4, lr_rule="adam", train_longer=True)
    _, here = run(adam := adam_under(name), loader(8), regime, betas := Betas())
    _, there = run(adam_under(name), loader(4), reference := Betas())
    assert len(set(reference.seen)) > 3
    assert betas.seen == pytest.approx([1 - 2 * (1 - beta) for beta in reference.seen])
    torch.testing.assert_close(here.tensor, math.sqrt(2) * there.tensor, rtol=1e-9, atol=0)
    assert adam is not None


def adam_under(name):
    return Regression(EPOCH_SCHEDULES[name], optimizer=partial(torch.optim.Adam, betas=(0.9, 0.99)))


# ------------------------------------------------------------------------------------------------ what is said, groups


def test_what_is_logged_at_every_update(tmp_path):
    logger = CSVLogger(tmp_path)
    schedule = EPOCH_SCHEDULES["StepLR"]
    regime = LargeBatchRegime(4, warmup_updates=5)
    _, trace = run(
        Regression(schedule), loader(25), regime, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2
    )
    seen = rows(logger)
    assert len(seen) == 90
    # 60 samples in batches of 25, 25 and 10; an update sees two batches, or the last one.
    epochs, within = zip(*[divmod(update, 2) for update in range(90)], strict=True)
    expected = [60 * epoch + (50, 60)[half] for epoch, half in zip(epochs, within, strict=True)]
    assert [float(row["lightning_gap/regime/samples_seen"]) for row in seen] == expected
    rates = [float(row["lightning_gap/regime/lr_over_batch"]) * 50 for row in seen]
    assert rates == pytest.approx([rate for rate, _ in trace.rates], rel=1e-6)


def test_groups_that_are_added_later(tmp_path):
    class Grows(Callback):
        def __init__(self, **options):
            self.options = options

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                extra = torch.nn.Parameter(torch.zeros(1))
                trainer.optimizers[0].add_param_group({"params": [extra], **self.options})

    trainer, _ = run(Regression(), loader(30), LargeBatchRegime(4), Grows(), max_epochs=1)
    assert trainer.optimizers[0].param_groups[2]["lr"] == pytest.approx(1e-3 * math.sqrt(7.5))
    with pytest.warns(UserWarning, match=r"group was added with the learning rate 0.25, which is taken as it is"):
        run(Regression(), loader(30), LargeBatchRegime(4), Grows(lr=0.25), max_epochs=1)


def test_a_fine_tuning_callback_is_warned_about():
    class Tuned(Regression):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Linear(4, 4)

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), lr=1e-3)

    with pytest.warns(UserWarning, match=r"BackboneFinetuning counts epochs of this run.* by 7.5"):
        run(Tuned(), loader(30), LargeBatchRegime(4), BackboneFinetuning(unfreeze_backbone_at_epoch=100), max_epochs=1)


# --------------------------------------------------------------- manual optimization, mixed precision, torch.compile


class Manual(Regression):
    """Two optimizers, the second of which steps every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.used = []

    def configure_optimizers(self):
        return [
            torch.optim.SGD([self.layer.weight], lr=1e-3),
            torch.optim.Adam([self.layer.bias], lr=1e-3, betas=(0.95, 0.95)),
        ]

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in (first, second) if batch_idx % 2 else (first,):
            hook = optimizer.optimizer.register_step_pre_hook(
                lambda o, *_: self.used.append((type(o).__name__, o.param_groups[0]["lr"]))
            )
            optimizer.step()
            hook.remove()


@pytest.mark.filterwarnings("ignore:.*leaves its betas.*")
def test_manual_optimization_and_several_optimizers():
    with pytest.raises(MisconfigurationException, match="Apply a plan of your own"):
        run(Manual(), loader(16), LargeBatchRegime(4))
    regime = LargeBatchRegime(4, train_longer=False, clip_norm=0.1, clip_updates=2, warmup_updates=4)
    gradients = Gradients()
    trainer, _ = run(module := Manual(), loader(16), regime, gradients, max_epochs=3)
    assert trainer.global_step == 18  # 12 of the first and 6 of the second optimizer
    for kind, updates in (("SGD", 12), ("Adam", 6)):
        used = [rate for name, rate in module.used if name == kind]
        assert used == pytest.approx([1e-3 * (1 + min(1, t / 4)) for t in range(updates)])
    assert regime.state_dict()["made"] == [12, 6]
    assert [group["lr"] for o in trainer.optimizers for group in o.param_groups] == pytest.approx([2e-3, 2e-3])


def test_mixed_precision_with_skipped_updates():
    class Overflows(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if self.trainer.global_step in (0, 10, 11) else loss

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}

    schedule = EPOCH_SCHEDULES["StepLR"]
    _, reference = run(Regression(schedule), loader(4))
    regime = LargeBatchRegime(4, clip_norm=0.5, warmup_updates=0)
    trainer, trace = run(
        module := Overflows(schedule, lr=1e-3), loader(30), regime, gradients := Gradients(), **scaled()
    )
    assert trainer.global_step == 90
    torch.testing.assert_close(trace.tensor, math.sqrt(7.5) * reference.tensor, rtol=1e-9, atol=0)
    assert max(norm for norm in gradients.norms if math.isfinite(norm)) < 0.5 + 1e-4  # of unscaled gradients
    assert regime.state_dict()["clipped"][1] == 90
    assert regime.state_dict()["made"] == [87]  # skipped updates are not made
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_fused_optimizer_that_unscales_by_itself_is_not_clipped():
    module = Regression(optimizer=partial(torch.optim.SGD, fused=True))
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="fused=False"):
        run(module, loader(30), LargeBatchRegime(4, clip_norm=1.0), plugins=[scaler])


def test_a_compiled_module_keeps_its_regime():
    class Quiet(Regression):
        def training_step(self, batch, batch_idx):  # Lightning's self.log does not compile
            return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    module = Quiet(EPOCH_SCHEDULES["CosineAnnealingLR"])
    regime = LargeBatchRegime(4, clip_norm=0.5, warmup_updates=5)
    trainer, trace = run(torch.compile(module, backend="eager"), loader(30), regime)
    plain, twin = run(Regression(EPOCH_SCHEDULES["CosineAnnealingLR"]), loader(30), regime)
    assert trainer.global_step == plain.global_step == 90
    assert trace.rates == twin.rates


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_longer": 1.5}, ValueError, "train_longer=1.5"),
        ({"train_longer": math.nan}, ValueError, "train_longer=nan"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm=0.0"),
        ({"clip_norm": math.inf}, ValueError, "clip_norm=inf"),
        ({"clip_updates": 5}, ValueError, "needs a clip_norm"),
        ({"clip_updates": 0, "clip_norm": 1.0}, ValueError, "clip_updates must be at least 1, got 0"),
        ({"warmup_updates": -1}, ValueError, "warmup_updates must be at least 0, got -1"),
        ({"warmup_updates": 1.5}, TypeError, "warmup_updates must be an int, got 1.5"),
        ({"warmup_updates": 5, "lr_rule": "none"}, ValueError, "nothing to grow to"),
        ({"gradient_noise": True}, ValueError, 'pass lr_rule="none"'),
        ({"stretch_schedulers": "yes"}, ValueError, "stretch_schedulers='yes'"),
    ],
)
def test_arguments_out_of_their_range(options, error, message):
    with pytest.raises(error, match=message):
        LargeBatchRegime(4, **options)


@pytest.mark.parametrize("updates", [0, 3])
def test_a_tensor_learning_rate_is_logged_as_it_was_used(updates, tmp_path):
    # Its scheduler changes it in place, before it is logged.
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    found = []
    for number in (float, lambda rate: torch.tensor(rate, dtype=torch.float64)):
        logger = CSVLogger(tmp_path / str(len(found)))
        module = Regression(
            schedule, interval="step", optimizer=lambda groups, lr, n=number: torch.optim.SGD(groups, n(lr))
        )
        regime = LargeBatchRegime(4, train_longer=False, warmup_updates=updates)
        run(module, loader(16), regime, logger=logger, log_every_n_steps=1, max_epochs=2)
        found.append([
            tuple(float(row[f"lightning_gap/regime/{name}"]) for name in ("learning_rate", "lr_over_batch"))
            for row in rows(logger) if row.get("lightning_gap/regime/learning_rate")
        ])  # fmt: skip
    assert len(found[0]) == 8
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
