"""A prefix for a model whose attention heads are divided among processes by Transformers' tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.transformers.structure.prefix_layout import PrefixLayout
from prefix_kernels.nn.encoder import PrefixEncoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_tensor_parallel(model: nn.Module) -> bool:
    """Return True if ``model`` was loaded with a ``tp_plan``, by several processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def split_over_heads(model: PreTrainedModel, encoder: PrefixEncoder | nn.ModuleDict, layout: PrefixLayout) -> None:
    """Let each process hold in ``encoder`` the prefixes of the heads that it computes of a tensor-parallel ``model``.

    Raises:
        ValueError: the heads do not divide over the processes.
    """
    if not is_tensor_parallel(model):
        return
    from torch.distributed.tensor.parallel import parallelize_module

    from prefix_kernels.distributed import PrefixParallel

    mesh = _mesh_of(layout.sites[0].module)
    for one in encoder.values() if isinstance(encoder, nn.ModuleDict) else [encoder]:
        parallelize_module(one, mesh, PrefixParallel())


def refuse_divided(heads: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if tensor parallelism divides one of ``heads``, which then cannot be copied for another task."""
    for name, head in heads.items():
        if any(hasattr(parameter, "device_mesh") for parameter in head.parameters()):
            raise ValueError(f"{name}: expected a head that each process holds whole, got one divided among processes")


def divided_like(present: Tensor, table: Tensor) -> Tensor:
    """``table [P, 2 L, Hkv, D]``, whole or of this process's heads, divided among processes as ``present`` is."""
    if not hasattr(present, "device_mesh"):
        return table
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(present, DTensor)
    table, mesh, placements = table.to(present.device, present.dtype), present.device_mesh, present.placements
    if table.shape == present.shape:
        return distribute_tensor(table, mesh, placements)
    return DTensor.from_local(table, mesh, placements, run_check=False)


def _mesh_of(attention: nn.Module) -> DeviceMesh:
    """The mesh over which the projections of ``attention`` are divided."""
    for parameter in attention.parameters():
        mesh: DeviceMesh | None = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    raise ValueError(f"{type(attention).__name__}: its model is tensor-parallel, but none of its weights is divided")
