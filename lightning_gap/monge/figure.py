"""The callback that logs a figure of the map while it is learned."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import WarningCache
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import ArrayLike
from torch import Tensor
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.extras import library
from lightning_gap.monge.plot import Space, Theme, plot_map
from lightning_gap.monge.samples.files.read import read_matrix
from lightning_gap.trainer.loggers import log_figure, takes_figures
from lightning_gap.trainer.strategy import holds_whole_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MapFigure"]

_KEY = "lightning_gap/monge/map"


class MapFigure(Callback):
    """Log a figure of source, target, images and arrows after validation; see :func:`plot_map`.

    It goes to the loggers, on rank zero, as ``lightning_gap/monge/map``: to W&B and TensorBoard as an image at the step
    of ``trainer.global_step``, to MLflow and CSV as the file ``figures/lightning_gap/monge/map/<step>.png``. Without a
    logger it is in :attr:`figure` alone.

    Drawn are the samples of the first validation batches, of this process, up to ``max_points`` of each set and
    condition, or ``samples``. Weights are not drawn, but rows of weight 0 are left out. Samples in coordinates that
    standardize each feature are drawn in the original ones; principal components stay what they are.

    Nothing here moves random number generators, weights or buffers: a run with the callback is bit-equal to the run
    without.

    Args:
        every_n_validations: Draw after the first of every so many validations; the sanity check does not count.
        samples: ``(source, target)``, or ``(source, target, condition)`` for a conditional map, to draw instead: raw
            samples, as ``MongeMap.transport`` takes them.
        space: See :func:`plot_map`, as the following.
        feature_names: Names of the features.
        arrows: Most arrows in a panel.
        max_points: Most points of each set in a panel.
        theme: ``"light"`` or ``"dark"``.

    Raises:
        TypeError: ``samples`` is no pair, or ``every_n_validations`` no integer.
        ValueError: ``every_n_validations`` is not positive.
        ModuleNotFoundError: When it is set up: Matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gap import MongeMap, SamplesDataModule
        >>> drawing = MapFigure()
        >>> trainer = Trainer(max_epochs=1, callbacks=[drawing], logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> data = SamplesDataModule(torch.randn(200, 2), torch.randn(200, 2) + 3, batch_size=100)
        >>> trainer.fit(MongeMap(dim=2), data)
        >>> drawing.figure is not None
        True
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        *,
        samples: Sequence[ArrayLike | Tensor] | None = None,
        space: Space = "auto",
        feature_names: Sequence[str] | None = None,
        arrows: int = 80,
        max_points: int = 1000,
        theme: Theme = "light",
    ) -> None:
        check_integer("every_n_validations", every_n_validations)
        if samples is not None and (not isinstance(samples, tuple | list) or len(samples) not in (2, 3)):
            raise TypeError("samples must be (source, target), or (source, target, condition) for a conditional map")
        self.every_n_validations = every_n_validations
        self.samples = samples
        self.max_points = max_points
        self.options: dict[str, Any] = {"space": space, "feature_names": feature_names, "arrows": arrows}
        self.options |= {"max_points": max_points, "theme": theme}
        self._validations = 0
        self._due = False
        self._drawn: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._figure: Figure | None = None
        self._warned = WarningCache()

    @property
    def figure(self) -> "Figure | None":
        """The last figure that was drawn; ``None`` before the first, and on other ranks than zero."""
        return self._figure

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        library("matplotlib", "MapFigure", "plots")

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Where weights are sharded, all ranks must map together.
        takes_part = trainer.is_global_zero or not holds_whole_weights(trainer)
        self._due = takes_part and not trainer.sanity_checking and self._validations % self.every_n_validations == 0
        self._drawn = {}

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._due or self.samples is not None or dataloader_idx:
            return
        if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[0], Tensor):
            self._warned.warn("MapFigure draws batches (source, target), and validation has others: give samples=")
            return
        most = self.max_points
        if self._drawn and all(sum(len(x) for x, _, _ in parts) >= most for parts in self._drawn.values()):
            return
        with isolate_rng():
            for key, x, y, condition in _conditions(batch):
                part = _in_original_features(pl_module, *_mapped(pl_module, x[:most], y[:most], condition))
                self._drawn.setdefault(key, []).append(part)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if not self._due:
            return
        names: list[str] | None = None
        if self.samples is not None:
            source, target, *condition = self.samples
            features = getattr(pl_module, "feature_names", None)
            source, target = (
                read_matrix(name, given, features)
                if hasattr(given, "columns") or hasattr(given, "var_names")
                else given
                for name, given in (("source", source), ("target", target))
            )
            with isolate_rng():
                mapped = pl_module.transport(source, *condition)  # type: ignore[operator]
            sets: tuple[Any, Any, Any] = (source, mapped, target)
        elif self._drawn:
            joined = {key: [torch.cat(part) for part in zip(*parts, strict=True)] for key, parts in self._drawn.items()}
            keys = sorted(joined)
            sets = tuple([joined[key][k] for key in keys] for k in range(3))  # type: ignore[assignment]
            if keys == [()]:
                sets = (sets[0][0], sets[1][0], sets[2][0])
            else:
                names = [_name(pl_module, key) for key in keys]
            self._drawn = {}
        else:
            return
        if not trainer.is_global_zero:
            return
        title = f"validation after {trainer.global_step} updates"
        self._figure = plot_map(*sets, conditions=names, title=title, **self.options)
        deaf = sorted({type(logger).__name__ for logger in trainer.loggers if not takes_figures(logger)})
        if deaf:
            self._warned.warn(f"MapFigure: {', '.join(deaf)} takes no figures, so none is logged to it")
        log_figure(trainer.loggers, _KEY, lambda: self._figure, trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = int(state_dict["validations"])


def _conditions(batch: Any) -> Iterator[tuple[tuple[Any, ...], Tensor, Tensor, Tensor | None]]:
    """Yield each condition's key, source and target without rows of weight 0, and the condition itself."""
    several = batch[0].dim() == 3
    source, target, a, b, condition = (
        part if several or part is None else part[None]
        for part in (*batch[:2], *(getattr(batch, n, None) for n in ("source_weights", "target_weights", "condition")))
    )
    for k in range(len(source)):
        x = source[k] if a is None else source[k][a[k] > 0]
        y = target[k] if b is None else target[k][b[k] > 0]
        label = None if condition is None else condition[k]
        key = () if not several else (k,) if label is None else tuple(label.reshape(-1).tolist())
        yield key, x, y, label


def _mapped(
    pl_module: LightningModule, x: Tensor, y: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return source, images and target in the precision of the network."""
    parameter = next((p for p in pl_module.parameters() if p.is_floating_point()), x)
    x, y = x.to(parameter.dtype), y.to(parameter.dtype)
    if condition is not None and condition.is_floating_point():
        condition = condition.to(parameter.dtype)
    if condition is None or not getattr(getattr(pl_module, "map", None), "conditional", False):
        return x, pl_module(x), y
    return x, pl_module(x, condition.expand(len(x), *condition.shape)), y


def _in_original_features(pl_module: LightningModule, *samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    representation: Any = getattr(pl_module, "representation", None)
    if representation is not None and representation.components is None:
        samples = tuple(representation.decode(x) for x in samples)
    first, second, third = (x.detach().cpu() for x in samples)
    return first, second, third


def _name(pl_module: LightningModule, key: tuple[Any, ...]) -> str:
    names = getattr(pl_module, "condition_names", None)
    if names and len(key) == 1 and isinstance(key[0], int) and key[0] < len(names):
        return str(names[key[0]])
    return "condition " + ", ".join(f"{value:g}" for value in key)
