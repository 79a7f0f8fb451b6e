"""Transforms of torch.func, forward mode and batched gradients: those of the plain layer fed ghost by ghost."""

import copy

import pytest
import torch
from ghost_reference import TwoRanks, members
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from lightning_gap.ghost import GhostBatchNorm1d, convert_ghost_batchnorm
from lightning_gap.ghost.kernels import looks_into_operations, normalize_over_ranks

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SPATIAL = {2: (), 3: (2,), 4: (2, 1), 5: (1, 2, 1)}
CASES = [  # dimensions, samples, options of the plain layer and of the ghosts
    (2, 8, {}, {}),
    (2, 9, {"affine": False}, {"grouping": "strided"}),  # a lone last sample
    (3, 7, {"affine": False}, {}),
    (4, 10, {}, {"grouping": "strided"}),
    (5, 6, {}, {}),
    (2, 3, {}, {}),  # one ghost
]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def layers(dim, options, ghosts, **more):
    plain = PLAIN[dim](2, dtype=torch.float64, **options, **more)
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    return plain, convert_ghost_batchnorm(copy.deepcopy(plain), 4, **ghosts)


def ghost_by_ghost(layer, grouping="contiguous"):
    """Return the twin as a function without assignments, which any transform takes."""

    def forward(x):
        parts = members(len(x), 4, grouping, x[0, 0].numel())
        order = torch.tensor([i for part in parts for i in part]).argsort()
        return torch.cat([layer(x[part]) for part in parts])[order]

    return forward


def cubed(forward):
    return lambda x: forward(x).pow(3).sum()


def with_tangents(forward, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward(forward_ad.make_dual(x, tangent))).tangent


def batched_gradients(forward, x, upstream):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(forward(x), x, upstream, is_grads_batched=True)[0]


TRANSFORMS = {
    "grad": lambda f, x, v: grad(cubed(f))(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](v)[0],
    "jvp": lambda f, x, v: torch.stack(jvp(f, (x,), (v,))),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(cubed(f))(x),
    "grad of grad": lambda f, x, v: grad(cubed(grad(cubed(f))))(x),
    "vmap": lambda f, x, v: vmap(f)(torch.stack((x, v))),
    "vmap of grad": lambda f, x, v: vmap(grad(cubed(f)), in_dims=1, out_dims=1)(torch.stack((x, v), 1)),
    "forward mode": with_tangents,
    "batched gradients": lambda f, x, v: batched_gradients(f, x, torch.stack((v, x))),
    "functional.hessian": lambda f, x, v: torch.autograd.functional.hessian(cubed(f), x, vectorize=True),
}


class Fused(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).exp()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_plain_layer(name, training):
    for dim, n, options, ghosts in CASES:
        plain, ghost = (
            layer.train(training) for layer in layers(dim, options, ghosts, track_running_stats=not training)
        )
        right = ghost_by_ghost(plain, ghosts.get("grouping", "contiguous"))
        x, v = randn(2, n, 2, *SPATIAL[dim])
        if dim == 4:
            x, v = (t.contiguous(memory_format=torch.channels_last) for t in (x, v))
        expected = TRANSFORMS[name](right, x, v)
        torch.testing.assert_close(TRANSFORMS[name](ghost, x, v), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dim", "n", "options", "ghosts"), CASES)
def test_gradients_of_every_order_and_mode(dim, n, options, ghosts):
    ghost = layers(dim, options, ghosts, track_running_stats=False)[1]
    x = randn(n, 2, *SPATIAL[dim]).requires_grad_()
    assert torch.autograd.gradcheck(
        ghost, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(ghost, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_layers_with_a_forward_of_their_own(name):
    plain = Fused(2, dtype=torch.float64, track_running_stats=False)
    x, v = randn(2, 9, 2)
    expected = TRANSFORMS[name](ghost_by_ghost(plain), x, v)
    found = TRANSFORMS[name](convert_ghost_batchnorm(copy.deepcopy(plain), 4), x, v)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_tangents_of_a_gradient():
    # The forward pass without tangents, the backward pass with.
    plain, ghost = layers(2, {}, {}, track_running_stats=False)
    x, upstream, tangent = randn(3, 10, 2)
    found = []
    for forward in (ghost, ghost_by_ghost(plain)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        with forward_ad.dual_level():
            (gradient,) = torch.autograd.grad(y, leaf, forward_ad.make_dual(upstream, tangent))
            found.append(forward_ad.unpack_dual(gradient).tangent)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("n", [3, 8, 9])
def test_ensembles_update_their_own_statistics(n, momentum):
    plain = [layers(2, {"momentum": momentum}, {})[0] for _ in range(3)]
    ghosts = [convert_ghost_batchnorm(copy.deepcopy(layer), 4) for layer in plain]
    parameters, buffers = stack_module_state(ghosts)
    x = randn(n, 2)

    def loss(parameters, buffers, x):
        return functional_call(ghosts[0], (parameters, buffers), (x,)).pow(3).sum()

    for step in range(2):
        gradients, losses = vmap(torch.func.grad_and_value(loss), in_dims=(0, 0, None))(parameters, buffers, x + step)
        for i, layer in enumerate(plain):
            layer.zero_grad()
            (expected := ghost_by_ghost(layer)(x + step).pow(3).sum()).backward()
            torch.testing.assert_close(losses[i], expected.detach())
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(gradients[name][i], parameter.grad)
            for name, buffer in layer.named_buffers():
                torch.testing.assert_close(buffers[name][i], buffer)


def test_statistics_that_are_given_are_updated_within_a_transform():
    plain, ghost = layers(2, {}, {})
    x = randn(9, 2)
    parameters, buffers = dict(ghost.named_parameters()), {name: b.clone() for name, b in ghost.named_buffers()}

    def loss(parameters, buffers):
        return functional_call(ghost, (parameters, buffers), (x,)).pow(3).sum()

    gradients = grad(loss)(parameters, buffers)
    ghost_by_ghost(plain)(x).pow(3).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    with forward_ad.dual_level():  # no transform of torch.func: the layer's own buffers
        ghost(forward_ad.make_dual(x, x))
    assert int(ghost.num_batches_tracked) == 2


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("n", [4, 9])
@pytest.mark.parametrize("name", ["grad", "jvp", "jacrev", "jacfwd", "vmap"])
def test_statistics_that_a_transform_cannot_see_are_refused_and_kept(name, n, momentum):
    ghost = layers(2, {"momentum": momentum}, {})[1]
    before = copy.deepcopy(ghost.state_dict())
    with pytest.raises(RuntimeError, match=r"functional_call.*track_running_stats=False"):
        TRANSFORMS[name](ghost, *randn(2, n, 2))
    torch.testing.assert_close(ghost.state_dict(), before, rtol=0, atol=0)


def test_one_value_per_channel_is_refused_within_transforms_too():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        vmap(GhostBatchNorm1d(2, ghost_batch_size=4), in_dims=1)(torch.randn(1, 3, 2))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_ghosts_over_ranks(name):
    for dim in (2, 4):
        x, v = randn(2, 6, 2, *SPATIAL[dim])
        weight, bias = randn(2, 2)

        def over_ranks(x, weight=weight, bias=bias):
            return normalize_over_ranks(x, weight, bias, 1e-5, TwoRanks())[0]

        def twice(x, weight=weight, bias=bias):
            return nn.functional.batch_norm(torch.cat((x, x)), None, None, weight, bias, training=True)[: len(x)]

        if name in ("batched gradients", "functional.hessian"):
            with pytest.raises(NotImplementedError, match=r"use torch\.func"):
                TRANSFORMS[name](over_ranks, x, v)
            continue
        # What x does to both halves is what a rank does to itself and to its equal; forward mode feels both as well.
        torch.testing.assert_close(TRANSFORMS[name](over_ranks, x, v), TRANSFORMS[name](twice, x, v))


@pytest.mark.compiler
@pytest.mark.parametrize("dim", [2, 4])
def test_compiled_transforms(dim):
    torch._dynamo.reset()
    ghost = layers(dim, {}, {}, track_running_stats=False)[1]
    x = randn(9, 2, *SPATIAL[dim])
    found = torch.compile(grad(cubed(ghost)), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, grad(cubed(ghost))(x))


def test_transforms_are_seen():
    assert not looks_into_operations()
    assert vmap(lambda _: looks_into_operations(), out_dims=None)(torch.ones(2))
