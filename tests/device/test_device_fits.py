"""Lightning's trainer on a GPU: the callbacks and MongeMap train there as on the CPU, in every precision they take."""

import pytest
import torch
from device_fits import Classifier, clouds, fit_classifier, fit_map, images, samples, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gap import (
    GhostBatchNorm,
    GradientNoiseScale,
    LargeBatchRegime,
    MongeMap,
    SamplesDataModule,
    UltraSlowDiffusion,
)
from lightning_gap.monge import ConditionalMap, SphereMap, StructuredMap, UnpairedBatch

PRECISIONS = ["32-true", "16-mixed", "bf16-mixed"]


def regime():
    return LargeBatchRegime(8, clip_norm=1.0, warmup_updates=2, train_longer=False)


CALLBACKS = {
    "none": list,
    "ghosts": lambda: [GhostBatchNorm(8)],
    "strided ghosts": lambda: [GhostBatchNorm(8, grouping="strided", running_stats="per_step")],
    "regime": lambda: [regime()],
    "noise of ghosts": lambda: [GhostBatchNorm(8), GradientNoiseScale(every_n_updates=2)],
    "diffusion": lambda: [UltraSlowDiffusion(every_n_updates=1, per_layer=True)],
    "anchors on the CPU": lambda: [UltraSlowDiffusion(every_n_updates=1, anchor_device="cpu", anchor_dtype="bfloat16")],
    "together": lambda: [GhostBatchNorm(8), GradientNoiseScale(every_n_updates=2), regime(), UltraSlowDiffusion()],
}


def near(found, expected, share):
    for name, value in expected.items():
        if value.is_floating_point():
            difference, size = (found[name] - value).norm(), value.norm()
            assert difference <= share * (size + 0.1), (name, float(difference), float(size))
        else:
            assert torch.equal(found[name], value), name


def state(model):
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def options_for(name, precision):
    # Noise between the ranks' gradients is measured between micro-batches, of which there must be two.
    return {"precision": precision, "accumulate_grad_batches": 3 if name == "together" else 1}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CALLBACKS)
def test_classifier(device, name, precision):
    options = options_for(name, precision)
    expected = state(fit_classifier("cpu", CALLBACKS[name](), **(options | {"precision": "32-true"})))
    model = fit_classifier(device, CALLBACKS[name](), **options)
    near(state(model), expected, 2e-3 if precision == "32-true" else 0.1)


MAPS = {
    "plain": {},
    "euclidean": {"cost": "euclidean", "fitting_cost": "euclidean"},
    "elastic": {"cost": "elastic", "map": lambda: StructuredMap(2, hidden=(16,), cost="elastic")},
    "unbalanced": {"rho": 5.0, "gap_weight": 0.5},
    "blocked": {"solver": "blocked"},
    "no gap": {"gap_weight": 0.0},
    "reference": {"gap_reference": clouds(40)[0]},
    "energy": {"fitting_loss": "energy"},
}


# Half precision is that of the network alone, whatever the loss.
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "32-true") for name in MAPS), *(("plain", other) for other in PRECISIONS[1:])]
)
def test_map(device, name, precision):
    def arguments():
        return {key: value() if key == "map" else value for key, value in MAPS[name].items()}

    options = {"trainer": {"max_epochs": 1, "precision": precision}}
    expected = state(fit_map("cpu", trainer={"max_epochs": 1}, **arguments()))
    model = fit_map(device, **arguments(), **options)
    near(state(model), expected, 5e-3 if precision == "32-true" else 0.1)


@pytest.mark.parametrize("data", ["standardized", "conditions"])
def test_map_of_prepared_samples(device, data):
    def prepared():
        if data == "standardized":
            return samples(standardize=True, components=2)
        labels = ["a" if i % 2 else "b" for i in range(96)]
        return samples(conditions=[labels, labels], batch_size=16)

    expected = state(fit_map("cpu", prepared(), trainer={"max_epochs": 1}))
    model = fit_map(device, prepared(), trainer={"max_epochs": 1})
    near(state(model), expected, 5e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_maps_with_all_callbacks(device, precision):
    callbacks = [
        UltraSlowDiffusion(every_n_updates=1),
        LargeBatchRegime(16, batch_size=32, lr_rule="adam", train_longer=False),
        GhostBatchNorm(16),
    ]
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model = fit_map(device, callbacks=callbacks, map=net, trainer={"max_epochs": 1, "precision": precision})
    assert all(bool(value.isfinite().all()) for value in state(model).values())


def test_checkpoints_move_between_devices(device, tmp_path):
    def saving():
        return ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")

    x = clouds()[0]
    model = fit_map(device, callbacks=[saving()], trainer={"max_epochs": 2, "enable_checkpointing": True})
    last = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    content = torch.load(last, weights_only=True, map_location="cpu")
    assert {value.device.type for value in content["state_dict"].values()} == {"cpu"}
    for where in ("cpu", device):
        loaded = MongeMap.load_from_checkpoint(last, map_location=where, weights_only=True)
        assert loaded.device.type == torch.device(where).type
        images = loaded.transport(x.to(where))
        assert images.device.type == torch.device(where).type
        torch.testing.assert_close(images.cpu(), model.transport(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["map", "classifier"])
def test_resumed_fits_go_on_as_if_not_stopped(device, kind, tmp_path):
    def fit(epochs, **options):
        checkpoint = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        settings = {"max_epochs": epochs, "enable_checkpointing": True}
        if kind == "map":
            return fit_map(device, callbacks=[checkpoint], trainer=settings)
        return fit_classifier(device, [*CALLBACKS["together"](), checkpoint], accumulate_grad_batches=3, **settings)

    expected = state(fit(2))
    fit(1)
    last = tmp_path / "1" / "last.ckpt"
    data = {"datamodule": samples()} if kind == "map" else {"train_dataloaders": images(), "val_dataloaders": images()}
    model = MongeMap(hidden=(16,)) if kind == "map" else Classifier()
    callbacks = [*([] if kind == "map" else CALLBACKS["together"]()), ModelCheckpoint(tmp_path / "1", save_last=True)]
    resumed = trainer(
        device, callbacks=callbacks, accumulate_grad_batches=1 if kind == "map" else 3, enable_checkpointing=True
    )
    resumed.fit(model, **data, ckpt_path=last, weights_only=True)
    near(state(model), expected, 1e-5)


def test_validation_test_and_prediction(device):
    model = fit_map(device)
    data = samples(test_fraction=0.2)
    runner = trainer(device)
    for loop in (runner.validate, runner.test):
        scores = loop(model, datamodule=data, verbose=False)[0]
        assert all(value == value for value in scores.values())
    images = runner.predict(model, datamodule=data)
    assert {part.device.type for part in images} <= {"cpu", "cuda"}


def test_samples_that_are_on_the_device(device):
    source, target = clouds()
    expected = state(fit_map("cpu", trainer={"max_epochs": 1}))
    data = SamplesDataModule(source.to(device), target.to(device), batch_size=32, val_fraction=0.25)
    model = fit_map(device, data, trainer={"max_epochs": 1})
    near(state(model), expected, 5e-3)


def test_maps_of_every_kind_run_on_the_device(device):
    x = clouds()[0]
    labels = torch.arange(96) % 3
    sphere = torch.nn.functional.normalize(clouds(dim=3)[0], dim=1)
    for network, inputs in (
        (ConditionalMap(2, num_conditions=3), (x, labels)),
        (StructuredMap(2, cost="sqeuclidean"), (x,)),
        (SphereMap(3), (sphere,)),
    ):
        expected = network(*inputs)
        found = network.to(device)(*(t.to(device) for t in inputs))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.emulated
def test_labels_are_checked_once_a_batch(device):
    # The map itself does not wait for the device: what it finds there ends the process, on CUDA.
    x, labels = clouds(12)[0], torch.tensor([0, 1, 3] * 4)
    batch = UnpairedBatch(x, x, condition=labels)
    model = MongeMap(map=ConditionalMap(2, num_conditions=3))
    batches = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(ValueError, match="condition has the label 3, but the map knows 3 conditions"):
        trainer(device).fit(model, batches, batches)
    with pytest.raises(ValueError, match="condition has the label 3"):
        trainer(device).predict(model, torch.utils.data.DataLoader([(x, labels)], batch_size=None))
    with pytest.raises(RuntimeError, match="none of 3 conditions, 0 to 2"):
        ConditionalMap(2, num_conditions=3).to(device)(x.to(device), labels.to(device))
