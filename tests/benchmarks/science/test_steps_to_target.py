"""The prediction of a batch that was left out: the page is the log's, and training is what it says it is."""

import numpy as np
import pytest
import torch

from benchmarks.logs import RESULTS
from benchmarks.marked import differences
from benchmarks.science.large_batch import critical_branches
from benchmarks.science.large_batch import steps_to_target as script

pytest.importorskip("sklearn")


def test_the_page_is_what_the_log_says():
    made = script.blocks(RESULTS) | {"branches": critical_branches.block(RESULTS)}
    assert differences(script.PAGE, made) == []


def test_networks_side_by_side_train_as_each_alone():
    both = script.Digits((0, 1)).curves(32, (0.5, 1.0), [1.5])
    for seed in (0, 1):
        at, losses = script.Digits((seed,)).curves(32, (0.5, 1.0), [1.5])
        count = min(len(at), len(both[0]))
        np.testing.assert_allclose(losses[:count, 0], both[1][:count, seed], rtol=1e-3)


def test_a_network_trains_as_a_module_does():
    digits = script.Digits((0,))
    weights = digits.start(1)
    net = torch.nn.Sequential(torch.nn.Linear(64, script.HIDDEN), torch.nn.ReLU(), torch.nn.Linear(script.HIDDEN, 10))
    with torch.no_grad():
        for layer, weight, bias in ((net[0], *weights[:2]), (net[2], *weights[2:])):
            layer.weight.copy_(weight[0].T)
            layer.bias.copy_(bias[0, 0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    at, losses = digits.curves(64, (0.5,), [1.9])
    for update, rows in zip(range(1, at[-1] + 1), digits.batches(64), strict=False):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(digits.images[rows[0]]), digits.labels[rows[0]]).backward()
        optimizer.step()
        if update in at:
            loss = torch.nn.functional.cross_entropy(net(digits.images), digits.labels).item()
            assert loss == pytest.approx(losses[list(at).index(update), 0, 0], rel=1e-3)
