"""TensorBoard: ``events.out.tfevents.*``."""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_gap.dashboards.runs.run import ROOM, Format, Run, RunError, clock, settings

__all__ = ["TENSORBOARD"]


def _read(path: Path) -> Run:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise RunError(f"reading {path} needs tensorboard: pip install tensorboard") from error
    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0, "tensors": 1}).Reload()
    tags = events.Tags()
    scalars = {key: events.Scalars(key) for key in tags["scalars"]}
    found: dict[str, NDArray[np.float64]] = {}
    for key, points in scalars.items():
        room = ROOM.match(key)
        axis = scalars.get(f"{room.group(0)}updates") if room else None
        at = defaultdict(list)
        for point in axis or ():
            at[point.step].append((point.wall_time, point.value))
        # Train and validation may be logged at one step, with the updates of each: the nearer in time is its own.
        values = [
            (min((abs(time - p.wall_time), x) for time, x in at[p.step])[1] if at[p.step] else p.step, p.value)
            for p in points
            if math.isfinite(p.value)
        ]
        if values:
            found[key] = np.array(values, dtype=np.float64)
    times = {(point.step, point.wall_time) for points in scalars.values() for point in points}
    pictures = {key: events.Images(key)[-1].encoded_image_string for key in tags["images"]}
    return Run(path.name, TENSORBOARD.kind, path, settings(path / "hparams.yaml"), found, pictures, clock(times))


TENSORBOARD = Format("TensorBoard", r"events\.out\.tfevents.*", _read)
