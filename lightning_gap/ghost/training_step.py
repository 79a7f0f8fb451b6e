"""Training steps that leave nothing behind but running statistics, on batches of their own."""

import copy
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gap.trainer.internals.of_lightning import prepared_batch, training_loaders
from lightning_gap.trainer.internals.of_torch import MODULE_TABLES, tree_map, version_of
from lightning_gap.trainer.strategy import data_parallel_rank, data_parallel_size

__all__ = ["leaving_no_trace", "own_batches", "own_loader", "own_randomness", "step_of"]


def step_of(module: LightningModule) -> Callable[[Any, int], Any]:
    """Return a module's training step as a function of batch and number; a manual one, which trains, is refused."""
    if not module.automatic_optimization:
        raise ValueError(
            f"the training_step of {type(module).__name__} makes updates itself (manual optimization), so statistics "
            "cannot be taken by it; call recalibrate_batchnorm(module, loader, forward=...)"
        )
    step = module.training_step
    takes_number = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    return lambda batch, index: step(batch, index) if takes_number else step(batch)


@contextmanager
def leaving_no_trace(module: LightningModule, layers: Collection[nn.Module]) -> Iterator[None]:
    """Undo what happens to a module meanwhile, but to some layers: logs, attributes and buffers of all submodules."""
    changing = set(layers)
    # Parameters stay as they are, and sharded ones change places by themselves.
    kept = [
        (submodule, {name: (v, _content(v)) for name, v in vars(submodule).items() if name not in MODULE_TABLES})
        for submodule in module.modules()
    ]
    buffers = [(b, _content(b)) for m in module.modules() if m not in changing for b in m.buffers(recurse=False)]
    vars(module).update(dict.fromkeys(("log", "log_dict"), lambda *_, **__: None))
    try:
        yield
    finally:
        with torch.no_grad():
            for submodule, attributes in kept:
                for name in vars(submodule).keys() - attributes.keys() - set(MODULE_TABLES):
                    del vars(submodule)[name]
                for name, (value, content) in attributes.items():
                    _refill(value, content)
                    vars(submodule)[name] = value
            for buffer, content in buffers:
                _refill(buffer, content)


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_inference() else (version_of(value), value.detach().clone())
    return copy.copy(value) if isinstance(value, list | dict | set | deque) else None


def _refill(value: Any, content: Any) -> None:
    """Put back what has been changed in place, and touch nothing else."""
    if content is None:
        return
    if isinstance(value, Tensor):
        if version_of(value) != content[0]:
            value.detach().copy_(content[1])
    elif isinstance(value, list | deque):
        if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
            value.clear()
            value.extend(content)
    elif list(value) != list(content) if isinstance(value, dict) else value != content:
        value.clear()
        value.update(content)
    elif isinstance(value, dict):
        value.update({key: kept for key, kept in content.items() if value[key] is not kept})


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed, and go on with those of before."""
    with isolate_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (what data sets draw from)
        yield


def own_loader(trainer: Trainer) -> CombinedLoader:
    """Return a copy of the training loader that shares data sets, and no position or random state, with it.

    Of a loader that stands for another, whose batches follow the run, it is a copy of that one.
    """
    loaders, mode = training_loaders(trainer)
    return CombinedLoader(tree_map(lambda loader: _own(_stood_for(loader) or loader), loaders), mode)  # type: ignore[arg-type]


def _stood_for(loader: Any) -> Any:
    return None if isinstance(loader, DataLoader) else getattr(loader, "stands_for", None)


def _own(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return copy.deepcopy(loader)
    dataset = loader.dataset
    shared = {} if isinstance(dataset, IterableDataset) else {id(dataset): dataset}
    parts = {name: getattr(loader, name) for name in ("dataset", "sampler", "batch_sampler", "generator")}
    own = copy.copy(loader)
    vars(own).update(copy.deepcopy(parts, shared), _iterator=None, persistent_workers=False)
    return own


def own_batches(trainer: Trainer, count: int) -> Iterator[Any]:
    """Yield batches of a copy of the training loader, as the training step gets them."""
    module, (first, every, count) = trainer.lightning_module, _share(trainer, count)
    for batch, _, _ in islice(iter(own_loader(trainer)), first, first + every * count, every):
        batch = prepared_batch(module, trainer.precision_plugin.convert_input(batch))
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _share(trainer: Trainer, count: int) -> tuple[int, int, int]:
    """Return which is this rank's first batch of a loader, every how many it has one, and how many it takes."""
    other = _stood_for(training_loaders(trainer)[0])
    ranks = 1 if other is None else data_parallel_size(trainer)
    if ranks == 1 or len(other) < ranks:
        return 0, 1, count
    return data_parallel_rank(trainer), ranks, min(count, len(other) // ranks)  # as many on each rank
