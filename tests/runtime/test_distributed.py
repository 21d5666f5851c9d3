"""Several processes that share the data find what one process finds alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse.runtime import distributed
from actsparse.thresholds import read_thresholds

from ..distributed_job import ALGORITHMS

pytestmark = pytest.mark.slow

JOB = Path(__file__).parents[1] / "distributed_job.py"
# Gradients are sums of floats, whose order differs; all the others are counts.
WITH_GRADIENTS = {"auto", "fisher", "corrected-gxo+global"}


def start(command: list[str], rank: int, size: int, port: int) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command], env=environment, text=True, **pipes)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def outs(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What one process wrote, and what two wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    outs = {size: folder / str(size) for size in (1, 2)}
    port = free_port()
    for out in outs.values():
        out.mkdir()
    jobs = {size: [str(JOB), str(files), str(out)] for size, out in outs.items()}
    started = [start(job, rank, size, port) for size, job in jobs.items() for rank in range(size)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return outs


def read(out: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((out / f"{rank}.json").read_text())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_thresholds_are_those_of_one_process(algorithm, outs):
    alone, shared = (read_thresholds(outs[size] / f"{algorithm}.safetensors") for size in (1, 2))
    assert alone.thresholds.keys() == shared.thresholds.keys()
    for name, threshold in alone.thresholds.items():
        if algorithm in WITH_GRADIENTS:
            torch.testing.assert_close(shared.thresholds[name], threshold, rtol=1e-6, atol=0)
        else:
            assert torch.equal(shared.thresholds[name], threshold), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_is_that_of_one_process(algorithm, outs):
    alone, shared = (read(outs[size])[algorithm] for size in (1, 2))
    if algorithm in WITH_GRADIENTS:
        assert shared["word_perplexity"] == pytest.approx(alone["word_perplexity"], rel=1e-3)
    else:
        assert shared == alone


def test_every_process_gets_the_same_result(outs):
    assert read(outs[2], 0) == read(outs[2], 1)


def test_only_the_first_process_writes(outs):
    assert {path.name for path in outs[2].iterdir()} - {"1.json"} == {path.name for path in outs[1].iterdir()}


def test_mistakes_are_told_in_every_process(outs):
    for rank in (0, 1):
        mistakes = read(outs[2], rank)["mistakes"]
        assert "given different calibration data" in mistakes["other data"]
        assert "cannot be shared among processes" in mistakes["order"]


# As after init_process_group("nccl"), there is no backend for tensors on the CPU.
JOIN = """
import torch
import torch.distributed as dist
from actsparse.runtime import distributed
dist.init_process_group("cuda:gloo")
for _ in range(2):
    with distributed.together():
        total = torch.ones(2)
        distributed.add_up(total)
        distributed.require_same(bytes(32), "data")
        try:
            distributed.require_same(bytes([distributed.rank()] * 32), "data")
        except distributed.ProcessError as error:
            print(total.tolist(), error)
    assert dist.is_initialized() and distributed.count_processes() == 1
dist.destroy_process_group()
"""


def test_a_group_that_cannot_add_up_on_the_cpu_is_joined_all_the_same():
    port = free_port()
    for process in [start(["-c", JOIN], rank, 2, port) for rank in range(2)]:
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        first, second = printed.splitlines()
        assert first == second
        assert first.startswith("[2.0, 2.0] the processes were given different data")


def test_alone_nothing_is_shared():
    assert distributed.share(range(5)) == [0, 1, 2, 3, 4]
    assert distributed.is_first()
    total = torch.ones(2)
    distributed.add_up(total)
    assert total.tolist() == [1, 1]


def test_digest_tells_types_shapes_and_values_apart():
    inputs = [
        {"a": torch.ones(4)},
        {"b": torch.ones(4)},
        {"a": torch.ones(2, 2)},
        {"a": torch.ones(4, dtype=torch.int64)},
        {"a": torch.zeros(4)},
        (torch.ones(4),),
        [torch.ones(2), torch.ones(2)],
        "a",
        1,
    ]
    assert len({distributed.digest_of([value]) for value in inputs}) == len(inputs)
