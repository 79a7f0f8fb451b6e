"""``python -m lightning_gap``, which launchers such as torchrun take: ``torchrun -m lightning_gap fit ...``."""

from lightning_gap.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
