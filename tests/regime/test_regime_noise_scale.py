"""The gradient noise scale: closed forms, a slow twin, nothing but observed."""

import csv
import math

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
from lightning_gap.regime import LargeBatchRegime, NoiseScaleEstimate, gradient_moments

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
    monkeypatch.setattr("lightning_gap.regime.monitor.holds_whole_weights", lambda trainer: False)
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
