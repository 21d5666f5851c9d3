"""
Time the kernel alone: one masked layer as the extension's operation against OpenVINO's dense layer, INT8.

    python benchmarks/kernel_speed.py [--json FILE]
"""

import argparse
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
from bars import Bar, Measurement
from command import make_plain_parser, positive, run_benchmark

from actsparse.commands.bench.memory import measure_memory
from actsparse.errors import ActsparseError
from actsparse.openvino import accelerate
from actsparse.openvino.build import extension_path
from actsparse.openvino.graph_masks import insert_mask
from actsparse.openvino.linear import find_linears
from actsparse.runtime.environment import count_cores

SHAPES = ((4096, 12288), (2048, 12288), (6144, 2048), (4864, 896), (1536, 576))
SPEEDUP = 1.9
# Bytes kept that are read in a second, over what the same cores read of a scattered half of pages.
READING = 0.85
SPARSITY = 0.5
# Median of |x| for normal x: half of the inputs are masked.
THRESHOLD = 0.67449
CONFIG = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
# Layers in turn, so that none finds its weights in a cache.
CACHE_BYTES = 800_000_000


def make_layers(in_features: int, out_features: int, *, is_sparse: bool) -> ov.CompiledModel:
    """
    Compile layers that all read the same input, each with its own weights.

    :param in_features: Input channels.
    :param out_features: Output channels.
    :param is_sparse: Whether to mask and accelerate them.
    :return: The compiled model.
    """
    rng = np.random.default_rng(0)
    x = ops.parameter([1, 1, in_features], np.float32)
    count = CACHE_BYTES // (in_features * out_features)
    node, results = x, []
    weight = rng.normal(size=(out_features, in_features)).astype(np.float32)
    for _ in range(count):
        layer = ops.matmul(node, ops.constant(np.roll(weight, len(results), axis=0)), False, True)
        results.append(ops.result(layer))
        # The next one has to wait: a token's layers run one after the other.
        node = ops.add(x, ops.multiply(ops.reduce_mean(layer, [-1], keep_dims=True), np.float32(0)))
    model = nncf.compress_weights(ov.Model(results, [x]), mode=nncf.CompressWeightsMode.INT8_ASYM)
    if is_sparse:
        for linear in list(find_linears(model)):
            insert_mask([linear], THRESHOLD)
        if accelerate(model).kept:
            message = "the extension does not run here: see actsparse doctor"
            raise ActsparseError(message)
    return ov.Core().compile_model(model, "CPU", CONFIG)


def measure(options: argparse.Namespace) -> Measurement:
    """
    Time all shapes, dense and sparse in turn.

    :param options: The command line.
    :return: Ratios of the medians.
    """
    bars: list[Bar] = []
    samples: dict[str, Any] = {}
    reading = measure_memory(extension_path(), count_cores())
    for shape in SHAPES:
        requests = [make_layers(*shape, is_sparse=is_sparse).create_infer_request() for is_sparse in (False, True)]
        count = CACHE_BYTES // (shape[0] * shape[1])
        rng = np.random.default_rng(1)
        seconds: list[list[float]] = [[], []]
        for _ in range(options.repeats + 3):
            x = rng.normal(size=(1, 1, shape[0])).astype(np.float32)
            for request, times in zip(requests, seconds, strict=True):
                start = time.perf_counter()
                request.infer([x])
                times.append((time.perf_counter() - start) / count)
        dense, sparse = (median(times[3:]) for times in seconds)
        note = f"{dense * 1e6:.0f} µs over {sparse * 1e6:.0f} µs a layer"
        name = f"{shape[0]} x {shape[1]}, INT8, 50%"
        bars.append(Bar(f"{name}: speed-up", dense / sparse, SPEEDUP, True, note=note))
        speed = shape[0] * shape[1] * (1 - SPARSITY) / sparse
        note = f"{speed / 1e9:.1f} of {reading.half_read / 1e9:.1f} GB/s"
        bars.append(Bar(f"{name}: share of the speed of reading", speed / reading.half_read, READING, True, note=note))
        samples[f"{shape[0]}x{shape[1]}"] = {"dense": seconds[0], "sparse": seconds[1]}
    return Measurement(tuple(bars), {**CONFIG, "repeats": options.repeats, "cold cache bytes": CACHE_BYTES}, samples)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Time the kernel alone against OpenVINO's dense layer.")
    parser.add_argument("--repeats", type=positive, default=40, help="how often to time each")
    return run_benchmark("kernel_speed", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
