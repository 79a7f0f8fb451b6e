"""The report of several runs."""

from collections.abc import Sequence

from lightning_gap.dashboards.comparison.compared import Compared
from lightning_gap.dashboards.comparison.diffusion import diffusion_section
from lightning_gap.dashboards.comparison.maps import maps_section
from lightning_gap.dashboards.comparison.names import DIFFUSION, HELD_OUT, MONGE, better, result_metrics, short
from lightning_gap.dashboards.comparison.regime import regime_section
from lightning_gap.dashboards.comparison.results import results_section
from lightning_gap.dashboards.report import Fact, Gallery, Report, Section
from lightning_gap.dashboards.runs import Run

__all__ = ["SECTIONS", "compare"]


def _other_section(compared: Compared) -> Section | None:
    keys = sorted({key for run in compared.runs for key in run.pictures} - {f"{MONGE}map", f"{DIFFUSION}figure"})
    pictures = compared.pictures(keys)
    return Section("Pictures", "What the runs logged besides.", [Gallery(pictures, 2)]) if pictures else None


# In the order of the page; each is left out where it has nothing to say.
SECTIONS = (results_section, regime_section, diffusion_section, maps_section, _other_section)


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


def compare(runs: Sequence[Run], *, title: str | None = None, left_out: Sequence[str] = ()) -> Report:
    """Return the report of some runs: results with the best marked, regimes, diffusion and maps, as far as logged.

    Args:
        runs: At least one run.
        title: Heading of the page; what is compared, by default.
        left_out: Why runs are missing that were to be compared, for the foot of the page.

    Raises:
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("runs is empty: give at least one")
    compared = Compared(runs, {run.name: number for number, run in enumerate(runs)})
    sections = [section(compared) for section in SECTIONS]
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
