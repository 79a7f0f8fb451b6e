"""What each process of a gloo test does first."""

import atexit
import os
import socket
import warnings

import torch
import torch.distributed as dist


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def leave_world():
    """Close the process group: an interpreter that ends while gloo's threads run may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def enter_world(rank, ranks, port):
    """Become one of some processes that torchelastic has started, as Lightning sees it; on one thread, and quietly."""
    warnings.simplefilter("ignore")
    atexit.register(leave_world)
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
