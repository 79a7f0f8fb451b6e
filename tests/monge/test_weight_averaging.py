"""Callbacks of Lightning that average weights: they average weights, and no decision of the training."""

import math

import pytest
import torch
from checkered import checkered
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from monge_runs import FAST, gaussians, samples, small, trainer, weights
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_gap import MongeMap
from lightning_gap.monge import BrenierMap, ResidualMLP, StructuredMap

NAMES = ("fitting_epsilon", "gap_epsilon", "started")
AVERAGES = {
    "all": WeightAveraging,
    "all, buffers as they are": lambda: WeightAveraging(use_buffers=False),
    "exponential": lambda: EMAWeightAveraging(decay=0.9),
    "exponential, buffers as they are": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
    "exponential, from the fourth step on": lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=4),
    "never": lambda: EMAWeightAveraging(update_starting_at_step=1000),
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}
MAPS = {
    "default": lambda: None,
    "residual": lambda: ResidualMLP(2, (8,), start="gaussian"),
    "structured": lambda: StructuredMap(2, hidden=(8,), start="mean"),
    "brenier": lambda: BrenierMap(2, (4,), start="identity"),
}


class Epsilons(Callback):
    """Keeps what the steps and validations of a fit took for its epsilons."""

    def __init__(self) -> None:
        self.seen: set[tuple[float, ...]] = set()

    def on_train_batch_end(self, trainer, pl_module, *_):
        kept = pl_module.epsilons
        self.seen.add((kept.fitting, kept.gap, float(kept.started)))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        scores = pl_module.scores["val"]
        if trainer.global_step:
            self.seen.add((scores.fitting_epsilon, scores.gap_epsilon, 1.0))


def make(name: str) -> MongeMap:
    torch.manual_seed(0)
    return MongeMap(map=MAPS[name](), hidden=(8,), optimizer=FAST)


@checkered(average=list(AVERAGES), net=list(MAPS))
def test_maps_are_averaged_and_epsilons_are_kept(average, net, tmp_path):
    watch, data = Epsilons(), samples(48, batch_size=12, standardize=net != "residual")
    model = make(net)
    run = trainer(max_epochs=2, callbacks=[AVERAGES[average](), watch])
    run.fit(model, data)
    x = gaussians(20)[0]
    assert bool(model.transport(x).isfinite().all())
    if average != "never":  # then Lightning keeps the weights of the beginning
        assert not torch.allclose(model.transport(x), x)
    (kept,) = watch.seen
    assert all(map(math.isfinite, kept))
    assert tuple(float(getattr(model, name)) for name in NAMES) == kept
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    assert tuple(float(getattr(loaded, name)) for name in NAMES) == kept
    assert torch.equal(loaded.transport(x), model.transport(x))


def test_plain_loaders_decide_after_the_copy_was_made(tmp_path):
    data = samples()
    train, val = ([tuple(b[:2]) for b in loader] for loader in (data.train_dataloader(), data.val_dataloader()))
    for average in ("all", "exponential", "exponential, from the fourth step on"):
        model, watch = make("residual"), Epsilons()
        keep = ModelCheckpoint(tmp_path / average, every_n_train_steps=2, save_top_k=-1)
        run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[AVERAGES[average](), watch, keep])
        run.fit(model, *(DataLoader(batches, batch_size=None) for batches in (train, val)))
        (kept,) = watch.seen
        paths = sorted((tmp_path / average).glob("*.ckpt"))
        assert len(paths) == 3
        for path in paths:
            for part in ("state_dict", "current_model_state"):
                state = torch.load(path, weights_only=True)[part]
                assert tuple(float(state[name]) for name in NAMES) == kept


@pytest.mark.parametrize("average", ["all", "exponential", "exponential, buffers as they are", "stochastic"])
def test_averages_go_on_as_if_never_stopped(average, tmp_path):
    def fit(model, **options):
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        run = trainer(max_epochs=4, enable_checkpointing=True, callbacks=[AVERAGES[average](), keep])
        run.fit(model, samples(48, batch_size=12), **options)
        return model

    whole = fit(make("residual"))
    resumed = fit(make("residual"), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_truth_values_of_older_checkpoints_are_taken():
    for net in MAPS:
        model = make(net) if net != "default" else small()
        state = {n: v.bool() if n.endswith("started") else v for n, v in model.state_dict().items()}
        started = {n: torch.tensor(True) for n in state if n.endswith("started")}
        model.load_state_dict({**state, **started})
        assert bool(model.started)
        assert model.epsilons.started
        if hasattr(model.map, "started"):
            assert bool(model.map.started)


def test_averages_of_torch_itself():
    model = small(map=ResidualMLP(2, (8,), start="gaussian"))
    averaged = AveragedModel(model, use_buffers=True)
    trainer(max_steps=2, max_epochs=-1).fit(model, samples())
    for _ in range(3):
        averaged.update_parameters(model)
    trainer().validate(averaged.module, samples(), verbose=False)
    assert averaged.module.epsilons.fitting == pytest.approx(float(model.fitting_epsilon))
    x = gaussians(5)[0]
    torch.testing.assert_close(averaged.module.transport(x), model.transport(x))


def test_keys_of_the_state_are_what_they_were():
    assert set(small().state_dict()) == {
        "fitting_epsilon", "gap_epsilon", "started",
        *(f"map.displacement.{k}.{part}" for k in (0, 2) for part in ("weight", "bias")),
    }  # fmt: skip
    assert {"map.started", "map.offset", "map.matrix"} <= set(make("residual").state_dict())
