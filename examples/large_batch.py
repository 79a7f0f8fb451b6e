"""An application of your own: any LightningModule under LightningCLI, with this package's callbacks in its YAML.

    python examples/large_batch.py fit --config examples/large_batch.yaml

The images are scikit-learn's 1797 handwritten digits; the extra `data` brings them.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Imported so that YAML may call them by their short names.
from lightning_gap import GhostBatchNorm, GradientNoiseScale, LargeBatchRegime, UltraSlowDiffusion  # noqa: F401


class Digits(LightningDataModule):
    """The digits, every fifth of them for validation.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
        held_out = torch.arange(len(x)) % 5 == 0
        self.train, self.val = TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images."""
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images for validation."""
        return DataLoader(self.val, 512)


class Classifier(LightningModule):
    """A perceptron with batch normalization.

    Args:
        width: Units of its hidden layers.
        learning_rate: Of SGD, at the reference batch.
        milestones: Epochs of the reference run after which it falls to a tenth.
    """

    def __init__(self, width: int = 64, learning_rate: float = 0.1, milestones: tuple[int, ...] = (15, 20)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log cross entropy and accuracy."""
        scores = self.net(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(scores, batch[1]))
        self.log("val_accuracy", (scores.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        """Return SGD with momentum, and its steps."""
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams["learning_rate"], momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.hparams["milestones"]))]


def main(args: ArgsType = None) -> None:
    """Run the application."""
    LightningCLI(Classifier, Digits, args=args)


if __name__ == "__main__":
    main()
