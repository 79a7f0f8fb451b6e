"""Both halves of the package on real data: ``lightning-gap demo``."""

from lightning_gap.demo.colour_transfer import ColourSettings
from lightning_gap.demo.datasets import DemoError
from lightning_gap.demo.large_batch import LargeBatchSettings
from lightning_gap.demo.run import DemoSettings, run_demo

__all__ = ["ColourSettings", "DemoError", "DemoSettings", "LargeBatchSettings", "run_demo"]
