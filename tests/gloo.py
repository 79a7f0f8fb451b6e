"""Processes of a gloo test: how they are started, and what each does first."""

import atexit
import os
import socket
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def leave_world():
    """Close the process group when every process is done: the first has the store, which others may still ask."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _close():
    """An interpreter that ends while gloo's threads run may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def enter_world(rank, ranks, port):
    """Become one of some processes that torchelastic has started, as Lightning sees it; on one thread, and quietly."""
    warnings.simplefilter("ignore")
    atexit.register(_close)
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


def start_processes(worker, arguments, ranks):
    """Run ``worker(rank, *arguments)`` in so many processes, and raise what one of them raises.

    They are forks, which have imported everything already. The fork of a process that has computed on several threads
    may hang, so there they begin anew.
    """
    method = "fork" if torch.get_num_threads() == 1 else "spawn"
    mp.start_processes(worker, arguments, ranks, start_method=method)
