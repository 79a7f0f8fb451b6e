"""Noise scales in dual norms of whole runs and of loops of one's own: slow twins, nothing but observed, resumed."""

import math
from pathlib import Path

import pytest
import torch
from checkered import checkered
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from noise_scale_models import Classifier, Complex, Mean, Thawed, samples, targets
from regime_runs import SaveAt, run, trainer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GradientNoiseScale
from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.regime import DualNoiseScaleEstimate, DualNormGradients, LargeBatchRegime
from lightning_gap.regime.dual_norms import dual_verdict, shrinkage

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")


class Words(nn.Module):
    """A sparse embedding, a convolution, layers, a weight that is not reached."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Embedding(7, 6, sparse=True)
        self.conv, self.norm, self.head = nn.Conv1d(6, 4, 3), nn.LayerNorm(4), nn.Linear(4, 1)
        self.aside = nn.Linear(2, 2)

    def forward(self, words):
        return self.head(self.norm(self.conv(self.places(words).mT).tanh().mean(-1))).squeeze(1)


def whole(gradient):
    return gradient.to_dense().double()


def twin(norm, parts, small_batch):
    """N, the norm of the mean and that of noise, of a list of each part's gradients, by covariances one by one."""
    total = torch.zeros(3, dtype=torch.float64)
    for gradients in zip(*parts, strict=True):
        stacked = torch.stack(gradients)
        count, mean = len(parts), stacked.mean(0)
        if norm == "l1":
            raw, size = (stacked.var(0) * small_batch).sqrt().sum(), mean.abs().sum()
            one, few = shrinkage(1, 1), shrinkage(1, count - 1)
        else:
            flat = stacked.reshape(count, len(mean), -1) if mean.dim() > 1 else stacked.reshape(count, 1, -1)
            flat = flat if flat.shape[1] <= flat.shape[2] else flat.mT
            rows, columns = flat.shape[1:]
            apart = (flat - flat.mean(0)).transpose(0, 1).reshape(rows, -1)
            raw = torch.linalg.matrix_norm(apart, "nuc") * math.sqrt(small_batch / (count - 1))
            size = torch.linalg.matrix_norm(flat.mean(0), "nuc")
            one, few = shrinkage(rows, columns), shrinkage(rows, columns * (count - 1))
        total += torch.stack((raw / few, size, raw / few * one / math.sqrt(small_batch * count)))
    return total.tolist()


@pytest.mark.parametrize("norm", ["l1", "nuclear"])
@pytest.mark.parametrize("factor", [None, 64.0])
def test_measurements_are_those_of_a_slow_twin(norm, factor):
    model, gradients, parts = Words(), DualNormGradients(), []
    words = torch.randint(7, (3, 5, 9), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reached = [parameter for name, parameter in model.named_parameters() if "aside" not in name]
    for part in words:
        loss = (model(part) - part.float().mean(1)).square().mean()
        parts.append([whole(gradient) for gradient in torch.autograd.grad(loss, reached)])
    gradients.listen([optimizer], norm)
    for part in words:
        ((model(part) - part.float().mean(1)).square().mean() * (factor or 1 / 3)).backward()
    found = gradients.moments(5, loss_factor=factor)
    assert found == pytest.approx(twin(norm, parts, 5), rel=1e-4)
    gradients.remove()
    assert not model.head.weight._backward_hooks


@checkered(norm=["l1", "nuclear"], scaled=[False, True])
def test_a_known_noise_scale_is_found(norm, scaled):
    """Of the mean of samples: each coordinate's deviation over samples, at weights that stay."""
    scale = GradientNoiseScale(every_n_updates=1, norm=norm)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))] if scaled else []
    run(Mean(), None, scale, accumulate_grad_batches=8, max_epochs=30, plugins=plugins)
    x, w, estimate = targets(), torch.linspace(-1, 1, 3), scale.estimate
    noise = x.std(0).sum() if norm == "l1" else x.var(0).sum().sqrt()
    assert estimate.total_noise / estimate.measurements == pytest.approx(noise.item(), rel=0.05)
    true = (noise / torch.linalg.vector_norm(w - x.mean(0), 1 if norm == "l1" else 2)).item() ** 2
    low, high = estimate.critical_batch_bounds
    assert 0.9 * low < true < 1.1 * high


@pytest.mark.parametrize("norm", ["l1", "nuclear", "auto"])
def test_it_only_observes(norm):
    class Adam(Classifier):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def outcome(*callbacks):
        torch.manual_seed(1)
        module = Adam(nn.Dropout(0.2))
        trainer = trainer_of(
            *callbacks, LargeBatchRegime(8, lr_rule="none"), accumulate_grad_batches=4, max_epochs=1, logger=False
        )
        trainer.fit(module, samples(8, 256))
        weights = torch.cat([parameter.flatten() for parameter in module.parameters()])
        return weights.tolist(), torch.get_rng_state().tolist(), any(p._backward_hooks for p in module.parameters())

    assert outcome() == outcome(scale := GradientNoiseScale(every_n_updates=3, norm=norm))
    assert scale.estimate.measurements > 2
    assert scale.estimate.norm == ("l1" if norm == "auto" else norm)


@pytest.mark.parametrize("norm", ["l1", "nuclear"])
def test_it_resumes(tmp_path, norm):
    class Ordered(Mean):
        def train_dataloader(self):
            return DataLoader(TensorDataset(targets()), batch_size=16)

    def fresh(norm=norm):
        return GradientNoiseScale(every_n_updates=3, norm=norm)

    options = {"accumulate_grad_batches": 4, "max_epochs": 3}
    run(Ordered(lr=0.1), None, whole := fresh(), save := SaveAt(tmp_path), **options)
    assert whole.estimate.measurements > 5
    for step in save.saved[:-1]:
        run(Ordered(lr=0.1), None, part := fresh(), ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert part.estimate == whole.estimate
    with pytest.warns(UserWarning, match=rf"in the {norm} norm, and this run .* the euclidean one: they begin anew"):
        run(Ordered(lr=0.1), None, other := fresh("auto"), ckpt_path=tmp_path / f"{save.saved[0]}.ckpt", **options)
    assert 0 < other.estimate.measurements < whole.estimate.measurements


def test_another_norm_s_numbers_have_its_name(tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"accumulate_grad_batches": 4, "max_epochs": 1, "logger": logger, "log_every_n_steps": 1}
    run(Mean(), None, GradientNoiseScale(every_n_updates=1, norm="l1"), **options)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]
    names = {name.removeprefix("lightning_gap/regime/") for name in header.split(",") if "lightning_gap" in name}
    assert names == {"updates", "noise_scale_l1", "critical_batch_size_l1", "batch_over_critical_l1"}


def test_the_verdict_names_the_norm(capsys):
    scale = GradientNoiseScale(every_n_updates=2, norm="l1")
    run(Mean(), None, scale, LargeBatchRegime(4, lr_rule="none"), accumulate_grad_batches=4, max_epochs=2)
    said = " ".join(capsys.readouterr().out.split())
    early, late = said.partition("Gradient noise scale after 19 updates:")[2].split("Gradient noise scale:")
    assert "in the l1 norm" in early
    assert dual_verdict(16, scale.estimate) in late
    assert "times its updates" not in said  # which follows in the Euclidean norm alone


def test_parameters_count_in_their_optimizers_norm_and_length_of_step():
    torch.manual_seed(0)
    matrix, other = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(3))
    muon, adamw = torch.optim.Muon([matrix], lr=0.02), torch.optim.AdamW([other], lr=0.001)
    parts = [[torch.randn(8, 2), torch.randn(3)] for _ in range(3)]

    def found(optimizers, norm, parameters):
        gradients = DualNormGradients()
        gradients.listen(optimizers, norm)
        for part in parts:
            for parameter, value in zip((matrix, other), part, strict=True):
                if parameter in parameters:
                    (parameter * value).sum().backward()
        numbers = torch.tensor(gradients.moments(4, loss_factor=1.0))
        gradients.remove()
        matrix.grad = other.grad = None
        return numbers

    both = found([muon, adamw], "auto", {matrix, other})
    alone = found([muon], "nuclear", {matrix}), found([adamw], "l1", {other})
    length = 0.02 * math.sqrt(8 / 2)  # Muon's step of a tall matrix is as much longer
    torch.testing.assert_close(both, alone[0] + alone[1] * 0.001 / length)
    for group in (*muon.param_groups, *adamw.param_groups):
        group["lr"] = 0.0  # as at the start of a warm-up
    torch.testing.assert_close(found([muon, adamw], "auto", {matrix, other}), alone[0] + alone[1])


def test_groups_and_parameters_that_come_later_are_heard():
    scale = GradientNoiseScale(every_n_updates=1, norm="nuclear")
    trainer_of(scale, accumulate_grad_batches=4, max_epochs=2).fit(Thawed(), samples(8, 256))
    assert scale.estimate.measurements == 16
    scale = GradientNoiseScale(every_n_updates=1, norm="l1")
    trainer_of(scale, accumulate_grad_batches=4, max_epochs=1).fit(Complex(), samples(8, 256))
    assert scale.estimate.measurements == 8
    assert scale.estimate.total_noise > 0


def test_an_incomplete_last_window_of_one_is_left_out():
    scale = GradientNoiseScale(every_n_updates=1, norm="l1")
    run(Mean(samples=36), None, scale, accumulate_grad_batches=4, max_epochs=2)  # windows of 4, 4 and 1 batches
    assert scale.estimate.measurements == 4


def test_refusals():
    class Several(Mean):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class Both(Classifier):
        def configure_optimizers(self):
            first, second = list(self.net[0].parameters()), list(self.net[2].parameters())
            return torch.optim.SGD([{"params": first}, {"params": second, "gradient_norm": "l1"}], lr=0.1)

    for module, options, run_options, message in (
        (Mean(), {"norm": "l1"}, {}, r"norm='l1' needs the gradients of micro-batches .* accumulate_grad_batches of 2"),
        (Mean(), {"norm": "nuclear", "source": "examples"}, {"accumulate_grad_batches": 2}, "norm='euclidean'"),
        (Several(), {"norm": "auto"}, {"accumulate_grad_batches": 2}, "the norm in which LBFGS descends is not known"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            run(module, None, GradientNoiseScale(**options), **run_options)
    ghosts = Classifier(GhostBatchNorm1d(16, ghost_batch_size=4))
    trainer = trainer_of(GradientNoiseScale(norm="l1", source="ghosts"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="single examples or ghosts only Euclidean norms"):
        trainer.fit(ghosts, samples(16, 64))
    trainer = trainer_of(GradientNoiseScale(norm="auto"), max_epochs=1, accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="no norm belongs to both: pass norm="):
        trainer.fit(Both(), samples(16, 64))
    with pytest.raises(ValueError, match="norm must be one of euclidean, l1, nuclear, auto, got 'l2'"):
        GradientNoiseScale(norm="l2")


def test_what_a_loop_of_ones_own_is_refused():
    gradients, weight = DualNormGradients(), nn.Parameter(torch.ones(2))
    adam, sgd = torch.optim.Adam([weight]), torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ValueError, match="use MicroBatchGradients, or name a norm"):
        gradients.listen([sgd])
    with pytest.raises(ValueError, match="norm must be one of auto, l1, nuclear"):
        gradients.listen([adam], "euclidean")
    sgd.param_groups[0]["gradient_norm"] = "max"
    with pytest.raises(ValueError, match="of a group must be 'euclidean', 'l1' or 'nuclear', got 'max'"):
        gradients.listen([sgd])
    gradients.listen([adam])
    weight.sum().backward()
    with pytest.raises(ValueError, match=r"1 micro-batches .* shows no noise: call listen"):
        gradients.moments(4)
    with pytest.raises(ValueError, match="micro_batch_size"):
        gradients.moments(0)
    with pytest.raises(ValueError, match="run one forward"):
        gradients.listen([torch.optim.Adam(nn.LazyLinear(2).parameters())], "l1")
    assert DualNoiseScaleEstimate(decay=0.9).norm == "l1"


def by_samples(net, x, y):
    """N and the norm of the mean gradient of both norms, from the gradient of every sample by itself."""

    def loss(parameters, one, label):
        return nn.functional.cross_entropy(torch.func.functional_call(net, parameters, (one[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    found = {"l1": torch.zeros(2, dtype=torch.float64), "nuclear": torch.zeros(2, dtype=torch.float64)}
    for gradients in every.values():
        g = gradients.double()
        found["l1"] += torch.stack((g.std(0).sum(), g.mean(0).abs().sum()))
        g = g if g.dim() > 2 else g[:, None]
        g = g if g.shape[1] <= g.shape[2] else g.mT
        noise = g - g.mean(0)
        covariance = torch.einsum("bij,bkj->ik", noise, noise) / (len(g) - 1)
        root = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt().sum()
        found["nuclear"] += torch.stack((root, torch.linalg.matrix_norm(g.mean(0), "nuc")))
    return found


@pytest.mark.parametrize(
    ("norm", "directions", "parts", "noise", "scale"),
    [
        ("l1", 16, 4, 1.0, 0.95),
        ("l1", 2, 4, 0.95, 1.0),
        ("nuclear", 16, 4, 0.95, 1.0),
        ("nuclear", 2, 4, 0.9, 1.0),
        ("nuclear", 2, 16, 0.95, 1.1),
    ],
)
def test_a_networks_noise_scale_is_that_of_its_samples(norm, directions, parts, noise, scale):
    """Of a network that has begun to train; inputs of few directions make noise of fewer than white noise has."""
    torch.manual_seed(0)
    x = torch.randn(1024, directions) @ torch.randn(directions, 16) + 0.1 * torch.randn(1024, 16)
    y = (x @ torch.randn(16, 5) + torch.randn(1024, 5)).argmax(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def backward(size, share=1.0):
        chosen = torch.randint(len(x), (size,))
        (nn.functional.cross_entropy(net(x[chosen]), y[chosen]) * share).backward()

    for _ in range(60):
        optimizer.zero_grad()
        backward(32)
        optimizer.step()
    gradients, estimate = DualNormGradients(), DualNoiseScaleEstimate(decay=0.95, norm=norm)
    for _ in range(60):
        optimizer.zero_grad()
        gradients.listen([optimizer], norm)
        for _ in range(parts):
            backward(256 // parts, 1 / parts)
        estimate.update(*gradients.moments(256 // parts))
    true_noise, true_size = by_samples(net, x, y)[norm].tolist()
    low, high = estimate.critical_batch_bounds
    found = (estimate.total_noise / 60 / true_noise, estimate.critical_batch_size * (true_size / true_noise) ** 2)
    assert low < (true_noise / true_size) ** 2 < high
    assert found == pytest.approx((noise, scale), rel=0.2)
