"""Train a network of the paper under a regime that YAML describes, with this package's public callbacks.

    python -m benchmarks.science.large_batch.train fit --config benchmarks/science/large_batch/f1_mnist.yaml \
        --config benchmarks/science/large_batch/columns/ra.yaml --data.path mnist_full.npz

A second ``--config`` overrides the first. ``reproduce.py`` runs all rows of the tables.
"""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningCLI, LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

# Imported so that YAML may call them by their short names.
from benchmarks.science.large_batch.images import Images
from benchmarks.science.large_batch.networks import C1, F1, Phases, ResNet44  # noqa: F401
from lightning_gap import BatchSizeSchedule, GhostBatchNorm, LargeBatchRegime, UltraSlowDiffusion  # noqa: F401


class Classifier(LightningModule):
    """A network under cross entropy.

    Args:
        network: From images (n, c, h, w) to scores (n, classes).
        optimizer: Of the reference run.
        lr_scheduler: Of the reference run, stepped every epoch.
        channels_last: Whether convolutions have their channels last in memory, which is faster.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        network = network.to(memory_format=self._format)
        self.network, self._optimizer, self._lr_scheduler = network, optimizer, lr_scheduler

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of images."""
        return self.network(images.contiguous(memory_format=self._format))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log cross entropy and error, %."""
        scores = self(batch[0]).float()
        self.log("test_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log("test_error", 100 * (scores.argmax(1) != batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        """Return the reference run's."""
        optimizer = self._optimizer(self.parameters())
        return [optimizer], [self._lr_scheduler(optimizer)]


class FreshMomentum(Callback):
    """Momentum that starts anew each epoch: the authors' code makes a new optimizer for each."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the optimizers' states."""
        for optimizer in trainer.optimizers:
            optimizer.state.clear()


class CLI(LightningCLI):
    """One seed for all that is random."""

    def add_arguments_to_parser(self, parser):
        """Name the weights, the order of the images and their augmentation by one seed."""
        parser.link_arguments("seed_everything", "data.seed")


def main(args: ArgsType = None) -> None:
    """Run the application."""
    CLI(Classifier, Images, args=args, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
