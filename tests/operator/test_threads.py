"""Calls from several threads at once, after a fork, and the work of one call spread over the threads."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import check, make_call, run
from torch.utils.data import DataLoader, Dataset

from prefix_kernels import prefix_attention

SEED = torch.tensor([7])
SHOWN = torch.rand(1, 1, 9, 640 + 513, generator=torch.Generator().manual_seed(0)) < 0.8
linux_only = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are looked up in Linux's /proc")


@pytest.fixture(autouse=True)
def two_threads():
    """A pool to share or to lose in a fork, whatever the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_calls_from_several_threads_at_once_are_those_of_one_thread():
    calls = [
        make_call(
            batch=2,
            q_heads=4,
            kv_heads=2,
            q_len=100 + 9 * seed,
            k_len=130,
            prefix_len=20,
            head_dim=(32, 40, 64)[seed % 3],
            seed=seed,
            is_causal=seed % 2 == 0,
            dtype=(torch.float32, torch.bfloat16)[seed % 2],
        )
        for seed in range(6)
    ]
    expected = [run(call).tensors() for call in calls]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for want, got in zip(expected, pool.map(run, calls), strict=True):
                for name, tensor in got.tensors().items():
                    assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_right_result(threads):
    torch.set_num_threads(threads)
    check(make_call(batch=1, q_heads=1, q_len=200, k_len=210, prefix_len=40, head_dim=32))
    check(make_call(batch=3, q_heads=6, kv_heads=2, q_len=65, k_len=70, prefix_len=130, head_dim=32, is_causal=True))
    check(make_call(batch=5, q_heads=4, kv_heads=1, q_len=1, k_len=70, prefix_len=300, head_dim=32, is_causal=True))


FEW_QUERIES = {
    "causal": dict(batch=1, q_heads=1, q_len=70, k_len=900, prefix_len=300, is_causal=True),
    "window": dict(batch=1, q_heads=2, kv_heads=1, q_len=33, k_len=700, prefix_len=530, window_size=(300, 10)),
    "dropout": dict(
        batch=1, q_heads=2, kv_heads=1, q_len=60, k_len=600, prefix_len=129, dropout_p=0.3, dropout_seed=SEED
    ),
    # so long that there are few chunks
    "long prefix": dict(batch=1, q_heads=16, q_len=3, k_len=5, prefix_len=4200, head_dim=128),
    "mask": dict(batch=1, q_heads=1, q_len=9, k_len=513, prefix_len=640, attn_mask=SHOWN),
    "bank": dict(
        batch=3,
        q_heads=1,
        q_len=9,
        k_len=30,
        prefix_len=700,
        num_prefixes=3,
        prefix_ids=torch.tensor([[2, 0], [-1, 1], [1, 1]]),
        prefix_lens=torch.tensor([700, 3, 555]),
    ),
}


@pytest.mark.parametrize("threads", [2, 7, 16])
@pytest.mark.parametrize("needs", [None, ("prefix_key", "prefix_value"), ("query",), ("key", "prefix_value")], ids=str)
@pytest.mark.parametrize("shape", FEW_QUERIES.values(), ids=FEW_QUERIES)
def test_keys_are_divided_where_blocks_of_queries_are_few(shape, needs, threads):
    torch.set_num_threads(threads)
    call = make_call(**{"head_dim": 40} | shape)
    first = check(call, needs=needs).tensors()
    for name, tensor in run(call, needs=needs).tensors().items():
        assert torch.equal(tensor, first[name]), name


def test_more_threads_than_work():
    torch.set_num_threads(16)
    check(make_call(batch=1, q_heads=1, q_len=1, k_len=1, prefix_len=1, head_dim=8))
    check(make_call(batch=1, q_heads=1, q_len=3, k_len=0, prefix_len=2, head_dim=8))


class AttentionDataset(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        result = run(make_call(q_len=40, k_len=60, prefix_len=20, head_dim=32, seed=index))
        return torch.cat([result.out.flatten(), result.grads["prefix_key"].flatten()])


def test_data_loader_workers():
    expected = torch.stack([AttentionDataset()[index] for index in range(8)])  # the pool exists before the fork
    loader = DataLoader(AttentionDataset(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def exit_code_of_fork(child: Callable[[], bool], seconds: float = 60) -> int | None:
    """0 when ``child`` returned true in a forked process, None when it hung."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if child() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


@linux_only
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_with_one_thread():
    call = make_call(batch=4, q_heads=4, q_len=140, k_len=150, prefix_len=20, head_dim=32)
    expected = run(call)

    def child() -> bool:
        torch.set_num_threads(1)
        got = run(call)
        return torch.allclose(got.out, expected.out, atol=1e-5) and torch.allclose(
            got.grads["prefix_key"], expected.grads["prefix_key"], atol=1e-4
        )

    assert exit_code_of_fork(child) == 0


# CPU time of every thread during one long call.
THREAD_TIMES = """
import json, os, sys
import torch
from prefix_kernels import prefix_attention

torch.set_num_threads(2)
shape, needs, options = json.loads(sys.argv[1])
tensors = [torch.randn(size) for size in shape]
for tensor, need in zip(tensors, needs):
    tensor.requires_grad_(need)

def spent():
    threads = os.listdir("/proc/self/task")
    return {thread: int(open(f"/proc/self/task/{thread}/schedstat").read().split()[0]) for thread in threads}

out = prefix_attention(*tensors, **options)
if any(needs):
    out.backward(torch.ones_like(out))
start = spent()
for _ in range(3):
    out = prefix_attention(*tensors, **options)
    if any(needs):
        out.backward(torch.ones_like(out))
end = spent()
print(json.dumps(sorted((end[thread] - start.get(thread, 0) for thread in end), reverse=True)))
"""

ONE_HEAD = [(1, 1, 2048, 64)] * 3 + [(1, 20, 64)] * 2
LONG_PREFIX = [(1, 1, 1500, 64), (1, 1, 16, 64), (1, 1, 16, 64), (1, 4096, 64), (1, 4096, 64)]


@linux_only
@pytest.mark.parametrize(
    "shape, needs, options",
    [
        (ONE_HEAD, [False] * 5, {}),
        (ONE_HEAD, [False] * 5, {"is_causal": True}),
        (ONE_HEAD, [True] * 5, {}),
        (ONE_HEAD, [True] * 5, {"is_causal": True}),
        (LONG_PREFIX, [False] * 3 + [True] * 2, {}),
    ],
    ids=["forward", "causal forward", "backward", "causal backward", "long prefix backward"],
)
def test_one_batch_row_and_one_head_keep_two_threads_busy(shape, needs, options):
    """Waiting threads sleep (OMP_WAIT_POLICY), so the time that a thread spends is work."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", THREAD_TIMES, json.dumps([shape, needs, options])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second, *_ = [*json.loads(done.stdout), 0]
    assert second > 0.2 * (first + second), f"busiest {first / 1e6:.0f} ms, next {second / 1e6:.0f} ms"


def test_importing_does_not_change_the_number_of_threads():
    script = "import torch; n = torch.get_num_threads(); import prefix_kernels; assert torch.get_num_threads() == n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_inference_mode_and_its_tensors():
    with torch.inference_mode():
        inputs = make_call(q_len=20).inputs
        out = prefix_attention(**inputs)
    assert out.is_inference()
