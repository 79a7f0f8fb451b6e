"""The gradient noise scale: closed forms, a slow twin, nothing but observed."""

import csv
import math
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import SaveAt, run, trainer_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GradientNoiseScale, UltraSlowDiffusion
from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.regime import LargeBatchRegime, MicroBatchGradients, NoiseScaleEstimate, gradient_moments
from lightning_gap.regime.noise_scale import normalization_note, plan_verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")

SAMPLES = 512


def targets(samples=SAMPLES):
    return 0.5 + 2 * torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))


class Mean(LightningModule):
    """Loss |w - x|^2 / 2: a sample's gradient is w - x, so tr(Sigma) = tr cov(x) and G = w - E[x]."""

    def __init__(self, lr=0.0, batch=4, samples=SAMPLES):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))
        self.lr, self.batch, self.samples = lr, batch, samples

    def training_step(self, batch, batch_idx):
        return (self.w - batch[0]).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(targets(self.samples)), batch_size=self.batch, shuffle=True)


def expected():
    x, w = targets(), torch.linspace(-1, 1, 3)  # the weights that run() starts from
    return (x.var(0).sum() / (w - x.mean(0)).square().sum()).item()


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 100), st.integers(101, 10_000))
def test_two_batch_sizes_give_both_moments(variance, square, small, big):
    found = gradient_moments(square + variance / small, square + variance / big, small, big)
    assert found == pytest.approx((variance, square), rel=1e-6)


def test_averages_are_those_of_a_slow_twin():
    variances, squares = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    estimate = NoiseScaleEstimate(decay=0.8)
    for variance, square in zip(variances.tolist(), squares.tolist(), strict=True):
        estimate.update(variance, square)
    weights = 0.8 ** torch.arange(49, -1, -1, dtype=torch.float64)
    assert estimate.noise_scale == pytest.approx(((weights * variances).sum() / (weights * squares).sum()).item())
    assert estimate.critical_batch_size == pytest.approx((variances.sum() / squares.sum()).item())
    estimate.update(-1e9, 1.0)
    assert math.isnan(estimate.noise_scale)


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_known_noise_scale_is_found(accumulate, scaled):
    scale = GradientNoiseScale(every_n_updates=1)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))] if scaled else []
    trainer, _ = run(Mean(), None, scale, accumulate_grad_batches=accumulate, max_epochs=8, plugins=plugins)
    assert scale.estimate.measurements == trainer.global_step
    assert scale.estimate.critical_batch_size == pytest.approx(expected(), rel=0.15)


def test_every_measurement_is_that_of_a_slow_twin():
    class Twin(Callback):
        """The gradient of every micro-batch by itself, and of all of them together."""

        def __init__(self):
            self.moments, self.parts = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.parts.append(batch[0])

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            w, parts = pl_module.w.detach(), self.parts
            self.parts = []
            small = torch.stack([(w - part).mean(0).square().sum() for part in parts]).mean().item()
            big = (w - torch.cat(parts)).mean(0).square().sum().item()
            if all(len(part) == 4 for part in parts) and len(parts) > 1:
                self.moments.append(gradient_moments(small, big, 4, 4 * len(parts)))

    class Recorded(GradientNoiseScale):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.moments, update = [], self.estimate.update
            self.estimate.update = lambda *moments: (self.moments.append(moments), update(*moments))

        def state_dict(self):
            return {}

    # 50 samples in batches of 4: windows of 4, 4, 4 and one incomplete batch, which is left out.
    twin, scale = Twin(), Recorded(every_n_updates=1)
    run(Mean(lr=0.1, samples=50), None, twin, scale, accumulate_grad_batches=4, max_epochs=3)
    assert len(scale.moments) == 9
    for ours, theirs in zip(scale.moments, twin.moments, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # 60 samples: windows of 4, 4, 4 and 3 batches, all of them whole.
    twin, scale = Twin(), Recorded(every_n_updates=1)
    run(Mean(lr=0.1, samples=60), None, twin, scale, accumulate_grad_batches=4, max_epochs=3)
    assert len(scale.moments) == 12
    for ours, theirs in zip(scale.moments, twin.moments, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_it_only_observes():
    def outcome(*callbacks):
        module = Mean(lr=0.1)
        trainer, trace = run(module, None, *callbacks, LargeBatchRegime(4, clip_norm=1.0), accumulate_grad_batches=4)
        return module.w.tolist(), trace.rates, trainer.global_step, torch.get_rng_state().tolist()

    assert outcome() == outcome(GradientNoiseScale(every_n_updates=3))


def test_what_it_logs_and_says(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    scale = GradientNoiseScale(every_n_updates=5)
    run(Mean(), None, scale, accumulate_grad_batches=4, max_epochs=20, logger=logger, log_every_n_steps=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "this run's 16 is past it" in said
    assert f"critical batch about {scale.estimate.critical_batch_size:.0f}" in said
    with open(f"{logger.log_dir}/metrics.csv") as file:
        values = [row["lightning_gap/regime/critical_batch_size"] for row in csv.DictReader(file)]
    assert float(values[-1] or values[-5]) == pytest.approx(scale.estimate.critical_batch_size, rel=0.1)
    run(Mean(), None, GradientNoiseScale(every_n_updates=10**6), accumulate_grad_batches=16, max_epochs=1)
    assert "Gradient noise scale:" in capsys.readouterr().out


def test_it_resumes(tmp_path):
    def fresh():
        return GradientNoiseScale(every_n_updates=3)

    class Ordered(Mean):
        def train_dataloader(self):
            return DataLoader(TensorDataset(targets()), batch_size=16)

    options = {"accumulate_grad_batches": 4, "max_epochs": 6}
    run(Ordered(lr=0.1), None, whole := fresh(), save := SaveAt(tmp_path), **options)
    for step in save.saved[:-1]:
        run(Ordered(lr=0.1), None, part := fresh(), ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert part.estimate == whole.estimate
    trainer = trainer_of(kept := fresh())
    trainer.validate(Validated(), verbose=False)
    assert kept.estimate.measurements == 0


class Validated(Mean):
    def validation_step(self, batch, batch_idx):
        return None

    def val_dataloader(self):
        return DataLoader(TensorDataset(targets()), batch_size=16)


def test_refusals(monkeypatch):
    class Manual(Mean):
        automatic_optimization = False

    class Fused(Mean):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=True)

    class Several(Mean):
        def train_dataloader(self):
            return [super().train_dataloader(), super().train_dataloader()]

        def training_step(self, batch, batch_idx):
            raise AssertionError("refused before the first step")

    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    noisy = LargeBatchRegime(4, lr_rule="none", train_longer=False, gradient_noise=True)
    for module, callbacks, options, message in (
        (Mean(), [GradientNoiseScale()], {}, "one micro-batch"),
        (Manual(), [GradientNoiseScale()], {}, "automatic optimization"),
        (Fused(), [GradientNoiseScale()], {"plugins": [scaler], "accumulate_grad_batches": 2}, "fused=False"),
        (Mean(), [LargeBatchRegime(4, clip_norm=1.0), GradientNoiseScale()], {}, "Put GradientNoiseScale before it"),
        (Mean(), [GradientNoiseScale(), noisy], {"accumulate_grad_batches": 2}, "noise would be measured too"),
        (Several(), [GradientNoiseScale()], {"accumulate_grad_batches": 2}, "Use one DataLoader with a batch_size"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            run(module, None, *callbacks, **options)
    monkeypatch.setattr("lightning_gap.regime.noise_scale_callback.holds_whole_weights", lambda trainer: False)
    with pytest.raises(MisconfigurationException, match="not supported"):
        run(Mean(), None, GradientNoiseScale())
    for options, error in (({"every_n_updates": 0}, ValueError), ({"every_n_updates": 1.5}, TypeError)):
        with pytest.raises(error, match="every_n_updates"):
            GradientNoiseScale(**options)
    with pytest.raises(ValueError, match="decay=1"):
        GradientNoiseScale(decay=1)


# ------------------------------------------------------------------------------------------------------------- sparse


class Words(LightningModule):
    """Two embeddings and a bag, of which one embedding is looked up twice a batch; rows come more than once."""

    def __init__(self, sparse):
        super().__init__()
        self.first, self.second = (torch.nn.Embedding(20, 4, sparse=sparse) for _ in range(2))
        self.bag, self.head = torch.nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        words, y = batch
        hidden = self.first(words[:, 0]) + self.first(words[:, 1]) + self.second(words[:, 2]) + self.bag(words)
        return (self.head(hidden).squeeze(1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def words(batch):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 20, (64, 3), generator=generator), torch.randn(64, generator=generator)
    return DataLoader(TensorDataset(*samples), batch_size=batch)


def test_sparse_gradients_are_measured_as_dense_ones():
    found = {}
    for sparse in (False, True):
        scale, diffusion = GradientNoiseScale(every_n_updates=1), UltraSlowDiffusion()
        module = Words(sparse)
        run(module, words(8), scale, diffusion, accumulate_grad_batches=2, max_epochs=2)
        found[sparse] = scale.estimate, diffusion.trace["distance"]
    assert found[True][0].measurements == found[False][0].measurements == 8
    for name in ("variance", "square", "total_variance", "total_square"):
        assert getattr(found[True][0], name) == pytest.approx(getattr(found[False][0], name), rel=1e-4)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4)
    plain = Words(True)
    run(plain, words(8), accumulate_grad_batches=2, max_epochs=2)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 0.05}, {"clip_norm": 1e6}, {"lr_rule": "none", "gradient_noise": "head"}, {"warmup_updates": 3}],
)
def test_the_regime_takes_sparse_gradients_as_dense_ones(options):
    dense, sparse = Words(False), Words(True)
    for module in (dense, sparse):
        run(module, words(16), LargeBatchRegime(8, **options), max_epochs=2)
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- layers that mix samples


class Classifier(LightningModule):
    """Fixed weights, so that all of a run measures one number."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), *layers, torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def samples(batch, count=2048):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch, shuffle=True)


def critical(micro_batch, *layers, **options):
    scale = GradientNoiseScale(every_n_updates=1)
    torch.manual_seed(1)
    options = {"accumulate_grad_batches": 64 // micro_batch, "max_epochs": 10, **options}
    trainer_of(scale, **options).fit(Classifier(*layers), samples(micro_batch))
    return scale.estimate.critical_batch_size


def test_with_ghosts_the_noise_scale_does_not_depend_on_the_micro_batch():
    with pytest.warns(UserWarning, match="net.1 normalizes over 4 samples, .* of batches made of such groups"):
        four, sixteen = (critical(b, GhostBatchNorm1d(16, ghost_batch_size=4)) for b in (4, 16))
    assert four == pytest.approx(sixteen, rel=0.15)
    with pytest.warns(UserWarning, match="net.1 normalizes over 4 samples"):
        assert critical(4, torch.nn.BatchNorm1d(16)) == pytest.approx(four, rel=0.15)
    with pytest.warns(UserWarning, match="net.1 normalizes over 32 samples"):
        assert critical(32, torch.nn.BatchNorm1d(16)) < 0.7 * four


@pytest.mark.parametrize(
    ("layer", "mixes"),
    [
        (torch.nn.BatchNorm1d(16), True),
        (torch.nn.LazyBatchNorm1d(), True),
        (torch.nn.BatchNorm1d(16).eval(), False),
        (torch.nn.BatchNorm1d(16, track_running_stats=False).eval(), True),
        (torch.jit.script(torch.nn.BatchNorm1d(16)), True),
        (torch.nn.LayerNorm(16), False),
        (torch.nn.GroupNorm(4, 16), False),
        (
            torch.nn.Sequential(torch.nn.Unflatten(1, (4, 4)), torch.nn.InstanceNorm1d(4, track_running_stats=True)),
            False,
        ),
    ],
)
def test_layers_that_mix_samples_are_named_once_in_warning_and_verdict(capsys, layer, mixes):
    flat = torch.nn.Flatten()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        critical(16, layer, flat, max_epochs=1)
    found = [str(warning.message) for warning in caught if "GradientNoiseScale" in str(warning.message)]
    assert len(found) == mixes
    assert ("normalizes over 16 samples" in " ".join(capsys.readouterr().out.split())) == mixes


@pytest.mark.parametrize("kind", [torch.nn.SyncBatchNorm, GhostBatchNorm1d])
def test_layers_that_join_replicas_are_not_trusted(kind):
    layer = kind(3)
    layer.process_group = object()
    assert "may be far off" in normalization_note({"norm": layer}, 16, replicas=2)
    assert "may be far off" not in normalization_note({"norm": torch.nn.BatchNorm1d(3)}, 16, replicas=2)


# ------------------------------------------------------------------------------------------------ parameters of a kind


class Lazy(Classifier):
    """Parameters without a shape until the first batch."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LazyLinear(16), torch.nn.ReLU(), torch.nn.LazyLinear(2))


class Aside(Classifier):
    """A weight whose gradient nothing sets to zero, for no optimizer has it."""

    def __init__(self):
        super().__init__()
        self.aside = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.aside

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


class Thawed(Classifier):
    """The first layer is unfrozen, and given to the optimizer, after the first epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.0)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.net[0].parameters())})


class Complex(Classifier):
    """A complex weight."""

    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.ones(8, dtype=torch.cfloat))

    def training_step(self, batch, batch_idx):
        return super().training_step([(batch[0] * self.phase).real.float(), batch[1]], batch_idx)


class Double(Classifier):
    """Weights in double precision, and data that follow them."""

    def __init__(self):
        super().__init__()
        self.net.double()

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].double(), batch[1]], batch_idx)


@pytest.mark.parametrize("kind", [Classifier, Lazy, Aside, Thawed, Complex, Double])
def test_every_measurement_is_of_the_gradients_that_the_optimizer_uses(kind):
    class Twin(GradientNoiseScale):
        """What is in ``.grad`` of the optimizer's parameters, and of each micro-batch by itself."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.parts = [*getattr(self, "parts", []), batch]
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            parts, self.parts = self.parts, []
            before = self.estimate.measurements, self.estimate.total_variance, self.estimate.total_square
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self.estimate.measurements == before[0]:
                return
            weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            squares = []
            for batch in [*parts, [torch.cat(tensors) for tensors in zip(*parts, strict=True)]]:
                gradients = torch.autograd.grad(pl_module.training_step(batch, 0), weights)
                squares.append(sum(gradient.abs().double().square().sum().item() for gradient in gradients))
            expected = gradient_moments(sum(squares[:-1]) / len(parts), squares[-1], 16, 64)
            found = self.estimate.total_variance - before[1], self.estimate.total_square - before[2]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)

    twin = Twin(every_n_updates=1)
    trainer = trainer_of(twin, accumulate_grad_batches=4, max_epochs=2)
    trainer.fit(kind(), samples(16, 256))
    assert twin.estimate.measurements == trainer.global_step - (kind is Lazy)


# ------------------------------------------------------------------------------------------------- beside the regime


def test_the_verdict_compares_the_plan_with_the_critical_batch(tmp_path, capsys):
    logger, scale = CSVLogger(tmp_path), GradientNoiseScale(every_n_updates=2)
    regime = LargeBatchRegime(4, lr_rule="none")
    options = {"accumulate_grad_batches": 4, "max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
    run(Mean(), None, scale, regime, **options)
    said = " ".join(capsys.readouterr().out.split())
    early, late = said.partition("Gradient noise scale after 19 updates:")[2].split("Gradient noise scale:")
    for line in (early, late):
        assert "the plan makes 1 times its updates" in line
    estimate, plan = scale.estimate, regime.plan
    assert plan_verdict(plan.batch_size, 4, estimate, planned=1.0) in late
    with open(f"{logger.log_dir}/metrics.csv") as file:
        values = [row["lightning_gap/regime/batch_over_critical"] for row in csv.DictReader(file)]
    assert float(next(filter(None, reversed(values)))) == pytest.approx(16 / estimate.critical_batch_size, rel=0.2)


@given(st.floats(1, 1e5), st.integers(1, 1000), st.floats(1, 100))
def test_the_verdict_on_a_plan_is_between_the_samples_and_the_updates_of_the_reference_run(critical, reference, ratio):
    estimate = NoiseScaleEstimate(decay=0.5)
    estimate.update(critical, 1.0)
    batch = round(reference * ratio)
    numbers = re.findall(r"([\d.e+-]+) times its", plan_verdict(batch, reference, estimate))
    updates, samples = map(float, numbers)
    assert reference / batch * 0.94 <= updates <= 1.06
    assert 0.94 <= samples <= batch / reference * 1.06


# --------------------------------------------------------------------------------------------------- loops of one's own


@pytest.mark.parametrize("factor", [None, 1.0, 64.0])
def test_a_loop_of_ones_own_finds_what_the_callback_finds(factor):
    model, estimate, gradients = Mean(), NoiseScaleEstimate(decay=0.95), MicroBatchGradients()
    with torch.no_grad():
        model.w.copy_(torch.linspace(-1, 1, 3))  # as run() does
    torch.manual_seed(0)
    for _ in range(8):
        for parts in zip(*[iter(model.train_dataloader())] * 4, strict=True):
            model.w.grad = None
            gradients.listen(model.parameters())
            for part in parts:
                (model.training_step(part, 0) * (factor or 1 / 4)).backward()
            estimate.update(*gradients.moments(4, loss_factor=factor))
    assert estimate.measurements == 8 * SAMPLES / 16
    assert estimate.critical_batch_size == pytest.approx(expected(), rel=0.15)
    gradients.remove()
    assert not model.w._backward_hooks


def test_what_a_loop_of_ones_own_is_refused():
    gradients, weight = MicroBatchGradients(), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="0 micro-batches"):
        gradients.moments(4)
    gradients.listen([weight])
    weight.sum().backward()
    with pytest.raises(ValueError, match=r"1 micro-batches .*call listen"):
        gradients.moments(4)
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        gradients.moments(0)
    with pytest.raises(ValueError, match="run one forward"):
        gradients.listen(torch.nn.LazyLinear(2).parameters())


@pytest.mark.parametrize("moments", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_a_measurement_that_overflowed_is_left_out(moments):
    estimate = NoiseScaleEstimate(decay=0.5)
    estimate.update(2.0, 1.0)
    estimate.update(*moments)
    assert (estimate.measurements, estimate.noise_scale, estimate.critical_batch_size) == (1, 2.0, 2.0)
