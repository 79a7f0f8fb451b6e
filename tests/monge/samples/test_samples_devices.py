"""The data module whatever torch's default device, and with samples that are elsewhere than the CPU."""

import numpy as np
import pytest
import torch

from lightning_gap import SamplesDataModule

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(60, 3)), RNG.normal(size=(50, 3)) + 1
LABELS = (["a", "b", "c"] * 20, ["a", "b", "b", "c", "a"] * 10)
GROUPS = ([1, 2, 3, 4] * 15, [1, 2, 3, 4, 4] * 10)
W = (np.arange(60) % 3, np.arange(50) + 1.0)


def sampler(n, generator):
    return torch.randn(n, 3, generator=generator, device="cpu")


class Stream:
    def __iter__(self):
        return iter(list(X) * 3)


SETS = {
    "plain": {},
    "standardized": {"standardize": True, "components": 2},
    "weights and images": {"weights": W, "true_images": lambda x: x * 2},
    "conditions": {"conditions": LABELS, "conditions_per_batch": 1, "batch_size": 5},
    "vectors": {
        "conditions": (None, LABELS[1]),
        "condition_vectors": {"a": [0.0, 1], "b": [1, 0], "c": [1, 1]},
        "batch_size": 5,
    },
    "groups": {"groups": GROUPS, "val_groups": [1], "test_groups": 0.3, "test_fraction": 0.0},
    "sampler": {"source": sampler, "true_images": lambda x: x + 1},
    "stream": {"target": Stream(), "steps_per_epoch": 3, "eval_batch_size": 20},
    "apart": {"val": (X[:9], Y[:8]), "standardize": True},
}


def everything(options, convert=lambda x: x):
    """Return all that a data module gives."""
    options = {"source": X, "target": Y, "batch_size": 16, "test_fraction": 0.2, **options}
    for name in ("source", "target"):
        options[name] = convert(options[name])
    data = SamplesDataModule(**options)
    loader, found = data.train_dataloader(), []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found += [tuple(batch) for batch in loader]
    found += [tuple(batch) for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]
    found += [tuple(batch) if not torch.is_tensor(batch) else (batch,) for batch in data.predict_dataloader()]
    found += [*data.splits.values(), data.training_samples(7)]
    return [x for part in found for x in part if x is not None]


def agree(found, expected, device="cpu"):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.device.type in (device, "cpu")
        # Like what it is compared with, but for rounding on another device.
        torch.testing.assert_close(mine.cpu(), theirs)


@pytest.mark.parametrize("name", SETS)
def test_the_default_device_does_no_harm(name):
    expected = everything(SETS[name])
    # Nothing can be read from this device: whatever is made on it by accident is found out.
    torch.set_default_device("meta")
    try:
        found = everything(SETS[name])
    finally:
        torch.set_default_device(None)
    agree(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SETS)
def test_samples_that_are_on_a_gpu(name):
    def there(x):
        return torch.as_tensor(x, device="cuda") if isinstance(x, np.ndarray) else x

    agree(everything(SETS[name], there), everything(SETS[name]), "cuda")
    torch.set_default_device("cuda")
    try:
        agree(everything(SETS[name], there), everything(SETS[name]), "cuda")
    finally:
        torch.set_default_device(None)
