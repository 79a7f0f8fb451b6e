import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


@pytest.fixture
def sharded_layer():
    """A layer whose parameters are shards, over a mesh of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh, layer = init_device_mesh("cpu", (1,)), nn.Linear(3, 4)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    yield layer
    dist.destroy_process_group()
