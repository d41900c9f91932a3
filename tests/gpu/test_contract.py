"""The optional arguments of rel_attention on a GPU: values, dropout, graph capture, offsets beyond 2^31, sanitizers."""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.accuracy import assert_all_close_to_truth, outputs_and_gradients, truth_and_reference
from tests.contract import FEATURES, make_problem, pairs
from txl_kernels import dropout, rel_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"B": 2, "H": 4, "T": 150, "M": 90, "D": 64, "device": "cuda"}
triton_attention = functools.partial(rel_attention, backend="triton")


def upstream(inputs):
    generator = torch.Generator().manual_seed(1)
    q = inputs["q"]
    return (torch.randn(shape, generator=generator).to(q) for shape in (q.shape, q.shape[:3]))


def check(features, **sizes):
    inputs, options = make_problem(frozenset(features), **(SIZES | sizes))
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    got = outputs_and_gradients(triton_attention, inputs, dout, dlse, **options)
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_each_argument(feature, dtype):
    check({feature}, dtype=DTYPES[dtype])


@pytest.mark.parametrize("D", [41, 128])
@pytest.mark.parametrize("feature", FEATURES)
def test_each_argument_at_other_head_sizes(feature, D):
    check({feature}, dtype=torch.bfloat16, D=D, T=77, M=60)


@pytest.mark.long
@pytest.mark.parametrize("features", pairs(), ids="+".join)
def test_every_pair(features):
    check(features, dtype=torch.bfloat16, T=77, M=40)


@pytest.mark.parametrize("features", [set(), {"float mask"}, {"bidirectional", "grouped heads", "segment"}])
def test_dropout(features):
    inputs, options = make_problem(frozenset(features), dtype=torch.bfloat16, **SIZES)
    dout, dlse = upstream(inputs)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (), device="cuda")
    (B, H, T, _), S = inputs["q"].shape, inputs["k"].shape[2]
    kept = dropout.kept(seed, slice(0, B), slice(0, H), slice(0, T), slice(0, S), H, 0.4)
    dropping = options | {"dropout_p": 0.4}
    truth, reference = truth_and_reference(inputs, dout, dlse, **dropping, kept=kept)
    torch.manual_seed(5)
    got = outputs_and_gradients(triton_attention, inputs, dout, dlse, **dropping)
    assert_all_close_to_truth(got, truth, reference)


def test_graph_capture_of_a_training_step_with_dropout():
    """A replay reads new inputs and draws a new dropout mask."""
    inputs, options = make_problem(frozenset({"key lengths", "segment"}), dtype=torch.bfloat16, **SIZES)
    options |= {"dropout_p": 0.2, "segment": (inputs.pop("segment_scores"), *options.pop("segment_ids"))}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def step():
        out = triton_attention(**leaves, **options)
        return out, *torch.autograd.grad(out.float().square().sum(), list(leaves.values()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    first = [x.clone() for x in results]
    graph.replay()
    assert not torch.equal(first[0], results[0])
    with torch.no_grad():
        inputs["v"].zero_()
    graph.replay()
    assert torch.count_nonzero(results[0]) == 0


def test_offsets_beyond_two_to_the_31():
    """The last head of tensors with more than 2^31 elements, against the same head alone."""
    B, H, T, D = 3, 64, 88_000, 128
    q = torch.randn(1, 1, T, D, device="cuda", dtype=torch.bfloat16)
    big = torch.zeros(B, H, T, D, device="cuda", dtype=torch.bfloat16)
    assert big.numel() > 2**31
    big[-1, -1] = q[0, 0]
    r = torch.randn(1, T, D, device="cuda", dtype=torch.bfloat16)
    wanted = triton_attention(q, q, q, r, window=(200, -1))
    got = triton_attention(big, big, big, r, window=(200, -1))
    assert torch.equal(got[-1:, -1:], wanted)


SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


@pytest.mark.skipif(not os.access(SANITIZER, os.X_OK), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    script = (
        "import torch; from tests.contract import make_problem; from txl_kernels import rel_attention\n"
        "for features in ((), ('key lengths', 'float mask', 'segment'), ('bidirectional', 'position query')):\n"
        "    x, o = make_problem(frozenset(features), H=2, T=45, M=30, D=64, dtype=torch.bfloat16, device='cuda')\n"
        "    if 'segment_ids' in o: o['segment'] = (x.pop('segment_scores'), *o.pop('segment_ids'))\n"
        "    leaves = {n: t.requires_grad_() for n, t in x.items()}\n"
        "    rel_attention(**leaves, **o, backend='triton').float().sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
