"""Samplers and streams: endless populations."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.batches import UnpairedBatches
from lightning_gap.monge.samples.draws import SampledSamples, StreamedSamples


def normal(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, 2, generator=generator)


def shifted(n: int, generator: torch.Generator) -> torch.Tensor:
    return normal(n, generator) * 2 + 5


class Count(IterableDataset):
    """Counts upwards, in chunks of an odd size."""

    def __init__(self, chunk: int = 3, total: int = 10**9) -> None:
        self.chunk, self.total = chunk, total

    def __iter__(self):
        for start in range(0, self.total, self.chunk):
            stop = min(start + self.chunk, self.total)
            yield torch.arange(start, stop, dtype=torch.float32)[:, None]


def values(samples: torch.Tensor) -> list[int]:
    return samples.flatten().int().tolist()


def test_samplers_give_fresh_samples_that_the_seed_fixes():
    data = SamplesDataModule(normal, shifted, batch_size=16, steps_per_epoch=3, eval_batch_size=50, test_fraction=0.1)
    loader = data.train_dataloader()
    first = list(loader)
    assert len(first) == len(loader) == 3
    assert all(torch.equal(a.source, b.source) for a, b in zip(first, loader, strict=True))
    loader.sampler.set_epoch(1)
    drawn = torch.cat([batch.source for batch in (*first, *loader)])
    assert len(drawn.unique(dim=0)) == 96
    held = [next(iter(stage)) for stage in (data.val_dataloader(), data.test_dataloader())]
    assert all(len(batch.source) == len(batch.target) == len(batch.target_again) == 50 for batch in held)
    assert not torch.equal(held[0].source, held[1].source)
    assert abs(float(held[0].target_again.mean()) - 5) < 1
    assert not torch.equal(held[0].target_again, held[0].target)
    assert [len(samples) for samples in data.predict_dataloader()] == [50]
    assert [len(samples) for samples in data.training_samples(7)] == [7, 7]
    assert data.dim == 2


def test_an_epoch_of_samplers_has_a_default_length():
    assert len(SamplesDataModule(normal, shifted).train_dataloader()) == 100
    assert len(SamplesDataModule(normal, torch.randn(90, 2), batch_size=8).train_dataloader()) == 81 // 8
    assert SamplesDataModule(normal, shifted, val_fraction=0).val_dataloader() == []


def test_a_number_of_steps_goes_on_through_finite_sets():
    x = torch.arange(10.0)[:, None]
    data = SamplesDataModule(x, x, batch_size=5, steps_per_epoch=4, val_fraction=0)
    seen = [values(batch.source) for batch in data.train_dataloader()]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(10))


def test_a_sampler_and_an_array_are_encoded_alike():
    data = SamplesDataModule(normal, torch.randn(200, 2).double() * 3 + 1, batch_size=32, standardize=True)
    batch = next(iter(data.train_dataloader()))
    assert batch.source.dtype == batch.target.dtype == torch.float64
    assert float(torch.cat(data.training_samples()).mean().abs()) < 0.5
    raw = torch.cat(list(data.predict_dataloader()))
    assert abs(float(raw.std()) - 1) < 0.1


def test_the_representation_may_move_away():
    data = SamplesDataModule(normal, shifted, batch_size=4, standardize=True)
    before = next(iter(data.train_dataloader())).source
    data.representation.to("meta")
    assert torch.equal(next(iter(data.train_dataloader())).source, before)


def test_a_known_map_gives_images_everywhere():
    data = SamplesDataModule(normal, shifted, batch_size=4, true_images=lambda x: 2 * x + 5, components=2)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        decode = data.representation.decode
        torch.testing.assert_close(decode(batch.true_images), 2 * decode(batch.source) + 5)


@pytest.mark.parametrize(
    "population", [lambda: SampledSamples("source", normal), lambda: StreamedSamples("source", Count())]
)
def test_processes_share_what_one_would_draw(population):
    one = UnpairedBatches([(population(), population())], 8, 3)
    ranks = [UnpairedBatches([(population(), population())], 8, 3, num_replicas=2, rank=rank) for rank in (0, 1)]
    for number in ((0, 0), (0, 2), (1, 1)):
        joined = torch.cat([batches[number].source for batches in ranks])
        assert torch.equal(joined, one[number].source)


def test_a_stream_is_read_in_order_after_what_is_held_out():
    data = SamplesDataModule(Count(), Count(5), batch_size=4, steps_per_epoch=2, eval_batch_size=10, test_fraction=0.5)
    assert set(values(next(iter(data.val_dataloader())).source)) == set(range(10))
    assert set(values(next(iter(data.test_dataloader())).target)) == set(range(10, 20))
    loader = data.train_dataloader()
    assert [values(batch.source) for batch in loader] == [[20, 21, 22, 23], [24, 25, 26, 27]]
    loader.sampler.set_epoch(1)
    assert [values(batch.target) for batch in loader] == [[28, 29, 30, 31], [32, 33, 34, 35]]
    # A run that goes on at a later epoch, and one that starts anew.
    loader.sampler.set_epoch(5)
    assert values(next(iter(loader)).source) == [60, 61, 62, 63]
    loader.sampler.set_epoch(0)
    assert values(next(iter(loader)).source) == [20, 21, 22, 23]


def test_a_stream_that_ends_starts_again_without_what_is_held_out():
    data = SamplesDataModule(Count(3, total=11), Count(), batch_size=4, steps_per_epoch=4, eval_batch_size=5)
    seen = [values(batch.source) for batch in data.train_dataloader()]
    assert seen == [[5, 6, 7, 8], [9, 10, 5, 6], [7, 8, 9, 10], [5, 6, 7, 8]]


def test_loaders_of_single_samples_and_of_tuples_are_streams():
    x = torch.arange(40.0)[:, None]
    data = SamplesDataModule(
        DataLoader(TensorDataset(x), batch_size=7), [*x.numpy()], batch_size=4, eval_batch_size=8, steps_per_epoch=2
    )
    assert values(next(iter(data.train_dataloader())).source) == [8, 9, 10, 11]


def test_a_stream_in_use_can_be_pickled():
    stream = StreamedSamples("source", Count())
    batches = UnpairedBatches([(stream, SampledSamples("target", normal))], 4, 3)
    expected = batches[0, 1].source
    again = pickle.loads(pickle.dumps(batches))
    assert torch.equal(again[0, 1].source, expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": lambda n: torch.randn(n, 2)}, TypeError, "source must be a function of a number and a generator"),
        (
            {"source": lambda n, generator: torch.randn(n + 1, 2)},
            ValueError,
            "source was asked for 2 samples, and returned 3",
        ),
        ({"source": lambda n, generator: torch.full((n, 2), torch.nan)}, ValueError, "what source yields holds NaN"),
        ({"source": lambda n, generator: torch.randn(n)}, ValueError, r"what source yields must have shape \(n, d\)"),
        ({"target": lambda n, generator: torch.randn(n, 3)}, ValueError, "source has dimension 2 but target has 3"),
        ({"source": iter([torch.zeros(4, 2)])}, TypeError, "source is an iterator, which can be read once only"),
        (
            {"source": DataLoader(TensorDataset(torch.zeros(9, 2)), shuffle=True)},
            ValueError,
            "source is a DataLoader that",
        ),
        (
            {"source": Count(3, 20), "target": Count(), "eval_batch_size": 30},
            ValueError,
            "yields no more than 20 samples",
        ),
        ({"weights": (torch.ones(4), None)}, ValueError, "weights are of rows, and source is a sampler"),
        ({"source_rows": {"a": 1}}, ValueError, "source_rows selects rows, and source is a sampler"),
        ({"true_images": torch.zeros(4, 2)}, TypeError, "true_images must be a function where source is a sampler"),
        ({"true_images": lambda x: x[:1]}, ValueError, "true_images returned shape"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be at least 1"),
        ({"steps_per_epoch": 1.5}, TypeError, "steps_per_epoch must be an int"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        SamplesDataModule(**{"source": normal, "target": shifted, **options})
