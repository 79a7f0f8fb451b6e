"""Ghosts are samples: layers that see several rows of each, against the plain layer fed sample by sample."""

import copy
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from ghost_reference import members
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.ghost import GhostBatchNorm, GhostBatchNorm1d, convert_ghost_batchnorm, plan_ghost_batchnorm
from lightning_gap.ghost.samples import BatchRows, samples_in

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
TOKENS = 5


def rows_of(samples, k):
    return [k * sample + row for sample in samples for row in range(k)]


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("spatial", [(), (3,), (2, 3)])
def test_rows_of_a_sample_are_in_one_ghost(spatial, grouping):
    generator = torch.Generator().manual_seed(0)
    kind = nn.BatchNorm2d if len(spatial) == 2 else nn.BatchNorm1d
    for n, k, g, momentum in itertools.product((1, 4, 7, 9, 13), (1, 2, 5), (2, 3, 4), (0.1, None)):
        if n * k * max(1, len(spatial)) == 1:
            continue
        plain = kind(2, momentum=momentum, dtype=torch.float64)
        ghost = convert_ghost_batchnorm(copy.deepcopy(plain), g, grouping=grouping, rows_per_sample=k)
        x = torch.randn(n * k, 2, *spatial, generator=generator, dtype=torch.float64).requires_grad_()
        parts = [rows_of(part, k) for part in members(n, g, grouping, k * x[0, 0].numel())]
        order = torch.tensor([row for part in parts for row in part]).argsort()
        expected = torch.cat([plain(x[part]) for part in parts])[order]
        y = ghost(x)
        torch.testing.assert_close(y, expected, **TIGHT)
        gradients = [torch.autograd.grad(out.pow(3).sum(), x)[0] for out in (y, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)
        for name, buffer in ghost.named_buffers():
            torch.testing.assert_close(buffer, getattr(plain, name), **TIGHT)


class Tokens(LightningModule):
    """Linear and BatchNorm over (B N, C), as LeViT has it; then a norm over samples, and one that sees both."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.both, self.head = nn.BatchNorm1d(6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.double()

    def forward(self, x):
        tokens = self.both(self.tokens(x.flatten(0, 1))).unflatten(0, (len(x), -1))
        return self.head(self.both(tokens.mean(1)))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class GhostByGhost(nn.Module):
    """A plain layer that is given the samples of one ghost after another, all rows of each."""

    def __init__(self, layer, grouping, owner):
        super().__init__()
        self.layer, self.grouping, self.owner = layer, grouping, owner

    def forward(self, x):
        samples = self.owner.samples
        k = len(x) // samples
        parts = [rows_of(part, k) for part in members(samples, 4, self.grouping, k)]
        order = torch.tensor([row for part in parts for row in part]).argsort()
        return torch.cat([self.layer(x[part]) for part in parts])[order]


def token_loader(n=22, batch_size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, TOKENS, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.mean((1, 2)).unsqueeze(1)), batch_size=batch_size)


def fit(model, loader, callback, **options):
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    Trainer(callbacks=[callback], **defaults | options).fit(model, loader)
    return model


def build(kind=Tokens):
    seed_everything(0, verbose=False)
    return kind()


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_the_callback_counts_samples_at_each_call(grouping, capsys):
    model, twin = build(), build()
    fit(model, token_loader(), GhostBatchNorm(4, grouping=grouping))  # batches of 8, 8 and 6
    printed = capsys.readouterr().out
    assert "tokens.1" in printed
    assert f"{TOKENS} rows a sample" in printed
    assert "head.0" not in printed

    owner = SimpleNamespace()
    for parent, name in ((twin.tokens, "1"), (twin, "both"), (twin.head, "0")):
        setattr(parent, name, GhostByGhost(getattr(parent, name), grouping, owner))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in itertools.chain(token_loader(), token_loader()):
        owner.samples = len(batch[0])
        optimizer.zero_grad()
        twin.training_step(batch, 0).backward()
        optimizer.step()
    for mine, theirs in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


@pytest.mark.parametrize(
    ("given", "updates"),
    [("auto", (6, 12, 6)), (1, (28, 34, 6)), ({"tokens.*": 1}, (28, 12, 6)), ({"tokens": 10, "*": 1}, (3, 34, 6))],
)
def test_given_rows(given, updates):
    model = fit(build(), token_loader(), GhostBatchNorm(4, rows_per_sample=given), max_epochs=1)
    norms = (model.tokens[1], model.both, model.head[0])
    assert tuple(int(norm.num_batches_tracked) for norm in norms) == updates
    assert not any(hasattr(norm, "rows_per_sample") for norm in norms)


class Nodes(Tokens):
    """Rows that are no multiple of the samples, and fewer rows than samples."""

    def forward(self, x):
        nodes = self.tokens(x.flatten(0, 1)[:-1])
        return self.head(nodes[: len(x)]) + self.both(nodes[:3]).mean()


def test_rows_that_fit_no_number_of_samples_are_named_once():
    words = r"layer 'tokens.1' \(39 rows for 8 samples\), 'both' \(3 rows for 8 samples\): each row.*rows_per_sample"
    with pytest.warns(UserWarning, match=words) as caught:
        model = fit(build(Nodes), token_loader(), GhostBatchNorm(4))
    assert len([w for w in caught if "cannot tell how many rows" in str(w.message)]) == 1
    assert int(model.tokens[1].num_batches_tracked) == 2 * (10 + 10 + 7)  # of 39, 39 and 29 rows: a last one joins


def test_wrong_rows_are_refused_before_anything_changes():
    model = build()
    for wrong, error in ((0, ValueError), (2.0, TypeError), (True, TypeError), ({"both": 0}, ValueError)):
        with pytest.raises(error, match="rows_per_sample"):
            GhostBatchNorm(4, rows_per_sample=wrong)
        with pytest.raises(error, match="rows_per_sample"):
            convert_ghost_batchnorm(model, 4, rows_per_sample=wrong)
    with pytest.raises(ValueError, match="rows_per_sample names 'stem', which fits none"):
        convert_ghost_batchnorm(model, 4, rows_per_sample={"both": 2, "stem": 3})
    with pytest.raises(TypeError, match="rows_per_sample"):
        GhostBatchNorm1d(3, rows_per_sample=1.5)
    assert len(plan_ghost_batchnorm(model).layers) == 3
    assert all(type(layer) is nn.BatchNorm1d for layer in (model.tokens[1], model.both, model.head[0]))
    with pytest.raises(ValueError, match="whole samples, got 9 rows with rows_per_sample=2"):
        GhostBatchNorm1d(3, ghost_batch_size=2, rows_per_sample=2, grouping="strided")(torch.randn(9, 3))


def test_copies_and_representation():
    layer = convert_ghost_batchnorm(nn.BatchNorm1d(3), 4, rows_per_sample=2)
    assert "rows_per_sample=2" in repr(layer)
    assert copy.deepcopy(layer).rows_per_sample == 2


@pytest.mark.parametrize("views", [2, 3])
def test_joined_views_by_strided_rows(views):
    """As the page says: ghosts with all views of some samples, where views are joined one after another."""
    g, n = 4, 12
    x = torch.randn(views * n, 3, dtype=torch.float64)
    y = GhostBatchNorm1d(3, ghost_batch_size=views * g, grouping="strided", dtype=torch.float64)(x)
    for ghost in range(n // g):
        of_ghost = [view * n + sample for view in range(views) for sample in range(ghost, n, n // g)]
        torch.testing.assert_close(y[of_ghost], nn.BatchNorm1d(3, dtype=torch.float64)(x[of_ghost]))


@dataclass
class Batch:
    image: torch.Tensor
    boxes: list


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(8, 3), 8),
        ([torch.zeros(8, 3), torch.zeros(8), 0.5, "name", torch.tensor(3.0)], 8),
        ({"x": torch.zeros(8, 3), "views": [torch.zeros(8, 2)] * 2}, 8),
        (Batch(torch.zeros(8, 3), [{"box": torch.zeros(n, 4)} for n in range(8)]), 8),
        ((torch.zeros(16, 3), torch.zeros(8)), None),  # two views, and labels
        ({"a": torch.zeros(8, 1), "b": torch.zeros(4, 1)}, None),
        ([[torch.zeros(8, 3), torch.zeros(8)], [torch.zeros(56, 3), torch.zeros(56)]], None),  # of two loaders
        ({"known": (torch.zeros(8, 3), torch.zeros(8)), "new": ((torch.zeros(56, 3),) * 2, torch.zeros(56))}, None),
        (([torch.zeros(n, 3) for n in (20, 30)], [torch.zeros(n) for n in (20, 30)]), 2),
        (([torch.zeros(3, 9, 9)] * 8, [{"boxes": torch.zeros(n + 1, 4)} for n in range(8)]), 8),
        ("nothing", None),
        ([], None),
    ],
)
def test_samples_of_a_batch(batch, samples):
    assert samples_in(batch) == samples


@pytest.mark.compiler
def test_compiled_layers_count_samples():
    torch._dynamo.reset()
    models = [build(), build()]
    models[0].forward = torch.compile(models[0].forward, backend="aot_eager", fullgraph=True)
    for model in models:
        fit(model, token_loader(), GhostBatchNorm(4))
    for compiled, eager in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-8)


def test_rows_are_told_by_the_samples_of_the_batch():
    rows, layer = BatchRows(), nn.BatchNorm1d(4)
    rows.samples = 16
    assert [rows.of(layer, n) for n in (16, 160, 37)] == [1, 10, 1]
    assert rows.unfit == {layer: (37, 16)}
