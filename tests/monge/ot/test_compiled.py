"""``torch.compile`` around what trains by the solvers: they are called, not traced."""

import pytest
import torch
from monge_runs import Metrics, gaussians, samples, small, trainer
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_gap import monge_gap, sinkhorn_divergence
from lightning_gap.monge import divergence_and_gap, energy_distance, optimal_transport

pytestmark = [
    pytest.mark.compiler,
    # Dynamo's own look at the loss that it is handed back.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

X, Y = gaussians(64)
LOSSES = {
    "divergence": lambda mapped: 2 * sinkhorn_divergence(mapped, Y),
    "gap": lambda mapped: monge_gap(X, mapped, cost="euclidean") + mapped.square().mean(),
    "gap, blocked": lambda mapped: monge_gap(X, mapped, solver="blocked"),
    "both": lambda mapped: sum(divergence_and_gap(X, mapped, Y)),
    "energy": lambda mapped: energy_distance(mapped, Y).sqrt(),
    "transport": lambda mapped: optimal_transport(mapped, Y, cost="pnorm(p=1.5)", epsilon=0.1).value,
    "exact": lambda mapped: optimal_transport(mapped, Y, solver="exact").value,
    "a cost of one's own": lambda mapped: sinkhorn_divergence(mapped, Y, cost=lambda x, y: (x - y).abs().sum(-1)),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_loss_is_the_plain_one(name):
    results = []
    for loss in (LOSSES[name], torch.compile(LOSSES[name], backend="aot_eager")):
        mapped = (X + 0.3).requires_grad_()
        value = loss(mapped)
        results.append((value.detach(), *torch.autograd.grad(value, mapped)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("how", ["torch.compile", "compile()"])
def test_a_compiled_monge_map_trains_as_the_plain_one(how):
    runs = []
    for compiled in (False, True):
        model, metrics = small(gap_weight=lambda updates: min(1.0, updates / 8)), Metrics()
        fitted = model
        if compiled and how == "torch.compile":
            fitted = torch.compile(model, backend="aot_eager")
        elif compiled:
            model.compile(backend="aot_eager")
        data = samples(test_fraction=0.2)
        run = trainer(max_steps=12, max_epochs=-1, callbacks=[metrics])
        run.fit(fitted, data)
        scores = run.test(fitted, data, verbose=False)[0]
        images = torch.cat(run.predict(fitted, [X[:5]]))
        runs.append((metrics.train, scores, images))
    plain, compiled = runs
    assert len(plain[0]) == len(compiled[0]) == 12
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_only_the_network_is_compiled():
    """However many updates: no graph but the network's, which a schedule of the gap's weight does not change."""
    graphs = CompileCounterWithBackend("eager")
    model = small(gap_weight=lambda updates: updates / 8)
    trainer(max_steps=12, max_epochs=-1, limit_val_batches=0).fit(
        torch.compile(model, backend=graphs), samples(val_fraction=0)
    )
    assert 1 <= graphs.frame_count <= 2
