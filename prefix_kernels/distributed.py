"""Tensor parallelism of prefixes; the rule for sharded calls is in :mod:`prefix_kernels.sharded_attention`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from prefix_kernels.nn.encoder import PrefixEncoder
from prefix_kernels.sharded_attention import sharded_attention

__all__ = ["PrefixParallel", "sharded_attention"]


class PrefixParallel(ParallelStyle):
    """Tensor parallelism of a :class:`~prefix_kernels.PrefixEncoder`: each process holds the prefixes of its heads.

    For ``parallelize_module`` of ``torch.distributed.tensor.parallel``, beside ``ColwiseParallel`` for the query, key
    and value projections of the model and ``RowwiseParallel`` for the output. The table is split over heads; a
    generating MLP is kept whole, and every process takes its heads of what it generates.

    Args:
        use_local_output: the encoder returns plain tensors, which is what attention needs that sees plain tensors of
            its own heads. False: DTensors.

    Raises:
        TypeError: on a module that is no PrefixEncoder.
        ValueError: the heads do not divide over the processes.
    """

    def __init__(self, *, use_local_output: bool = True) -> None:
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, PrefixEncoder):
            raise TypeError(f"PrefixParallel: expected a PrefixEncoder, got {type(module).__name__}")
        if module.num_heads % device_mesh.size():
            raise ValueError(
                f"PrefixParallel: expected a number of heads that divides over {device_mesh.size()} processes, "
                f"got {module.num_heads}"
            )
        heads_of_table = 2
        for name, parameter in list(module.named_parameters()):
            placement = Shard(heads_of_table) if name == "table" else Replicate()
            owner = module.get_submodule(name.rpartition(".")[0])
            # The first process's values: each may have drawn its own.
            sharded = distribute_tensor(parameter.detach(), device_mesh, [placement])
            owner.register_parameter(
                name.rpartition(".")[2], nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            )
        if module.frozen_table is not None:
            module.frozen_table = distribute_tensor(module.frozen_table, device_mesh, [Shard(heads_of_table)])
        module.register_forward_hook(self._own_heads)
        return module

    def _own_heads(
        self, module: nn.Module, args: object, pairs: list[tuple[DTensor, DTensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        def own(prefix: DTensor) -> Tensor:
            prefix = prefix.redistribute(placements=[Shard(0)])
            return prefix.to_local() if self.use_local_output else prefix

        return [(own(key), own(value)) for key, value in pairs]
