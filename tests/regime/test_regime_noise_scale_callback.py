"""The noise scale of a run: known ones, a slow twin, nothing but observed."""

import csv
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from noise_scale_models import (
    Classifier,
    Mean,
    expected,
    samples,
    targets,
)
from regime_runs import SaveAt, run, sharded, trainer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GradientNoiseScale
from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.regime import LargeBatchRegime, gradient_moments
from lightning_gap.regime.noise_scale import plan_verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


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


def test_refusals():
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

    class Layered(Classifier):
        def train_dataloader(self):
            return samples(16, 64)

    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    noisy = LargeBatchRegime(4, lr_rule="none", train_longer=False, gradient_noise=True)
    for module, callbacks, options, message in (
        (
            Mean(),
            [GradientNoiseScale()],
            {},
            r"no weight's gradient .* single examples \(w: .* accumulate_grad_batches",
        ),
        (Mean(), [GradientNoiseScale(source="accumulation")], {}, "needs accumulate_grad_batches of 2"),
        (Mean(), [GradientNoiseScale(source="replicas")], {}, "needs several devices"),
        (Mean(batch=1), [GradientNoiseScale(source="examples")], {}, "one example"),
        (Mean(), [GradientNoiseScale(source="ghosts")], {}, "no layer normalizes over ghosts"),
        (Layered(nn.BatchNorm1d(16)), [GradientNoiseScale()], {}, "net.1 .* whole micro-batch.* put GhostBatchNorm"),
        (Layered(nn.BatchNorm1d(16)), [GradientNoiseScale(source="examples")], {}, "a single example has no gradient"),
        (Layered(GhostBatchNorm1d(16, ghost_batch_size=16)), [GradientNoiseScale()], {}, "one ghost of 16 samples"),
        (
            Layered(GhostBatchNorm1d(16, ghost_batch_size=4), GhostBatchNorm1d(16, ghost_batch_size=8)),
            [GradientNoiseScale()],
            {},
            "net.1 and net.2 have different ghosts",
        ),
        (
            Layered(nn.Unflatten(1, (4, 4)), nn.TransformerEncoderLayer(4, 2), nn.Flatten()),
            [GradientNoiseScale()],
            {},
            "make it batch-first",
        ),
        (torch.compile(Layered(), backend="eager"), [GradientNoiseScale()], {}, "compiled by torch"),
        (Manual(), [GradientNoiseScale()], {}, "automatic optimization"),
        (Fused(), [GradientNoiseScale()], {"plugins": [scaler], "accumulate_grad_batches": 2}, "fused=False"),
        (Mean(), [LargeBatchRegime(4, clip_norm=1.0), GradientNoiseScale()], {}, "Put GradientNoiseScale before it"),
        (Mean(), [GradientNoiseScale(), noisy], {"accumulate_grad_batches": 2}, "noise would be measured too"),
        (Several(), [GradientNoiseScale()], {"accumulate_grad_batches": 2}, "Use one DataLoader with a batch_size"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            run(module, None, *callbacks, **options)
    trainer = sharded(trainer_of(scale := GradientNoiseScale()))
    with pytest.raises(MisconfigurationException, match="FSDPStrategy is not supported"):
        scale.setup(trainer, Mean(), "fit")
    with pytest.raises(ValueError, match="source must be one of auto, examples, ghosts, accumulation, replicas"):
        GradientNoiseScale(source="tokens")
    with pytest.raises(ValueError, match="max_examples must be at least 1"):
        GradientNoiseScale(max_examples=0)
    for options, error in (({"every_n_updates": 0}, ValueError), ({"every_n_updates": 1.5}, TypeError)):
        with pytest.raises(error, match="every_n_updates"):
            GradientNoiseScale(**options)
    with pytest.raises(ValueError, match="decay=1"):
        GradientNoiseScale(decay=1)


def critical(micro_batch, *layers, **options):
    scale = GradientNoiseScale(every_n_updates=1)
    torch.manual_seed(1)
    options = {"accumulate_grad_batches": 64 // micro_batch, "max_epochs": 10, **options}
    trainer_of(scale, **options).fit(Classifier(*layers), samples(micro_batch))
    return scale.estimate.critical_batch_size


@pytest.mark.slow  # with ghosts of the micro-batch's size: test_regime_noise_sources.py
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
