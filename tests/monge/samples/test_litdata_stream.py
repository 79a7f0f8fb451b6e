"""LitData's streams as samples: whole in every process, and never shuffled."""

import json
import multiprocessing
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo import enter_world, free_port, leave_world

from lightning_gap import SamplesDataModule
from lightning_gap.monge.samples.litdata_stream import whole_stream

# LitData's own, of its buffers.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")


class Streaming(torch.utils.data.IterableDataset):
    """What stands in for LitData's class: it gives each process a part, and all by number."""

    def __init__(self, samples, shuffle=False):
        self.samples, self.shuffle = samples, shuffle

    def __iter__(self):
        return iter(self.samples[: len(self.samples) // 2])

    def __getitem__(self, number):
        if number >= len(self.samples):
            raise ValueError(f"The provided index {number} didn't find a match within the chunk intervals []")
        if self.samples[number] is None:
            raise ValueError("a transform failed")
        return self.samples[number]


@pytest.fixture
def litdata(monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", SimpleNamespace(StreamingDataset=Streaming))


@pytest.mark.usefixtures("litdata")
def test_all_samples_are_read_by_number_again_and_again():
    whole = whole_stream("source", Streaming([1, 2, 3, 4]))
    assert list(whole) == list(whole) == [1, 2, 3, 4]


@pytest.mark.usefixtures("litdata")
def test_what_fails_is_not_the_end():
    with pytest.raises(ValueError, match="a transform failed"):
        list(whole_stream("source", Streaming([1, None, 3])))


@pytest.mark.usefixtures("litdata")
def test_a_shuffled_stream_is_refused():
    stream = Streaming(list(torch.randn(40, 2)), shuffle=True)
    with pytest.raises(ValueError, match=r"source is a StreamingDataset that shuffles.*give shuffle=False"):
        SamplesDataModule(stream, torch.randn(40, 2), batch_size=4)


@pytest.mark.usefixtures("litdata")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_around_it_is_refused(shuffle):
    loader = torch.utils.data.DataLoader(Streaming(list(torch.randn(40, 2)), shuffle=shuffle), batch_size=2)
    with pytest.raises(ValueError, match=r"source is a DataLoader of a Streaming, .*give one StreamingDataset itself"):
        SamplesDataModule(loader, torch.randn(40, 2), batch_size=4)


@pytest.mark.usefixtures("litdata")
def test_others_of_its_classes_are_refused():
    combined = type("CombinedStreamingDataset", (), {"__module__": "litdata.streaming.combined"})
    with pytest.raises(ValueError, match=r"source is a CombinedStreamingDataset, .*with shuffle=False"):
        whole_stream("source", combined())


@pytest.mark.usefixtures("litdata")
def test_other_loaders_stay_as_they_are():
    loader = torch.utils.data.DataLoader([1, 2])
    assert whole_stream("source", loader) is loader


def test_other_streams_stay_as_they_are():
    stream = iter([1])
    assert whole_stream("source", stream) is stream


def written(folder, n=60):
    """Write samples as LitData does, and return them as a stream."""
    streaming = pytest.importorskip("litdata.streaming", reason="needs LitData")
    cache = streaming.Cache(str(folder), chunk_size=10)
    for i in range(n):
        cache[i] = torch.tensor([float(i), 1.0])
    cache.done()
    cache.merge()
    return streaming.StreamingDataset(str(folder))


def batches(stream):
    data = SamplesDataModule(stream, torch.zeros(40, 2), batch_size=4, steps_per_epoch=6, eval_batch_size=8)
    return [batch.source[:, 0].tolist() for batch in data.train_dataloader()]


def test_batches_are_of_the_stream_in_its_order(tmp_path):
    found = batches(written(tmp_path))
    numbers = [int(x) for batch in found for x in batch]
    assert numbers == list(range(numbers[0], numbers[0] + 24))


def work(rank, port, folder):
    enter_world(rank, 2, port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import litdata

    found = [float(x[0]) for x in whole_stream("source", litdata.StreamingDataset(f"{folder}/data"))]
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    leave_world()


@pytest.mark.distributed
def test_every_process_reads_it_whole(tmp_path):
    written(tmp_path / "data")
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    port = free_port()
    running = [context.Process(target=work, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == list(range(60))
