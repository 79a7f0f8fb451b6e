r"""The critical batch measured by branches: from one state, the same samples in larger and larger batches."""

import copy
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from rich.table import Table
from scipy.stats import t as student
from torch.optim import Optimizer
from typing_extensions import override

from lightning_gap.checks import check_integer, check_number
from lightning_gap.regime.loader import loader_batch_size
from lightning_gap.regime.rules.hyperparameters import OptimizerRules
from lightning_gap.regime.scaling import LRRule, check_rule, lr_factor, scale_optimizer
from lightning_gap.trainer.internals.of_lightning import trainer_if_any
from lightning_gap.trainer.terminal import quiet

__all__ = ["BranchLosses", "measure_critical_batch"]

Floats = NDArray[np.float64]
_OURS = {
    "accumulate_grad_batches", "callbacks", "devices", "limit_train_batches", "max_epochs", "max_steps", "max_time",
    "min_epochs", "min_steps", "num_nodes", "strategy", "reload_dataloaders_every_n_epochs",
}  # fmt: skip


@dataclass(frozen=True)
class BranchLosses:
    r"""The losses of branches, and the critical batch that they tell.

    Each branch's loss is smoothed by its mean over the last ``window`` of its batches; what counts is how far that lies
    over the one of the branch :math:`\kappa = 1` of the same seed, on the same samples in the same order. A branch is
    *recovered* if the mean of these differences over seeds is within ``tolerance``. The critical batch is the largest
    of those that are recovered with all smaller ones.

    Args:
        batch_size: Samples per update of the branch :math:`\kappa = 1`.
        losses: For each :math:`\kappa`, ``(seeds, batches)``: the training loss of each batch of the loader, before
            the update that it is part of. A loss that is not finite is worse than any.
        tolerance: In units of the loss.
        window: Over how many last batches the loss is averaged.
        confidence: Of the interval.

    Example:
        >>> losses = {1: [[1.0, 0.5], [1.0, 0.6]], 2: [[1.0, 0.505], [1.0, 0.603]], 4: [[1.0, 0.8], [1.0, 0.9]]}
        >>> branches = BranchLosses(32, {k: np.array(rows) for k, rows in losses.items()}, tolerance=0.01, window=1)
        >>> branches.critical_batch, branches.interval
        (64, (32, 64))
    """

    batch_size: int
    losses: Mapping[int, Floats]
    tolerance: float
    window: int
    confidence: float = 0.95

    def differences(self, multiple: int) -> Floats:
        r"""Return ``(seeds,)``: the smoothed loss of a branch over that of :math:`\kappa = 1`, seed by seed.

        Args:
            multiple: :math:`\kappa`.
        """
        ends = [self.losses[each][:, -self.window :].mean(1) for each in (multiple, 1)]
        return np.where(np.isfinite(ends[0]), ends[0] - ends[1], np.inf)

    def difference_interval(self, multiple: int) -> tuple[float, float]:
        """Return Student's interval of the mean difference over seeds; without bounds for a single seed.

        Args:
            multiple: As in :meth:`differences`.
        """
        values = self.differences(multiple)
        if not np.isfinite(values).all():
            return math.inf, math.inf
        if len(values) < 2:
            return (0.0, 0.0) if multiple == 1 else (-math.inf, math.inf)
        reach = student.ppf((1 + self.confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
        return float(values.mean() - reach), float(values.mean() + reach)

    @property
    def critical_batch(self) -> int:
        """The largest batch that is recovered, with all smaller ones; where that is the largest of all, at least it."""
        return self._largest({each: float(self.differences(each).mean()) for each in self.losses})

    @property
    def interval(self) -> tuple[int, int]:
        """The largest batch that is surely recovered, and the largest that is not surely worse."""
        bounds = {each: self.difference_interval(each) for each in self.losses}
        low, high = (self._largest({each: bound[side] for each, bound in bounds.items()}) for side in (1, 0))
        return low, high

    @property
    def progress(self) -> float:
        r"""By how much the loss of :math:`\kappa = 1` fell from its first batches to its last; the mean over seeds.

        Where that is within the tolerance, a branch that learns nothing is recovered too, and nothing is told.
        """
        rows = self.losses[1]
        return float((rows[:, : self.window].mean(1) - rows[:, -self.window :].mean(1)).mean())

    @property
    def is_bounded(self) -> bool:
        """Whether a branch was worse, so that the critical batch is not beyond the branches."""
        return self.critical_batch < self.batch_size * max(self.losses)

    def _largest(self, worse_by: Mapping[int, float]) -> int:
        largest = 1
        for multiple in sorted(worse_by):
            if worse_by[multiple] > self.tolerance:
                break
            largest = multiple
        return largest * self.batch_size

    def table(self) -> Table:
        """Return the branches as a table for a terminal: loss, and by how much it is worse, with its interval."""
        said = Table("batch", "κ", "loss", f"worse than κ = 1, {self.confidence:.0%}", "recovered")
        for multiple in sorted(self.losses):
            low, high = self.difference_interval(multiple)
            mean = float(self.differences(multiple).mean())
            said.add_row(
                f"{self.batch_size * multiple}",
                f"{multiple}",
                f"{self.losses[multiple][:, -self.window :].mean():.4g}",
                "–" if multiple == 1 else f"{mean:+.3g} ({low:+.3g} to {high:+.3g})",
                "yes" if mean <= self.tolerance else "no",
            )
        return said


def measure_critical_batch(
    model: LightningModule,
    data: LightningDataModule | Any,
    *,
    samples: int,
    ckpt_path: str | None = None,
    multiples: Sequence[int] = (1, 2, 4, 8),
    seeds: Sequence[int] = (0, 1, 2),
    lr_rule: LRRule = "sqrt",
    tolerance: float = 0.01,
    window: float = 0.25,
    confidence: float = 0.95,
    accumulate_grad_batches: int = 1,
    **trainer_options: Any,
) -> BranchLosses:
    r"""Measure the critical batch at a checkpoint: train on from it in batches :math:`\kappa` times as large.

    Every branch starts from the same weights and optimizer state, at the learning rate of the checkpoint times
    :math:`\sqrt \kappa` (or another rule), held constant, and sees the same batches of the loader in the same order:
    larger batches are accumulated. So all branches have seen exactly the same samples, in updates that are
    :math:`\kappa` times fewer, and layers that normalize over the batch do so alike. It trains ``len(multiples) *
    len(seeds) * samples`` samples, on one device; larger batches save no time here.

    Args:
        model: The module, with automatic optimization. It is copied, and stays as it is.
        data: A datamodule, or a loader, of the batch of :math:`\kappa = 1`.
        samples: How many each branch sees; rounded up to whole updates of the largest batch.
        ckpt_path: A checkpoint of ``Trainer``, with weights and optimizer state. Without it, branches start from the
            model's weights and a new optimizer. Read with ``weights_only=True``.
        multiples: :math:`\kappa`, 1 among them.
        seeds: Of the order of the data, and of dropout and the like; two or more give an interval.
        lr_rule: How the rate follows :math:`\kappa`, as in ``LargeBatchRegime``: ``"sqrt"``, ``"linear"``, ``"adam"``,
            ``"none"``, or a function.
        tolerance: By how much the smoothed loss of a branch may be worse, in units of the loss.
        window: The share of each branch, at its end, over which the loss is averaged, in (0, 1].
        confidence: Of the interval.
        accumulate_grad_batches: Batches of the loader in an update at :math:`\kappa = 1`.
        trainer_options: Of the branches' ``Trainer``: ``accelerator``, ``precision``, ``gradient_clip_val``.

    Returns:
        The losses of all branches: ``critical_batch``, ``interval``, ``table()``.

    Raises:
        TypeError: If the model is none.
        ValueError: If an argument is out of its range, or the rule is not for the optimizer.
        MisconfigurationException: If the model optimizes manually, or the loader's batch size is unknown.

    References:
        Merrill, Arora, Groeneveld, Hajishirzi 2025, "Critical batch size revisited: a simple empirical approach to
        large-batch language model training" (arXiv 2505.23971), section 3.

    Example:
        >>> import torch
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> data = torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4, shuffle=True)
        >>> branches = measure_critical_batch(
        ...     BoringModel(), data, samples=64, multiples=(1, 2), seeds=(0, 1), accelerator="cpu"
        ... )
        >>> branches.losses[2].shape  # seeds, batches of the loader
        (2, 16)
    """
    _check(model, multiples, seeds, trainer_options)
    check_integer("samples", samples, what="what each branch sees")
    check_integer("accumulate_grad_batches", accumulate_grad_batches)
    tolerance = check_number("tolerance", tolerance, least=0)
    if not 0 < window <= 1:
        raise ValueError(f"window={window} must be in (0, 1]: the share of a branch over which its loss is averaged.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, for example 0.95.")
    for multiple in multiples:
        lr_factor(lr_rule, multiple)
    source = _Prepared.of(data)
    size = loader_batch_size(source.loader)
    whole = math.lcm(*multiples) * accumulate_grad_batches
    batches = math.ceil(samples / (size * whole)) * whole
    losses: dict[int, list[list[float]]] = {multiple: [] for multiple in sorted(multiples)}
    doubted = False
    with tempfile.TemporaryDirectory() as folder:
        start = None if ckpt_path is None else _start(ckpt_path, Path(folder))
        for seed, multiple in ((seed, multiple) for seed in seeds for multiple in losses):
            branch = _Branch(multiple, lr_rule, accumulate_grad_batches * multiple)
            with isolate_rng(), quiet(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")  # nor shall it have one
                torch.manual_seed(seed)
                trainer = Trainer(
                    accumulate_grad_batches=branch.accumulated, max_epochs=1, devices=1, callbacks=[branch],
                    limit_val_batches=0, num_sanity_val_steps=0, **{**_SILENT, **trainer_options},
                )  # fmt: skip
                given = source.attached(_SameBatches(source.loader, batches, seed))
                trainer.fit(_copy(model), **given, ckpt_path=start, weights_only=True)
            losses[multiple].append(branch.losses)
            if branch.doubt and not doubted:
                doubted = True
                rank_zero_warn(f"measure_critical_batch: {branch.doubt}")
    rows = {multiple: np.array(found, dtype=np.float64) for multiple, found in losses.items()}
    last = max(1, round(window * batches))
    branches = BranchLosses(size * accumulate_grad_batches, rows, tolerance, last, confidence)
    if branches.progress <= tolerance:
        rank_zero_warn(
            f"measure_critical_batch: the loss at the first batch size fell by {branches.progress:.2g}, no more than "
            f"tolerance={tolerance:g}, so a branch that learns nothing would pass too. Give more samples, or a smaller "
            "tolerance."
        )
    return branches


_SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


def _check(model: Any, multiples: Sequence[int], seeds: Sequence[int], trainer_options: Mapping[str, Any]) -> None:
    if not isinstance(model, LightningModule):
        raise TypeError(f"model must be a LightningModule of lightning.pytorch, got {type(model).__name__}")
    if not model.automatic_optimization:
        raise MisconfigurationException(
            "measure_critical_batch accumulates batches, which manual optimization does by itself. Use automatic "
            "optimization."
        )
    for multiple in multiples:
        check_integer("multiples", multiple, what="the batch of a branch over the first one's")
    if 1 not in multiples or len(set(multiples)) != len(multiples) or len(multiples) < 2:
        raise ValueError(f"multiples={tuple(multiples)} must be different, and 1 among them, for example (1, 2, 4, 8).")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={tuple(seeds)} must be different, and at least one: give (0, 1, 2).")
    ours = sorted(_OURS & set(trainer_options))
    if ours:
        raise ValueError(
            f"{', '.join(ours)} cannot be given: branches run on one device, with lengths and accumulation of their "
            "own. Leave it out; accumulation stands for any number of devices."
        )


def _start(ckpt_path: str, folder: Path) -> str:
    """Write what branches take from a checkpoint: no loops, callbacks or schedules. So Lightning itself restores it."""
    state = dict(torch.load(ckpt_path, map_location="cpu", weights_only=True))
    if "optimizer_states" not in state:
        raise ValueError(
            f"ckpt_path={ckpt_path} holds no state of an optimizer: give a checkpoint that was written with "
            "save_weights_only=False."
        )
    for part in ("loops", "callbacks", "lr_schedulers"):
        state.pop(part, None)
    path = folder / "start.ckpt"
    torch.save({**state, "lr_schedulers": [], "epoch": 0, "global_step": 0}, path)
    return str(path)


def _copy(model: LightningModule) -> LightningModule:
    """Return a copy of a module, without the trainer that it was fitted by."""
    trainer = trainer_if_any(model)
    model.trainer = None
    try:
        return copy.deepcopy(model)
    finally:
        model.trainer = trainer


@dataclass(frozen=True)
class _Prepared:
    """Training data that are set up once for all branches."""

    loader: Any
    module: LightningDataModule | None

    @classmethod
    def of(cls, data: Any) -> "_Prepared":
        if not isinstance(data, LightningDataModule):
            return cls(data, None)
        with isolate_rng():
            data.prepare_data()
            data.setup("fit")
            return cls(data.train_dataloader(), data)

    def attached(self, batches: "_SameBatches") -> dict[str, Any]:
        """Return what ``fit`` takes: the same batches, with the hooks of their datamodule."""
        if self.module is None:
            return {"train_dataloaders": batches}
        module: Any = copy.copy(self.module)
        module.prepare_data, module.setup = (lambda: None), (lambda stage: None)
        module.train_dataloader = lambda: batches
        return {"datamodule": module}


class _SameBatches:
    """A number of batches of a loader, over as many passes as that takes, in an order that a seed alone says."""

    def __init__(self, loader: Any, batches: int, seed: int) -> None:
        self.loader, self.batches, self.seed = loader, batches, seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        left, number = self.batches, 0
        while left:
            with isolate_rng():  # what training draws between does not move the order
                torch.manual_seed(hash((self.seed, number)) % 2**63)
                one_pass = iter(self.loader)
                first = next(one_pass, None)
            if first is None:
                raise MisconfigurationException("measure_critical_batch: the loader has no batch. Give it samples.")
            yield first
            left -= 1
            while left and (batch := next(one_pass, None)) is not None:
                yield batch
                left -= 1
            number += 1


class _Branch(Callback):
    """Scale the rates for another batch, and keep the losses."""

    def __init__(self, multiple: int, rule: LRRule, accumulated: int) -> None:
        self.multiple, self.rule, self.accumulated = multiple, rule, accumulated
        self.losses: list[float] = []
        self.doubt: str | None = None
        self._heard: list[torch.Tensor] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scale the rates, which are the checkpoint's by now, and hold them there."""
        trainer.lr_scheduler_configs.clear()
        for optimizer in trainer.optimizers:
            self._scale(optimizer)

    def _scale(self, optimizer: Optimizer) -> None:
        ratio = float(self.multiple)
        if isinstance(self.rule, str):
            self.doubt = check_rule(optimizer, self.rule, ratio, 0.0) or self.doubt
        scale_optimizer(optimizer, OptimizerRules(self.rule).rescaling(ratio, ratio))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of a batch, which Lightning has divided by the accumulation."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        self._heard.append(loss.detach().float() * self.accumulated)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read all losses from the device at once."""
        self.losses = torch.stack(self._heard).tolist()
