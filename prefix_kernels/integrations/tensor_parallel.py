"""A prefix for a model whose attention heads are divided among processes by Transformers' tensor parallelism."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from prefix_kernels.integrations.layout import PrefixLayout


def split_over_heads(model: PreTrainedModel, layout: PrefixLayout) -> None:
    """Let each process hold the prefixes of the heads that it computes, where ``model`` is loaded with a ``tp_plan``.

    Raises:
        ValueError: the heads do not divide over the processes.
    """
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return
    from torch.distributed.tensor.parallel import parallelize_module

    from prefix_kernels.distributed import PrefixParallel

    mesh = _mesh_of(layout.sites[0].module)
    encoder = model.prefix_encoder
    for one in encoder.values() if isinstance(encoder, nn.ModuleDict) else [encoder]:
        parallelize_module(one, mesh, PrefixParallel())


def _mesh_of(attention: nn.Module):
    """The mesh over which the projections of ``attention`` are divided."""
    for parameter in attention.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    raise ValueError(f"{type(attention).__name__}: its model is tensor-parallel, but none of its weights is divided")
