"""Networks that map samples to samples: what all of them promise."""

import copy
import importlib.util
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_gap import costs
from lightning_gap.monge import MLP, BrenierMap, ConditionalMap, ResidualMLP, SphereMap, StructuredMap

WIDTHS = (8, 4)
MAPS = {
    "mlp": lambda d: MLP(d, WIDTHS),
    "residual": lambda d: ResidualMLP(d, WIDTHS),
    "residual, mean": lambda d: ResidualMLP(d, WIDTHS, start="mean"),
    "residual, gaussian": lambda d: ResidualMLP(d, WIDTHS, "silu", start="gaussian"),
    "residual, plan": lambda d: ResidualMLP(d, WIDTHS, start="plan", plan_steps=5),
    "structured, plan": lambda d: StructuredMap(d, "pnorm(p=1.5)", WIDTHS, start="plan", plan_steps=5),
    "structured, sqeuclidean": lambda d: StructuredMap(d, "sqeuclidean", WIDTHS, start="gaussian"),
    "structured, elastic": lambda d: StructuredMap(d, costs.Elastic(0.1), WIDTHS, start="mean"),
    "structured, pnorm": lambda d: StructuredMap(d, costs.PNorm(1.5), WIDTHS),
    "potential, sqpnorm": lambda d: StructuredMap(d, "sqpnorm(p=3)", WIDTHS, "softplus", potential=True),
    "potential, mahalanobis": lambda d: StructuredMap(d, costs.Mahalanobis(2 * torch.eye(d)), WIDTHS, potential=True),
    "brenier": lambda d: BrenierMap(d, WIDTHS),
    "brenier, identity": lambda d: BrenierMap(d, WIDTHS, start="identity"),
    "sphere": lambda d: SphereMap(d, WIDTHS),
    "labels": lambda d: ConditionalMap(d, WIDTHS, num_conditions=3, start="gaussian"),
    "vectors": lambda d: ConditionalMap(d, WIDTHS, condition_dim=2, embedding_dim=4),
    "structured, labels": lambda d: StructuredMap(d, "pnorm(p=3)", WIDTHS, num_conditions=3),
    "potential, vectors": lambda d: StructuredMap(d, "sqeuclidean", WIDTHS, potential=True, condition_dim=2),
    "sphere, labels": lambda d: SphereMap(d, WIDTHS, num_conditions=3),
}
every_map = pytest.mark.parametrize("kind", MAPS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(net: nn.Module, n: int, d: int = 3) -> tuple[Tensor, ...]:
    x = normal(n, d, seed=1)
    if isinstance(net, SphereMap):
        x = nn.functional.normalize(x, dim=-1)
    if not net.conditional:
        return (x,)
    return x, torch.arange(n) % 3 if net.conditions else normal(n, 2, seed=2)


def learned(kind: str, d: int = 3) -> nn.Module:
    """A map that has started, and whose weights have left their start."""
    torch.manual_seed(0)
    net = MAPS[kind](d)
    if hasattr(net, "start"):
        net.start(normal(50, d, seed=3), 2 * normal(50, d, seed=4) + 1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval()


@every_map
def test_a_map_is_made_again_from_its_arguments_and_its_state(kind):
    net = learned(kind)
    inputs = arguments(net, 10)
    expected = net(*inputs)
    assert expected.shape == (10, 3)
    assert not torch.equal(expected, inputs[0])
    file = io.BytesIO()
    torch.save({"hparams": net.hparams, "state": net.state_dict()}, file)
    file.seek(0)
    held = torch.load(file, weights_only=True)
    again = type(net)(**held["hparams"]).eval()
    again.load_state_dict(held["state"])
    for other in (again, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(*inputs), expected)


@every_map
def test_a_map_needs_no_gradients_and_takes_any_number_of_samples(kind):
    net = learned(kind)
    inputs = arguments(net, 10)
    expected = net(*inputs)
    with torch.no_grad():
        assert torch.equal(net(*inputs), expected)
    with torch.inference_mode():
        assert torch.equal(net(*inputs), expected)
    torch.testing.assert_close(net(*(a[:1] for a in inputs)), expected[:1])
    assert net(*(a[:0] for a in inputs)).shape == (0, 3)
    batched = net(*(a.unflatten(0, (2, 5)) for a in inputs))
    torch.testing.assert_close(batched.flatten(0, 1), expected)


@every_map
def test_values_and_slopes_agree_with_differences_in_double(kind):
    net = learned(kind).double()
    inputs = [a.double() if a.is_floating_point() else a for a in arguments(net, 2)]
    parameters = dict(net.named_parameters())

    def f(x: Tensor, *values: Tensor) -> Tensor:
        if isinstance(net, SphereMap):
            x = nn.functional.normalize(x, dim=-1)
        return torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), (x, *inputs[1:]))

    assert torch.autograd.gradcheck(f, (inputs[0].requires_grad_(), *parameters.values()), fast_mode=True)


@every_map
def test_training_starts_with_finite_gradients_at_dimension_512(kind):
    torch.manual_seed(0)
    net = MAPS[kind](512).train()
    inputs = arguments(net, 4, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = net(*inputs)
        assert mapped.dtype == torch.float32
        mapped.sub(1).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert sum(float(p.grad.abs().sum()) for p in net.parameters() if p.grad is not None) > 0


@every_map
def test_a_map_keeps_its_values_under_autocast(kind):
    net = learned(kind)
    inputs = arguments(net, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(net(*inputs), net.float()(*inputs), atol=0.05, rtol=0.05)


@every_map
def test_a_map_is_one_graph_to_export(kind):
    net = learned(kind)
    inputs = arguments(net, 10)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(net, inputs, dynamic_shapes=tuple({0: rows} for _ in inputs))
    torch.testing.assert_close(exported.module()(*(a[:7] for a in inputs)), net(*inputs)[:7])


@pytest.mark.parametrize("kind", ["structured, elastic", "potential, vectors", "sphere, labels"])
def test_a_map_is_one_graph_to_compile_with_the_same_gradients(kind):
    net = learned(kind).train()
    inputs = arguments(net, 10)
    torch._dynamo.reset()
    mapped = torch.compile(net, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(mapped, net(*inputs))
    gradients = torch.autograd.grad(mapped.square().sum(), [*net.parameters()], allow_unused=True)
    wanted = torch.autograd.grad(net(*inputs).square().sum(), [*net.parameters()], allow_unused=True)
    torch.testing.assert_close([g for g in gradients if g is not None], [g for g in wanted if g is not None])


@pytest.mark.compiler
def test_the_gradient_of_a_potential_compiles_to_machine_code():
    net = learned("potential, sqpnorm")
    x = arguments(net, 10)[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x))


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["residual, gaussian", "structured, elastic", "potential, sqpnorm", "sphere, labels"])
def test_a_map_runs_under_onnx(kind, tmp_path):
    import onnxruntime

    net = learned(kind)
    inputs = arguments(net, 10)
    rows = torch.export.Dim("rows")
    program = torch.onnx.export(
        net, inputs, dynamo=True, dynamic_shapes=tuple({0: rows} for _ in inputs), verbose=False
    )
    program.save(str(tmp_path / "map.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "map.onnx"))
    feed = {held.name: a[:7].numpy() for held, a in zip(session.get_inputs(), inputs, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), net(*inputs)[:7].detach())


@pytest.mark.parametrize("hidden", [(), [8, 4]])
@pytest.mark.parametrize("start", ["identity", "mean", "gaussian"])
def test_residual_mlp_starts_at_the_identity_and_learns(hidden, start):
    net = ResidualMLP(3, hidden, start=start)
    x = torch.randn(20, 3)
    assert torch.equal(net(x), x)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - x - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_a_residual_map_starts_at_the_map_between_gaussians():
    x = normal(20_000, 2).double()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    S, T = torch.diag(torch.tensor([4.0, 1.0])).double(), turn @ torch.diag(torch.tensor([9.0, 0.25])).double() @ turn.T
    source, target = x @ torch.linalg.cholesky(S).T, normal(20_000, 2, seed=1).double() @ torch.linalg.cholesky(T).T + 5
    net = ResidualMLP(2, WIDTHS, start="gaussian").double()
    net.start(source, target)
    torch.testing.assert_close(torch.cov(net(source).detach().T), torch.cov(target.T), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net(source).detach().mean(0), target.mean(0))
    # Once: training data of a second fit do not move it, nor those after a checkpoint.
    before = net(source)
    net.start(source, target + 100)
    assert torch.equal(net(source), before)
    again = ResidualMLP(2, WIDTHS, start="gaussian").double()
    again.load_state_dict(net.state_dict())
    again.start(source, target + 100)
    assert torch.equal(again(source), before)


def test_a_start_needs_samples_of_the_right_kind():
    net = ResidualMLP(2, start="mean")
    with pytest.raises(ValueError, match="source holds NaN or infinity in 1 of 2 rows"):
        net.start(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="source has dimension 3, but the map was made with dim=2"):
        net.start(torch.zeros(2, 3), torch.zeros(2, 3))
    assert not net.started
    with pytest.raises(ValueError, match="start must be one of identity, mean, gaussian, plan, got 'median'"):
        ResidualMLP(2, start="median")


def test_residual_mlp_has_the_widths_and_the_activation_asked_for():
    for activation in (nn.ReLU, "relu"):
        net = ResidualMLP(2, (16, 4), activation)
        assert [tuple(p.shape) for p in net.parameters()] == [(16, 2), (16,), (4, 16), (4,), (2, 4), (2,)]
        assert sum(isinstance(m, nn.ReLU) for m in net.modules()) == 2
        assert net.hparams == {"dim": 2, "hidden": [16, 4], "activation": "relu", "start": "identity"}


def test_an_activation_of_ones_own_works_but_has_no_arguments_to_keep():
    net = ResidualMLP(2, (4,), lambda: nn.PReLU(4))
    assert net.hparams is None
    assert sum(isinstance(m, nn.PReLU) for m in net.modules()) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "at least 1, got 0"),
        ((2.0,), TypeError, "must be an int, got 2.0"),
        ((True,), TypeError, "must be an int, got True"),
        ((2, (8, -1)), ValueError, "at least 1, got -1"),
        ((2, 64), TypeError, r"hidden must be a sequence of widths, got 64: write hidden=\("),
        ((2, (8,), "swish"), ValueError, "unknown activation 'swish': choose one of elu, gelu"),
        ((2, (8,), nn.ReLU()), TypeError, r"activation must be a name or make a module, got ReLU\(\)"),
    ],
)
@pytest.mark.parametrize("cls", [MLP, ResidualMLP])
def test_bad_arguments_are_refused(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(*arguments)


@every_map
def test_samples_of_another_dimension_are_refused(kind):
    net = learned(kind)
    x, *condition = arguments(net, 4)
    with pytest.raises(ValueError, match="the samples have dimension 2, but the map was made with dim=3"):
        net(x[:, :2], *condition)


def test_a_condition_is_neither_missing_nor_ignored():
    with pytest.raises(ValueError, match=r"this map is conditional: give the samples' conditions"):
        learned("structured, labels")(normal(4, 3))
    with pytest.raises(ValueError, match="this map takes no condition"):
        learned("structured, pnorm")(normal(4, 3), torch.zeros(4).long())
