"""Lengths of the reference run, however they were rounded, are not taken for this run's."""

import math

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

from lightning_gap.regime.clock import ReferenceClock
from lightning_gap.regime.lengths import check_lengths
from lightning_gap.regime.loader import Pass
from lightning_gap.regime.planned import plan_regime

REFERENCE = 16


def check(make, samples, epochs, batch, accumulated, replicas):
    """Check a schedule of updates as a fit of some micro-batches and replicas does."""
    micro = batch // accumulated // replicas
    batches = math.ceil(math.ceil(samples / replicas) / micro)
    data = Pass(samples, False, batches, micro * replicas, replicas)
    plan = plan_regime(
        reference_batch_size=REFERENCE,
        batch_size=batch,
        samples=samples,
        updates_per_epoch=math.ceil(batches / accumulated),
        max_epochs=epochs,
    )
    scheduler = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    check_lengths(
        ReferenceClock.of(plan, scheduler, "step"), plan, trust=False, batches=data.numbers_of_batches(accumulated)
    )


@pytest.mark.parametrize("samples", [930, 1437, 2878])
@pytest.mark.parametrize("epochs", [3, 10, 20])
@pytest.mark.parametrize(
    ("batch", "accumulated", "replicas"), [(32, 2, 1), (64, 4, 1), (128, 1, 8), (64, 4, 2), (256, 1, 1)]
)
def test_lengths_of_the_reference_run_are_taken_however_rounded(samples, epochs, batch, accumulated, replicas):
    for there in (samples // REFERENCE, math.ceil(samples / REFERENCE)):
        total = there * epochs
        late = max(1, 2 * epochs // 3) * there
        for make in (
            lambda o, total=total: schedulers.CosineAnnealingLR(o, total),
            lambda o, total=total: schedulers.LambdaLR(o, lambda step: max(0.0, 1 - step / total)),
            lambda o, late=late, there=there: schedulers.MultiStepLR(o, [there, late]),
            lambda o, there=there: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=8 * there),
        ):
            check(make, samples, epochs, batch, accumulated, replicas)


def test_a_step_is_shorter_than_a_run():
    # 10 updates an epoch at the batch 1024, and 50 epochs: 500 updates, after which a StepLR would never fall.
    check(lambda o: schedulers.StepLR(o, 500), 9931, 50, 1024, 1, 1)


@pytest.mark.parametrize(("batch", "accumulated", "replicas"), [(64, 8, 1), (64, 1, 1), (64, 1, 8)])
def test_lengths_of_this_run_are_refused(batch, accumulated, replicas):
    # Micro-batches of half the reference batch are twice as many as its updates.
    total = math.ceil(math.ceil(930 / replicas) / (batch // accumulated // replicas)) * 10

    def linear(optimizer):
        return schedulers.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / total))

    with pytest.raises(ValueError, match=f"{total} looks like a length of this run"):
        check(linear, 930, 10, batch, accumulated, replicas)
