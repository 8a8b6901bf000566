"""FSDP: each process keeps a share of the frozen base, and a block is gathered from all of them when it computes.

arXiv:2304.11277, by PyTorch's `fully_shard`. Only the base is shared out. What trains is small: each process has all
of it, and its gradient is added up in one message a step, as without.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lora_cli.adapter.inject import Adapter
from lora_cli.adapter.quantised import Quantised
from lora_cli.blocks import blocks
from lora_cli.train.processes import others_alive

all_gather: Any = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # its name before 2.13


@dataclass
class Gathering:
    """How blocks come together: the all-gather that FSDP calls, counted."""

    received: int = 0
    """Bytes of the base that this process has had from others."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for a block, `size` numbers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Any:
        """Everybody's share, one behind the other; `input_tensor` is this process', and its place in the output."""
        self.received += output_tensor.nbytes - input_tensor.nbytes
        with others_alive():
            return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


@dataclass(frozen=True)
class Shares:
    """A base that is shared out."""

    gathering: Gathering
    whole: int
    """Bytes of the base."""
    held: int
    """Bytes of it that this process keeps."""


def share_out(model: nn.Module, adapter: Adapter, accelerator: Accelerator) -> Shares:
    """Let each process keep its rows of every weight of the base, on its device; the adapter is moved there whole.

    Whatever reads W0 itself has to do so before, or in the forward pass of its block.
    """
    for module in model.modules():
        if isinstance(module, Quantised):
            module.codes_as_parameters()
    own = {*adapter.named_tensors().values()}
    for parameter in own:
        parameter.data = parameter.data.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    gathering = Gathering()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=own)
    # The ends and the last norm stay together until the backward pass is over: the loss reads the head by itself.
    fully_shard(model, mesh=mesh, ignored_params=own, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gathering)  # pyright: ignore[reportArgumentType]
    shared = [p for p in model.parameters() if isinstance(p, DTensor)]
    return Shares(gathering, sum(p.nbytes for p in shared), sum(p.to_local().nbytes for p in shared))
