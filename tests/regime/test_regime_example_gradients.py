"""Squared norms of examples' gradients beside those of torch.func, and what is said where there are none."""

import pytest
import torch
from example_models import MODELS, Attention, Characters, cnn, mlp
from torch import nn

from lightning_gap.regime import ExampleGradients, MicroBatchGradients


def loss_of(output, scale=1.0):
    """A mean over examples of something that no gradient of is alike."""
    return scale * (output.flatten(1).tanh() * torch.linspace(1, 2, output[0].numel()).to(output)).square().mean()


def made(name, dtype=torch.float64):
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x.to(dtype) if x.is_floating_point() else x


def one_by_one(model, x, names=None):
    """The squared norm of each example's gradient, by torch.autograd, each example by itself."""
    found = []
    for row in x.split(1):
        model.zero_grad()
        loss_of(model(row)).backward()  # of an example: MODELS has no loss that mixes them
        chosen = [p for name, p in model.named_parameters() if p.requires_grad and (names is None or name in names)]
        found.append(sum(parameter.grad.square().sum() for parameter in chosen if parameter.grad is not None))
    return torch.stack(found)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_examples_by_themselves(name, dtype, tolerance):
    model, x = made(name, dtype)
    gradients = ExampleGradients()
    gradients.listen(model, examples=len(x))
    loss_of(model(x)).backward()
    found = gradients.norms()
    assert gradients.unmeasured == {}
    torch.testing.assert_close(found, one_by_one(model, x), rtol=tolerance * 3, atol=0)


def heard(model, x, **options):
    gradients = ExampleGradients()
    gradients.listen(model, examples=len(x), **options)
    loss_of(model(x)).backward()
    return gradients


def test_transforms_of_torch_find_the_same():
    model, x = made("cnn")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mlp_of = nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in model))  # none in place

    def loss(weights, row):
        return loss_of(torch.func.functional_call(mlp_of, weights, (row[None],)))

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    expected = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())
    torch.testing.assert_close(heard(model, x).norms(), expected, rtol=1e-10, atol=0)


def test_positions_are_named_and_the_rest_is_measured():
    for places in (6, 9):  # as many as examples, too
        model = Characters(positions=places).double()
        x = torch.randint(11, (6, places), generator=torch.Generator().manual_seed(2))
        gradients = heard(model, x)
        found = gradients.norms()
        assert list(gradients.unmeasured) == ["places.weight"]
        rest = [name for name, _ in model.named_parameters() if name != "places.weight"]
        torch.testing.assert_close(found, one_by_one(model, x, rest), rtol=1e-10, atol=0)


class Aside(nn.Module):
    """Weights that no layer's call explains, of each kind."""

    def __init__(self, kind):
        super().__init__()
        self.net = mlp()
        self.kind = kind
        if kind == "own":
            self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        y = self.net(x)
        if self.kind == "own":
            return y * self.scale
        if self.kind == "function":
            return y + torch.nn.functional.linear(x.flatten(1), self.net[1].weight)[:, :5]
        return y


@pytest.mark.parametrize(
    ("kind", "named"), [("own", {"scale"}), ("function", {"net.1.weight"}), ("penalty", {"net.3.weight"})]
)
def test_what_no_layer_explains_is_named(kind, named):
    torch.manual_seed(0)
    model, x = Aside(kind).double(), torch.randn(6, 12).double()
    gradients = ExampleGradients()
    gradients.listen(model, examples=6)
    loss = loss_of(model(x))
    (loss + model.net[3].weight.square().sum() if kind == "penalty" else loss).backward()
    found = gradients.norms()
    assert set(gradients.unmeasured) == named
    rest = {name for name, _ in model.named_parameters()} - named
    torch.testing.assert_close(found, one_by_one(model, x, rest), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.BatchNorm1d(4), (6, 4), "over the whole micro-batch"),
        (nn.LSTM(4, 3, batch_first=True), (6, 5, 4), "no layer that is known"),
        (Attention(dropout=0.5), (6, 5, 8), "set it to 0"),
        (Attention(add_bias_kv=True), (6, 5, 8), "add_bias_kv"),
        (nn.Linear(4, 3), (7, 4), "no dimension of the 6 examples"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (6, 4), "no layer that is known"),
    ],
)
def test_what_cannot_be_taken_apart_is_named_with_the_reason(layer, shape, reason):
    gradients = ExampleGradients()
    gradients.listen(layer, examples=6)
    output = layer(torch.randn(shape))
    loss_of(output[0] if isinstance(output, tuple) else output).backward()
    gradients.squares()
    assert reason in " ".join(gradients.unmeasured.values())


def test_refusals():
    gradients, x = ExampleGradients(), torch.randn(4, 3)
    for options, error, message in (
        ({"examples": 0}, ValueError, "examples must be at least 1"),
        ({"examples": 4.0}, TypeError, "examples must be an int"),
        ({"examples": 4, "max_examples": 0}, ValueError, "max_examples must be at least 1"),
        ({"examples": 4, "groups": [slice(0, 3)]}, ValueError, "each of the 4 examples once"),
    ):
        with pytest.raises(error, match=message):
            gradients.listen(nn.Linear(3, 1), **options)
    for model, message in (
        (nn.TransformerEncoderLayer(8, 2), "make it batch-first"),
        (nn.Sequential(torch.compile(nn.Linear(3, 1), backend="eager")), "compiled by torch"),
        (nn.LazyLinear(3), "run one forward before"),
    ):
        with pytest.raises(ValueError, match=message):
            gradients.listen(model, examples=4)
    with pytest.raises(ValueError, match="call listen"):
        gradients.moments()
    model = nn.LSTM(3, 2, batch_first=True)
    gradients.listen(model, examples=4)
    model(x[:, None])[0].sum().backward()
    with pytest.raises(ValueError, match="weight_ih_l0: no layer that is known"):
        gradients.moments()


@pytest.mark.parametrize("groups", [None, [slice(0, 4), slice(4, 8), slice(8, 12)], [slice(0, 12, 2), slice(1, 12, 2)],
                                    [slice(0, 5), slice(5, 10), slice(10, 12)]])  # fmt: skip
def test_groups_are_batches_of_their_own(groups):
    torch.manual_seed(0)
    for model, x in ((cnn(), torch.randn(12, 3, 8, 8)), (Characters(tied=True), torch.randint(11, (12, 5)))):
        model, x = model.double(), x.double() if x.is_floating_point() else x
        expected = []
        for group in groups or [slice(i, i + 1) for i in range(12)]:
            model.zero_grad()
            loss_of(model(x[group])).backward()
            expected.append(sum(parameter.grad.square().sum() for parameter in model.parameters()))
        model.zero_grad()
        found = heard(model, x, groups=groups).norms()
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_moments_are_those_of_micro_batches_on_average():
    """Of micro-batches of one example both hear the same."""
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(8, 12).double()
    single, micro = ExampleGradients(), MicroBatchGradients()
    micro.listen(model.parameters())
    for row in x.split(1):
        (loss_of(model(row)) / 8).backward()
    expected = micro.moments(micro_batch_size=1)
    micro.remove()
    for parts, factor in ((1, None), (2, None), (4, 1.0), (2, 3.0)):
        model.zero_grad()
        single.listen(model, examples=8 // parts)
        for part in x.chunk(parts):
            ((1 / parts if factor is None else factor) * loss_of(model(part))).backward()
        assert single.moments(loss_factor=factor) == pytest.approx(expected, rel=1e-9)


def test_sparse_gradients_and_sums_over_examples():
    torch.manual_seed(0)
    dense, ids = nn.Sequential(nn.Embedding(11, 4), nn.Flatten()), torch.randint(11, (6, 9))
    sparse = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten())
    sparse.load_state_dict(dense.state_dict())
    first, second = heard(dense, ids).moments(), heard(sparse, ids).moments()
    assert first == pytest.approx(second, rel=1e-5)
    dense.zero_grad()
    gradients = ExampleGradients()
    gradients.listen(dense, examples=6)
    (6 * loss_of(dense(ids))).backward()
    variance, square = gradients.moments()
    assert (variance / 36, square / 36) == pytest.approx(first, rel=1e-5)


def test_an_overflow_names_nothing():
    model, x = mlp(), torch.randn(6, 12)
    gradients = ExampleGradients()
    for scale in (float("inf"), 1.0):
        model.zero_grad()
        gradients.listen(model, examples=6)
        loss_of(model(x), scale).backward()
        gradients.squares()
    assert gradients.unmeasured == {}
    # Nor does an update that is not looked at.
    gradients.listen(model, examples=5)
    loss_of(model(x)).backward()
    gradients.remove()
    gradients.listen(model, examples=6)
    loss_of(model(x)).backward()
    assert gradients.norms().shape == (6,)


def test_half_precision_is_measured_in_single():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(6, 12)
    expected = one_by_one(model, x)
    model.zero_grad()
    gradients = ExampleGradients()
    gradients.listen(model, examples=6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(x))
    (2.0**16 * loss).backward()
    found = gradients.norms() / 2.0**32
    assert gradients.unmeasured == {}
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_gradients_are_the_same_bit_for_bit():
    for name in MODELS:
        model, x = made(name, torch.float32)
        state = torch.get_rng_state()
        loss_of(model(x)).backward()
        plain = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        gradients = heard(model, x)
        gradients.squares()
        assert torch.equal(state, torch.get_rng_state())
        for parameter, grad in zip(model.parameters(), plain, strict=True):
            assert (parameter.grad is None and grad is None) or torch.equal(parameter.grad, grad)
        assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("name", ["cnn", "transformer, tied"])
@pytest.mark.parametrize("groups", [None, [slice(0, 6, 3), slice(1, 6, 3), slice(2, 6, 3)]])
def test_some_examples_are_some_of_all(name, groups):
    model, x = made(name)
    whole = heard(model, x, groups=groups)
    every = whole.norms()
    means = []
    for seed in range(60):
        model.zero_grad()
        some = heard(model, x, groups=groups, max_examples=2, seed=seed)
        assert some.small_batch == whole.small_batch
        found = some.norms()
        assert len(found) == (1 if groups else 2)
        assert all(torch.isclose(each, every, rtol=1e-10).any() for each in found)
        means.append(found.mean())
    assert torch.stack(means).mean() == pytest.approx(every.mean().item(), rel=0.3)
