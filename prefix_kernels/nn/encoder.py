"""The prefixes of all layers of a model, from one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_kernels import fsdp


class PrefixEncoder(nn.Module):
    """The key and value prefixes of every layer of a model, as strided views of one table.

    The table is ``T [P, 2 L, H, D]``: ``T[:, 2 l]`` is the key prefix of layer ``l`` and ``T[:, 2 l + 1]`` its value
    prefix, which is how PEFT stores them: ``encoder.table.flatten(1)`` is its ``prompt_embeddings``. It is either
    trained itself (P-tuning v2, Liu et al., 2022) or, with ``projection=True``, generated while training (Li and
    Liang, 2021: "Prefix-Tuning: Optimizing Continuous Prompts for Generation")::

        T = Linear_2(tanh(Linear_1(embedding)))       embedding [P, E], Linear_1 E -> M, Linear_2 M -> 2 L H D

    Where values have a head dim ``Dv`` of their own, ``T`` is ``[P, L, H, D + Dv]``: keys and values side by side.

    Once training ends, :meth:`fold` replaces what generates the table by the table.

    With ``num_frozen_tokens`` the first rows of ``T`` are a buffer, out of reach of gradients and optimizers, and the
    rest of them is what is trained. Eyuboglu et al. (2025, "Cartridges") freeze the first token of a long prefix, to
    which many models attend as a sink.

    Args:
        num_prefix_tokens: ``P``, the prefix length, at least 1.
        num_layers: ``L``.
        num_heads: ``H``, the number of key/value heads (fewer than the query's with grouped-query attention).
        head_dim: ``D``.
        value_head_dim: ``Dv``. Default: ``D``.
        projection: generate the table by the network above.
        embedding_dim: ``E``, with ``projection`` only. Default: ``num_heads * head_dim``.
        hidden_size: ``M``, with ``projection`` only. Default: 512.
        num_frozen_tokens: ``F``, from 0 to ``P``, the first tokens that are never trained; 0 with ``projection``.
        dropout: probability with which entries of the prefix, its frozen rows included, are zeroed while training (the
            others are scaled up).
        init_std: standard deviation of the initial table, one number or one per layer. With ``projection`` the rows of
            ``Linear_2`` are scaled so that the generated table has it. Default: 1.0, and with ``projection`` whatever
            the usual initialisation of Embedding and Linear gives.

    Attributes:
        table: the trained rows of the table, a parameter ``[P - F, 2 L, H, D]``, or None while they are generated.
        frozen_table: its frozen rows, a buffer ``[F, 2 L, H, D]``, or None where ``F`` is 0.

    Raises:
        ValueError: a size below 1, ``num_frozen_tokens`` outside ``[0, P]`` or with ``projection``, a dropout outside
            ``[0, 1]``, a wrong number of ``init_std``, or ``embedding_dim`` or ``hidden_size`` without ``projection``.
    """

    table: nn.Parameter | None
    frozen_table: Tensor | None
    embedding: nn.Embedding
    transform: nn.Sequential

    def __init__(
        self,
        num_prefix_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        projection: bool = False,
        embedding_dim: int | None = None,
        hidden_size: int | None = None,
        num_frozen_tokens: int = 0,
        dropout: float = 0.0,
        init_std: float | Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "num_prefix_tokens": num_prefix_tokens,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "value_head_dim": head_dim if value_head_dim is None else value_head_dim,
        }
        for name, size in {"embedding_dim": embedding_dim, "hidden_size": hidden_size}.items():
            if size is not None and not projection:
                raise ValueError(f"{name}: expected None without projection=True, got {size}")
            if size is not None:
                sizes[name] = size
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if not 0 <= num_frozen_tokens <= num_prefix_tokens:
            raise ValueError(f"num_frozen_tokens: expected 0 to {num_prefix_tokens}, got {num_frozen_tokens}")
        if num_frozen_tokens and projection:
            raise ValueError(
                "num_frozen_tokens: expected 0 with projection=True (every row moves with the network that generates "
                f"it), got {num_frozen_tokens}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")

        self.num_prefix_tokens = num_prefix_tokens
        self.num_frozen_tokens = num_frozen_tokens
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.value_head_dim = head_dim if value_head_dim is None else value_head_dim
        self.dropout = dropout
        self.init_std = init_std
        frozen = (
            torch.empty(num_frozen_tokens, *self._row_shape, device=device, dtype=dtype) if num_frozen_tokens else None
        )
        self.register_buffer("frozen_table", frozen)
        if projection:
            embedding_dim = num_heads * head_dim if embedding_dim is None else embedding_dim
            hidden_size = 512 if hidden_size is None else hidden_size
            self.embedding = nn.Embedding(num_prefix_tokens, embedding_dim, device=device, dtype=dtype)
            self.transform = nn.Sequential(
                nn.Linear(embedding_dim, hidden_size, device=device, dtype=dtype),
                nn.Tanh(),
                nn.Linear(hidden_size, math.prod(self._row_shape), device=device, dtype=dtype),
            )
            self.register_parameter("table", None)
        else:
            rows = num_prefix_tokens - num_frozen_tokens
            self.table = nn.Parameter(torch.empty(rows, *self._row_shape, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def _row_shape(self) -> tuple[int, int, int]:
        if self.value_head_dim == self.head_dim:
            return 2 * self.num_layers, self.num_heads, self.head_dim
        return self.num_layers, self.num_heads, self.head_dim + self.value_head_dim

    @property
    def projection(self) -> bool:
        """True while a network generates the table, which :meth:`fold` ends."""
        return self.table is None

    @property
    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        # nn.Sequential does not know the types of its modules.
        return cast(nn.Linear, self.transform[0]), cast(nn.Linear, self.transform[2])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values."""
        if self.projection:
            self.embedding.reset_parameters()
            for layer in self._linears:
                layer.reset_parameters()
        tables = [x for x in (self.frozen_table, self.table) if x is not None]
        for table in tables:
            table.normal_()
        if self.init_std is None:
            return

        stds = [self.init_std] * self.num_layers if isinstance(self.init_std, int | float) else list(self.init_std)
        if len(stds) != self.num_layers:
            raise ValueError(f"init_std: expected one number or one per layer ({self.num_layers}), got {len(stds)}")
        if not self.projection:
            for table in tables:
                table *= table.new_tensor(stds).repeat_interleave(table.shape[1] // self.num_layers)[:, None, None]
            return
        generated: Tensor = self._generate().unflatten(1, (self.num_layers, -1))
        factors = generated.new_tensor(stds) / generated.square().mean(dim=(0, 2, 3, 4)).sqrt()
        last = self._linears[1]
        scales = factors.repeat_interleave(last.out_features // self.num_layers)
        last.weight.mul_(scales[:, None])
        last.bias.mul_(scales)

    def _generate(self) -> Tensor:
        rows: Tensor = self.transform(self.embedding.weight)
        return rows.view(self.num_prefix_tokens, *self._row_shape)

    def full_table(self) -> Tensor:
        """``T``, differentiable with respect to what is trained; no copy where that is all of it."""
        if self.table is None:
            return self._generate()
        return self.table if self.frozen_table is None else torch.cat([self.frozen_table, self.table])

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """The prefixes of this step.

        Returns:
            ``(prefix_key, prefix_value)`` of each layer: ``[H, P, D]`` (the value: ``Dv``) with ``stride(-1) == 1``,
            views of one tensor (copies where this module is a unit of FSDP2).
        """
        table = F.dropout(self.full_table(), self.dropout, self.training)
        # unbind, not 2 L slices: its backward writes the table's gradient once.
        prefixes: Sequence[Tensor] = table.permute(1, 2, 0, 3).unbind(0)
        if fsdp.is_unit(self):
            # The table's memory is given back as soon as this returns.
            prefixes = [prefix.clone() for prefix in prefixes]
        if self.value_head_dim != self.head_dim:
            sizes = (self.head_dim, self.value_head_dim)
            return [(key, value) for key, value in (prefix.split(sizes, dim=-1) for prefix in prefixes)]
        return list(zip(prefixes[0::2], prefixes[1::2], strict=True))

    def packed(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The table ``T`` of ``(prefix_key, prefix_value)`` of each layer, ``[H, P, D]`` and ``[H, P, Dv]``."""
        rows = [(key.transpose(0, 1), value.transpose(0, 1)) for key, value in pairs]
        if self.value_head_dim != self.head_dim:
            return torch.stack([torch.cat(row, dim=-1) for row in rows], dim=1)
        return torch.stack([x for row in rows for x in row], dim=1)

    def fold(self) -> PrefixEncoder:
        """Replace, in place, the embedding and its network by the table that they generate.

        The outputs stay the same and the parameters become ``2 L P H D``; an encoder without a network stays as it is.
        The table is trainable if anything that generated it was. An optimizer still refers to the parameters that are
        gone: fold once training ends.

        A model of which FSDP2 shards more than this encoder has to be resharded before (``model.reshard()``): what a
        forward pass has left gathered of the unit around the encoder cannot be told from parameters that are whole.

        Returns:
            This encoder.

        Raises:
            ValueError: FSDP2 shards what generates the table (``save_prefix(model, path, fold=True)`` needs no fold).
        """
        if self.projection:
            fsdp.reshard(self)
            if any(p.is_shard() for parameter in self.parameters() for p in getattr(parameter, "placements", ())):
                raise ValueError("fold: expected parameters that every process holds whole, got sharded ones")
            trainable = any(parameter.requires_grad for parameter in self.parameters())
            table = self.folded_prefix_state()["table"]
            del self.embedding, self.transform
            self.table = nn.Parameter(table, requires_grad=trainable)
        return self

    def prefix_parameter_names(self) -> list[str]:
        """Name every parameter, as the protocol of :mod:`prefix_kernels.checkpoint` asks: all belong to the prefix."""
        return [name for name, _ in self.named_parameters()]

    def frozen_prefix_names(self) -> list[str]:
        """Name every buffer, as the protocol of :mod:`prefix_kernels.checkpoint` asks: all belong to the prefix."""
        return [name for name, _ in self.named_buffers()]

    def arranged_prefix_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Divide stored rows into frozen and trained ones (protocol of :mod:`prefix_kernels.checkpoint`)."""
        names = [name for name in ("frozen_table", "table") if name in state]
        if not names:
            return dict(state)
        rows = state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        others = {name: tensor for name, tensor in state.items() if name not in names}
        if not self.num_frozen_tokens:
            return others | {"table": rows}
        return others | {"frozen_table": rows[: self.num_frozen_tokens], "table": rows[self.num_frozen_tokens :]}

    @torch.no_grad()
    def folded_prefix_state(self) -> dict[str, Tensor]:
        """Return the table and its frozen rows, detached, for the protocol of :mod:`prefix_kernels.checkpoint`."""
        frozen = {} if self.frozen_table is None else {"frozen_table": self.frozen_table}
        return {"table": self._generate() if self.table is None else self.table.detach()} | frozen

    def extra_repr(self) -> str:
        return (
            f"num_prefix_tokens={self.num_prefix_tokens}, num_layers={self.num_layers}, num_heads={self.num_heads}, "
            f"head_dim={self.head_dim}, value_head_dim={self.value_head_dim}, projection={self.projection}, "
            f"num_frozen_tokens={self.num_frozen_tokens}, dropout={self.dropout}"
        )
