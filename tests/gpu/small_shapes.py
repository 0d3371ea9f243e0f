"""Small calls through every kernel, for compute-sanitizer, which makes each a hundred times slower."""

import itertools

import torch

from prefix_kernels import prefix_attention

SHAPES = ((40, 50, 20, 64), (1, 70, 20, 128))  # Sq, Sk, P, D
OPTIONS = {
    "plain": {},
    "general": {"is_causal": True, "softcap": 2.0, "dropout_p": 0.2},
}


def main() -> None:
    for dtype, (q_len, k_len, prefix_len, head_dim), options in itertools.product(
        (torch.bfloat16, torch.float32), SHAPES, OPTIONS.values()
    ):
        shapes = [(1, 2, q_len), (1, 1, k_len), (1, 1, k_len), (1, prefix_len), (1, prefix_len)]
        leaves = [torch.randn(*shape, head_dim, device="cuda").to(dtype).requires_grad_() for shape in shapes]
        out = prefix_attention(*leaves, **options)
        out.backward(torch.ones_like(out))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
