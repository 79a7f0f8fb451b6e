"""Tables and figures of docs/results/large_batch.md, from the logs of ``reproduce.py`` and ``potential.py``.

python -m benchmarks.science.large_batch.results           # write the page's tables, and the figures
python -m benchmarks.science.large_batch.results --check   # only say which tables the logs contradict
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.logs import read as read_log
from benchmarks.marked import DOCS, command, mean_and_std, table

PAGE = DOCS / "results" / "large_batch.md"
# The paper's table 1, validation accuracy in %.
PUBLISHED = {
    "F1, MNIST": (98.27, 97.05, 97.55, 97.60, 98.53),
    "C1, CIFAR-10": (87.80, 83.95, 86.15, 86.4, 88.20),
    "ResNet44, CIFAR-10": (92.83, 86.10, 89.30, 90.50, 93.07),
}
NAMES = {
    "f1_mnist": "F1, MNIST",
    "f1_fashion": "F1, Fashion-MNIST",
    "c1_cifar10_short": "C1, CIFAR-10, short",
    "c1_cifar10": "C1, CIFAR-10",
    "resnet44_cifar10": "ResNet44, CIFAR-10",
}
PAPER = {"sb": "SB", "lb": "LB", "lr": "+LR", "gbn": "+GBN", "ra": "+RA"}
COLOURS = dict(zip(PAPER, ("k", "C3", "C1", "C0", "C2"), strict=True))
# What the start page shows of a network: samples of an epoch, and columns with their batches.
SHOWN = {
    "f1_fashion": (60_000, {"lb": "4096", "sb": "128", "seesaw_gbn": "128, growing to 4096"}),
    "c1_cifar10_short": (50_000, {"lb": "1024", "sb": "128", "ramp_gbn": "128, growing to 1024"}),
}
# One of the updates at which distances are recorded, in the fifth epoch of the batch 4096.
EARLY = 71
DISTANCE, BELOW = f"distance after {EARLY} updates", "below batch 128"
# For each table beyond the paper, its rows: column and what it is.
VARIATIONS = {
    "rules": {
        "sb": "batch 128",
        "lb": "4096, rate as it was",
        "ghosts": "4096, rate as it was, ghosts",
        "lr": "√ rule",
        "lr_warmup": "√ rule, 5 epochs of warm-up",
        "gbn": "√ rule, ghosts",
        "gbn_warmup": "√ rule, ghosts, 5 epochs of warm-up",
        "auto": "the rule that chooses, ghosts",
        "linear": "linear rule",
        "linear_warmup": "linear rule, 5 epochs of warm-up",
        "linear_gbn": "linear rule, ghosts",
    },
    "longer": {
        "gbn": "0 (as many samples)",
        "auto15": "0.0165 (1.5 times), the rule that chooses",
        "ra_no_gbn4": "0.1 (4 times), no ghosts",
        "ra4": "0.1 (4 times)",
        "ra": "1 (as many updates)",
        "sb": "batch 128",
    },
    "statistics": {"gbn": "sequential, one step a ghost", "gbn_per_step": "per step, the mean of the ghosts"},
    "momentum": {
        "sb": "batch 128",
        "fresh_sb": "batch 128, momentum anew",
        "lb": "4096",
        "fresh_lb": "4096, momentum anew",
        "lr": "√ rule",
        "fresh_lr": "√ rule, momentum anew",
        "gbn": "√ rule, ghosts",
        "fresh_gbn": "√ rule, ghosts, momentum anew",
    },
    "noise": {
        "layer_sb": "batch 128",
        "layer_lb": "4096",
        "layer_lr": "4096, √ rule",
        "layer_noise": "4096, multiplicative noise",
    },
    "adamw": {
        "adamw_sb": "batch 128",
        "adamw_lb": "4096",
        "adamw_lr": "4096, √ rule, moments as they were",
        "adamw_gbn": "4096, √ rule, ghosts",
        "adamw_lb512": "512",
        "adamw_rule512": "512, Adam rule",
        "adamw_ra512": "512, Adam rule, ghosts, as many updates",
    },
    "precision": {
        "sb": "batch 128, bf16-mixed",
        "float32_sb": "batch 128, float32",
        "gbn": "+GBN, bf16-mixed",
        "float32_gbn": "+GBN, float32",
    },
}
# Batches that grow, at the small batch's samples, for each network that has been trained so.
GROWING = {
    "sb": "128 throughout",
    "seesaw": "128, and ten times as large where the rate would fall to a tenth, to 4096",
    "seesaw_gbn": "the same, ghosts of 128",
    "seesaw_sqrt": "the same without ghosts, by the √ rule",
    "ramp": "128 for two epochs, 512 and 1024 for one each",
    "ramp_gbn": "the same, ghosts of 128",
    "ramp_gbn_ema": "the same, the rate held, averaged",
    "sb_ema": "128 throughout, the rate held, averaged",
    "lb": "the large batch throughout",
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        epochs: Passes over the data at which it was tested.
        updates: Updates at which it was tested.
        error: Test error there, %.
        walk: Updates at which the distance from the first weights was recorded, and the distances.
        facts: What it cost and ran on.
    """

    epochs: Sequence[float]
    updates: Sequence[float]
    error: Sequence[float]
    walk: tuple[Sequence[float], Sequence[float]]
    facts: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """At the end, %: nothing is chosen by the test images."""
        return 100 - self.error[-1]


Runs = dict[str, dict[str, list[Run]]]


def read(logs: Path) -> Runs:
    """Return the runs of each network and column, by seed."""
    runs: Runs = {}
    for network in NAMES:
        for row in sorted(
            read_log(logs / f"large_batch_{network}.jsonl"), key=lambda row: (row["column"], row["seed"])
        ):
            logged = [dict(zip(row["log"], values, strict=True)) for values in zip(*row["log"].values(), strict=True)]
            tests = [at for at in logged if at["test_error"] is not None]
            walk = [at for at in logged if at["distance"] is not None]
            run = Run(
                [at["epoch"] + 1 for at in tests],
                [at["step"] + 1 for at in tests],
                [at["test_error"] for at in tests],
                ([at["distance_updates"] for at in walk], [at["distance"] for at in walk]),
                row,
            )
            runs.setdefault(network, {}).setdefault(row["column"], []).append(run)
    return runs


def accuracies(runs: Sequence[Run]) -> list[float]:
    """Return the final accuracies of runs, %."""
    return [run.accuracy for run in runs]


def gap(reference: Sequence[Run], runs: Sequence[Run]) -> str:
    """Return by how much accuracy runs fall short of the reference: mean, and its standard error."""
    groups = [np.array(accuracies(group)) for group in (reference, runs)]
    if min(map(len, groups)) == 0:
        return ""
    difference = groups[0].mean() - groups[1].mean()
    if min(map(len, groups)) == 1:
        return f"{difference:+.2f}"
    return f"{difference:+.2f} ± {np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)):.2f}"


def blocks(runs: Runs) -> dict[str, str]:
    """Return the tables of the page."""
    made = {"accuracy": _accuracy(runs), "cost": _cost(runs), "growing": _growing(runs)}
    fashion = runs.get("f1_fashion", {})
    for name, columns in VARIATIONS.items():
        reference = fashion.get(next((column for column in columns if column.endswith("sb")), ""), [])
        titles = ["", "updates", "epochs", "CPU s", DISTANCE, "accuracy, %", BELOW]
        groups = [(what, fashion[column]) for column, what in columns.items() if column in fashion]
        rows = [
            [
                *(what, *_facts(group), _distance(group), mean_and_std(accuracies(group))),
                "" if group is reference else gap(reference, group),
            ]
            for what, group in groups
        ]
        hidden = {DISTANCE} if name != "rules" else set()
        if name == "statistics" or not reference:
            hidden.add(BELOW)
        shown = [place for place, title in enumerate(titles) if title not in hidden]
        cells = [[row[place] for place in shown] for row in rows]
        made[name] = table([titles[place] for place in shown], cells) if rows else "Not run yet."
    return made


def _accuracy(runs: Runs) -> str:
    rows = []
    for network, name in NAMES.items():
        if name in PUBLISHED:
            rows.append([f"{name}, published", *PUBLISHED[name], ""])
        if network in runs:
            groups = [runs[network].get(column, []) for column in PAPER]
            cells = [mean_and_std(accuracies(group)) if group else "not run" for group in groups]
            rows.append([f"**{name}**", *cells, gap(groups[0], groups[1])])
    return table(["network, data", *PAPER.values(), "SB − LB ± standard error"], rows)


def _facts(group: Sequence[Run]) -> list[object]:
    return [
        int(group[0].updates[-1]),
        int(group[0].epochs[-1]),
        round(np.mean([r.facts["cpu_seconds"] for r in group])),
    ]


def _distance(group: Sequence[Run]) -> str:
    """Return how far the weights are from the first ones early in training."""
    walks = [dict(zip(*run.walk, strict=True)) for run in group]
    return mean_and_std([walk[EARLY] for walk in walks if EARLY in walk], 1)


def _cost(runs: Runs) -> str:
    rows = []
    for network, name in NAMES.items():
        for column, title in PAPER.items():
            group = runs.get(network, {}).get(column, [])
            if group:
                facts = group[0].facts
                where = f"{facts['device']}, {facts['precision']}"
                short = "" if column == "sb" else gap(runs[network].get("sb", []), group)
                rows.append([name, title, len(group), *_facts(group), where, mean_and_std(accuracies(group)), short])
    titles = ["network, data", "", "seeds", "updates", "epochs", "CPU s", "on", "accuracy, %", "below SB"]
    return table(titles, rows)


def _growing(runs: Runs) -> str:
    rows = []
    for network, name in NAMES.items():
        columns = runs.get(network, {})
        if not any(column in columns for column in GROWING if column not in PAPER):
            continue
        reference = columns["sb"]
        for column, what in GROWING.items():
            if group := columns.get(column, []):
                updates, _, seconds = _facts(group)
                fewer = 1 - group[0].updates[-1] / reference[0].updates[-1]
                rows.append([
                    name, what, f"{updates} ({fewer:.0%} fewer)" if fewer else str(updates), seconds,
                    mean_and_std(accuracies(group)), "" if group is reference else gap(reference, group),
                ])  # fmt: skip
    return table(["network, data", "batch", "updates", "CPU s", "accuracy, %", BELOW], rows)


def draw(runs: Runs, logs: Path, images: Path) -> None:
    """Draw the paper's figures 1 to 3, and the picture of the start page."""
    _samples(runs, images / "large_batch_samples.png")
    _errors(runs, images / "large_batch_error.png")
    _walks(runs, images / "large_batch_distance.png")
    _potential(logs, images / "large_batch_potential.png")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _errors(runs: Runs, path: Path) -> None:
    networks = [network for network in NAMES if network in runs]
    figure = _figure(9, 3.6 * len(networks))
    for row, network in zip(figure.subplots(len(networks), 2, squeeze=False), networks, strict=True):
        for ax, along in zip(row, ("epochs", "updates"), strict=True):
            lowest = []
            for column, title in PAPER.items():
                for index, run in enumerate(runs[network].get(column, [])):
                    label = title if index == 0 else None
                    ax.plot(getattr(run, along), run.error, color=COLOURS[column], label=label, linewidth=1)
                    lowest.append(min(run.error))
            least = max(min(lowest), 0.1)
            ax.set(xscale="log", xlabel=along, title=NAMES[network], ylim=(0.9 * least, 4 * least))
        row[0].set_ylabel("test error, %")
        row[0].legend()
    figure.savefig(path, dpi=110)


def _samples(runs: Runs, path: Path) -> None:
    networks = [network for network in SHOWN if network in runs]
    if not networks:
        return
    figure = _figure(9, 4.2)
    colours = dict(
        zip(("lb", "sb", "seesaw_gbn", "ramp_gbn"), ("#c8553d", "#5b6470", "#1f6fd0", "#1f6fd0"), strict=True)
    )
    for ax, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        epoch, columns = SHOWN[network]
        last = [
            100 - float(np.mean(accuracies(runs[network][column]))) for column in columns if column in runs[network]
        ]
        for column, batch in columns.items():
            for index, run in enumerate(runs[network].get(column, [])):
                error = 100 - float(np.mean(accuracies(runs[network][column])))
                label = f"batch {batch}: {error:.1f} % after {run.updates[-1]:,} updates" if index == 0 else None
                seen = np.asarray(run.epochs) * epoch / 1e6
                ax.plot(seen, run.error, color=colours[column], label=label, linewidth=1.4, alpha=0.85)
        span = max(last) - min(last)
        ax.set(xlabel="samples, millions", ylim=(min(last) - 0.6 * span, max(last) + 1.6 * span), xlim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(title=NAMES[network], loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.axes[0].set_ylabel("test error, %")
    figure.savefig(path, dpi=110)


def _walks(runs: Runs, path: Path) -> None:
    networks = [network for network in NAMES if network in runs]
    figure = _figure(9, 3.6 * len(networks))
    for row, network in zip(figure.subplots(len(networks), 2, squeeze=False, sharey="row"), networks, strict=True):
        for ax, columns, what in (
            (row[0], ("sb", "lb"), "before adaptation"),
            (row[1], ("sb", "lr", "gbn", "ra"), "after"),
        ):
            for column in columns:
                for index, run in enumerate(runs[network].get(column, [])):
                    label = PAPER[column] if index == 0 else None
                    ax.plot(*run.walk, color=COLOURS[column], label=label, linewidth=1)
            ax.set(xscale="log", xlabel="updates t", title=f"{NAMES[network]}, {what}")
            ax.legend()
        row[0].set_ylabel("‖wₜ − w₀‖")
    figure.savefig(path, dpi=110)


def potentials(logs: Path) -> list[dict[str, Any]]:
    """Return the probes of the random potential."""
    return read_log(logs / "large_batch_potential.jsonl")


def _potential(logs: Path, path: Path) -> None:
    probes = potentials(logs)
    names = list(dict.fromkeys(probe["name"] for probe in probes))
    if not names:
        return
    figure = _figure(4.5 * len(names), 3.6)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for index, probe in enumerate(probe for probe in probes if probe["name"] == name):
            ax.plot(probe["radii"], probe["std"], "o", markersize=3, color=f"C{index}", label=f"seed {probe['seed']}")
        ax.set(xlabel="‖w − w₀‖", title=name, xlim=(0, None), ylim=(0, None))
        ax.legend()
    figure.axes[0].set_ylabel("standard deviation of the loss")
    figure.savefig(path, dpi=110)


def potential_block(logs: Path) -> str:
    """Return the table of the probes."""
    rows = []
    probes = potentials(logs)
    for name in dict.fromkeys(probe["name"] for probe in probes):
        group = [probe for probe in probes if probe["name"] == name]
        rows.append([
            *(name, group[0]["images"], group[0]["samples"], len(group)),
            mean_and_std([probe["gamma"] for probe in group]),
            mean_and_std([probe["alpha"] for probe in group]),
            mean_and_std([probe["r2"] for probe in group], 3),
        ])  # fmt: skip
    return table(["network, data, up to", "images", "samples", "seeds", "γ", "α = 2γ", "R²"], rows)


def main() -> None:
    """Write the page, or check it."""
    command(
        __doc__,
        "large_batch",
        lambda logs: blocks(read(logs)) | {"potential": potential_block(logs)},
        lambda logs, images: draw(read(logs), logs, images),
    )


if __name__ == "__main__":
    main()
