"""Every kernel compiled ahead of time for GPUs that need not be there, with the compiler's resource report."""

from dataclasses import replace

import pytest
import torch
import triton

from tests.compile.ahead_of_time import SHARED_MEMORY_LIMIT, TARGETS, compile_launch, specialization_key
from tests.compile.plain_forward import without_position_term
from tests.compile.recorded import launches
from txl_kernels.triton_backend.launch_table import FEW_QUERIES

KERNELS = ("forward_kernel", "backward_dq_kernel", "backward_dkv_kernel", "backward_dr_kernel")
# Most bytes a thread may spill, in the order of KERNELS, and none in a main loop.
SPILLED_BYTES = {
    ("sm_80", 64): (0, 0, 0, 0), ("sm_80", 128): (0, 0, 0, 0),
    ("sm_90", 64): (0, 0, 0, 0), ("sm_90", 128): (0, 0, 48, 0),
    ("sm_100", 64): (0, 0, 0, 0), ("sm_100", 128): (0, 0, 0, 0),
    ("gfx942", 64): (0, 0, 0, 0), ("gfx942", 128): (0, 0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_the_target(target, D, dtype, record_property):
    """Compiles, uses the matrix unit, one product beside another; stays within shared memory and known spills."""
    recorded = launches(target, D, dtype)
    assert set(recorded) == {*KERNELS, "row_stats_kernel", "biased_queries_kernel"}
    for name, launch in recorded.items():
        resources = compile_launch(launch, target)
        record_property(f"{name} {target} D={D} {dtype}", str(resources))
        assert resources.shared_memory <= SHARED_MEMORY_LIMIT[target], name
        assert ("UTMALDG" in resources.listing) == (launch.loads == "descriptors"), name
        if name in KERNELS:
            assert resources.matrix_instructions > 0, f"{name}: no matrix instructions"
            assert not resources.serialized, f"{name}: products wait for one another"
        if name in KERNELS and dtype is torch.bfloat16:
            kernel = KERNELS.index(name)
            assert resources.spill_bytes <= SPILLED_BYTES[target, D][kernel], f"{name}: {resources}"
            assert resources.spills_in_loop == 0, f"{name}: {resources}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_position_term_costs_less_than_it_did(target):
    """Thread-instructions a score of the forward's main loop, beside the same kernel without a position term."""
    launch = launches(target, 64)["forward_kernel"]
    ours, plain = (compile_launch(x, target).instructions_per_score for x in (launch, without_position_term(launch)))
    assert 12 < plain < 18
    assert ours <= {"sm_80": 2.0, "sm_90": 1.8}[target] * plain


@pytest.mark.parametrize("D", [41, 250, 256])
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
    """One variant of every kernel serves all lengths, aligned or not, 1 included; 16 heads fill the dr kernel alone.

    But the forward has one for few queries, and one more for ranges of keys, and kernels of the backward have one that
    adds to what earlier ranges of the workspace left.
    """
    for D, H in ((64, 4), (64, 16), (41, 10)):
        keys = {}
        for T in (1, 150, 160, 512, 513):
            for M in (0, 150, 512, 1600):
                for name, launch in launches("sm_90", D, T=T, M=M, H=H, terms=terms).items():
                    kind = (launch.values["ADD"],) if "ADD" in launch.values else ()
                    if name == "forward_kernel":
                        kind = (launch.values["range_keys"] is None, T <= FEW_QUERIES)
                    keys.setdefault((name, *kind), set()).add(specialization_key(launch))
        assert keys.keys() >= {(name,) for name in ("combine_kernel", "row_stats_kernel")}
        assert keys.keys() >= {(name, False) for name in KERNELS[1:]}
        assert keys.keys() >= {("forward_kernel", *kind) for kind in ((True, False), (True, True), (False, True))}
        assert {name: len(variants) for name, variants in keys.items()} == dict.fromkeys(keys, 1)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_few_queries_fit_the_target(target, D):
    """One token against 1600 keys: the forward of ranges of keys, without spills, and what combines them."""
    recorded = launches(target, D, T=1, M=1599)
    for name in ("forward_kernel", "combine_kernel"):
        resources = compile_launch(recorded[name], target)
        assert resources.shared_memory <= SHARED_MEMORY_LIMIT[target], name
        assert resources.spill_bytes == 0, f"{name}: {resources}"


def test_where_tiles_come_by_descriptors():
    """In the rows of the table that say so if some row of r is read; in all from copies with rows of 16 bytes."""
    by_table = "pointers" if triton.__version__ >= "3.7" else "descriptors"
    expected = {
        64: dict(zip(KERNELS, (by_table, *["descriptors"] * 3), strict=True)),
        100: dict.fromkeys(KERNELS, "descriptors"),
        128: dict.fromkeys(KERNELS, "descriptors"),
    }
    for D, loads in expected.items():
        recorded = launches("sm_90", D)
        assert {name: recorded[name].loads for name in KERNELS} == loads
    k = launches("sm_90", 100)["backward_dq_kernel"].values["k_ptr"]
    assert (list(k.shape), k.strides) == ([2, 4, 1024, 100], (4 * 1024 * 104, 1024 * 104, 104, 1))
    assert launches("sm_90", 100, T=1)["forward_kernel"].loads == "pointers"
    r = launches("sm_90", 128)["backward_dq_kernel"].values["r_ptr"]
    assert (list(r.shape), r.block_shape) == ([4, 1024, 128], [1, 64, 128])
    batched = launches("sm_90", 128, terms="batched r")["backward_dq_kernel"].values["r_ptr"]
    assert (list(batched.shape), batched.block_shape) == ([2, 4, 1024, 128], [1, 1, 64, 128])


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
    for name in KERNELS[:3]:
        assert specialization_key(with_biases[name]) != specialization_key(without[name])
