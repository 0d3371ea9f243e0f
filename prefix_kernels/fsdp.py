"""Detection of FSDP2's units (``fully_shard``), without importing FSDP2 where nobody did."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def is_unit(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Return True if ``fully_shard`` was called on ``module`` itself: its parameters are whole only while it runs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def units_of(model: nn.Module) -> list[FSDPModule]:
    """The modules in ``model``, itself among them, on which ``fully_shard`` was called."""
    return [module for module in model.modules() if is_unit(module)]


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters of ``model`` back where a forward pass has left gathered copies of them.

    What is written to such a copy is lost with it.
    """
    for unit in units_of(model):
        unit.reshard()
