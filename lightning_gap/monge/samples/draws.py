"""Where the samples of a batch come from: a finite set of rows, a sampler, or a stream."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_gap.monge.ot.checks import check_samples
from lightning_gap.monge.ot.subsets import drawn_by_weight
from lightning_gap.monge.samples.litdata_stream import whole_stream

__all__ = ["Endless", "FiniteSamples", "Part", "Population", "SampledSamples", "StreamedSamples", "Turn", "generator"]

Encode = Callable[[Tensor], Tensor]


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a generator of its own for every seed and key of non-negative integers."""
    # With the length: a seed sequence takes [s] and [s, 0] for the same.
    state = np.random.SeedSequence([seed, len(key), *key]).generate_state(1, np.uint64)[0]
    return torch.Generator(device="cpu").manual_seed(int(state) & (2**63 - 1))


class Turn(NamedTuple):
    """Which batch of a run is drawn, and which part of it."""

    key: tuple[int, ...]  # tells this draw's stage, side and condition from others of the run
    epoch: int
    step: int
    steps: int  # batches in an epoch
    size: int  # samples in the global batch
    part: slice  # its rows that this process holds


class Part(NamedTuple):
    """Samples, their weights in the global batch, and their known images."""

    samples: Tensor
    weights: Tensor | None = None
    images: Tensor | None = None


class Population(Protocol):
    """Samples that can be drawn for any batch of any epoch, the same for the same turn."""

    def draw(self, turn: Turn) -> Part:
        """Return this process's part of a global batch."""
        ...


class FiniteSamples:
    """``(n, d)`` samples that batches go through in a random order, anew in each epoch; weights are positive."""

    def __init__(self, samples: Tensor, weights: Tensor | None = None, images: Tensor | None = None) -> None:
        self.samples = samples
        self.weights = weights
        self.images = images
        self._orders: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, turn: Turn) -> Tensor:
        """Return the row numbers of a global batch: parts of permutations, one after another."""
        n = len(self)
        start, stop = turn.step * turn.size, (turn.step + 1) * turn.size
        cycles = range(start // n, (stop - 1) // n + 1)
        orders = [self._order((*turn.key, turn.epoch, cycle)) for cycle in cycles]
        first = cycles.start * n
        return (orders[0] if len(orders) == 1 else torch.cat(orders))[start - first : stop - first]

    def draw(self, turn: Turn) -> Part:
        """Return this process's part of a global batch."""
        return self._take(self.rows(turn), turn.part)

    def first(self, size: int, part: Callable[[int], slice]) -> Part:
        """Return a part of the first ``size`` samples, or of all if there are fewer."""
        size = min(size, len(self))
        return self._take(torch.arange(size, device="cpu"), part(size))

    def chosen(self, size: int, draws: torch.Generator) -> Tensor:
        """Return samples that count alike: drawn by their weights, or else all of them or so many in random order."""
        if self.weights is not None:
            rows = drawn_by_weight(self.weights, size, draws)
        else:
            rows = torch.randperm(len(self), generator=draws, device="cpu")[:size]
        return self.samples[rows.to(self.samples.device)]

    def halves(self) -> tuple["FiniteSamples", "FiniteSamples"]:
        """Return the first half, the larger one of an odd number, and the other one."""
        middle = (len(self) + 1) // 2
        parts = [
            [None if x is None else x[rows] for x in (self.samples, self.weights, self.images)]
            for rows in (slice(middle), slice(middle, None))
        ]
        (first, *of_first), (second, *of_second) = parts
        assert first is not None
        assert second is not None
        return FiniteSamples(first, *of_first), FiniteSamples(second, *of_second)

    def with_features(self, choose: Encode) -> "FiniteSamples":
        """Return the same rows with other columns."""
        return FiniteSamples(choose(self.samples), self.weights, None if self.images is None else choose(self.images))

    def _take(self, rows: Tensor, part: slice) -> Part:
        # Row numbers are drawn on the CPU, and the samples may be elsewhere.
        rows, weights = rows.to(self.samples.device), None
        if self.weights is not None:
            weights = self.weights[rows]
            weights = (weights / weights.sum())[part]
        rows = rows[part]
        images = None if self.images is None else self.images.index_select(0, rows)
        return Part(self.samples.index_select(0, rows), weights, images)

    def _order(self, key: tuple[int, ...]) -> Tensor:
        if key not in self._orders:
            # A batch needs at most the last two, but for sets smaller than a batch.
            if len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = torch.randperm(len(self), generator=generator(key[0], *key[1:]), device="cpu")
        return self._orders[key]


class _Endless:
    """Samples without an end; ``argument`` names them in messages, ``encode`` applies to samples and images."""

    def __init__(self, argument: str, true_map: Encode | None, encode: Encode | None) -> None:
        self.argument = argument
        self.true_map = true_map
        self.encode = encode

    def part(self, raw: Tensor) -> Part:
        """Return samples and their known images in encoded space."""
        images = None if self.true_map is None else map_images(self.argument, self.true_map, raw)
        if self.encode is None:
            return Part(raw, None, images)
        return Part(self.encode(raw), None, None if images is None else self.encode(images))


class SampledSamples(_Endless):
    """Fresh samples for each batch from a function of their number and a generator, on which alone they depend."""

    def __init__(
        self,
        argument: str,
        sampler: Callable[[int, torch.Generator], Any],
        true_map: Encode | None = None,
        encode: Encode | None = None,
    ) -> None:
        super().__init__(argument, true_map, encode)
        self.sampler = sampler
        try:
            inspect.signature(sampler).bind(1, torch.Generator(device="cpu"))
        except TypeError as error:
            raise TypeError(
                f"{argument} must be a function of a number and a generator, as in "
                f"lambda n, generator: torch.randn(n, 2, generator=generator), but {error}"
            ) from error
        except ValueError:
            pass  # a builtin without a signature: its first call will tell

    def draw(self, turn: Turn) -> Part:
        """Return this process's part of a global batch."""
        return self.part(self.raw(turn.size, generator(*turn.key, turn.epoch, turn.step))[turn.part])

    def raw(self, size: int, draws: torch.Generator, skip: int = 0) -> Tensor:
        """Return ``size`` samples as they are drawn."""
        return _checked(self.argument, self.sampler(size, draws), size)

    def trained_on(self, encode: Encode, reserved: int) -> "SampledSamples":
        """Return the same samples, encoded."""
        return SampledSamples(self.argument, self.sampler, self.true_map, encode)


class StreamedSamples(_Endless):
    """Samples in the order in which something iterable yields them, again from its start when it ends.

    It yields ``(n, d)`` samples, ``(d,)`` single ones, or tuples that start with them; the first ``reserved`` are held
    out. Every process reads the whole stream, LitData's too, and takes its part of each batch.
    """

    def __init__(
        self,
        argument: str,
        stream: Iterable[Any],
        reserved: int = 0,
        true_map: Encode | None = None,
        encode: Encode | None = None,
    ) -> None:
        stream = whole_stream(argument, stream)
        if isinstance(stream, Iterator):
            raise TypeError(
                f"{argument} is an iterator, which can be read once only: give what makes it, such as an "
                "IterableDataset, or a DataLoader"
            )
        if isinstance(stream, DataLoader) and isinstance(stream.sampler, RandomSampler):
            raise ValueError(
                f"{argument} is a DataLoader that shuffles, so that held-out samples would be trained on in the next "
                "epoch: give shuffle=False, or the samples themselves, which are shuffled here"
            )
        super().__init__(argument, true_map, encode)
        self.stream = stream
        self.reserved = reserved
        self._chunks: Iterator[Tensor] | None = None
        self._rest: Tensor | None = None
        self._position = 0

    def draw(self, turn: Turn) -> Part:
        """Return this process's part of a global batch."""
        start = (turn.epoch * turn.steps + turn.step) * turn.size
        if self._chunks is None or start < self._position:
            self._chunks, self._rest, self._position = self._again(), None, 0
        while self._position < start:
            self._position += len(self._take(min(turn.size, start - self._position)))
        raw = self._take(turn.size)
        self._position += turn.size
        return self.part(raw[turn.part])

    def raw(self, size: int, draws: torch.Generator, skip: int = 0) -> Tensor:
        """Return the first ``size`` samples after ``skip``, as they are; fewer where the stream ends."""
        parts: list[Tensor] = []
        for chunk in self.stream:
            parts.append(self._samples(chunk))
            if sum(map(len, parts)) >= skip + size:
                break
        found = torch.cat(parts)[skip : skip + size] if parts else torch.empty(0, 1, device="cpu")
        if not len(found):
            raise ValueError(
                f"{self.argument} yields no more than {sum(map(len, parts))} samples, of which {skip} are held out: "
                "lower eval_batch_size, or give the samples as an array"
            )
        return found

    def trained_on(self, encode: Encode, reserved: int) -> "StreamedSamples":
        """Return the same stream, encoded, without its first ``reserved`` samples."""
        return StreamedSamples(self.argument, self.stream, reserved, self.true_map, encode)

    def _again(self) -> Iterator[Tensor]:
        """Yield what is not held out, again and again."""
        while True:
            skip, found = self.reserved, False
            for chunk in self.stream:
                samples = self._samples(chunk)
                left = samples[skip:]
                skip = max(0, skip - len(samples))
                if len(left):
                    found = True
                    yield left
            if not found:
                raise ValueError(f"{self.argument} yields no samples but the {self.reserved} that are held out")

    def _take(self, size: int) -> Tensor:
        assert self._chunks is not None
        parts = [] if self._rest is None else [self._rest]
        while sum(map(len, parts)) < size:
            parts.append(next(self._chunks))
        taken = torch.cat(parts) if len(parts) > 1 else parts[0]
        self._rest = taken[size:]
        return taken[:size]

    def _samples(self, chunk: Any) -> Tensor:
        samples = chunk[0] if isinstance(chunk, tuple | list) else chunk
        samples = samples if isinstance(samples, Tensor) else torch.from_numpy(np.array(samples))
        return _checked(self.argument, samples[None] if samples.dim() == 1 else samples, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None, "_rest": None, "_position": 0}


Endless = SampledSamples | StreamedSamples


def map_images(argument: str, true_map: Callable[[Tensor], Any], samples: Tensor) -> Tensor:
    """Return the images of samples under a known map, checked."""
    with torch.no_grad():
        images = true_map(samples)
        images = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    if images.shape != samples.shape:
        raise ValueError(
            f"true_images returned shape {tuple(images.shape)} for samples of {argument} of shape "
            f"{tuple(samples.shape)}: it must keep the shape"
        )
    check_samples("true_images", images)
    moved: Tensor = images.to(samples)
    return moved


def _checked(argument: str, samples: Any, size: int | None) -> Tensor:
    found = samples if isinstance(samples, Tensor) else torch.from_numpy(np.array(samples))
    found = found.detach()
    found = found if found.dtype == torch.float64 else found.float()
    check_samples(f"what {argument} yields", found)
    if size is not None and len(found) != size:
        raise ValueError(f"{argument} was asked for {size} samples, and returned {len(found)}")
    return found
