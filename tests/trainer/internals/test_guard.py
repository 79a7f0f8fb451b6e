"""What is said of a private name that is gone."""

import pytest
import torch
from torch import nn

from lightning_gap.trainer.internals.guard import PrivateNameGoneError, bound, private, set_private


def test_a_name_that_is_gone_is_named_with_its_package_and_version():
    with pytest.raises(PrivateNameGoneError, match=rf"torch {torch.__version__.split('+')[0]}.* has no Linear\._gone"):
        private(nn.Linear(1, 1), "_gone", "torch")
    with pytest.raises(PrivateNameGoneError, match=r"has no Linear\._gone"):
        set_private(nn.Linear(1, 1), "_gone", 1, "torch")


def test_a_function_that_is_gone_says_so_when_it_is_called():
    gone = bound(torch, "_gone", "torch")
    with pytest.raises(PrivateNameGoneError, match=r"torch\._gone"):
        gone(1)
