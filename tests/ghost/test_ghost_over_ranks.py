"""How ghosts lie over ranks, from numbers alone."""

from itertools import pairwise

from lightning_gap.ghost.ranks import GhostsOverRanks


def together(sizes, ghost_batch_size, **options):
    return GhostsOverRanks.of(sizes, ghost_batch_size, "auto", **options).together


def test_groups_of_ranks_that_fill_a_ghost():
    assert together([32] * 8, 128) == 4
    assert together([32] * 8, 32) == 1  # no rank needs another
    assert together([64] * 8, 32) == 1
    assert together([32] * 6, 128) == 1  # four does not divide six
    assert together([20, 12, 8, 24], 32) == 2
    assert together([20, 8, 12, 24], 32, strided=True) == 2
    assert together([20, 8, 12, 24], 32) == 1
    assert together([0, 0], 32) == 1  # not known
    found = [together([16] * 16, 16 * k) for k in (1, 2, 4, 8, 16)]
    assert all(b % a == 0 for a, b in pairwise(found))


def test_one_rank_of_each_ghost():
    assert list(GhostsOverRanks([16] * 6, 48, 3).representatives) == [0, 3]
    assert list(GhostsOverRanks([16] * 6, 48, 3, strided=True).representatives) == [0, 1]


def test_what_is_said_of_ghosts():
    assert GhostsOverRanks([80], 32).describe() == "2 on each of 1 ranks, and one of 16 samples"
    assert GhostsOverRanks([128, 128], 128).falls_short() is None
    assert GhostsOverRanks([32, 32], 128, 2).falls_short() == (
        "ghosts over 2 ranks have 64 samples. Use micro-batches of 64, or ranks_per_ghost='auto'."
    )
