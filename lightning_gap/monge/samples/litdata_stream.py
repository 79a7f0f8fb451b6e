"""LitData's streams, which give each process a part of its own, read whole by every process."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["whole_stream"]

# What LitData says of a number past the last sample.
_PAST_THE_END = "chunk interval"


def whole_stream(argument: str, stream: Iterable[Any]) -> Iterable[Any]:
    """Return a stream that every process reads whole, and in the same order each time; another than LitData's as it is.

    ``litdata.StreamingDataset`` gives each process, and each worker, its own part: the parts of one batch would be of
    different streams. By their numbers it gives all samples to all.

    Args:
        argument: How messages call it.
        stream: What yields samples.

    Raises:
        ValueError: LitData shuffles it, so that held-out samples would be trained on.
    """
    litdata = sys.modules.get("litdata")  # not imported for the question
    if litdata is None or not isinstance(stream, litdata.StreamingDataset):
        return stream
    if stream.shuffle:
        raise ValueError(
            f"{argument} is a StreamingDataset that shuffles, so that held-out samples would be trained on in the next "
            "epoch: give shuffle=False, and write its samples in random order"
        )
    return _ByNumber(stream)


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
