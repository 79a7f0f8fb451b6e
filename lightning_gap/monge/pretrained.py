"""Maps that leave their training behind: a folder that the Hugging Face hub takes as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from lightning_gap.monge.checkpoint_files import SafelyLoaded
from lightning_gap.monge.pretrained_folder import read_folder, write_folder

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["Pretrained"]


class Pretrained(SafelyLoaded):
    """A module whose map is saved without its training."""

    def save_pretrained(self, folder: str | Path, *, scores: Mapping[str, Any] | None = None) -> None:
        """Write the map into a folder, for those who use it and do not train it.

        The folder gets ``model.safetensors``, weights and buffers of the map, of the samples' standardization and of
        the conditions' encoding; ``config.json``, the map's class by its public name and its arguments, costs,
        epsilons, dimensions, names of features and conditions, versions; and ``README.md``, a card in the hub's format
        with the sizes of the training data, scores and certificate where they are known, which is left as it is where
        there is one. Neither training samples (but those that an :class:`EntropicMap` is made of) nor the optimizer are
        in it; a checkpoint has all that a training goes on with. Of several processes the first one writes.

        Args:
            folder: The folder, which is made where there is none.
            scores: Numbers by name for the card, as ``trainer.test(model, data)[0]``; by default those of the map's
                last test since it was fitted, or else of its last validation.

        Raises:
            MisconfigurationException: The weights are in shards.
            ModuleNotFoundError: There is no safetensors: ``pip install 'lightning_gap[hub]'``.
            TypeError: ``scores`` are no numbers by name, or a state of your network is no tensor.
            ValueError: There is no network yet, or ``folder`` is a file.

        Example:
            >>> import tempfile, torch
            >>> from lightning_gap import MongeMap
            >>> from lightning_gap.monge import ResidualMLP
            >>> net, x = ResidualMLP(2, start="mean"), torch.randn(100, 2)
            >>> net.start(x, x + 3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     MongeMap(map=net).save_pretrained(folder)
            ...     loaded = MongeMap.from_pretrained(folder)
            >>> torch.equal(loaded.transport(x), net(x))
            True
        """
        write_folder(cast("MongeMap", self), folder, scores)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **given: Any) -> Self:
        """Return the map of a folder that :meth:`save_pretrained` wrote, on the CPU and in evaluation mode.

        It needs neither the data nor the code of the training, and its images have the same bits as before. Nothing in
        the folder is run, and nothing that it names is imported but the public maps of this package.

        Args:
            folder: A folder on this machine; for a map on the Hugging Face hub, what
                ``huggingface_hub.snapshot_download("owner/name")`` returns.
            **given: Arguments of :class:`MongeMap` that go before those of the folder: ``map=``, an instance of a
                network of your own, and ``cost=`` or ``fitting_cost=``, of which a folder holds the names only.

        Raises:
            FileNotFoundError: There is no such folder, or a file is missing in it.
            ModuleNotFoundError: There is no safetensors: ``pip install 'lightning_gap[hub]'``.
            ValueError: A file is damaged or of an unknown format; the map is not of this package and not given, or a
                cost; or weights are missing, too many, or of other shapes than the map's.

        Example:
            >>> from lightning_gap import MongeMap
            >>> model = MongeMap.from_pretrained("my-map")  # doctest: +SKIP
            >>> images = model.transport(x)  # doctest: +SKIP
        """
        return cast(Self, read_folder(cast("type[MongeMap]", cls), folder, given))
