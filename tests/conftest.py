"""What holds for every test."""

import sys

import pytest


@pytest.fixture(autouse=True)
def threads_are_left_as_they_were():
    """A process that is forked when torch has used several threads hangs at the next use of them."""
    torch = sys.modules.get("torch")  # not imported here: an emulated device has to be there first
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        now = torch.get_num_threads()
        torch.set_num_threads(before)
        pytest.fail(f"a test left {now} threads where there were {before}")
