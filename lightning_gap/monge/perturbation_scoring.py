"""The callback that logs the scores of perturbations, condition by condition, in a test."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_gap.monge.border import checked, images
from lightning_gap.monge.held_out import sizes_of_whole
from lightning_gap.monge.scores.perturbation import PerturbationScores
from lightning_gap.monge.training_log import log_scores

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["PerturbationScoring"]


class PerturbationScoring(Callback):
    """Log the five scores of :class:`PerturbationScores` in ``trainer.test``, of each condition beside its floor.

    They are logged as ``lightning_gap/monge/test_perturbation_<score>``, means over the conditions, with ``_floor``,
    and ``.../<condition>`` for each one. Images and targets are in the coordinates of the training, or decoded to the
    raw features. It maps the samples once more, and draws no random numbers.

    Args:
        raw: Whether to score in the raw features rather than in the coordinates of the training.
        max_samples: See :class:`PerturbationScores`.

    Attributes:
        values: The scores of the last test, by name.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gap import MongeMap, SamplesDataModule
        >>> labels = {"drug": ["A", "B"] * 50, "dose": [1] * 50 + [10] * 50}
        >>> data = SamplesDataModule(torch.randn(90, 2), torch.randn(100, 2), conditions=(None, labels), batch_size=8,
        ...                          test_conditions=["B, 10"])
        >>> scoring = PerturbationScoring()
        >>> trainer = Trainer(max_epochs=1, callbacks=[scoring], logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False)
        >>> model = MongeMap()
        >>> trainer.fit(model, data)
        >>> _ = trainer.test(model, data, verbose=False)
        >>> sorted(name for name in scoring.values if name.endswith("B, 10"))[:3]
        ['drug_signature/B, 10', 'drug_signature_floor/B, 10', 'mmd/B, 10']
    """

    def __init__(self, *, raw: bool = False, max_samples: int = 2048) -> None:
        self.raw = raw
        self.max_samples = max_samples
        self.values: dict[str, float] = {}
        self._scores: PerturbationScores | None = None

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = [str(name) for name in getattr(getattr(trainer, "datamodule", None), "condition_names", ())]
        self._scores = PerturbationScores(max_samples=self.max_samples, conditions=names or None).to(pl_module.device)

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: "MongeMap",  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._scores is not None
        b = checked(pl_module, batch)
        with torch.no_grad():
            mapped = images(pl_module, b.source, b.condition)
        encoding = pl_module.representation if self.raw else None
        sets = {"source": b.source, "mapped": mapped, "target": b.target, "target_again": b.target_again}
        if encoding is not None:
            sets = {name: None if x is None else encoding.decode(x).to(x.dtype) for name, x in sets.items()}
        source, mapped_, target = (sets.pop(name) for name in ("source", "mapped", "target"))
        assert source is not None
        assert mapped_ is not None
        assert target is not None
        self._scores.update(
            source, mapped_, target, source_weights=b.source_weights, target_weights=b.target_weights,
            parts_of=sizes_of_whole(pl_module, b), condition=_labels(trainer, b.condition), **sets,
        )  # fmt: skip

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scores is None or not self._scores.update_called:
            return
        values = self._scores.compute()
        self._scores = None
        self.values = {name: float(value) for name, value in values.items()}
        log_scores(pl_module, "test", {f"perturbation_{name}": value for name, value in values.items()})


def _labels(trainer: Trainer, condition: Tensor | None) -> Tensor | None:
    """Return the labels of conditions that are vectors, by those of the data module."""
    vectors: Tensor | None = getattr(getattr(trainer, "datamodule", None), "condition_vectors", None)
    if condition is None or not condition.is_floating_point() or vectors is None:
        return condition
    apart = (condition[:, None].double().cpu() - vectors.double()).abs().amax(-1)
    return apart.argmin(1).to(condition.device)
