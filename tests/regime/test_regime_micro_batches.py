"""The gradients of micro-batches: sparse ones, those of loops of one's own, and parameters of every kind."""

import pytest
import torch
from lightning.pytorch import LightningModule
from noise_scale_models import SAMPLES, Aside, Classifier, Complex, Double, Lazy, Mean, Thawed, expected, samples
from regime_runs import run, trainer_of
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GradientNoiseScale, UltraSlowDiffusion
from lightning_gap.regime import LargeBatchRegime, MicroBatchGradients, NoiseScaleEstimate, gradient_moments

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


@pytest.mark.parametrize("factor", [None, 1.0, 64.0])
def test_a_loop_of_ones_own_finds_what_the_callback_finds(factor):
    model, estimate, gradients = Mean(), NoiseScaleEstimate(decay=0.95), MicroBatchGradients()
    with torch.no_grad():
        model.w.copy_(torch.linspace(-1, 1, 3))  # as run() does
    torch.manual_seed(0)
    for _ in range(8):
        for parts in zip(*[iter(model.train_dataloader())] * 4, strict=True):
            model.w.grad = None
            gradients.listen(model.parameters())
            for part in parts:
                (model.training_step(part, 0) * (factor or 1 / 4)).backward()
            estimate.update(*gradients.moments(4, loss_factor=factor))
    assert estimate.measurements == 8 * SAMPLES / 16
    assert estimate.critical_batch_size == pytest.approx(expected(), rel=0.15)
    gradients.remove()
    assert not model.w._backward_hooks


def test_what_a_loop_of_ones_own_is_refused():
    gradients, weight = MicroBatchGradients(), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="0 micro-batches"):
        gradients.moments(4)
    gradients.listen([weight])
    weight.sum().backward()
    with pytest.raises(ValueError, match=r"1 micro-batches .*call listen"):
        gradients.moments(4)
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        gradients.moments(0)
    with pytest.raises(ValueError, match="run one forward"):
        gradients.listen(torch.nn.LazyLinear(2).parameters())


class Words(LightningModule):
    """Two embeddings and a bag, of which one embedding is looked up twice a batch; rows come more than once."""

    def __init__(self, sparse):
        super().__init__()
        self.first, self.second = (torch.nn.Embedding(20, 4, sparse=sparse) for _ in range(2))
        self.bag, self.head = torch.nn.EmbeddingBag(20, 4, mode="sum", sparse=sparse), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        words, y = batch
        hidden = self.first(words[:, 0]) + self.first(words[:, 1]) + self.second(words[:, 2]) + self.bag(words)
        return (self.head(hidden).squeeze(1) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def words(batch):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 20, (64, 3), generator=generator), torch.randn(64, generator=generator)
    return DataLoader(TensorDataset(*samples), batch_size=batch)


def test_sparse_gradients_are_measured_as_dense_ones():
    found = {}
    for sparse in (False, True):
        scale, diffusion = GradientNoiseScale(every_n_updates=1), UltraSlowDiffusion()
        module = Words(sparse)
        run(module, words(8), scale, diffusion, accumulate_grad_batches=2, max_epochs=2)
        found[sparse] = scale.estimate, diffusion.trace["distance"]
    assert found[True][0].measurements == found[False][0].measurements == 8
    for name in ("variance", "square", "total_variance", "total_square"):
        assert getattr(found[True][0], name) == pytest.approx(getattr(found[False][0], name), rel=1e-4)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4)
    plain = Words(True)
    run(plain, words(8), accumulate_grad_batches=2, max_epochs=2)
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 0.05}, {"clip_norm": 1e6}, {"lr_rule": "none", "gradient_noise": "head"}, {"warmup_updates": 3}],
)
def test_the_regime_takes_sparse_gradients_as_dense_ones(options):
    dense, sparse = Words(False), Words(True)
    for module in (dense, sparse):
        run(module, words(16), LargeBatchRegime(8, **options), max_epochs=2)
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [Classifier, Lazy, Aside, Thawed, Complex, Double])
def test_every_measurement_is_of_the_gradients_that_the_optimizer_uses(kind):
    class Twin(GradientNoiseScale):
        """What is in ``.grad`` of the optimizer's parameters, and of each micro-batch by itself."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.parts = [*getattr(self, "parts", []), batch]
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            parts, self.parts = self.parts, []
            before = self.estimate.measurements, self.estimate.total_variance, self.estimate.total_square
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self.estimate.measurements == before[0]:
                return
            weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            squares = []
            for batch in [*parts, [torch.cat(tensors) for tensors in zip(*parts, strict=True)]]:
                gradients = torch.autograd.grad(pl_module.training_step(batch, 0), weights)
                squares.append(sum(gradient.abs().double().square().sum().item() for gradient in gradients))
            expected = gradient_moments(sum(squares[:-1]) / len(parts), squares[-1], 16, 64)
            found = self.estimate.total_variance - before[1], self.estimate.total_square - before[2]
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)

    twin = Twin(every_n_updates=1)
    trainer = trainer_of(twin, accumulate_grad_batches=4, max_epochs=2)
    trainer.fit(kind(), samples(16, 256))
    assert twin.estimate.measurements == trainer.global_step - (kind is Lazy)
