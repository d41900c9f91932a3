"""Compiles recorded kernel launches for GPUs that need not be there, and reads the compiler's resource report."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that one block can have (CUDA programming guide; CDNA 3 ISA guide for the LDS of gfx942).
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_MATRIX_INSTRUCTION = {
    "sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b|\bWGMMA\b", "sm_100": r"\bUTCHMMA\b|\bHMMA\b", "gfx942": r"\bv_mfma_"
}  # fmt: skip
SPIN_WAIT = 50  # instructions; every tile loop has more
MAIN_LOOPS = {"backward_dq_kernel": 2}  # one for rows of r, one for keys; the other kernels have one
_BIN = Path(nvidia.__file__).parent / "bin"


@dataclass
class Launch:
    """One recorded call of a kernel: `kernel[grid](*args, **options)`."""

    kernel: JITFunction
    values: dict[str, object]
    options: dict[str, int]

    @property
    def loads(self) -> str:
        """What the kernel gets its tiles from."""
        return "descriptors" if any(isinstance(x, TensorDescriptor) for x in self.values.values()) else "pointers"


@dataclass
class Resources:
    """What a compiled kernel uses: 32-bit registers and spilled bytes a thread, shared memory bytes a block.

    `loops` lists the instructions of each loop over tiles, on NVIDIA only. The main loop is the one with the fewest
    a tile, `instructions_per_tile` (unrolled, it has several tiles), and has `spills_in_loop` instructions on spilled
    registers; where a kernel has two, both count together. `instructions_per_score` is thread-instructions over the
    scores of a tile. None where no loop was read.
    `serialized`: the products of a loop wait for one another, as ptxas has them (C7510, C7511) where registers run out.
    """

    registers: int
    spill_bytes: int
    shared_memory: int
    matrix_instructions: int
    loops: list[list[str]] = field(repr=False)
    spills_in_loop: int = 0
    instructions_per_tile: float | None = None
    instructions_per_score: float | None = None
    serialized: bool = False
    listing: str = field(default="", repr=False)


def record_launches(run: Callable[[], object]) -> list[Launch]:
    """Calls run() with every kernel launch recorded instead of executed."""
    launches = []
    original = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        values = dict(zip(names, args, strict=False)) | {k: x for k, x in kwargs.items() if k in names}
        launches.append(Launch(self, values, {k: x for k, x in kwargs.items() if k not in names}))

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def _specialize(launch: Launch, target: str) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes that the runtime compiles this launch with, by its own steps.

    So what is compiled here lies in Triton's cache under the key that a launch on such a GPU looks for.
    """
    kernel, backend = launch.kernel, make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, specialization, _ = bind(**launch.values)
    _, signature, constexprs, attrs = kernel._pack_args(backend, launch.options, values, specialization, None)
    return signature, constexprs, attrs


def specialization_key(launch: Launch) -> str:
    """Equal for two launches exactly where they share a compiled variant."""
    return repr((*_specialize(launch, "sm_90"), sorted(launch.options.items())))


def with_tiling(launch: Launch, block_m: int, block_n: int, num_warps: int, num_stages: int, unroll: int = 1) -> Launch:
    """The same launch with another row of the launch table."""
    values = launch.values | {"BLOCK_M": block_m, "BLOCK_N": block_n, "UNROLL": unroll}
    return Launch(launch.kernel, values, launch.options | {"num_warps": num_warps, "num_stages": num_stages})


def compile_launch(launch: Launch, target: str) -> Resources:
    """Compiles one recorded launch for a target of TARGETS."""
    source = ASTSource(launch.kernel, *_specialize(launch, target))
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    read = _amd_resources if target.startswith("gfx") else _nvidia_resources
    resources = read(compiled, target, MAIN_LOOPS.get(launch.kernel.__name__, 1))
    if resources.loops and "BLOCK_N" in launch.values:
        threads = TARGETS[target].warp_size * launch.options["num_warps"]
        scores = launch.values["BLOCK_M"] * launch.values["BLOCK_N"]
        resources.instructions_per_score = resources.instructions_per_tile * threads / scores
    return resources


def _nvidia_resources(compiled, target: str, main_loops: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [_BIN / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [_BIN / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    loops = _loops(listing)
    products = [sum(bool(re.search(_MATRIX_INSTRUCTION[target], line)) for line in loop) for loop in loops]
    tiles = [max(1, n // max(1, min(products))) for n in products]
    main = sorted((len(loop) / n, loop) for loop, n in zip(loops, tiles, strict=True))[:main_loops]
    return Resources(
        registers=int(re.search(r"\bREG:(\d+)", usage)[1]),
        spill_bytes=int(re.search(r"\bSTACK:(\d+)", usage)[1]),
        shared_memory=compiled.metadata.shared,
        matrix_instructions=len(re.findall(_MATRIX_INSTRUCTION[target], listing)),
        loops=loops,
        spills_in_loop=sum(bool(re.search(r"\b(LDL|STL)\b", line)) for _, loop in main for line in loop),
        instructions_per_tile=sum(n for n, _ in main) or None,
        serialized=any(_waits(loop) >= n > 0 for loop, n in zip(loops, products, strict=True)),
        listing=listing,
    )


def _waits(loop: list[str]) -> int:
    return sum("WARPGROUP.DEPBAR" in line for line in loop)


def _loops(listing: str) -> list[list[str]]:
    """The instructions of the loops with work in them: from a label to the branch back to it.

    Left out are spin waits, which are a few instructions, and branches back from waits placed behind the exit.
    """
    instructions, last_exit, labels, loops = [], -1, {}, []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
            if re.search(r"\bEXIT\b", line):
                last_exit = len(instructions)
            branch = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", line)
            start = labels.get(branch[1], len(instructions)) if branch else len(instructions)
            if len(instructions) - start > SPIN_WAIT and last_exit < start:
                loops.append(instructions[start:])
    return loops


def _amd_resources(compiled, target: str, main_loops: int) -> Resources:
    listing = compiled.asm["amdgcn"]
    return Resources(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", listing)[1]),
        spill_bytes=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", listing)[1]),
        shared_memory=compiled.metadata.shared,
        matrix_instructions=len(re.findall(_MATRIX_INSTRUCTION[target], listing)),
        loops=[],
        listing=listing,
    )
