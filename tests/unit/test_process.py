"""How operators live with the rest of a process: Python's lock, threads, forked children, several callers at once."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from reference import make_layer, random_values
from tutel.functional import grouped_gemm

FORK = """
import os, sys, torch
from tutel import moe
layer = moe.moe_layer({"k": 2}, 32, {"count_per_node": 4, "hidden_size_per_expert": 64})
tokens = torch.randn(512, 32)
expected = layer(tokens)
expected.sum().backward()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as DataLoader does; with more, operators of torch itself hang in a forked child
    output = layer(tokens)
    output.sum().backward()
    os._exit(0 if torch.equal(output, expected) else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


def run_python(source):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_forked_child():
    finished = run_python(FORK)
    assert finished.returncode == 0, finished.stderr


def test_python_goes_on_while_an_operator_runs():
    rows, weight = torch.randn(3000, 1024), torch.randn(1, 1024, 1024)
    offsets = torch.tensor([0, 3000])
    counted, stop = [0], threading.Event()
    ready = threading.Event()

    def count():
        ready.set()
        while not stop.is_set():
            counted[0] += 1
            stop.wait(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    ready.wait()
    progress = 0
    # Each call takes several milliseconds; a held lock would let the other thread on once a call at most.
    calls = 20
    for _ in range(calls):
        before = counted[0]
        grouped_gemm(rows, weight, offsets)
        progress += counted[0] - before
    stop.set()
    thread.join()
    assert progress > 2 * calls


def test_several_python_threads_at_once():
    layer = make_layer(model_dim=32, hidden_size=64)
    tokens = [random_values((300, 32), torch.float32, seed=seed) for seed in range(4)]
    expected = [layer(value) for value in tokens]
    found = [[] for _ in tokens]

    def work(index):
        with torch.no_grad():
            found[index] = [layer(tokens[index]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, wanted in zip(found, expected, strict=True):
        assert len(outputs) == 20
        assert all(torch.equal(output, wanted) for output in outputs)


def test_data_loader_workers_can_run_the_layer():
    source = """
import torch
from tutel import moe
class Data(torch.utils.data.Dataset):
    layer = moe.moe_layer({"k": 2}, 8, {"count_per_node": 4, "hidden_size_per_expert": 8})
    def __len__(self): return 8
    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((64, 8), float(index)))
if __name__ == "__main__":
    data = Data()
    direct = [data[i] for i in range(8)]
    loaded = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    assert all(map(torch.equal, direct, loaded))
"""
    finished = run_python(source)
    assert finished.returncode == 0, finished.stderr
