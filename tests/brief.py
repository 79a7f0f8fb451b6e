"""Starts of maps for what is to run, whatever its maps are."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest


def begin_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let starts of maps take few samples, a twentieth of their steps, and one look."""
    from lightning_gap.monge.maps.descent import minimize
    from lightning_gap.monge.maps.starts import PlanStart

    targets = PlanStart.targets

    def briefly(*args: Any, steps: int, looks: int = 1, **options: Any) -> None:
        minimize(*args, steps=max(1, steps // 20), **options)

    def of_few(start: PlanStart, *args: Any) -> Any:
        return targets(replace(start, samples=min(start.samples, 512)), *args)

    monkeypatch.setattr(PlanStart, "targets", of_few)
    for module in ("energy_fit", "fitting", "semidual"):
        monkeypatch.setattr(import_module(f"lightning_gap.monge.maps.{module}"), "minimize", briefly)
