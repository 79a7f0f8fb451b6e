"""A character transformer under AdamW: larger batches by each rule, and batches that grow, at the same samples.

    python -m benchmarks.science.large_batch.characters [--seeds 0 1 2] [--ratios 1 4 8 32] [--only REGEX]
    python -m benchmarks.science.large_batch.characters --page    # write the tables of docs/results/large_batch.md

The text is the reference manual's topics that every Python carries (``pydoc_data.topics``): windows of 64 characters,
24,000 of them seen once. The network has layer normalization, two layers, 64 features, four heads. The reference run:
AdamW at 0.002, weight decay 0.1, β 0.9 and 0.99, a cosine to 0 over 1500 updates of 16 windows, gradients clipped to
norm 1. The last tenth of the text is held out.

Rows: what the batch is, and by which rule: final loss on 1000 held-out windows, updates, CPU seconds on one thread.
"""

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.logs import RESULTS, put, read
from benchmarks.marked import DOCS, mean_and_std, table, write
from lightning_gap import BatchSizeSchedule, LargeBatchRegime

__all__ = ["LOG", "PAGE", "blocks"]

LOG, PAGE = RESULTS / "large_batch_characters.jsonl", DOCS / "results" / "large_batch.md"
BATCH, WINDOWS, CONTEXT, HELD_OUT = 16, 24_000, 64, 1000
KEY = ("batch", "rule", "ratio", "seed")
Made = Callable[[int], Callback]
# By rule: the callback of a ratio. All see the reference run's samples.
RULES: Mapping[str, Made] = {
    "none": lambda ratio: LargeBatchRegime(BATCH, lr_rule="none", train_longer=False),
    "sqrt": lambda ratio: LargeBatchRegime(BATCH, lr_rule="sqrt", train_longer=False),
    "sqrt, time scale, half-life": lambda ratio: LargeBatchRegime(
        BATCH, lr_rule="sqrt", train_longer=False, weight_decay_rule="timescale", betas_rule="half_life"
    ),
    "auto": lambda ratio: LargeBatchRegime(BATCH, lr_rule="auto", train_longer=False),
}
# By schedule: the callback, up to a ratio.
GROWING: Mapping[str, Made] = {
    "seesaw": lambda ratio: BatchSizeSchedule("seesaw", max_batch_size=BATCH * ratio),
    "seesaw, time scale, half-life": lambda ratio: BatchSizeSchedule(
        "seesaw", max_batch_size=BATCH * ratio, weight_decay_rule="timescale", betas_rule="half_life"
    ),
    "8 times after half": lambda ratio: BatchSizeSchedule([(0, BATCH), (WINDOWS // 2, BATCH * ratio)]),
}


def windows() -> tuple[TensorDataset, TensorDataset, int]:
    """Return windows to train on, held-out ones, and the number of characters there are."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    characters = sorted(set(text))
    index = {character: at for at, character in enumerate(characters)}
    codes = torch.tensor([index[character] for character in text])
    split = int(0.9 * len(codes))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part, count in ((codes[:split], WINDOWS), (codes[split:], HELD_OUT)):
        starts = torch.randint(len(part) - CONTEXT - 1, (count, 1), generator=generator)
        parts.append(TensorDataset(part[starts + torch.arange(CONTEXT + 1)]))
    return parts[0], parts[1], len(characters)


class Transformer(LightningModule):
    """Predicts the next character."""

    def __init__(self, characters: int, features: int = 64) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(characters, features), nn.Embedding(CONTEXT, features)
        layer = partial(nn.TransformerEncoderLayer, features, 4, 4 * features, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross entropy of the next characters of windows (n, context + 1)."""
        before, after = batch[0][:, :-1], batch[0][:, 1:]
        x = self.embed(before) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), after.flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the reference run's."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.99))
        cosine = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


def run(batch: str, rule: str, ratio: int, seed: int, callback: Callback | None) -> dict[str, Any]:
    """Train, and return the row."""
    train, held_out, characters = windows()
    seed_everything(seed, verbose=False)
    model = Transformer(characters)
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", gradient_clip_val=1.0, callbacks=[] if callback is None else [callback],
        **dict.fromkeys(shown, False),
    )  # fmt: skip
    size = BATCH * (ratio if batch == "constant" else 1)
    begun = time.process_time()
    trainer.fit(model, DataLoader(train, size, shuffle=True))
    seconds = time.process_time() - begun
    model.eval()
    with torch.no_grad():
        losses = [float(model.loss([rows])) for rows in held_out.tensors[0].split(250)]
    return {
        "batch": batch, "rule": rule, "ratio": ratio, "seed": seed, "loss": round(statistics.mean(losses), 5),
        "updates": trainer.global_step, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def _runs(args: argparse.Namespace) -> list[tuple[str, str, int, Callback | None]]:
    constant = [
        ("constant", rule, ratio, make(ratio)) for ratio in args.ratios if ratio > 1 for rule, make in RULES.items()
    ]
    growing = [(name, "", ratio, make(ratio)) for name, make in GROWING.items() for ratio in (8, 32)]
    growing = [row for row in growing if not (row[0].startswith("8") and row[2] != 8)]
    wanted = re.compile(args.only).search
    return [row for row in [("constant", "reference", 1, None), *constant, *growing] if wanted(f"{row[0]} {row[1]}")]


def blocks(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the tables of the page."""

    def of(batch: str, rule: str, ratio: int) -> list[dict[str, Any]]:
        return [row for row in rows if (row["batch"], row["rule"], row["ratio"]) == (batch, rule, ratio)]

    reference = of("constant", "reference", 1)
    base = statistics.mean(row["loss"] for row in reference)
    ratios = sorted({row["ratio"] for row in rows if row["batch"] == "constant" and row["ratio"] > 1})
    lines = []
    for rule in RULES:
        means = [statistics.mean(row["loss"] for row in found) for r in ratios if (found := of("constant", rule, r))]
        cells = [mean_and_std([row["loss"] for row in of("constant", rule, ratio)], 3) for ratio in ratios]
        lines.append([rule, *cells, f"{max([base, *means]) - min([base, *means]):.3f}"])
    reference_cell = mean_and_std([row["loss"] for row in reference], 3)
    rules = table(["rule", *(f"κ = {ratio}" for ratio in ratios), "spread with κ = 1"], lines)
    growing = [["16 throughout", "1500", reference_cell, ""]]
    for name, _, ratio in sorted({(r["batch"], r["rule"], r["ratio"]) for r in rows if r["batch"] != "constant"}):
        found = of(name, "", ratio)
        updates = round(statistics.mean(row["updates"] for row in found))
        behind = statistics.mean(row["loss"] for row in found) - base
        growing.append([
            f"{name}, to {BATCH * ratio}", f"{updates} ({1 - updates / 1500:.0%} fewer)",
            mean_and_std([row["loss"] for row in found], 3), f"{behind:+.3f}".replace("-", "−"),
        ])  # fmt: skip
    return {
        "characters, rules": rules + f"\n\nκ = 1: {reference_cell}.",
        "characters, growing": table(["batch", "updates", "held-out loss", "behind 16"], growing),
    }


def main() -> None:
    """Train what is asked for, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--only", default="", help="runs whose batch and rule this finds")
    parser.add_argument("--out", type=Path, default=LOG)
    parser.add_argument("--page", action="store_true", help="only write the tables from the log")
    args = parser.parse_args()
    if args.page:
        write(PAGE, blocks(read(args.out)))
        return
    torch.set_num_threads(1)
    for seed in args.seeds:
        for batch, rule, ratio, callback in _runs(args):
            row = run(batch, rule, ratio, seed, callback)
            print(row, flush=True)
            put(args.out, row, lambda known, row=row: all(known.get(key) == row[key] for key in KEY))


if __name__ == "__main__":
    main()
