"""Private names of Lightning and of torchmetrics, a function each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_gap.trainer.internals.guard import private, set_private

__all__ = [
    "INSTANTIATOR",
    "average_in_place",
    "averaged_model",
    "batches_that_stepped",
    "checkpoint_epochs",
    "count_batches",
    "default_states",
    "ends_tuning",
    "found_a_rate",
    "is_compiled_by_lightning",
    "plot_metric",
    "prepared_batch",
    "replace_training_source",
    "replaces_batchnorm",
    "restricted_classmethod",
    "set_checkpoint_epochs",
    "set_stops_at_epoch_end",
    "sets_the_rate",
    "shards_loaders",
    "stops_at_epoch_end",
    "take_accumulation",
    "trainer_if_any",
    "training_loaders",
    "training_source",
    "updates_logs",
    "validation_seconds",
]

_LIGHTNING = "lightning"
# The hyperparameter by which LightningCLI names the function that made a model, and by which one is refused.
INSTANTIATOR = "_instantiator"


def batches_that_stepped(trainer: Any) -> int:
    """Return the step at which ``pl_module.log`` logs now: batches with an update, not counting the present one."""
    return int(private(trainer.fit_loop.epoch_loop, "_batches_that_stepped", _LIGHTNING))


def training_source(trainer: Any) -> Any:
    """Return where a trainer will get its training loader, or the loader: before it is loaded, nothing public tells."""
    return private(trainer.fit_loop, "_data_source", _LIGHTNING).instance


def training_loaders(trainer: Any) -> tuple[Any, str]:
    """Return the loaders that the training loop reads, and the mode in which it combines them."""
    combined = private(trainer.fit_loop, "_combined_loader", _LIGHTNING)
    return combined.iterables, private(combined, "_mode", _LIGHTNING)


def prepared_batch(module: Any, batch: Any) -> Any:
    """Return a batch after a module's ``on_before_batch_transfer``, as a strategy calls it."""
    return private(module, "_on_before_batch_transfer", _LIGHTNING)(batch, dataloader_idx=0)


def updates_logs(trainer: Any) -> bool:
    """Return whether loggers get this update, one in ``log_every_n_steps``."""
    return bool(private(trainer, "_logger_connector", _LIGHTNING).should_update_logs)


def validation_seconds(trainer: Any) -> float | None:
    """Return every how many seconds a trainer validates; ``None`` where it does so by epochs or batches."""
    seconds: float | None = private(trainer, "_val_check_time_interval", _LIGHTNING)
    return seconds


def shards_loaders(trainer: Any) -> bool:
    """Return whether a trainer puts a distributed sampler of its own into loaders."""
    connector = private(trainer, "_accelerator_connector", _LIGHTNING)
    return bool(connector.use_distributed_sampler and connector.is_distributed)


def replaces_batchnorm(strategy: Any) -> bool:
    """Return whether a strategy turns BatchNorm into ``SyncBatchNorm``; ``False`` where it knows nothing of layers."""
    from lightning.pytorch.plugins import TorchSyncBatchNorm

    return isinstance(getattr(strategy, "_layer_sync", None), TorchSyncBatchNorm)


def is_compiled_by_lightning(module: Any) -> bool:
    """Return whether a module is what ``torch.compile(LightningModule)`` gave; where none tells, it is taken for no."""
    return getattr(module, "_compiler_ctx", None) is not None


def trainer_if_any(module: Any) -> Any:
    """Return a module's trainer, or ``None``: ``module.trainer`` raises where there is none."""
    return getattr(module, "_trainer", None)


def averaged_model(callback: Any) -> Any:
    """Return the average that a ``WeightAveraging`` keeps while it fits; ``None`` of any other callback."""
    return getattr(callback, "_average_model", None)


@contextmanager
def average_in_place(callback: Any, module: Any) -> Iterator[None]:
    """Have the average of a ``WeightAveraging`` in the place of the weights meanwhile, as in validation."""
    swap = private(callback, "_swap_models", _LIGHTNING)
    swap(module)
    try:
        yield
    finally:
        swap(module)


def checkpoint_epochs(callback: Any) -> tuple[int, bool]:
    """Return every how many epochs a ``ModelCheckpoint`` saves, 0 for never, and whether not after validations."""
    every = private(callback, "_every_n_epochs", _LIGHTNING)
    return int(every), bool(private(callback, "_save_on_train_epoch_end", _LIGHTNING))


def set_checkpoint_epochs(callback: Any, every: int) -> None:
    """Say every how many epochs a ``ModelCheckpoint`` saves."""
    set_private(callback, "_every_n_epochs", every, _LIGHTNING)


def stops_at_epoch_end(callback: Any) -> bool:
    """Return whether an ``EarlyStopping`` looks at its metric after training epochs, and not after validations."""
    return bool(private(callback, "_check_on_train_epoch_end", _LIGHTNING))


def set_stops_at_epoch_end(callback: Any, yes: bool) -> None:
    """Say whether an ``EarlyStopping`` looks at its metric after training epochs."""
    set_private(callback, "_check_on_train_epoch_end", yes, _LIGHTNING)


def ends_tuning(callback: Any) -> bool:
    """Return whether a ``BatchSizeFinder`` or ``LearningRateFinder`` ends ``fit`` where it has found something."""
    return bool(private(callback, "_early_exit", _LIGHTNING))


def sets_the_rate(finder: Any) -> bool:
    """Return whether a ``LearningRateFinder`` gives the module the learning rate that it finds."""
    return bool(private(finder, "_update_attr", _LIGHTNING))


def found_a_rate(finder: Any) -> bool:
    """Return whether a ``LearningRateFinder`` has suggested a learning rate, which the module has now."""
    found = finder.optimal_lr
    return found is not None and private(found, "_optimal_idx", _LIGHTNING) is not None


def replace_training_source(trainer: Any, source: Any) -> Any:
    """Let a trainer get its training loader from another source, and return the one before."""
    before = private(trainer.fit_loop, "_data_source", _LIGHTNING)
    set_private(trainer.fit_loop, "_data_source", source, _LIGHTNING)
    return before


def count_batches(trainer: Any, batches: int | float) -> None:
    """Tell a trainer how many batches the present epoch has; its combined loader no longer cuts at an earlier number.

    An interval of validations that is a share of the epoch is counted anew.
    """
    private(trainer.fit_loop, "_combined_loader", _LIGHTNING).limits = None
    trainer.fit_loop.max_batches = batches
    share = None if validation_seconds(trainer) is not None else trainer.val_check_interval
    if isinstance(share, float):
        whole = batches == float("inf")
        trainer.val_check_batch = float("inf") if whole else max(1, int(batches * share))


def take_accumulation(trainer: Any, opens: Callable[[], bool], closes: Callable[[], bool]) -> Callable[[], None]:
    """Let two functions say whether an update begins, and whether it ends, with the present batch.

    Lightning counts batches from the start of an epoch by one number. Returns what gives the counting back.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    automatic = epoch_loop.automatic_optimization
    zeroing = private(automatic, "_make_zero_grad_fn", _LIGHTNING)
    private(epoch_loop, "_accumulated_batches_reached", _LIGHTNING)
    accumulated = trainer.accumulate_grad_batches

    def zero_grad_fn(batch_idx: int, optimizer: Any) -> Any:
        if not opens():
            return None
        every = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = 1  # by which every batch is a first one
        try:
            return zeroing(batch_idx, optimizer)
        finally:
            trainer.accumulate_grad_batches = every

    epoch_loop._accumulated_batches_reached = closes
    automatic._make_zero_grad_fn = zero_grad_fn

    def give_back() -> None:
        vars(epoch_loop).pop("_accumulated_batches_reached", None)
        vars(automatic).pop("_make_zero_grad_fn", None)
        trainer.accumulate_grad_batches = accumulated

    return give_back


def plot_metric(metric: Any, value: Any, ax: Any) -> Any:
    """Draw values of a metric, as each of torchmetrics' own does in its ``plot``."""
    return private(metric, "_plot", "torchmetrics")(value, ax)


def default_states(metric: Any) -> dict[str, Any]:
    """Return the states that a metric's ``reset`` gives back, to be changed in place."""
    defaults: dict[str, Any] = private(metric, "_defaults", "torchmetrics")
    return defaults


if TYPE_CHECKING:
    restricted_classmethod = classmethod
else:

    def restricted_classmethod(method: Callable[..., Any]) -> Any:
        """Return a class method that instances refuse, as ``load_from_checkpoint``; a plain one where there is none."""
        from lightning.pytorch.utilities import model_helpers

        return getattr(model_helpers, "_restricted_classmethod", classmethod)(method)
