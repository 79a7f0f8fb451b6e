"""Entry points where tensors are made on the device by default."""

import pytest
import torch
from device_fits import clouds, fit_classifier, fit_map, samples

from lightning_gap import GhostBatchNorm, GradientNoiseScale, LargeBatchRegime, UltraSlowDiffusion, costs
from lightning_gap.diffusion import WeightDistance, estimate_alpha, weight_displacement
from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.monge import (
    BrenierMap,
    ConditionalMap,
    EnergyDistance,
    MapScores,
    ResidualMLP,
    SphereMap,
    StructuredMap,
    energy_distance,
    gaussian_map,
    marginal_wasserstein,
    monge_gap,
    optimal_transport,
    sinkhorn_divergence,
    unbalanced_weights,
)

X, Y = clouds(24)


def displacement():
    layer = torch.nn.Linear(3, 2)
    start = {name: value.detach().clone() for name, value in layer.named_parameters()}
    return weight_displacement(dict(layer.named_parameters()), start)


def distance():
    layer = torch.nn.Linear(3, 2)
    metric = WeightDistance(layer)
    metric.update(layer)
    return metric.compute()


def landscape():
    layer, x = torch.nn.Linear(4, 1), torch.rand(8, 4)
    return estimate_alpha(layer, lambda net: net(x).square().mean(), radius=1.0, samples=40, bins=4)


def scores():
    metric = MapScores(max_samples=10)
    x = X.cuda()
    metric.update(x, 2 * x, Y.cuda())
    return metric.compute()


def energy():
    metric = EnergyDistance()
    metric.update(X.cuda(), Y.cuda())
    return metric.compute()


def noise():
    return LargeBatchRegime(8, batch_size=32, lr_rule="none", gradient_noise=True, train_longer=False)


def on_device(function, **options):
    return lambda: function(X.cuda(), Y.cuda(), **options)


COSTS = ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "elastic", costs.Mahalanobis([[1.0, 0.5]])]
ENTRIES = {
    **{f"gap {cost}": on_device(monge_gap, cost=cost) for cost in COSTS},
    **{f"divergence {solver}": on_device(sinkhorn_divergence, solver=solver) for solver in ("dense", "blocked")},
    "exact": on_device(sinkhorn_divergence, solver="exact"),
    "plan": lambda: optimal_transport(X.cuda(), Y.cuda()).plan(),
    "energy distance": on_device(energy_distance),
    "marginal": on_device(marginal_wasserstein),
    "unbalanced weights": on_device(unbalanced_weights, rho=2.0),
    "gaussian map": on_device(gaussian_map),
    "residual map": lambda: ResidualMLP(2)(X.cuda()),
    "conditional map": lambda: ConditionalMap(2, num_conditions=2)(X.cuda(), torch.zeros(24, dtype=torch.long)),
    "structured map": lambda: StructuredMap(2, cost="sqeuclidean")(X.cuda()),
    "sphere map": lambda: SphereMap(3)(torch.nn.functional.normalize(torch.rand(24, 3), dim=1)),
    "Brenier map": lambda: BrenierMap(2)(X.cuda()),
    "ghost layer": lambda: GhostBatchNorm1d(2, ghost_batch_size=4)(X.cuda()),
    "scores": scores,
    "energy metric": energy,
    "displacement": displacement,
    "distance": distance,
    "landscape": landscape,
    "map": lambda: fit_map("cuda", trainer={"max_epochs": 1}),
    "map of a reference": lambda: fit_map("cuda", gap_reference=X, trainer={"max_epochs": 1}),
    "map of weighted samples": lambda: fit_map(
        "cuda", samples(weights=[torch.rand(96, device="cpu").tolist()] * 2), trainer={"max_epochs": 1}
    ),
    "map of standardized samples": lambda: fit_map(
        "cuda", samples(standardize=True, components=2), trainer={"max_epochs": 1}
    ),
    "ghosts": lambda: fit_classifier("cuda", [GhostBatchNorm(8)]),
    "regime": lambda: fit_classifier("cuda", [LargeBatchRegime(8, batch_size=32, train_longer=False)]),
    "noise": lambda: fit_classifier("cuda", [noise()], normalized=False),
    "diffusion": lambda: fit_classifier("cuda", [UltraSlowDiffusion(every_n_updates=1)]),
    "noise scale": lambda: fit_classifier("cuda", [GradientNoiseScale()], accumulate_grad_batches=3),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entry_points(device, name):
    torch.set_default_device(device)  # put back after each test
    ENTRIES[name]()
