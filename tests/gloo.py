"""What each process of a gloo test does first."""

import os
import socket
import warnings

import torch


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def enter_world(rank, ranks, port):
    """Become one of some processes that torchelastic has started, as Lightning sees it; on one thread, and quietly."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
    )
