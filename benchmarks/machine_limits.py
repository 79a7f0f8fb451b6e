"""What a machine can do at most: bytes read, exponentials, and multiply-adds a second."""

import time
from collections.abc import Callable

import torch

__all__ = ["exponentials_a_second", "gigabytes_a_second", "multiply_adds_a_second"]


def gigabytes_a_second(size: int = 1 << 28) -> float:
    """Return how fast memory far larger than any cache is read."""
    numbers = torch.ones(size // 4)
    return size / 1e9 / least_seconds(numbers.sum)


def exponentials_a_second(size: int = 1 << 13) -> float:
    """Return billions of torch's exponentials of numbers in the first cache, of one thread times the threads."""
    threads = torch.get_num_threads()
    numbers = -torch.rand(size)
    out = torch.empty_like(numbers)

    def often() -> None:
        for _ in range(400):
            torch.exp(numbers, out=out)

    torch.set_num_threads(1)
    try:
        return threads * 400 * size / 1e9 / least_seconds(often)
    finally:
        torch.set_num_threads(threads)


def multiply_adds_a_second(size: int = 2048) -> float:
    """Return billions of multiply-adds of a large product of matrices."""
    matrix, out = torch.rand(size, size), torch.empty(size, size)
    return size**3 / 1e9 / least_seconds(lambda: torch.mm(matrix, matrix, out=out))


def least_seconds(call: Callable[[], object], times: int = 7) -> float:
    """Return the seconds of the quickest of some calls."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return min(spent)
