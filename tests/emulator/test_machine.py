"""What the emulated GPU notices: small programs, right ones and the same with a step too few."""

import contextlib
import functools
import re
from unittest import mock

import numpy as np
import pytest
import torch

from tests.accuracy import make_inputs, outputs_and_gradients
from tests.compile.driver import MISSING
from tests.emulator import gpu, traffic
from tests.emulator.machine import Block
from tests.emulator.matrices import described
from tests.emulator.memory import SHARED_FIRST, WARP, Error, GlobalMemory, SharedMemory
from tests.emulator.registers import NotEmulatedError
from tests.emulator.translate import translated
from txl_kernels import rel_attention
from txl_kernels.triton_backend.plans import Buffer

HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry program(
	.param .u64 .ptr .global .align 1 program_param_0,
	.param .u32 program_param_1
)
.reqntid 64
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
// %bb.0:
	mov.u32 %r1, %tid.x;
	mov.b32 %r2, global_smem;
	shl.b32 %r3, %r1, 2;
	add.s32 %r4, %r2, %r3;
	ld.param.b64 %rd1, [program_param_0];
	mad.wide.s32 %rd2, %r1, 4, %rd1;
"""
# A thread's number to shared memory, from there that of a thread of the other warp to the tensor.
EXCHANGE = """
	st.shared.b32 [ %r4 + 0 ], %r1;
	bar.sync 	0;
	xor.b32 %r5, %r3, 128;
	add.s32 %r5, %r5, %r2;
	ld.shared.b32 	%r6, [%r5];
	st.global.b32 [ %rd2 + 0 ], { %r6 };
"""
COPY = """
	cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x4, 4;
	cp.async.commit_group;
	cp.async.wait_group 0;
	ld.shared.b32 	%r6, [%r4];
	add.s32 %r6, %r6, 1;
	st.global.b32 [ %rd2 + 0 ], { %r6 };
"""
# A barrier of the copy engine that waits for no bytes.
ENGINE = """
	setp.eq.s32 %p1, %r1, 0;
	@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
	bar.sync 0;
	@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 0;
{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], 0;
	@!complete bra.uni waitLoop;
}
	bar.sync 0;
	@%p1 mbarrier.inval.shared::cta.b64 [%r2];
"""
# Odd threads double, and all threads add one.
BRANCH = """
	and.b32 %r5, %r1, 1;
	setp.eq.b32 %p1, %r5, 0;
	mov.b32 %r6, %r1;
	@%p1 bra $L__BB0_2;
	add.s32 %r6, %r6, %r6;
$L__BB0_2:
	add.s32 %r6, %r6, 1;
	st.global.b32 [ %rd2 + 0 ], { %r6 };
"""
# The same where the ways meet in front of where they part, as in a loop that is turned round.
TURNED = """
	mov.b32 %r6, %r1;
	bra.uni $L__BB0_1;
$L__BB0_3:
	st.global.b32 [ %rd2 + 0 ], { %r6 };
	bra.uni $L__BB0_4;
$L__BB0_1:
	and.b32 %r5, %r1, 1;
	setp.eq.b32 %p1, %r5, 0;
	@%p1 bra $L__BB0_3;
	add.s32 %r6, %r6, %r6;
	bra.uni $L__BB0_3;
$L__BB0_4:
"""


def run(body: str, x: torch.Tensor, blocks: int = 1, shared_bytes: int = 256) -> torch.Tensor:
    """Runs a program of 64 threads a block on a tensor, which it returns."""
    _, program = translated(f"{HEAD}{body}\n\tret;\n$L__func_end0:\n}}\n")
    memory = GlobalMemory([(x.data_ptr(), x.data_ptr() + x.nbytes)])
    memory.n_threads = 64
    parameters = {"program_param_0": np.int64(x.data_ptr()), "program_param_1": np.int32(0)}
    with np.errstate(all="ignore"):
        for k in range(blocks):
            memory.block = k
            block = Block(memory, (k, 0), (blocks, 1), 64, shared_bytes)
            program(block, parameters, {})
            block.finish()
    memory.finish()
    return x


def zeros(n: int = 64) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


def test_threads_exchange_numbers():
    assert run(EXCHANGE, zeros()).tolist() == [k ^ WARP for k in range(64)]


def test_a_barrier_too_few_is_noticed():
    with pytest.raises(Error, match="no barrier between"):
        run(EXCHANGE.replace("bar.sync 	0;", ""), zeros())
    again = "\txor.b32 %r7, %r5, 0;\n\tst.shared.b32 [ %r4 + 0 ], %r7;\n"
    with pytest.raises(Error, match="what another reads"):
        run(EXCHANGE + again, zeros())
    run(EXCHANGE + "\tbar.sync 0;\n" + again, zeros())


def test_a_copy_not_waited_for_is_noticed():
    assert run(COPY, zeros()).tolist() == [1] * 64
    with pytest.raises(Error, match="a read from shared memory that a copy"):
        run(COPY.replace("wait_group 0", "wait_group 1"), zeros())
    with pytest.raises(Error, match="a write to shared memory that a copy"):
        run(COPY.replace("cp.async.commit_group;", "st.shared.b32 [ %r4 + 0 ], %r1;"), zeros())
    with pytest.raises(Error, match="ends before its copies"):
        run("\n".join(COPY.splitlines()[:3]), zeros())


def test_what_nobody_wrote_is_no_number():
    store = "\tst.global.b32 [ %rd2 + 0 ], { %r6 };\n"
    assert run(f"\tld.shared.b32 %r6, [%r4];\n{store}", zeros()).tolist() == [-1] * 64
    for text in (store, f"\tbra.uni $L__BB0_1;\n\tmov.b32 %r6, 0;\n$L__BB0_1:\n{store}"):
        never = run(text, zeros())
        assert never.view(torch.float32).isnan().all()
        assert never.view(torch.bfloat16).isnan().all()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_what_no_kernel_wrote_is_no_number(tmp_path):
    with gpu.emulated_gpu(tmp_path, "sm_90"):
        wanted = torch.empty(3, 5, dtype=torch.float16, device="meta")
        x, zeros = (Buffer(wanted, zeros).allocate(torch.device("cpu")) for zeros in (False, True))
    assert x.isnan().all()
    assert not zeros.any()


def test_a_barrier_of_the_copy_engine_is_shared_as_other_memory_is():
    run(ENGINE, zeros())
    with pytest.raises(Error, match="no barrier between"):
        run(ENGINE.replace("bar.sync 0;", "", 1), zeros())
    with pytest.raises(Error, match="what another reads"):
        run("".join(ENGINE.rsplit("bar.sync 0;", 1)), zeros())
    arrival = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 0;"
    run(ENGINE.replace("@%p1 mbarrier.inval", f"{arrival}\n\t@%p1 mbarrier.inval"), zeros())
    with pytest.raises(Error, match="a next phase of a barrier"):
        run(ENGINE.replace("}", f"}}\n\t{arrival}"), zeros())
    with pytest.raises(Error, match="that nothing will complete"):
        run(ENGINE.replace(arrival, ""), zeros())
    with pytest.raises(Error, match="a barrier that is none"):
        run(ENGINE.replace("bar.sync 0;", "@%p1 st.shared.b32 [ %r2 + 4 ], %r1;\n\tbar.sync 0;", 1), zeros())


def test_products_and_what_they_multiply():
    """By two groups of four warps; the second may be late until the next barrier."""
    elements = np.arange(2 * 128).reshape(2, 128) + SHARED_FIRST // 2
    of_first, of_second = ((2 * x[:, None], np.zeros(128, int)) for x in elements)
    memory = SharedMemory(512, 256)
    memory.begin_product(elements)
    with pytest.raises(Error, match="a product not yet waited for"):
        memory.on_write(*of_first)
    memory.end_product(elements)
    memory.on_write(*of_first)
    with pytest.raises(Error, match="other warps may not have multiplied yet"):
        memory.on_write(*of_second)
    memory.interval += 1
    memory.on_write(*of_second)
    with pytest.raises(Error, match="no fence between"):
        memory.begin_product(elements)
    memory.fence()
    with pytest.raises(Error, match="what one warp wrote"):
        memory.begin_product(elements)
    memory.interval += 1
    memory.begin_product(elements)
    memory.arriving[SHARED_FIRST] = True
    with pytest.raises(Error, match="a copy not yet waited for"):
        memory.begin_product(elements)


def test_a_descriptor_within_a_swizzling_pattern_is_refused():
    for start, fits in ((1024, True), (1024 + 32, True), (1024 + 512, False)):
        descriptor = np.int64(start >> 4 | 64 << 32 | 1 << 62)  # rows of 128 bytes, eight of them 1024 apart
        with contextlib.nullcontext() if fits else pytest.raises(NotImplementedError, match="swizzling pattern"):
            described(descriptor, 128, 64, 16, False)


def test_an_access_outside_is_noticed():
    for n in (63, 1):
        with pytest.raises(Error, match="outside of the tensors"):
            run(EXCHANGE, zeros(n))
    with pytest.raises(Error, match="outside of the 256 bytes"):
        run(EXCHANGE.replace("[ %r4 + 0 ], %r1", "[ %r4 + 4 ], %r1"), zeros())
    with pytest.raises(Error, match="access to global memory of 4 bytes at"):
        run(EXCHANGE.replace("[ %rd2 + 0 ]", "[ %rd2 + 2 ]"), zeros(65))


def test_blocks_in_each_others_way_are_noticed():
    with pytest.raises(Error, match="two blocks of a launch write the same place"):
        run(EXCHANGE, zeros(), blocks=2)
    with pytest.raises(Error, match="reads from global memory what another block"):
        run("\tld.global.b32 { %r5 }, [ %rd2 + 0 ];\n" + EXCHANGE, zeros(), blocks=2)
    late = """
	mov.u32 %r7, %ctaid.x;
	setp.eq.s32 %p1, %r7, 0;
	setp.eq.s32 %p2, %r7, 1;
	@%p1 ld.global.b32 { %r6 }, [ %rd2 + 0 ];
	@%p2 st.global.b32 [ %rd2 + 0 ], { %r1 };
"""
    run(late.replace("[ %rd2 + 0 ], { %r1 }", "[ %rd2 + 256 ], { %r1 }"), zeros(128), blocks=2)
    with pytest.raises(Error, match="a block writes to global memory what another"):
        run(late, zeros(), blocks=2)


def test_threads_go_different_ways_through_arithmetic_alone():
    assert run(BRANCH, zeros()).tolist() == [k + 1 if k % 2 == 0 else 2 * k + 1 for k in range(64)]
    assert run(TURNED, zeros()).tolist() == [k if k % 2 == 0 else 2 * k for k in range(64)]
    with pytest.raises(Error, match="different ways"):
        run(BRANCH.replace("add.s32 %r6, %r6, %r6;", "bar.sync 0;"), zeros())


def test_traffic_is_counted():
    """A thread's number to shared memory, one or two words apart, and to every second word of global memory."""
    program = EXCHANGE.replace("[ %r4 + 0 ], %r1", "[ %r5 + 0 ], %r1").replace("[%r5]", "[%r4]")
    program = program.replace("xor.b32 %r5, %r3, 128", "mov.b32 %r5, %r3")
    apart = "\tmad.wide.s32 %rd2, %r1, 8, %rd1;\n\tshl.b32 %r5, %r1, {};\n\tadd.s32 %r5, %r5, %r2;\n"
    load = "\tld.global.b32 { %r7 }, [ %rd2 + 0 ];\n"
    for shift, passes in ((2, 2 + 2), (3, 4 + 2)):
        with traffic.counted() as counts:
            run(apart.format(shift) + load + program, zeros(128), shared_bytes=512)
        (n,) = counts.values()
        assert (n["accesses"], n["fewest passes"], n["passes"]) == (4, 4, passes)
        assert (n["loads"], n["fewest sectors"], n["sectors"]) == (2, 2 * 4, 2 * 8)
        assert (n["barriers"], n["instructions"]) == (1, 64 * (6 + 3 + 1 + 6 + 1))


@pytest.mark.parametrize(("size", "apart", "passes"), [(4, 4, 1), (4, 128, 32), (8, 8, 2), (16, 16, 4), (16, 128, 32)])
def test_passes_of_wide_accesses(size, apart, passes):
    """Half a warp is served at once with 8 bytes a thread, a quarter with 16."""
    assert traffic._passes(apart * np.arange(WARP), size) == (passes, size // 4)


def test_what_is_not_emulated_says_so():
    with pytest.raises(NotEmulatedError, match=r"vote\.sync"):
        run("\tvote.sync.any.pred %p1, %p2, -1;\n", zeros())
    for text in ("bar.sync 1, 64", "add.cc.s32 %r5, %r5, %r5", "fma.rn.relu.bf16x2 %r5, %r5, %r5, %r5"):
        with pytest.raises(NotEmulatedError, match=re.escape(text)):
            run(f"\t{text};\n", zeros())


def integers(text: str, *numbers: int) -> int:
    """%r5 of thread 0 after an instruction on %r6 and %r7."""
    moves = "".join(f"\tmov.b32 %r{6 + k}, {x};\n" for k, x in enumerate(numbers))
    return run(f"{moves}\t{text};\n\tst.global.b32 [ %rd2 + 0 ], {{ %r5 }};\n", zeros())[0].item()


@pytest.mark.parametrize(("text", "numbers", "result"), [
    ("div.s32 %r5, %r6, %r7", (-7, 2), -3), ("rem.s32 %r5, %r6, %r7", (-7, 2), -1),
    ("div.u32 %r5, %r6, %r7", (-7, 2), 2**31 - 4),
    ("shr.s32 %r5, %r6, 40", (-7,), -1), ("shr.u32 %r5, %r6, 40", (-7,), 0), ("shl.b32 %r5, %r6, 32", (1,), 0),
    ("bfe.u32 %r5, %r6, 4, 8", (0x12345,), 0x34), ("bfe.s32 %r5, %r6, 4, 4", (0xF0,), -1),
    ("add.s32 %r5, %r6, %r7", (2**31 - 1, 1), -(2**31)),
    ("prmt.b32 %r5, %r6, %r7, 0x5410U", (0x11112222, 0x33334444), 0x44442222),
    ("prmt.b32 %r5, %r6, 0, 0x7778U", (0x80,), 0xFF), ("min.relu.s32 %r5, %r6, %r7", (-3, 5), 0),
    ("setp.lt.u32 %p1, %r6, %r7;\n\tselp.b32 %r5, 1, 0, %p1", (-1, 1), 0),
    ("setp.lt.s32 %p1, %r6, %r7;\n\tselp.b32 %r5, 1, 0, %p1", (-1, 1), 1),
    ("st.shared.b32 [%r4], %r6;\n\tld.shared.b16 %r7, [%r4];\n\tshr.u32 %r5, %r7, 8", (0x12348765,), 0x87),
    ("setp.lt.bf16x2 %p1|%p2, %r6, %r7;\n\tselp.b32 %r5, 1, 0, %p2", (0x3F803F80, 0x40003F80), 1),
    ("setp.lt.bf16x2 %p1|%p2, %r6, %r7;\n\tselp.b32 %r5, 1, 0, %p1", (0x3F803F80, 0x40003F80), 0),
    ("cvt.rn.bf16x2.f32 %r5, %r6, %r7", (0x3F808000, 0x3F818000), 0x3F803F82),  # to even between two
    ("add.bf16x2 %r5, %r6, %r7", (0x3F804000, 0x3F803F80), 0x40004040),
    ("fma.rn.f32 %r5, %r6, %r6, %r7", (0x3F800001, 0xBF800000 - 2**32), 0x34800000),  # the product is not rounded
    ("max.f32 %r5, %r6, %r7", (0x7FC00000, 0x3F800000), 0x3F800000),  # a number beside NaN
])  # fmt: skip
def test_instructions(text, numbers, result):
    assert integers(text, *numbers) == result


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize(("generation", "step"), [
    ("sm_80", r"bar\.sync 	0;"),
    ("sm_80", r"cp\.async\.wait_group 	\d;"),
    ("sm_90", r"bar\.sync 	0;"),
    ("sm_90", r"fence\.proxy\.async\.shared::cta;"),
    ("sm_90", r"wgmma\.wait_group\.sync\.aligned 0;"),
    ("sm_90", r"wgmma\.fence\.sync\.aligned;"),
    ("sm_90", r"\{\n\t\.reg \.pred complete;\n[^}]*\}"),
], ids=lambda x: re.sub(r"\W+", "", x))  # fmt: skip
def test_a_real_kernel_without_its_barriers_is_noticed(generation, step, tmp_path):
    """The forward with all steps of a kind taken out."""
    D = 64 if "fence" in step else 128  # at 128 nothing is written by threads for asynchronous products
    inputs = make_inputs(1, 1, 100, 60, D, dtype=torch.bfloat16)
    taken = []

    def without(text):
        changed, n = re.subn(step, "", text)
        taken.append(n)
        return translated(changed)

    patched = mock.patch.object(gpu, "translated", without)
    with gpu.emulated_gpu(tmp_path, generation), patched, pytest.raises(Error):
        outputs_and_gradients(functools.partial(rel_attention, backend="triton"), inputs)
    assert max(taken) > 0
