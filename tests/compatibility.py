"""What goes with what: the tables of docs/compatibility.md, made of what the tests run.

``python tests/compatibility.py`` writes the page anew; ``tests/test_compatibility.py`` fails while it differs, runs the
refusals, and looks for every test that a cell names.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_gap import costs
from lightning_gap.monge import StructuredMap
from lightning_gap.monge.ot.solve import choose_solver

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "compatibility.md"


# --------------------------------------------------------------------------------------------- strategy x component


class Cell(NamedTuple):
    """How a component fares under a strategy: by which tests (``file::name``), or why there is none."""

    word: str
    tests: tuple[str, ...] = ()


def works(*tests: str, word: str = "yes") -> Cell:
    return Cell(word, tests)


REFUSED = Cell("refused")
NOT_RUN = Cell("not run")

STRATEGIES = {
    "accumulation": "accumulation",
    "ddp": "DDP",
    "fsdp2": "ModelParallel (FSDP2)",
    "fsdp1": "FSDP",
    "deepspeed": "DeepSpeed",
    "half": "half precision",
    "compile": "torch.compile",
}
_BATCH = "regime/test_batch_schedule_"
_REGIME, _GHOST, _DIFFUSION, _MONGE = "regime/test_regime_", "ghost/test_ghost_", "diffusion/test_diffusion_", "monge/"
COMPONENTS: dict[str, dict[str, Cell]] = {
    "LargeBatchRegime": {
        "accumulation": works(
            f"{_REGIME}callback.py::test_accumulation_counts_in_the_batch_and_not_in_the_updates",
            f"{_REGIME}distributed.py::test_replicas_and_accumulation_make_the_plan_of_one_large_batch",
        ),
        "ddp": works(
            f"{_REGIME}distributed.py::test_replicas_and_accumulation_make_the_plan_of_one_large_batch",
            f"{_REGIME}distributed.py::test_uneven_shards_keep_the_updates",
        ),
        "fsdp2": works(f"{_REGIME}distributed.py::test_shards_train_as_one_process"),
        "fsdp1": REFUSED,
        "deepspeed": REFUSED,
        "half": works(f"{_REGIME}first_updates.py::test_mixed_precision_with_skipped_updates"),
        "compile": works(f"{_REGIME}first_updates.py::test_a_compiled_module_keeps_its_regime"),
    },
    "BatchSizeSchedule": {
        "accumulation": works(f"{_BATCH}callback.py::test_parts_of_an_update_make_the_same_update_as_the_whole"),
        "ddp": works(
            f"{_BATCH}distributed.py::test_replicas_and_parts_make_the_updates_of_one_process",
            f"{_BATCH}distributed.py::test_a_run_goes_on_on_as_many_ranks_or_others",
        ),
        "fsdp2": works(f"{_BATCH}modes.py::test_shards_train_as_one_process"),
        "fsdp1": REFUSED,
        "deepspeed": REFUSED,
        "half": works(f"{_BATCH}modes.py::test_mixed_precision_with_skipped_updates"),
        "compile": works(f"{_BATCH}modes.py::test_a_compiled_module_trains_as_the_plain_one"),
    },
    "GradientNoiseScale": {
        "accumulation": works(f"{_REGIME}noise_scale_callback.py::test_a_known_noise_scale_is_found"),
        "ddp": works(
            f"{_REGIME}distributed.py::test_replicas_measure_the_noise_scale_of_accumulation",
            f"{_REGIME}distributed.py::test_replicas_measure_the_noise_scale_of_examples",
            f"{_REGIME}distributed.py::test_replicas_measure_dual_norms_of_one_process",
        ),
        "fsdp2": REFUSED,
        "fsdp1": REFUSED,
        "deepspeed": REFUSED,
        "half": works(f"{_REGIME}noise_scale_callback.py::test_a_known_noise_scale_is_found"),
        "compile": NOT_RUN,
    },
    "GhostBatchNorm": {
        "accumulation": works(f"{_GHOST}report.py::test_a_micro_batch_below_the_ghost_size_warns_once"),
        "ddp": works(
            f"{_GHOST}distributed.py::test_two_processes_equal_one_on_the_same_batches",
            f"{_GHOST}ranks.py::test_four_processes_equal_one",
        ),
        "fsdp2": works(f"{_GHOST}ranks.py::test_four_processes_equal_one"),
        "fsdp1": REFUSED,
        "deepspeed": REFUSED,
        "half": works(f"{_GHOST}callback.py::test_mixed_precision_keeps_float32_statistics"),
        "compile": works(f"{_GHOST}callback.py::test_a_compiled_model_trains"),
    },
    "UltraSlowDiffusion": {
        "accumulation": works(f"{_DIFFUSION}callback.py::test_accumulation_counts_updates_not_batches"),
        "ddp": works(f"{_DIFFUSION}distributed.py::test_two_and_four_processes"),
        "fsdp2": works(f"{_DIFFUSION}distributed.py::test_two_and_four_processes"),
        "fsdp1": REFUSED,
        "deepspeed": REFUSED,
        "half": works(f"{_DIFFUSION}callback.py::test_run_is_bit_equal_with_and_without"),
        "compile": works(f"{_DIFFUSION}callback.py::test_compiled_model"),
    },
    "MongeMap": {
        "accumulation": works(f"{_MONGE}test_training_log.py::test_each_step_is_logged_as_lightning_would"),
        "ddp": works(f"{_MONGE}test_monge_map_distributed.py::test_several_processes_train_as_one_does"),
        "fsdp2": NOT_RUN,
        "fsdp1": NOT_RUN,
        "deepspeed": NOT_RUN,
        "half": works(f"{_MONGE}test_monge_map.py::test_precisions_of_the_trainer"),
        "compile": works(f"{_MONGE}ot/test_compiled.py::test_a_compiled_monge_map_trains_as_the_plain_one"),
    },
    "SamplesDataModule": {
        "accumulation": NOT_RUN,
        "ddp": works(f"{_MONGE}samples/test_samples_trainer.py::test_processes_see_together_what_one_sees"),
        "fsdp2": NOT_RUN,
        "fsdp1": NOT_RUN,
        "deepspeed": NOT_RUN,
        "half": Cell("–"),
        "compile": Cell("–"),
    },
    "MapScores": {
        "accumulation": Cell("–"),
        "ddp": works(f"{_MONGE}scores/test_map_scores.py::test_two_processes_are_as_one"),
        "fsdp2": NOT_RUN,
        "fsdp1": NOT_RUN,
        "deepspeed": NOT_RUN,
        "half": NOT_RUN,
        "compile": Cell("–"),
    },
}


def strategy_table() -> str:
    rows = [[f"`{name}`", *(cells[key].word for key in STRATEGIES)] for name, cells in COMPONENTS.items()]
    return _table(["component", *STRATEGIES.values()], rows)


def strategy_tests() -> str:
    rows = [
        [f"`{name}`", STRATEGIES[key], ", ".join(f"`{test.rpartition('::')[2]}`" for test in cell.tests)]
        for name, cells in COMPONENTS.items()
        for key, cell in cells.items()
        if cell.tests
    ]
    return _table(["component", "under", "tested by"], rows)


# ----------------------------------------------------------------------------------------------- scheduler x action

# What is done with a schedule, the test that does it, and the name of the schedule among the test's parameters.
ACTIONS = {
    "at 2, 3, 7.5, 16 and 32 times the batch": "test_every_schedule_at_every_ratio",
    "part of the way": "test_part_of_the_way_runs_through_the_whole_schedule",
    "resumes from every epoch": "test_every_schedule_resumes_from_every_epoch",
    "goes on at another batch": "test_every_schedule_goes_on_at_another_batch",
}
INTERVALS = {"epoch": "epochs", "step": "updates"}


def scheduler_table() -> str:
    tests = _module("regime", "test_regime_schedules")
    schedules = list(_module("regime", "regime_runs").SCHEDULES)
    rows = []
    for name in schedules:
        row = [name]
        for test in ACTIONS.values():
            tried = parameters(getattr(tests, test))
            # A test without intervals takes the schedules of epochs.
            intervals = tried.get("interval", ["epoch"]) if name in tried["name"] else []
            row.append(" and ".join(INTERVALS[each] for each in intervals) or "–")
        rows.append(row)
    return _table(["scheduler", *ACTIONS], rows)


# ---------------------------------------------------------------------------------------------------- cost x solver

# The test of each solver; that of "exact" is in test_compatibility.py.
SOLVERS = {
    "dense": "test_our_solvers_are_sinkhorn",
    "fused": "test_our_solvers_are_sinkhorn",
    "blocked": "test_our_solvers_are_sinkhorn",
    "exact": None,
    "online": "test_keops_comes_near",
    "multiscale": "test_keops_comes_near",
}


def squares_of_two(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A function as a cost."""
    return 2 * (x - y).square().sum(-1)


def every_cost() -> list[Any]:
    """The costs that the solvers' tests take, and a function."""
    return [*_module("monge/ot", "test_solvers").COSTS, squares_of_two]


def solver_cell(cost: Any, solver: str) -> str:
    """Say whether a solver takes a cost, and whether a test runs the two together."""
    x = torch.zeros(2, 3)
    try:
        choose_solver(solver, costs.resolve(cost), x, x)
    except ValueError:
        return "refused"
    except RuntimeError:  # no compiler here
        assert solver == "fused"
    tests = _module("monge/ot", "test_solvers")
    test = SOLVERS[solver]
    if test is None:
        return "tested"
    if callable(cost):
        test = "test_functions_are_costs_too" if solver == "dense" else ""
        return "tested" if test else "yes"
    function = getattr(tests, test)
    pairs = parameters(function)
    ours = pairs.get("solver", [solver])
    together = (
        (solver, cost) in zip(pairs["solver"], pairs["cost"], strict=True)
        if _jointly(function)
        else cost in pairs["cost"] and solver in ours
    )
    return "tested" if together else "yes"


def structured_cell(cost: Any) -> str:
    """Say whether a cost has structured maps; of Mahalanobis costs, it depends on the factor."""
    if isinstance(cost, str) and cost.startswith("mahalanobis"):
        square = costs.Mahalanobis(((1.0, 0.5, 0.0), (0.0, 0.3, -0.7), (0.0, 0.0, 1.0)))
        return "with full column rank" if structured(square) and not structured(cost) else "unknown"
    return "yes" if structured(cost) else "no"


def structured(cost: Any) -> bool:
    try:
        StructuredMap(3, cost)
    except ValueError:
        return False
    return True


def solver_table() -> str:
    rows = []
    for cost in every_cost():
        name = "a function" if callable(cost) else f"`{'mahalanobis(factor=…)' if 'mahal' in cost else cost}`"
        rows.append([name, *(solver_cell(cost, solver) for solver in SOLVERS), structured_cell(cost)])
    return _table(["cost", *(f"`{solver}`" for solver in SOLVERS), "structured map"], rows)


# -------------------------------------------------------------------------------------------------------- the page


def parameters(test: Any) -> dict[str, list[Any]]:
    """The values that ``pytest.mark.parametrize`` gives each parameter of a test."""
    found: dict[str, list[Any]] = {}
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = mark.args[0]
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            one = len(names) == 1
            values = [_values(value, one) for value in mark.args[1]]
            for at, name in enumerate(names):
                found[name] = [value[at] for value in values]
    return found


def _values(given: Any, one: bool) -> Any:
    """The values of one case: of what carries marks, or as they are."""
    return given.values if hasattr(given, "marks") else (given,) if one else given


def _jointly(test: Any) -> bool:
    return any(len(mark.args[0]) == 2 and not isinstance(mark.args[0], str) for mark in test.pytestmark if mark.args)


def _module(folder: str, name: str) -> Any:
    if str(TESTS / folder) not in sys.path:
        sys.path.append(str(TESTS / folder))
    return import_module(name)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def page() -> str:
    """The page, as it should be."""
    return TEXT.format(
        strategies=strategy_table(),
        strategy_tests=strategy_tests(),
        schedulers=scheduler_table(),
        solvers=solver_table(),
    )


TEXT = """\
<!-- Written by `python tests/compatibility.py` from what the tests run; change it there. -->

# What goes with what

These tables are made of the parameters of the tests, and a test fails while the page says anything else. What is
refused is refused when training starts, before anything is changed, in a sentence that names what to use instead.

## Strategy × component

{strategies}

On one device every component is tested throughout. Processes are those of gloo on a CPU, two or four; no GPU has run
these tests. "Not run" is neither refused nor known to work. What each cell means in detail:
[regime](regime.md#strategies-and-modes), [ghost batch normalization](ghost.md#strategies),
[diffusion](diffusion.md#strategies), [maps](monge_map.md#strategies).

{strategy_tests}

## Scheduler × action

Under `LargeBatchRegime`, stepped every epoch or every update. Each cell compares the learning rate of every update with
√ratio times that of a real run at the reference batch, to nine digits; resumed runs are compared bit for bit.

{schedulers}

`ReduceLROnPlateau`, schedulers of every n-th epoch or update, lengths taken from the trainer, and your own schedulers:
[the regime's page](regime.md#schedulers).

## Cost × solver

"Tested": each solver against alternating soft minima in float64, and `exact` against SciPy's assignment. "Yes": taken,
by the same code, and not compared by a test of its own. `multiscale` is for up to three dimensions. `flash` takes
`sqeuclidean`, `mahalanobis`, `cosine` and `pnorm(p=2)`, on CUDA alone. The last column says whether
[`StructuredMap`](maps.md) can take the cost.

{solvers}
"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
