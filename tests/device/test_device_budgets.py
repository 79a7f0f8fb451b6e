"""What a step may cost a device beside its arithmetic; a failure tells the places.

Each wait of the host leaves a GPU idle, and some thousand launches outlast the arithmetic of a small batch.
"""

import pytest
import torch
from budgets import within
from counts import Counts, counting
from device_fits import Steps, fit_classifier, fit_map, samples
from ground_costs import COSTS
from ranks import RecordedRanks

from lightning_gap import GhostBatchNorm, GradientNoiseScale, LargeBatchRegime, UltraSlowDiffusion, monge_gap
from lightning_gap.ghost import GhostBatchNorm1d, RunningStatisticsSync, ghost_batch_norm
from lightning_gap.monge import ConditionalMap, ResidualMLP
from lightning_gap.monge.costs import Mahalanobis

pytestmark = pytest.mark.emulated


def last_step(fit, *callbacks, **options):
    """Return what the last of some steps cost, after all that is done once."""
    steps = Steps()
    fit("cuda", callbacks=[steps, *callbacks], **options)
    return steps.counts[-1]


def test_steps_of_lightning_wait_for_nothing():
    within(last_step(fit_classifier), syncs=0)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("running_stats", ["sequential", "per_step"])
def test_ghost_layers(grouping, running_stats):
    within(last_step(fit_classifier, GhostBatchNorm(8, grouping=grouping, running_stats=running_stats)), syncs=0)


@pytest.mark.parametrize("n", [12, 10, 9, 4])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4)], ids=str)
def test_ghosts_with_cumulative_averages(n, shape):
    x = torch.rand(n, 3, *shape, device="cuda", requires_grad=True)
    statistics = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    updates = torch.tensor(2, device="cuda")
    with counting() as counts:
        y = ghost_batch_norm(x, *statistics, ghost_batch_size=4, momentum=None, num_batches_tracked=updates)
        y.sum().backward()
    within(counts, syncs=0, uploads=0)


def test_ghosts_over_ranks():
    x = torch.rand(4, 3, 5, 5, device="cuda", requires_grad=True)
    ranks = RecordedRanks(2)
    ranks.layers, ranks.channels = ["norm", "wider"], 4

    def of_rank(rank):
        with counting() as counts:
            ghost_batch_norm(x, None, None, ghost_batch_size=8, process_group=ranks).sum().backward()
        return counts

    for counts in ranks.each(of_rank, calls=2):
        within(counts, syncs=0, uploads=0)


def test_joined_statistics():
    layers = [GhostBatchNorm1d(3, ghost_batch_size=4).to("cuda") for _ in range(3)]
    x = torch.rand(8, 3, device="cuda")
    ranks = RecordedRanks(2)

    def of_rank(rank):
        sync = RunningStatisticsSync(layers, ranks, range(2))
        sync.remember()
        for layer in layers:
            layer(x)
        with counting() as counts:
            sync.join()
        return counts

    for counts in ranks.each(of_rank, calls=1):
        within(counts, syncs=0)


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 1.0, "warmup_updates": 100}, {"gradient_noise": True, "lr_rule": "none"}],
    ids=["clipped and warmed up", "noise"],
)
def test_regime(options):
    regime = LargeBatchRegime(8, batch_size=32, train_longer=False, **options)
    within(last_step(fit_classifier, regime, normalized="clip_norm" in options), syncs=0)


def test_diffusion():
    within(last_step(fit_classifier, UltraSlowDiffusion(every_n_updates=1)), syncs=1)


def test_noise_scale():
    counts = last_step(fit_classifier, GradientNoiseScale(every_n_updates=1), accumulate_grad_batches=3)
    within(counts, syncs=2)


MAPS = {
    "squared": {},
    "euclidean": {"cost": "euclidean"},
    "no gap": {"gap_weight": 0.0},
    "unbalanced": {"rho": 5.0},
}


@pytest.mark.parametrize("name", MAPS)
def test_map(name):
    data = samples(256, 10, batch_size=128, val_fraction=0.0)
    options = {"trainer": {"max_epochs": 1, "limit_val_batches": 0}, "map": ResidualMLP(10, (32,)), "tolerance": 1e-5}
    counts = last_step(fit_map, data=data, **options, **MAPS[name])
    within(counts, syncs=14)
    # But for the solver's own, a batch is looked at once.
    (place,) = (place for place in counts.syncs if "/ot/solvers/" not in place)
    assert counts.syncs[place] == 1
    assert "/ot/checks.py" in place


def test_conditional_map():
    network = ConditionalMap(2, num_conditions=3).to("cuda")
    x, labels = torch.rand(8, 2, device="cuda"), torch.zeros(8, dtype=torch.long, device="cuda")
    with counting() as counts:
        network(x, labels).sum().backward()
    within(counts, syncs=0)


@pytest.mark.parametrize("name", COSTS)
def test_launches_of_a_gap(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(t, dim=1) for t in torch.randn(2, 2000, 50, generator=generator))
    cost = COSTS[name] if name != "mahalanobis" else Mahalanobis(torch.eye(50)[:20])
    x, y = x.to("cuda"), y.to("cuda").requires_grad_()
    with counting() as counts:
        monge_gap(x, y, cost=cost).backward()
    within(counts, launches=2000)


def test_budgets_tell_the_places():
    counts = Counts()
    counts.syncs["lightning_gap/monge/ot/gap.py:1 item"] = 3
    with pytest.raises(
        AssertionError, match=r"3 syncs are more than 2:\n3 syncs\n +3  lightning_gap/monge/ot/gap.py:1 item"
    ):
        within(counts, syncs=2)
