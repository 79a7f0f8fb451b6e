"""Value and gradient of one optimal transport against the number of samples: seconds, memory, accuracy.

    python -m benchmarks.speed.transport_scale [--sizes 1000 ... 100000] [--solvers dense blocked] [--limit 600]
        [--tolerance 1e-5] [--reference 1e-3]
    python -m benchmarks.speed.transport_scale --pass-rows 500 [--sizes 100000 1000000] [--device cuda]
    python -m benchmarks.speed.transport_scale --roofline [--dims 2 10 32]

Each measurement has a process of its own, which solves a tiny problem first (what is compiled is compiled then) and
then the one that is timed, repeatedly where it is short. Its memory is how far the process's peak rises meanwhile; what
fits into the memory that the imports once used shows as 0. The marginal error is the L1 distance of the plan's two
marginals from the weights; where the solver does not tell, two more passes over all pairs find out, outside of the
times, on a part of the rows where there are many. A solver that meets ``--limit``, or refuses a size, is left out at
larger ones. ``--reference`` solves the largest size again to that tolerance, and tells the relative errors of value and
gradient against it.

The solver "online" is GeomLoss on KeOps, and "multiscale" its coarse-to-fine solver for up to three dimensions. These
and "fused" need a C++ compiler: leave them out of ``--solvers`` where there is none. "ott" is OTT-JAX, run by
``--peers`` and compiled before: costs in memory up to 5000 samples, and formed anew in each sweep beyond; its default
updates, to the same marginal error.

``--pass-rows`` times what an exact solver does again and again where a whole solve would take hours: one soft minimum
over all pairs, of which it does so many rows, by our compiled passes, by our blocks, and on a CPU by KeOps for squared
distances, in turns: billions of pairs a second. With ``--device cuda`` the compiled passes are Triton's, beside them
is FlashSinkhorn's for squared distances, where it is installed (``pip install lightning_gap[flash]``). ``--roofline``
sets the passes of a CPU beside what the machine can do: pairs a second if a pass did no more than one exponential a
pair (torch's, in cache), or d multiply-adds a pair (at the rate of large products of matrices), or read a matrix of
costs (the memory's bandwidth over four bytes). The plot needs matplotlib (``pip install lightning_gap[plots]``).
"""

import argparse
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine_limits import exponentials_a_second, gigabytes_a_second, multiply_adds_a_second
from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from benchmarks.processes import run_module
from benchmarks.speed.transport_engine import samples
from lightning_gap.monge.costs import resolve
from lightning_gap.monge.ot.result import OTResult
from lightning_gap.monge.ot.solve import choose_solver, optimal_transport
from lightning_gap.monge.ot.solvers.blocks import soft_minimum
from lightning_gap.monge.ot.solvers.fused.flash_passes import FlashPasses
from lightning_gap.monge.ot.solvers.fused.kernel import passes_on

SOLVERS = ("dense", "fused", "blocked", "online", "multiscale", "ott")
OTT_IN_MEMORY = 5000
SIZES = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
# Short measurements are repeated for this many seconds, and as often at most.
ENOUGH_SECONDS, ENOUGH_TIMES = 1.0, 7
# Above so many samples the marginals are checked on so many rows.
CHECKED_BELOW, CHECKED_ROWS = 100_000, 2000


@dataclass(frozen=True)
class Measurement:
    """What one process found."""

    n: int
    d: int
    solver: str
    times: list[float]
    peak_mb: float
    marginal_error: float
    sweeps: int
    value_error: float = math.nan
    gradient_error: float = math.nan

    @property
    def seconds(self) -> float:
        """Return the median."""
        return float(np.median(self.times))


def solve(x: Tensor, y: Tensor, solver: str, share: float, tolerance: float) -> tuple[OTResult, Tensor]:
    """Find value and gradient."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    result = optimal_transport(x, y, solver=solver, relative_epsilon=share, tolerance=tolerance)
    result.value.backward()
    assert x.grad is not None
    return result, x.grad


def peak_mb() -> float:
    """Return the most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / (1 << 10)


def marginal_error(x: Tensor, y: Tensor, result: OTResult) -> float:
    """Return the L1 distance of the plan's marginals from uniform weights."""
    if not math.isnan(result.marginal_error):
        return result.marginal_error
    cost = result.problem.cost
    F, G = result.f / result.epsilon, result.g / result.epsilon
    errors = []
    for (rows, own), (columns, other) in (((x, F), (y, G)), ((y, G), (x, F))):
        # The samples are independent draws: of many, the first tell what all would.
        some = slice(CHECKED_ROWS if len(rows) > CHECKED_BELOW else None)
        weights = torch.full_like(other, 1 / len(other))
        answer = soft_minimum(rows[some], columns, weights, other, cost, result.epsilon)
        errors.append(float(torch.expm1(own[some] - answer).abs().mean()))
    return sum(errors)


def timed(call: Callable[[], object], limit: int) -> tuple[list[float], float]:
    """Return the seconds of some calls, and how far they raise the peak of memory; a signal ends them at the limit."""
    before, times = peak_mb(), list[float]()
    signal.alarm(limit)
    while not times or (sum(times) < ENOUGH_SECONDS and len(times) < ENOUGH_TIMES):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    signal.alarm(0)
    return times, peak_mb() - before


def measure(args: argparse.Namespace, n: int, d: int, solver: str, reference: float) -> Measurement:
    """Measure in this process."""
    x, y = (torch.from_numpy(points) for points in samples(n, d))
    share, found = args.relative_epsilon, []
    if solver == "ott":
        return measure_ott(args, x, y)
    solve(x[:300], y[:300], solver, share, args.tolerance)
    times, peak = timed(lambda: found.append(solve(x, y, solver, share, args.tolerance)), args.limit)
    result, gradient = found[-1]
    errors = [math.nan, math.nan]
    if reference:
        exact, right = solve(x, y, solver, share, reference)
        errors = [abs(float(result.value / exact.value) - 1), float((gradient - right).norm() / right.norm())]
    return Measurement(n, d, solver, times, peak, marginal_error(x, y, result), result.iterations, *errors)


def measure_ott(args: argparse.Namespace, x: Tensor, y: Tensor) -> Measurement:
    """Measure OTT-JAX, compiled before, on the same problem to the same marginal error."""
    import jax
    import jax.numpy as jnp
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    # Ours are halves of squared distances: twice epsilon for theirs.
    epsilon = 2 * args.relative_epsilon * resolve("sqeuclidean").mean(x, y)
    batch = None if len(x) <= OTT_IN_MEMORY else 1024
    solver = Sinkhorn(threshold=args.tolerance, max_iterations=10_000, lse_mode=True)

    def value(x: object, y: object) -> tuple[object, tuple[object, object]]:
        out = solver(LinearProblem(PointCloud(x, y, epsilon=epsilon, batch_size=batch)))
        return out.reg_ot_cost, (out.n_iters, out.errors)

    step = jax.jit(jax.value_and_grad(value, has_aux=True))
    points = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    signal.alarm(args.limit)
    (_, (sweeps, errors)), _ = jax.block_until_ready(step(*points))
    times, peak = timed(lambda: jax.block_until_ready(step(*points)), args.limit)
    last = np.asarray(errors)
    return Measurement(len(x), x.shape[1], "ott", times, peak, float(last[last >= 0][-1]), int(sweeps))


def measure_apart(args: argparse.Namespace, n: int, d: int, solver: str) -> Measurement | str:
    """Measure in a process of its own; return why not where it was not to be."""
    reference = args.reference if n == max(args.sizes) else 0.0
    words = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in ("relative-epsilon", "tolerance", "limit")]
    words += ["--measure", str(n), str(d), solver, str(reference)]
    python = args.peers if solver == "ott" and args.peers else sys.executable
    done = run_module("benchmarks.speed.transport_scale", *words, python=python, capture_output=True)
    if done.returncode == -signal.SIGALRM:
        return f"not done within {args.limit} s"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        return last[0]
    return Measurement(**json.loads(done.stdout.strip().splitlines()[-1]))


def passes(n: int, d: int, rows: int, share: float, name: str, device: str, repeats: int = 5) -> Row:
    """Return speeds of one soft minimum of n rows against n columns, from some of the rows, by each."""
    x, y = (torch.from_numpy(points).to(device) for points in samples(n, d))
    cost = resolve(name)
    if name == "geodesic":
        x, y = (points / points.norm(dim=1, keepdim=True) for points in (x, y))
    epsilon = share * cost.mean(x[:2000], y[:2000])
    size = float(cost.pairwise(x[:2000], y[:2000]).max())
    some, G = x[:rows], torch.zeros(n, device=device)
    weights = torch.full_like(G, 1 / n)
    fused = passes_on(x.device)(some, y, cost, epsilon, size)

    flash = FlashPasses(some, y, cost, epsilon, size) if takes_flash(name, some, y) else None
    calls: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: fused.soft_minimum(G.double(), weights.double())[0],
        "blocked": lambda: soft_minimum(some, y, weights, G, cost, epsilon),
    }
    if flash is not None:
        calls["flash"] = lambda: flash.soft_minimum(G.double(), weights.double())[0]
    if name == "sqeuclidean" and device == "cpu":
        from pykeops.torch import LazyTensor

        logs = LazyTensor((G + weights.log())[None, :, None])

        def keops() -> Tensor:
            pairs = (LazyTensor(some[:, None]) - LazyTensor(y[None])).square().sum(-1)
            return -(logs - pairs / epsilon).logsumexp(dim=1).flatten()

        calls["KeOps"] = keops
    for call in calls.values():  # and all are warm
        torch.testing.assert_close(calls["fused"](), call(), rtol=1e-3, atol=1e-3, check_dtype=False)
    times: dict[str, list[float]] = {by: [] for by in calls}
    for _ in range(repeats):
        for by, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[by].append(time.perf_counter() - start)
    pairs = rows * n / 1e9
    found = {f"{by}, G pairs/s": spread([pairs / seconds for seconds in taken]) for by, taken in times.items()}
    others = {f"{by} / fused": ratios(taken, times["fused"]) for by, taken in times.items() if by != "fused"}
    return {"cost": name, "n": n, "d": d, "rows timed": rows, **found, **others}


def takes_flash(name: str, x: Tensor, y: Tensor) -> bool:
    """Return whether FlashSinkhorn takes samples, and is installed."""
    try:
        return choose_solver("flash", resolve(name), x, y) == "flash"
    except (ValueError, ModuleNotFoundError):
        return False


def synchronize(device: str) -> None:
    """Wait for what a device was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def roofline(args: argparse.Namespace) -> list[Row]:
    """Return passes of each cost beside what bounds a pass on this machine, in billions of pairs a second."""
    exponentials, products = exponentials_a_second(), multiply_adds_a_second()
    read = gigabytes_a_second() / 4
    rows: list[Row] = []
    for d in args.dims:
        bound = 1 / (1 / exponentials + d / products)
        for name in args.costs:
            ours = passes(max(args.sizes), d, 1000, args.relative_epsilon, name, "cpu")["fused, G pairs/s"]
            rows.append({
                "cost": name, "d": d, "fused, G pairs/s": ours, "of torch's rates, %": 100 * ours["median"] / bound,
                "exponentials alone": exponentials, "multiply-adds alone": products / d, "a matrix read": read,
            })  # fmt: skip
    return rows


def exponent(found: list[Measurement]) -> tuple[float, float]:
    """Return the slope of log seconds against log n over the upper half of the sizes, and where that begins."""
    sizes = np.array([m.n for m in found], dtype=float)
    begin = min(math.sqrt(sizes[0] * sizes[-1]), float(sizes[-2]))
    upper = sizes >= begin
    seconds = np.array([m.seconds for m in found])
    slope, _ = np.polyfit(np.log(sizes[upper]), np.log(seconds[upper]), 1)
    return float(slope), float(sizes[upper][0])


def plot(found: dict[tuple[int, str], list[Measurement]], share: float, output: Path) -> None:
    """Write seconds and peak memory against n."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = {solver: f"C{i}" for i, solver in enumerate(SOLVERS)}
    dims = sorted({d for d, _ in found})
    for (d, solver), row in found.items():
        style = {"color": colors[solver], "linestyle": ("-", "--", ":")[dims.index(d) % 3], "marker": "o"}
        slope = f", n^{exponent(row)[0]:.2f}" if len(row) > 1 else ""
        left.plot([m.n for m in row], [m.seconds for m in row], label=f"{solver}, d = {d}{slope}", **style)
        # Nothing has a place on a logarithmic axis.
        right.plot([m.n for m in row], [max(m.peak_mb, 1) for m in row], label=f"{solver}, d = {d}", **style)
    for axes, label in ((left, "seconds"), (right, "peak memory, MB (at least 1)")):
        axes.set(xscale="log", yscale="log", xlabel="samples n", ylabel=label)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"Optimal transport, value and gradient, squared distances, relative ε {share}")
    figure.savefig(output, dpi=150)


def main() -> None:
    """Print the table and the exponents, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--relative-epsilon", type=float, default=0.05)
    parser.add_argument("--limit", type=int, default=600, help="seconds for each measurement")
    parser.add_argument(
        "--pass-rows", type=int, metavar="ROWS", help="time passes over all pairs instead, by so many rows"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where these passes are")
    parser.add_argument("--costs", nargs="+", default=["sqeuclidean"], help="costs of these passes")
    parser.add_argument("--roofline", action="store_true", help="passes beside what bounds them on this machine")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="marginal error to stop at")
    parser.add_argument("--reference", type=float, default=0.0, help="tolerance of a solve to compare the largest with")
    parser.add_argument("--peers", type=Path, help="a Python with OTT-JAX and this package, for the solver ott")
    add_json(parser)
    parser.add_argument("--output", type=Path, default=Path("transport_scale.svg"), help="the plot, .svg or .png")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        n, d, solver, reference = args.measure
        print(json.dumps(asdict(measure(args, int(n), int(d), solver, float(reference)))))
        return
    if args.device != "cpu" and not args.pass_rows:
        parser.error("--device is for --pass-rows: whole solves are measured on the CPU")
    rows: list[Row] = []
    if args.roofline:
        rows = roofline(args)
        for row in rows:
            speed, share = row["fused, G pairs/s"]["median"], row["of torch's rates, %"]
            print(f"{row['cost']}, d = {row['d']}: {speed:.3g} G pairs/s, {share:.0f} % of torch's rates", flush=True)
        write_rows(args.json, rows)
        return
    if args.pass_rows:
        for n in args.sizes:
            for d in args.dims:
                for name in args.costs:
                    row = passes(n, d, min(n, args.pass_rows), args.relative_epsilon, name, args.device)
                    speeds = (f"{key} {value['median']:.3g}" for key, value in row.items() if "pairs/s" in key)
                    print(f"{name}, n = {n}, d = {d}: {', '.join(speeds)}", flush=True)
                    rows.append(row)
        write_rows(args.json, rows)
        return
    title = f"Value and gradient, relative ε {args.relative_epsilon} ({torch.get_num_threads()} threads)"
    table, console = Table(title=title), Console(width=120)
    for column in ("n", "d", "solver", "seconds", "peak MB", "marginal error", "sweeps"):
        table.add_column(column, justify="right")
    found: dict[tuple[int, str], list[Measurement]] = {}
    for d in args.dims:
        for solver in args.solvers:
            for n in sorted(set(args.sizes)):
                result = measure_apart(args, n, d, solver)
                if isinstance(result, str):
                    console.print(f"{solver}, d = {d}: n = {n} and beyond left out: {result}", style="yellow")
                    rows.append({"n": n, "d": d, "solver": solver, "seconds": f"left out: {result}"})
                    break
                found.setdefault((d, solver), []).append(result)
                where = {"n": n, "d": d, "solver": solver, "seconds": spread(result.times)}
                measured = {"peak memory, MB": result.peak_mb, "marginal error": result.marginal_error}
                if not math.isnan(result.value_error):
                    measured |= {"value, error": result.value_error, "gradient, error": result.gradient_error}
                    console.print(f"errors of value {result.value_error:.1e}, gradient {result.gradient_error:.1e}")
                rows.append({**where, **measured, "sweeps": result.sweeps or "not counted"})
                cells = (f"{result.seconds:.3g}", f"{result.peak_mb:.0f}", f"{result.marginal_error:.1e}")
                # GeomLoss follows a schedule and does not count.
                row = (str(n), str(d), solver, *cells, str(result.sweeps) if result.sweeps else "-")
                console.print(*row, style="dim")
                table.add_row(*row)
    console.print(table)
    for (d, solver), row in found.items():
        if len(row) > 1:
            slope, begin = exponent(row)
            console.print(f"{solver}, d = {d}: seconds grow as n^{slope:.2f} from n = {begin:.0f} on")
            of_these = [one for one in rows if (one["d"], one["solver"]) == (d, solver) and "marginal error" in one]
            of_these[-1]["exponent"] = slope
    write_rows(args.json, rows)
    if found:
        plot(found, args.relative_epsilon, args.output)
        console.print(f"plot: {args.output}")


if __name__ == "__main__":
    main()
