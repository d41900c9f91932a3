"""Every kernel compiled ahead of time for GPUs that need not be there, with the compiler's resource report."""

from dataclasses import replace

import pytest
import torch

from tests.compile.ahead_of_time import SHARED_MEMORY_LIMIT, TARGETS, compile_launch, specialization_key
from tests.compile.recorded import launches

KERNELS = ("forward_kernel", "backward_dq_kernel", "backward_dkv_kernel", "backward_dr_kernel")
VECTOR_KERNELS = ("column_kernel", "row_stats_kernel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_the_target(target, D, dtype, record_property):
    """Compiles, uses the matrix unit, stays within shared memory; the forward spills nothing on sm_90."""
    recorded = launches(target, D, dtype)
    assert set(recorded) == {*KERNELS, *VECTOR_KERNELS}
    for name, launch in recorded.items():
        resources = compile_launch(launch, target)
        record_property(f"{name} {target} D={D} {dtype}", str(resources))
        assert resources.shared_memory <= SHARED_MEMORY_LIMIT[target], name
        if name in KERNELS:
            assert resources.matrix_instructions > 0, f"{name}: no matrix instructions"
        if name == "forward_kernel" and target == "sm_90":
            assert resources.spill_bytes == 0, f"{name}: {resources}"


@pytest.mark.parametrize("D", [41, 256])
def test_padded_and_largest_head_size(D):
    for name, launch in launches("sm_90", D).items():
        assert compile_launch(launch, "sm_90").shared_memory <= SHARED_MEMORY_LIMIT["sm_90"], name


@pytest.mark.parametrize(
    ("target", "terms"),
    [
        ("sm_80", "all"),
        ("sm_90", "all"),
        ("gfx942", "all"),
        ("sm_90", "q_pos"),
        ("sm_90", "no r"),
        ("sm_90", "batched r"),
    ],
)
def test_optional_terms_compile(target, terms):
    """Masks, lengths, segments, softcap, dropout and row biases at once, with every form of r."""
    recorded = launches(target, 64, terms=terms)
    assert set(recorded) >= {*KERNELS, "row_stats_kernel"}
    assert ("backward_dmask_kernel" in recorded) == (terms != "no r")
    for name, launch in recorded.items():
        assert compile_launch(launch, target).shared_memory <= SHARED_MEMORY_LIMIT[target], name


@pytest.mark.long
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_float32_kernels_fit_the_target(target, D):
    for name, launch in launches(target, D, torch.float32).items():
        assert compile_launch(launch, target).shared_memory <= SHARED_MEMORY_LIMIT[target], name


@pytest.mark.parametrize("terms", ["", "all", "q_pos"])
def test_lengths_do_not_compile_variants(terms):
    """One variant of every kernel serves all lengths, aligned or not, 1 included; 16 heads fill the dr kernel alone."""
    for D, H in ((64, 4), (64, 16), (41, 10)):
        keys = {}
        for T in (1, 150, 160, 512, 513):
            for M in (0, 150, 512, 1600):
                for name, launch in launches("sm_90", D, T=T, M=M, H=H, terms=terms).items():
                    keys.setdefault(name, set()).add(specialization_key(launch))
        assert keys.keys() >= {*KERNELS, "row_stats_kernel"}
        assert {name: len(variants) for name, variants in keys.items()} == dict.fromkeys(keys, 1)


def test_offsets_of_64_bits_compile():
    """Strides of tensors with more than 2^31 elements."""
    for name, launch in launches("sm_90", 64).items():
        strides = {key: 2**33 for key in launch.values if key.startswith("stride") and key.endswith(("b", "h"))}
        far = replace(launch, values=launch.values | strides)
        assert compile_launch(far, "sm_90").shared_memory <= SHARED_MEMORY_LIMIT["sm_90"], name


def test_a_missing_bias_is_a_variant_of_its_own():
    """The counterpart: what must be compiled differently does change the key."""
    with_biases, without = launches("sm_90", 64), launches("sm_90", 64, biases=False)
    assert set(without) == {*KERNELS, "row_stats_kernel"}
    for name in KERNELS:
        assert specialization_key(with_biases[name]) != specialization_key(without[name])
