"""The benchmarks that ``performance.py`` runs: of speed and memory, and of accuracy."""

from dataclasses import dataclass

__all__ = ["NEEDS", "PARTS", "SCIENCE", "SPEED", "Benchmark"]

NEEDS = {
    "peers": "OTT-JAX, POT and GeomLoss (`--peers PYTHON`)",
    "data": "the data (`--data FOLDER`)",
    "compiler": "a C++ compiler",
    "cuda": "a CUDA device",
    "linux": "Linux",
}

# Commands that are parts of a benchmark: pages from its logs, the run that it starts, the peer's half, its data.
PARTS = frozenset(
    {
        "science.large_batch.results",
        "science.large_batch.train",
        "science.monge_gap.ott_peer",
        "science.monge_gap.results",
        "science.peers.pairs",
        "science.peers.table",
    }
)


@dataclass(frozen=True)
class Benchmark:
    """A command of this package, and what it is for.

    Attributes:
        arguments: Behind ``python -m benchmarks.``; PEERS and DATA stand for what the options give, OUTPUT for a name
            in the folder of logs.
        measures: In words.
        minutes: Rough, on two cores that do nothing else.
        quick: The arguments of a tiny run.
        needs: Of ``NEEDS``. What needs the peers runs by their Python, unless it hands PEERS on.
        page: Where the results of a benchmark of accuracy are.
        rows: Whether it takes ``--json``.
    """

    arguments: str
    measures: str
    minutes: float
    quick: str = ""
    needs: tuple[str, ...] = ()
    page: str = ""
    rows: bool = True

    def line(self, quick: bool) -> str:
        """Return the arguments of a whole run, or of a tiny one where there is one."""
        return (quick and self.quick) or self.arguments


GHOST = "speed.ghost_batch_norm"
SPEED = {
    "ghost_op": Benchmark(
        f"{GHOST} op --threads 1 --ghosts 32 128 --repeat 7 --reuse-memory",
        "Ghost BN forward and backward, against BatchNorm and peers' designs", 0.8,
        f"{GHOST} op --threads 1 --ghosts 32 --repeat 3 --shapes 1d", ("linux",),
    ),
    "ghost_threads": Benchmark(
        f"{GHOST} op --threads 2 --ghosts 32 128 --repeat 7 --reuse-memory --shapes channels_last",
        "The same on channels_last images, by two threads and the wall clock", 0.3,
        f"{GHOST} op --threads 2 --ghosts 128 --repeat 1 --shapes channels_last", ("linux",),
    ),
    "ghost_small": Benchmark(
        f"{GHOST} op --threads 1 --ghosts 32 --repeat 40 --shapes small",
        "The same on small batches, where the calls take the time", 0.1,
        f"{GHOST} op --threads 1 --ghosts 32 --repeat 2 --shapes small",
    ),
    "ghost_step": Benchmark(
        f"{GHOST} step --threads 1 --ghosts 32 --repeat 5",
        "A training step with Ghost BN, against BatchNorm", 1.1,
        f"{GHOST} step --threads 1 --ghosts 32 --repeat 1 --models mlp",
    ),
    "ghost_compile": Benchmark(
        f"{GHOST} compile --threads 1 --ghosts 32 --shapes 1d --repeat 5",
        "The same under `torch.compile`", 0.3,
        f"{GHOST} compile --threads 1 --ghosts 1024 --shapes 1d --repeat 1", ("compiler",),
    ),
    "ghost_memory": Benchmark(
        f"{GHOST} memory --ghosts 32 --shapes 16x16",
        "Highest memory of Ghost BN", 0.6,
        f"{GHOST} memory --ghosts 1024 --shapes 16x16", ("linux",),
    ),
    "ghost_limit": Benchmark(
        f"{GHOST} limit --threads 1 --ghosts 32 128 --shapes 1d --repeat 5",
        "Ghost BN against the passes over memory that torch's kernels need for it", 0.1,
        f"{GHOST} limit --threads 1 --ghosts 128 --shapes 1d --repeat 1",
    ),
    "ghost_convert": Benchmark(
        f"{GHOST} convert", "Converting a ResNet-50", 0.1, f"{GHOST} convert --repeat 2",
    ),
    "ghost_gpu": Benchmark(
        f"{GHOST} op --device cuda --threads 1 --ghosts 32 128",
        "Ghost BN on ResNet-50's layers, on a GPU", 1, f"{GHOST} op --device cuda --threads 1 --ghosts 128 --repeat 2",
        ("cuda",),
    ),
    "ghost_gpu_compile": Benchmark(
        f"{GHOST} compile --device cuda --threads 1 --ghosts 32 128",
        "The same under `torch.compile`, on a GPU", 3,
        f"{GHOST} compile --device cuda --threads 1 --ghosts 128 --repeat 2", ("cuda", "compiler"),
    ),
    "regime": Benchmark(
        "speed.regime_overhead --updates 8 --turns 3",
        "`LargeBatchRegime` and `GradientNoiseScale`, beside an update of ResNet-18", 1,
        "speed.regime_overhead --updates 3 --turns 1",
    ),
    "noise_scale": Benchmark(
        "speed.noise_scale_overhead --turns 15",
        "Norms of single examples' gradients, of ghosts', and dual norms, beside the updates of four models", 1,
        "speed.noise_scale_overhead --turns 2 --models mlp",
    ),
    "diffusion": Benchmark(
        "speed.diffusion_overhead --steps 12",
        "`UltraSlowDiffusion` in 10,000 updates of ResNet-18", 0.4, "speed.diffusion_overhead --steps 3 --batch-size 2",
    ),
    "distance": Benchmark(
        "speed.diffusion_distance --repeats 40",
        "One distance of the weights, against reading them once", 0.3, "speed.diffusion_distance --repeats 1",
    ),
    "engine_ott": Benchmark(
        "speed.transport_engine --sizes 256 1024 --seconds 1",
        "Value and gradient of a Monge gap, against OTT-JAX", 2.2,
        "speed.transport_engine --sizes 64 --dims 2 --shares 0.1 --seconds 0.05", ("peers",),
    ),
    "engine_small_epsilon": Benchmark(
        "speed.transport_engine --sizes 1024 --dims 2 --shares 0.001 --seconds 1",
        "The same at a relative ε of 0.001", 5,
        "speed.transport_engine --sizes 64 --dims 2 --shares 0.01 --seconds 0.05", ("peers",),
    ),
    "engine_geomloss": Benchmark(
        "speed.transport_engine --peer geomloss --sizes 512 --dims 2 --seconds 1",
        "Value and gradient of a Monge gap, against GeomLoss", 1.7,
        "speed.transport_engine --peer geomloss --sizes 64 --dims 2 --shares 0.1 --seconds 0.05",
    ),
    "engine_pot": Benchmark(
        "speed.transport_engine --peer pot --sizes 256 1024 --dims 2 --seconds 1",
        "Value and gradient of a Monge gap, against POT", 1,
        "speed.transport_engine --peer pot --sizes 64 --dims 2 --shares 0.1 --seconds 0.05", ("peers",),
    ),
    "training": Benchmark(
        "speed.transport_training --threads 1 --iterations 120 --batches 256 1024 --gaps l2 l22",
        "A training step of a map, against OTT-JAX's estimator", 1.6,
        "speed.transport_training --threads 1 --iterations 4 --block 2 --batches 64 --gaps l22", ("peers",),
    ),
    "equal_quality_moons": Benchmark(
        "speed.map_to_equal_quality moons --threads 1 --peers PEERS",
        "`MongeMap` and OTT-JAX's estimator to equal quality, like for like", 1.8,
        "speed.map_to_equal_quality moons --peers PEERS --seeds 0 --steps 4 --every 2", ("peers",),
    ),
    "equal_quality_w2": Benchmark(
        "speed.map_to_equal_quality w2 --dims 8 --limit 120 --peers PEERS --data DATA",
        "The same on the Wasserstein-2 benchmark, each side's recipe", 4.8,
        "speed.map_to_equal_quality w2 --dims 2 --seeds 0 --steps 2 --every 1 --peers PEERS --data DATA",
        ("peers", "data"),
    ),
    "shell": Benchmark(
        "speed.map_training_shell step --steps 100",
        "`MongeMap` under the Trainer, against a plain loop", 0.6,
        "speed.map_training_shell step --batches 32:2 --steps 30",
    ),
    "large_step": Benchmark(
        "speed.map_training_shell large --batches 4096:2 16384:2",
        "One step on a large batch: seconds and memory", 0.5, "speed.map_training_shell large --batches 128:2",
    ),
    "maps": Benchmark(
        "speed.map_cost",
        "What each map costs, against a residual network", 0.2, "speed.map_cost --repeats 2 --batch 16",
    ),
    "command": Benchmark(
        "speed.transport_command --rows 1_000_000 --threads 1",
        "`lightning-gap transport`, against the bare network", 0.7,
        "speed.transport_command --rows 2000 --repeats 1 --threads 1",
    ),
    "command_start": Benchmark(
        "speed.command_start --repeats 3", "What the command line takes before it does anything", 0.5,
        "speed.command_start --repeats 1",
    ),
    "scale": Benchmark(
        "speed.transport_scale --solvers dense fused blocked --sizes 1000 3000 10000 30000 --dims 2 --limit 100",
        "Time and memory against n: our dense, fused and blocked solvers", 2,
        "speed.transport_scale --solvers dense --sizes 100 --dims 2",
    ),
    "scale_keops": Benchmark(
        "speed.transport_scale --solvers online --sizes 1000 3000 --dims 2 --limit 100",
        "Time and memory against n: GeomLoss on KeOps", 0.4,
        "speed.transport_scale --solvers online --sizes 400 --dims 2", ("compiler",),
    ),
    "scale_million": Benchmark(
        "speed.transport_scale --solvers multiscale --sizes 10000 100000 1000000 --dims 2 --limit 300",
        "Time and memory to n = 10⁶: GeomLoss's multiscale solver on KeOps", 1.7,
        "speed.transport_scale --solvers multiscale --sizes 400 --dims 2", ("compiler",),
    ),
    "scale_ott": Benchmark(
        "speed.transport_scale --solvers ott --sizes 1000 3000 10000 --dims 2 --limit 100",
        "Time and memory against n: OTT-JAX", 3,
        "speed.transport_scale --solvers ott --sizes 100 --dims 2", ("peers",),
    ),
    "scale_dims": Benchmark(
        "speed.transport_scale --solvers fused --sizes 10000 30000 100000 --dims 2 10 32 --tolerance 0.03 "
        "--reference 0.001 --limit 300",
        "Time, memory and errors to n = 10⁵ in 2, 10 and 32 dimensions", 5,
        "speed.transport_scale --solvers fused --sizes 300 --dims 2 --tolerance 0.03 --reference 0.001", ("compiler",),
    ),
    "exact": Benchmark(
        "speed.transport_exact --sizes 1000 2000 --alone 10000 --dims 2 10",
        "Exact transport, against SciPy's assignment and POT's network simplex, and beyond their sizes", 2.2,
        "speed.transport_exact --sizes 100 --alone 900 --dims 2", ("compiler",),
    ),
    "scale_roofline": Benchmark(
        "speed.transport_scale --roofline --sizes 100000 --dims 2 10 32 "
        "--costs sqeuclidean euclidean cosine 'pnorm(p=1.5)'",
        "Passes over n² pairs beside what bounds them on the machine", 2,
        "speed.transport_scale --roofline --sizes 2000 --dims 2", ("compiler",),
    ),
    "scale_passes": Benchmark(
        "speed.transport_scale --pass-rows 1000 --sizes 100000 --dims 2 10 32 "
        "--costs sqeuclidean euclidean cosine 'pnorm(p=1.5)'",
        "One pass over n² pairs: our compiled passes, our blocks, and KeOps", 2,
        "speed.transport_scale --pass-rows 20 --sizes 1000 --dims 2", ("compiler",),
    ),
    "scale_passes_gpu": Benchmark(
        "speed.transport_scale --device cuda --pass-rows 20000 --sizes 100000 1000000 --dims 2 10 64 "
        "--costs sqeuclidean euclidean cosine 'pnorm(p=1.5)' geodesic",
        "One pass over n² pairs on a GPU: Triton's passes, FlashSinkhorn's, and our blocks", 3,
        "speed.transport_scale --device cuda --pass-rows 1000 --sizes 10000 --dims 2", ("cuda", "compiler"),
    ),
}  # fmt: skip
SCIENCE = {
    "gap_gradient": Benchmark(
        "science.gap_gradient gradient", "How exact the gap's gradient is", 1, page="../transport.md", rows=False
    ),
    "schedules": Benchmark(
        "science.regime_idioms",
        "Where a schedule's length comes from, under the regime", 8, page="../schedules.md", rows=False,
    ),
    "laws": Benchmark(
        "science.diffusion_laws",
        "How often the right law of diffusion is found", 15, page="../diffusion.md", rows=False,
    ),
    "mnist": Benchmark(
        "science.diffusion_mnist --data DATA/mnist_full.npz --results OUTPUT.jsonl",
        "Figure 2 of the paper, F1 on MNIST", 300, needs=("data",), page="../diffusion.md", rows=False,
    ),
    "processes": Benchmark(
        "speed.map_training_shell ddp", "Losses of several processes, against one", 2, page="../monge_map.md"
    ),
    "epsilon_lambda": Benchmark(
        "science.epsilon_lambda", "What ε and λ do to a map", 15, page="../howto_epsilon_lambda.md", rows=False
    ),
    "structured": Benchmark(
        "science.structured_maps --steps 300", "Structured maps against a free one", 60, page="../maps.md", rows=False
    ),
    "ensembles": Benchmark(
        "science.map_ensembles", "Whether the spread of an ensemble tells of its error", 5,
        "science.map_ensembles --dims 2 --maps residual --seeds 0 1 --steps 5",
        page="../howto_trajectories.md", rows=False,
    ),
    "cells": Benchmark(
        "science.map_real_data --data DATA",
        "Maps of real cells", 60, needs=("data",), page="../real_cells.md", rows=False,
    ),
    "pertpy": Benchmark(
        "science.pertpy_distances --data DATA", "Distances between populations of cells, against pertpy's", 1,
        "science.pertpy_distances", ("peers", "data"), page="../scores.md", rows=False,
    ),
    "default_maps": Benchmark(
        "science.default_maps --data DATA",
        "The default map on real data, against what takes no training", 60, needs=("data",), page="default_maps.md",
        rows=False,
    ),
    "few_samples": Benchmark(
        "science.small_tables --data DATA",
        "How long the default learning rate is to last where samples are few", 120, needs=("data",),
        page="default_maps.md", rows=False,
    ),
    "unseen": Benchmark(
        "science.unseen_conditions sachs kang --data DATA",
        "Conditions that no map was trained on", 30, needs=("data",), page="../real_cells.md", rows=False,
    ),
    "known_maps": Benchmark(
        "science.transport_maps w2 gaussians line sphere --data DATA",
        "Learned maps against known ones", 120, needs=("data",), page="../transport_maps.md", rows=False,
    ),
    "w2_maps": Benchmark(
        "science.w2_maps default --data DATA",
        "The default map on the Wasserstein-2 pairs", 30, needs=("data",), page="../transport_maps.md", rows=False,
    ),
    "known_costs": Benchmark(
        "science.known_costs",
        "The same for costs other than the squared one", 100, page="../transport_maps.md", rows=False,
    ),
    "certificates": Benchmark(
        "science.certificates --data DATA", "Bounds of a map's error against the truth", 40,
        needs=("data",), page="../maps.md", rows=False,
    ),
    "auto_rule": Benchmark(
        "science.large_batch.auto_rule --log OUTPUT.jsonl", "The rule that chooses, beside √κ and none", 10,
        "science.large_batch.auto_rule --log OUTPUT.jsonl --seeds 0", page="../regime.md", rows=False,
    ),
    "noisy_quadratic": Benchmark(
        "science.large_batch.noisy_quadratic", "Which rules keep the stationary covariance of weights and average", 30,
        "science.large_batch.noisy_quadratic --only SGD", page="../regime.md",
    ),
    "dual_norms": Benchmark(
        "science.large_batch.dual_norms", "The noise scale in dual norms, against every sample's gradient", 0.5,
        "science.large_batch.dual_norms --measurements 2", page="../regime.md", rows=False,
    ),
    "large_batches": Benchmark(
        "science.large_batch.reproduce --data f1_mnist=DATA/mnist_full.npz --only f1_mnist --runs OUTPUT --logs OUTPUT",
        "The tables of Hoffer et al., F1 on MNIST", 390, needs=("data",), page="large_batch.md", rows=False,
    ),
    "potential": Benchmark(
        "science.large_batch.potential f1_mnist --path DATA/mnist_full.npz --radius 30 --logs OUTPUT",
        "How the loss spreads around the first weights", 10, needs=("data",), page="large_batch.md", rows=False,
    ),
    "characters": Benchmark(
        "science.large_batch.characters --out OUTPUT.jsonl",
        "A character transformer under AdamW: larger batches, and batches that grow", 20,
        "science.large_batch.characters --out OUTPUT.jsonl --seeds 0 --ratios 32",
        page="large_batch.md", rows=False,
    ),
    "steps_to_target": Benchmark(
        "science.large_batch.steps_to_target",
        "Updates to a target at a batch that was left out", 5, page="../critical_batch.md", rows=False,
    ),
    "branches": Benchmark(
        "science.large_batch.critical_branches",
        "The critical batch along a training, by branches", 2, page="../critical_batch.md", rows=False,
    ),
    "gap_suite": Benchmark(
        "science.monge_gap.suite --runs OUTPUT --logs OUTPUT",
        "The two-dimensional suite of Uscidda and Cuturi", 40, page="monge_gap.md", rows=False,
    ),
    "gap_ablations": Benchmark(
        "science.monge_gap.ablations --data DATA --logs OUTPUT",
        "What each number of the objective does", 15, needs=("data",), page="monge_gap.md", rows=False,
    ),
    "peer_maps": Benchmark(
        "science.peers.maps w2 --data DATA --out OUTPUT.jsonl",
        "Other libraries' maps on the Wasserstein-2 pairs", 45, needs=("peers", "data"),
        page="maps_against_peers.md", rows=False,
    ),
}  # fmt: skip
