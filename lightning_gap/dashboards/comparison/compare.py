"""The report of several runs, section by section: own metrics, regimes, distances from the start, maps, pictures."""

from collections.abc import Sequence
from typing import Any

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.comparison.compared import (
    DIFFUSION,
    HELD_OUT,
    MONGE,
    MOST_COLUMNS,
    REGIME,
    TRAINING,
    Compared,
    as_float,
    better,
    count,
    curve,
    result_metrics,
    short,
)
from lightning_gap.dashboards.comparison.to_target import targets_section
from lightning_gap.dashboards.report import Fact, Figure, Gallery, Legend, Report, Section
from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.table import ResultTable
from lightning_gap.dashboards.targets import HOLD, Target

__all__ = ["SECTIONS", "compare", "results_table"]

_MOST_CURVES = 8
_ORDER = (
    "sinkhorn_divergence", "monge_gap", "energy_distance", "wasserstein_1", "unexplained_variance",
    "displacement_cosine", "displacement", "loss",
)  # fmt: skip


def _results_section(compared: Compared) -> Section | None:
    """Return the section, if any run has such a metric."""
    metrics = result_metrics(compared.runs)
    compared = compared.where(lambda run: any(key in run.metrics for key in metrics))
    if not metrics:
        return None
    shown = [key for key in metrics if HELD_OUT.search(key)][:MOST_COLUMNS] or metrics[:MOST_COLUMNS]
    shown += [key for key in metrics if TRAINING.search(key) and key not in shown][: MOST_COLUMNS - len(shown)]
    marked = [key for key in shown if better(key)]
    lead = f"{count(len(compared.runs), 'run')}, {count(len(metrics), 'metric')} of their own."
    if marked and len(compared.runs) > 1:
        winner, value = compared.best(marked[0])
        lead += f" By {short(marked[0])}, {winner.name} ends best, at {value:.4g}."
    blocks: list[ResultTable | Gallery | Legend] = [_table(compared, shown)]
    return Section("Results", lead, blocks + compared.with_legend(compared.curves(metrics[:_MOST_CURVES])))


def results_table(runs: Sequence[Run], metrics: Sequence[str]) -> ResultTable:
    """Return the last values of some metrics, run by run, the best marked.

    Args:
        runs: The runs.
        metrics: The keys of the metrics.
    """
    return _table(Compared(runs, {}), metrics)


def _table(compared: Compared, metrics: Sequence[str]) -> ResultTable:
    unmarked = [short(key) for key in metrics if better(key) is None]
    caption = "The last value of each metric; the best of each column is marked."
    if unmarked:
        caption += f" Whether more is better the name does not tell of {', '.join(unmarked)}."
    return compared.table(
        "Results",
        {
            "Batch": [_batch(run) for run in compared.runs],
            "Updates": [run.updates for run in compared.runs],
            **{short(key): (compared.last(key), better(key)) for key in metrics},
        },
        caption,
    )


def _batch(run: Run) -> float | None:
    """Return a run's samples per update, as far as it tells."""
    return as_float(run.config.get(f"{REGIME}batch_size", run.config.get("batch_size")))


def _regime_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged something of a regime."""
    held_out = next((key for key in result_metrics(compared.runs) if HELD_OUT.search(key) and better(key)), None)
    compared = compared.where(lambda run: any(key.startswith(REGIME) for key in (*run.metrics, *run.config)))
    if not compared.runs:
        return None

    def whole(name: str) -> list[int | None]:
        return [None if x is None else int(x) for x in map(as_float, compared.given(REGIME + name))]

    columns: dict[str, Sequence[Any]] = {
        "Reference batch": compared.given(f"{REGIME}reference_batch_size"),
        "Batch": compared.given(f"{REGIME}batch_size"),
        "Rule": compared.given(f"{REGIME}lr_rule"),
        "Rate\u00a0×": [None if x is None else float(x) for x in compared.given(f"{REGIME}lr_factor")],
        "Updates of the reference": whole("reference_updates"),
        "Updates": whole("updates"),
        "Epochs of the reference": whole("reference_epochs"),
        "Epochs": whole("epochs"),
        "Critical batch": compared.last(f"{REGIME}critical_batch_size"),
    }
    caption = (
        "What LargeBatchRegime made of each reference run. The critical batch is what GradientNoiseScale measured: "
        "beyond it, a larger batch saves few updates."
    )
    gallery = _gap_figure(compared, held_out)
    gallery += compared.curves([f"{REGIME}learning_rate", f"{REGIME}clipped_fraction"])
    gallery += compared.curves([f"{REGIME}noise_scale"], logy=True)
    return Section(
        "Large batches",
        f"The regime of {count(len(compared.runs), 'run')}: batch, learning rate and length beside the reference "
        "run's.",
        [compared.table("Regimes", columns, caption), *compared.with_legend(gallery)],
        "Hoffer, Hubara, Soudry 2017 · Train longer, generalize better",
    )


def _gap_figure(compared: Compared, metric: str | None) -> list[Figure]:
    """Return the last value of a metric by batch size, if there are several sizes."""
    if metric is None:
        return []
    found = [(run.name, _batch(run), run.last(metric)) for run in compared.runs]
    points = {name: (size, value) for name, size, value in found if size is not None and value is not None}
    if len({size for size, _ in points.values()}) < 2:
        return []
    figure = figures.scatter(
        list(points.values()),
        [compared.numbers[name] for name in points],
        xlabel="batch (samples per update)",
        ylabel=short(metric),
    )
    return [
        Figure(
            figures.as_svg(figure),
            "What the last weights of each run reach, against the samples of one update.",
            f"{metric} by batch size",
            "The generalization gap by batch size",
        )
    ]


def _diffusion_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged its distance."""
    key = f"{DIFFUSION}distance"
    compared = compared.where(lambda run: key in run.metrics)
    if not compared.runs:
        return None

    def fitted(name: str) -> list[float | None]:
        return compared.last(DIFFUSION + name)

    drawn = ("log_intercept", "log_slope", "first_update", "last_update")
    laws = [None if None in law else law for law in zip(*map(fitted, drawn), strict=True)]
    lines = [curve(run, key) for run in compared.runs]
    overlay = figures.overlay(
        lines, compared.styles, xlabel="updates t", ylabel="‖wₜ − w₀‖", logx=True, wide=True,
        laws=laws,
    )  # fmt: skip
    walk = Figure(
        figures.as_svg(overlay),
        "The distance from the initial weights against the logarithm of the update. Dashed: the law a + b·log t, "
        "over the updates it was fitted to. The paper's claim is that runs with one slope explore alike.",
        "Distance from the initial weights against log updates: "
        + ", ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines if len(line.y)),
        "Ultra-slow diffusion",
    )
    more = compared.curves([f"{DIFFUSION}relative_distance", f"{DIFFUSION}cosine"], logx=True)
    columns: dict[str, Sequence[Any]] = {
        "Last distance": compared.last(key),
        "Slope b": fitted("log_slope"),
        "R² of a + b·log t": fitted("log_r2"),
        "Exponent p": fitted("power_exponent"),
        "R² of c·tᵖ": fitted("power_r2"),
        "Weight of the logarithm": fitted("log_weight"),
        "α": fitted("alpha"),
    }
    caption = (
        "Both laws over the longest stretch of constant learning rate, as UltraSlowDiffusion fitted them at the end of "
        "each run; nothing where a run spans under two decades of updates or was cut off. The weight is Akaike's."
    )
    return Section(
        "Distance from the start",
        f"How far the weights of {count(len(compared.runs), 'run')} travelled, and by which law.",
        [compared.legend(), Gallery([walk], 1), *([Gallery(more, 2)] if more else []),
         compared.table("Laws of diffusion", columns, caption)],
        "Hoffer, Hubara, Soudry 2017 · section 3",
    )  # fmt: skip


def _maps_section(compared: Compared) -> Section | None:
    """Return the section, if any run logged something of a map."""
    compared = compared.where(lambda run: any(key.startswith(MONGE) for key in run.metrics))
    if not compared.runs:
        return None
    known = {key for run in compared.runs for key in run.metrics if key.startswith(MONGE)}
    stages = [stage for stage in ("test", "val", "train") if any(short(key).startswith(stage) for key in known)]
    ordered = [f"{MONGE}{stage}_{name}" for stage in stages for name in _ORDER]
    present = [key for key in ordered if key in known]
    # A loss of another weight, and a gap of another cost, are other quantities.
    same = {name: len(set(compared.given(name))) == 1 for name in ("cost", "gap_weight")}
    unmarked = {"displacement": True, "loss": not all(same.values()), "monge_gap": not same["cost"]}
    best = {key: None if unmarked.get(short(key).partition("_")[2]) else better(key) for key in present}
    held_out = [key for key in present if "/train_" not in key] or present
    scores = {short(key).replace("_", " "): (compared.last(key), best[key]) for key in held_out[:MOST_COLUMNS]}
    columns: dict[str, Sequence[Any] | tuple[Sequence[Any], Any]] = {
        "cost": [None if cost is None else str(cost) for cost in compared.given("cost")],
        **scores,
        "λ": [as_float(weight) for weight in compared.given("gap_weight")],
    }
    caption = (
        "The last values. The divergence tells how far the images are from the target, the gap what the map pays over "
        "an optimal one for its cost; neither a gap of another cost nor a loss of another weight λ is marked."
    )
    maps = compared.pictures([f"{MONGE}map"])
    blocks: list[ResultTable | Gallery | Legend] = [compared.table("Maps", columns, caption)]
    blocks += compared.with_legend(compared.curves(held_out[:4]))
    if maps:
        blocks.append(Gallery(maps, 1 if len(maps) == 1 else 2))
    return Section(
        "Transport maps",
        f"{count(len(compared.runs), 'map')}: fit, Monge gap, and where samples go.",
        blocks,
        "Uscidda, Cuturi 2023 · The Monge gap",
    )


def _other_section(compared: Compared) -> Section | None:
    keys = sorted({key for run in compared.runs for key in run.pictures} - {f"{MONGE}map", f"{DIFFUSION}figure"})
    pictures = compared.pictures(keys)
    return Section("Pictures", "What the runs logged besides.", [Gallery(pictures, 2)]) if pictures else None


# In the order of the page; each is left out where it has nothing to say.
SECTIONS = (_results_section, _regime_section, _diffusion_section, _maps_section, _other_section)


def _facts(compared: Compared) -> list[Fact]:
    runs = compared.runs
    facts = [Fact(f"{len(runs)}", "run" if len(runs) == 1 else "runs", ", ".join(sorted({run.kind for run in runs})))]
    scored = [key for key in result_metrics(runs) if HELD_OUT.search(key) and better(key)][:2]
    monge = [f"{MONGE}{stage}_sinkhorn_divergence" for stage in ("test", "val")]
    scored += [key for key in monge if any(key in run.metrics for run in runs)][:1]
    for key in scored:
        winner, value = compared.best(key)
        facts.append(Fact(f"{value:.4g}", f"best {short(key)}", winner.name))
    return facts


def compare(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    left_out: Sequence[str] = (),
    targets: Sequence[Target] = (),
    by: str = "batch",
    hold: int = HOLD,
    smooth: int = 1,
) -> Report:
    """Return the report of some runs: results with the best marked, regimes, diffusion and maps, as far as logged.

    Args:
        runs: At least one run.
        title: Heading of the page; what is compared, by default.
        left_out: Why runs are missing that were to be compared, for the foot of the page.
        targets: What runs have to reach: adds what each took to it, and the profiles over runs.
        by: How runs are grouped in these: ``"batch"``, or a hyper-parameter.
        hold: Points in a row at a target, as in :func:`~lightning_gap.dashboards.targets.first_held`.
        smooth: As there.

    Raises:
        ValueError: There is no run, or a target of a metric that none logged.
    """
    if not runs:
        raise ValueError("runs is empty: give at least one")
    compared = Compared(runs, {run.name: number for number, run in enumerate(runs)})
    sections = [section(compared) for section in SECTIONS]
    if targets:
        sections.insert(1, targets_section(compared, targets, by=by, hold=hold, smooth=smooth))
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return Report(
        title=title or name,
        summary="Read from the files that the runs' loggers left: "
        + ", ".join(f"{run.name} ({run.kind})" for run in runs[:12])
        + (f", and {len(runs) - 12} more." if len(runs) > 12 else "."),
        facts=_facts(compared),
        sections=[section for section in sections if section is not None],
        configuration={
            run.name: {"folder": str(run.path), **{key: run.config[key] for key in sorted(run.config)}} for run in runs
        },
        footer=("Losing rows are shown as they came.", *(f"Left out: {reason}." for reason in left_out)),
    )
