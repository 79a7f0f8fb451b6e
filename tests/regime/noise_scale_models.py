"""Modules whose gradients have a noise scale that is known, or that a twin can measure."""

import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = 512


def targets(samples=SAMPLES):
    return 0.5 + 2 * torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))


class Mean(LightningModule):
    """Loss |w - x|^2 / 2: a sample's gradient is w - x, so tr(Sigma) = tr cov(x) and G = w - E[x]."""

    def __init__(self, lr=0.0, batch=4, samples=SAMPLES):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(3))
        self.lr, self.batch, self.samples = lr, batch, samples

    def training_step(self, batch, batch_idx):
        return (self.w - batch[0]).square().sum(1).mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(targets(self.samples)), batch_size=self.batch, shuffle=True)


def expected():
    x, w = targets(), torch.linspace(-1, 1, 3)  # the weights that run() starts from
    return (x.var(0).sum() / (w - x.mean(0)).square().sum()).item()


class Classifier(LightningModule):
    """Fixed weights, so that all of a run measures one number."""

    def __init__(self, *layers):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), *layers, torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def samples(batch, count=2048):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=batch, shuffle=True)


class Lazy(Classifier):
    """Parameters without a shape until the first batch."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LazyLinear(16), torch.nn.ReLU(), torch.nn.LazyLinear(2))


class Aside(Classifier):
    """A weight whose gradient nothing sets to zero, for no optimizer has it."""

    def __init__(self):
        super().__init__()
        self.aside = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.aside

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.0)


class Thawed(Classifier):
    """The first layer is unfrozen, and given to the optimizer, after the first epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.0)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.net[0].parameters())})


class Complex(Classifier):
    """A complex weight."""

    def __init__(self):
        super().__init__()
        self.phase = torch.nn.Parameter(torch.ones(8, dtype=torch.cfloat))

    def training_step(self, batch, batch_idx):
        return super().training_step([(batch[0] * self.phase).real.float(), batch[1]], batch_idx)


class Double(Classifier):
    """Weights in double precision, and data that follow them."""

    def __init__(self):
        super().__init__()
        self.net.double()

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].double(), batch[1]], batch_idx)
