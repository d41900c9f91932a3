"""Breaks the kernels one line at a time and shows that the interpreter tests notice: `python -m tests.mutations`.

A mutation whose line is gone is an error, so that this list follows the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = "txl_kernels/triton_backend"

# (file, what stands there, what is put in its place): why a test must notice
MUTATIONS = {
    "rotation off by one": ("primitives.py", "x, columns & (BLOCK_N - 1), axis=1", "x, (columns + 1) & (BLOCK_N - 1), axis=1"),
    "transposed rotation off by one": ("primitives.py", "x, rows & (BLOCK_N - 1), axis=0", "x, (rows + 1) & (BLOCK_N - 1), axis=0"),
    "block of r chosen one column late": ("primitives.py", "(ii + x) // BLOCK_N", "(ii + x + 1) // BLOCK_N"),
    "wrong block carried": ("primitives.py", "tl.where(e == 0, raw, pending[0])", "tl.where(e == 0, pending[0], raw)"),
    "wrong part collected": ("primitives.py", "tl.where(e == len(partial), raw,", "tl.where(e != len(partial), raw,"),
    "future of one key visible": ("primitives.py", "offs_n < offs_m + reach", "offs_n <= offs_m + reach"),
    "key beyond S visible": ("primitives.py", "(offs_n < S) &", "(offs_n < S + 1) &"),
    "row beyond the matrix read": ("primitives.py", "(rows < n_rows))[:, None]", "(rows < n_rows + 1))[:, None]"),
    "row before the matrix read": ("primitives.py", "((rows >= 0) &", "((rows >= -1) &"),
    "padding columns read": ("primitives.py", "inside = inside & (offs_d < D)[None, :]\n    return", "inside = inside\n    return"),
    "queries beyond T count": ("primitives.py", 'other=float("inf"))', "other=0.0)"),
    "delta dropped": ("primitives.py", "p * (dp - delta)", "p * dp"),
    "content bias dropped": ("primitives.py", "q.to(tl.float32) + load_bias", "q.to(tl.float32) + 0 * load_bias"),
    "position bias dropped": ("primitives.py", "raw += load_column", "raw += 0 * load_column"),
    "forward: scale missing": ("forward_kernel.py", "s = (ac + bd) * scale", "s = ac + bd"),
    "forward: key tile skipped": ("forward_kernel.py", "tl.range(interior, end, BLOCK_N)", "tl.range(interior + BLOCK_N, end, BLOCK_N)"),
    "forward: one key too many unmasked": ("forward_kernel.py", "tl.minimum(S, i0 + reach) //", "tl.minimum(S, i0 + reach + 1) //"),
    "forward: log-sum-exp without the maximum": ("forward_kernel.py", "m_i + tl.log(l_i)", "tl.log(l_i)"),
    "forward: running sum not rescaled": ("forward_kernel.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    "dq: last block of r dropped": ("backward_dq_kernel.py", "c + end + (e - GROUPS)", "c + end + (e + 1 - GROUPS)"),
    "dq: scale missing": ("backward_dq_kernel.py", "dq * scale", "dq"),
    "dq: row of r off by one": ("backward_dq_kernel.py", "rows - len(partial) * BLOCK_N", "rows + 1 - len(partial) * BLOCK_N"),
    "dkv: first query tile skipped": ("backward_dkv_kernel.py", "tl.maximum(0, j0 - reach + 1) //", "(BLOCK_M + tl.maximum(0, j0 - reach + 1)) //"),
    "dkv: unmasked too early": ("backward_dkv_kernel.py", "j0 + BLOCK_N - reach)", "j0 - reach)"),
    "dkv: column of r dropped": ("backward_dkv_kernel.py", "block += load_column", "block += 0 * load_column"),
    "dkv: scale missing": ("backward_dkv_kernel.py", "dk * scale", "dk"),
    "dkv: content bias gradient not scaled": ("backward_dkv_kernel.py", "k.to(tl.float32), 0) * scale", "k.to(tl.float32), 0)"),
    "dkv: column sum of ds dropped": ("backward_dkv_kernel.py", "colsum + tl.sum(ds, 1)", "colsum"),
    "dr: key off by one": ("backward_dr_kernel.py", "c + i0, scale", "c + i0 + 1, scale"),
    "dr: key before the first visible": ("backward_dr_kernel.py", "(offs_n >= 0) &", "(offs_n >= -1) &"),
    "dr: first tile skipped": ("backward_dr_kernel.py", "edge < lower, edge,", "edge < lower, edge + 1,"),
    "dr: tiles at the end skipped": ("backward_dr_kernel.py", "n_tiles - (upper - lower), num", "lower, num"),
    "dr: rows of the future not cleared": ("backward_dr_kernel.py", "visible = offs_p < hidden", "visible = offs_p < P"),
    "dr: position bias part dropped": ("backward_dr_kernel.py", "dr += colsum[:, None]", "dr += 0 * colsum[:, None]"),
    "dr: a batch element left out": ("backward_dr_kernel.py", "(B * (part + 1)) // n_parts", "(B * (part + 1) - 1) // n_parts"),
    "delta: gradient of the log-sum-exp dropped": ("vector_kernels.py", "delta -= tl.load", "delta -= 0 * tl.load"),
    "launcher: distance of row 0 off by one": ("launch.py", "first_distance - (self.S - self.T),", "first_distance - (self.S - self.T) + 1,"),
    "launcher: bias difference with the wrong sign": ("launch.py", "difference - content_bias.float()", "difference + content_bias.float()"),
}  # fmt: skip


def survives(file: str, old: str, new: str) -> bool:
    """Whether the tests pass with the mutation in a copy of the project."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in ("txl_kernels", "reference", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / KERNELS / file
        text = path.read_text()
        if text.count(old) < 1:
            raise SystemExit(f"{file}: nothing to mutate, {old!r} is not there")
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/interpreter"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": directory}
        run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if run.returncode not in (0, 1):
            raise SystemExit(f"the tests did not run:\n{run.stdout}{run.stderr}")
        return run.returncode == 0


def main(names: list[str]) -> None:
    """Tries the mutations with one of the given words in their name, or all; exits with 1 if one survives."""
    chosen = {name: m for name, m in MUTATIONS.items() if not names or any(word in name for word in names)}
    survivors = []
    for name, mutation in chosen.items():
        alive = survives(*mutation)
        print(f"{'SURVIVED' if alive else 'caught'}  {mutation[0]}: {name}", flush=True)
        survivors += [name] if alive else []
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
