"""The order of samples that a batch which changes is drawn in: it takes nothing from training's own random numbers."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

from lightning_gap.regime.scheduled_loader import draws_of


class Own(Sampler):
    """Draws with whatever there is."""

    def __len__(self):
        return 20

    def __iter__(self):
        draws = (random.randrange, np.random.randint, lambda n: int(torch.randint(n, (1,))))
        return iter([draw(7) for draw in draws for _ in range(7)][:20])


def loaders():
    data = list(range(20))
    yield DataLoader(data, 4, shuffle=True)
    yield DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    yield DataLoader(data, 4, sampler=Own())


def states():
    numpys = np.random.get_state()  # noqa: NPY002 - samplers of users draw with it
    return torch.get_rng_state().tolist(), random.getstate(), numpys[1].tolist()


@pytest.mark.parametrize("loader", loaders(), ids=["shuffled", "generator", "own"])
def test_a_pass_is_drawn_alike_every_time_and_takes_no_random_numbers(loader, monkeypatch):
    def devices(seed):
        raise AssertionError("the devices that train are not to be seeded anew")

    for device in (torch.cuda, torch.xpu, torch.mps):
        for name in ("manual_seed_all", "manual_seed"):
            monkeypatch.setattr(device, name, devices, raising=False)
    draws = draws_of(loader, seed=3)
    before = states()
    first = [draws(epoch) for epoch in range(3)]
    assert [draws(epoch) for epoch in range(3)] == first
    assert first[0] != first[1]
    assert states() == before


def test_an_ordered_pass_needs_no_draw():
    draws = draws_of(DataLoader(list(range(20)), 4), seed=3)
    assert draws(0) == draws(5) == range(20)
