"""Small calls through every kernel, for compute-sanitizer, which makes each a hundred times slower."""

import itertools

import torch

from prefix_kernels import prefix_attention

# Sq, Sk, P, D: tiles of many queries, few queries, and a head dim whose rows are copied in smaller pieces.
SHAPES = ((40, 50, 20, 64), (1, 70, 20, 128), (20, 20, 5, 36))
OPTIONS = {
    "plain": {},
    "general": {"is_causal": True, "softcap": 2.0, "dropout_p": 0.2},
    "composed": {"prefix_ids": [[1, 0], [-1, 1]], "prefix_lens": [5, 3]},
}
ALL, PREFIX = (True,) * 5, (False, False, False, True, True)


def main(device: str = "cuda") -> None:
    for dtype, (q_len, k_len, prefix_len, head_dim), options, needs in itertools.product(
        (torch.bfloat16, torch.float32), SHAPES, OPTIONS.values(), (ALL, PREFIX)
    ):
        bank = (2,) if "prefix_ids" in options else ()
        options = {
            name: torch.tensor(value, device=device) if isinstance(value, list) else value
            for name, value in options.items()
        }
        sequence = [(2, heads, rows, head_dim) for heads, rows in ((2, q_len), (1, k_len), (1, k_len))]
        shapes = [*sequence, *[(*bank, 1, prefix_len, head_dim)] * 2]
        # The prefix in float32 beside a bfloat16 sequence, as it is trained.
        dtypes = [dtype] * 3 + [torch.float32] * 2
        leaves = [
            torch.randn(shape, device=device).to(each).requires_grad_(need)
            for shape, each, need in zip(shapes, dtypes, needs, strict=True)
        ]
        out = prefix_attention(*leaves, **options)
        out.backward(torch.ones_like(out))
        query, key, value, *prefix = (leaf.detach() for leaf in leaves)
        out, lse = prefix_attention(query, key, value, return_lse=True)
        torch.ops.prefix_kernels.extend_(
            query, out, lse, *prefix, options.get("prefix_ids"), options.get("prefix_lens"), None
        )
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
