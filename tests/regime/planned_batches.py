"""A batch that grows in three steps, and what is planned of each of its updates."""

import math

from lightning.pytorch import Callback

BASE, STEPS = 4, [(0, 4), (100, 12), (200, 20)]


def reference_at(trace, reference):
    """Return the reference run's rates at the samples before each update, times the rule."""
    return [
        [rate * math.sqrt(size / BASE) for rate in reference.rates[samples // BASE]] for samples, size in trace.planned
    ]


class Planned(Callback):
    """The samples before each update, and the batch of its schedule."""

    def __init__(self, schedule, base=BASE):
        self.schedule, self.base, self.planned = schedule, base, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        part = self.schedule._run.part
        self.planned.append((self.schedule.samples_seen, min(part.batch_size, max(self.base, part.ends - part.begins))))
