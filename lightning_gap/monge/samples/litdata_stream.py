"""LitData's streams, which give each process a part of its own, read whole by every process."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["whole_stream"]

# What LitData says of a number past the last sample.
_PAST_THE_END = "chunk interval"


def whole_stream(argument: str, stream: Iterable[Any]) -> Iterable[Any]:
    """Return a stream that every process reads whole, and in the same order each time; another than LitData's as it is.

    ``litdata.StreamingDataset`` gives each process, and each worker, its own part: the parts of one batch would be of
    different streams. By their numbers it gives all samples to all. LitData's other classes do not, nor does a loader.

    Args:
        argument: How messages call it.
        stream: What yields samples.

    Raises:
        ValueError: LitData shuffles it, so that held-out samples would be trained on, or another of LitData's classes
            or a ``DataLoader`` is around it.
    """
    litdata = sys.modules.get("litdata")  # not imported for the question
    if litdata is None:
        return stream
    inner = stream.dataset if isinstance(stream, DataLoader) else stream
    if not _is_litdata(litdata, stream) and not _is_litdata(litdata, inner):
        return stream
    if inner is not stream or not isinstance(stream, litdata.StreamingDataset):
        what = type(inner).__name__ if inner is stream else f"{type(stream).__name__} of a {type(inner).__name__}"
        raise ValueError(
            f"{argument} is a {what}, by which LitData gives each process samples of its own, and every process has to "
            "read the same ones: give one StreamingDataset itself, with shuffle=False"
        )
    if stream.shuffle:
        raise ValueError(
            f"{argument} is a StreamingDataset that shuffles, so that held-out samples would be trained on in the next "
            "epoch: give shuffle=False, and write its samples in random order"
        )
    return _ByNumber(stream)


def _is_litdata(litdata: Any, stream: Any) -> bool:
    own = any(each.__module__.partition(".")[0] == "litdata" for each in type(stream).__mro__)
    return own or isinstance(stream, litdata.StreamingDataset)


class _ByNumber:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            try:
                sample = self._stream[number]
            except (IndexError, ValueError) as error:
                # A transform of the user's may raise, too.
                if isinstance(error, ValueError) and _PAST_THE_END not in str(error):
                    raise
                return
            yield sample
            number += 1
