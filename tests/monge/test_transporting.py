"""transport and predict: images of samples, whatever holds them, and nothing else changed."""

import numpy as np
import pytest
import torch
from monge_runs import gaussians, samples, small, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_gap import MongeMap


def test_predict_is_transport():
    model = small()
    data = samples(eval_batch_size=50)
    run = trainer()
    run.fit(model, data)
    source = gaussians()[0]
    assert torch.equal(torch.cat(run.predict(model, data)), model.transport(source))
    pairs = DataLoader([(source, source)], batch_size=None)
    assert torch.equal(run.predict(model, pairs)[0], model.transport(source))


def test_transport_takes_arrays_and_tensors_of_any_type():
    model = small()
    nn.init.ones_(model.map.displacement[-1].bias)
    x = np.arange(10).reshape(5, 2)
    expected = torch.as_tensor(x).float() + 1
    read_only = x.astype(np.float64)
    read_only.flags.writeable = False
    for given in (x, read_only, x.astype(np.float32)[::-1][::-1], torch.as_tensor(x), torch.as_tensor(x).half()):
        got = model.transport(given)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    assert model.transport(torch.zeros(0, 2)).shape == (0, 2)


def test_transport_in_batches_is_transport():
    model = small()
    trainer(limit_train_batches=2).fit(model, samples())
    x = torch.randn(33, 2)
    torch.testing.assert_close(model.transport(x, batch_size=8), model.transport(x))


def test_transport_leaves_modes_and_gradients_alone():
    frozen = nn.BatchNorm1d(2).eval()
    model = MongeMap(map=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9), frozen))
    model.train()
    frozen.eval()
    x = torch.randn(20, 2, requires_grad=True)
    state = torch.get_rng_state()
    first = model.transport(x)
    assert torch.equal(first, model.transport(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    assert model.training
    assert model.map[1].training
    assert not frozen.training
    assert frozen.num_batches_tracked == 0
    with pytest.raises(ValueError, match="keep the shape"):
        MongeMap(map=nn.Linear(2, 3)).train().transport(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(4), {}, r"x must have shape \(n, d\), got \(4,\)"),
        (torch.zeros(4, 3), {}, "samples have dimension 3, but the map was made with dim=2"),
        (torch.zeros(4, 2), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_transport_refuses_what_it_cannot_map(x, options, message):
    with pytest.raises(ValueError, match=message):
        small().transport(x, **options)


def test_transport_takes_what_cells_come_in():
    sparse, anndata, pandas = (pytest.importorskip(name) for name in ("scipy.sparse", "anndata", "pandas"))
    x = np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    model = MongeMap(2)
    expected = model.transport(x)
    matrices = [make(x) for make in (sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix, sparse.csr_array)]
    for given in (*matrices, x[::-1][::-1], x.astype(">f4"), pandas.DataFrame(x, columns=["a", "b"])):
        assert torch.equal(model.transport(given), expected)
    assert model.transport(matrices[0][:0]).shape == (0, 2)
    cells = anndata.AnnData(x, layers={"counts": x + 1}, obsm={"pca": x + 2})
    with pytest.raises(ValueError, match=r"x has X and the layers 'counts': say which one the map was trained on"):
        model.transport(cells)
    assert torch.equal(model.transport(cells, layer="X"), expected)
    assert torch.equal(model.transport(cells, layer="counts"), model.transport(x + 1))
    assert torch.equal(model.transport(cells, obsm="pca"), model.transport(x + 2))
    assert torch.equal(model.transport(anndata.AnnData(matrices[0])), expected)
    assert torch.equal(MongeMap(2, gap_reference=matrices[0]).gap_reference, torch.as_tensor(x))
