"""Breaks the kernels one line at a time and shows that the interpreter tests notice: `python -m tests.mutations`.

A mutation whose line is gone is an error, so that this list follows the code.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = "txl_kernels/triton_backend"

# (file, what stands there, what is put in its place): why a test must notice
MUTATIONS = {
    "rotation off by one": ("primitives.py", "x, columns & (BLOCK_N - 1), axis=1", "x, (columns + 1) & (BLOCK_N - 1), axis=1"),
    "transposed rotation off by one": ("primitives.py", "x, rows & (BLOCK_N - 1), axis=0", "x, (rows + 1) & (BLOCK_N - 1), axis=0"),
    "block of r chosen one column late": ("primitives.py", "(ii + x) // BLOCK_N", "(ii + x + 1) // BLOCK_N"),
    "block taken by the wrong queries": ("primitives.py", "ii // BLOCK_N == 0, raw", "ii // BLOCK_N != 0, raw"),
    "block taken a tile late": ("primitives.py", "ii // BLOCK_N == g - 1, raw", "ii // BLOCK_N == g, raw"),
    "block changed one column late": ("primitives.py", "ii % BLOCK_N, taken,", "ii % BLOCK_N + 1, taken,"),
    "gradient collected by the wrong queries": ("primitives.py", "ii // BLOCK_N == g, taken", "ii // BLOCK_N == g - 1, taken"),
    "gradient collected one column late": ("primitives.py", "ii % BLOCK_N, partial[0]", "ii % BLOCK_N + 1, partial[0]"),
    "future of one key visible": ("primitives.py", "tl.minimum(offs_m + reach, keys)", "tl.minimum(offs_m + reach + 1, keys)"),
    "key beyond S visible": ("primitives.py", "tl.minimum(offs_m + reach, keys)", "tl.minimum(offs_m + reach, keys + 1)"),
    "row beyond the matrix read": ("primitives.py", "(rows < n_rows))[:, None]", "(rows < n_rows + 1))[:, None]"),
    "row before the matrix read": ("primitives.py", "((rows >= 0) &", "((rows >= -1) &"),
    "padding columns read": ("primitives.py", "inside = inside & (offs_d < D)[None, :]\n    return", "inside = inside\n    return"),
    "queries beyond T count": ("primitives.py", 'other=float("inf"))', "other=0.0)"),
    "delta dropped": ("scores.py", "dropped(dp, terms, offs_m, offs_n) - delta", "dropped(dp, terms, offs_m, offs_n)"),
    "content bias dropped": ("launch.py", "return _with_bias(q, inputs.content_bias), q_pos", "return q, q_pos"),
    "position bias dropped": ("launch.py", "q_pos = _with_bias(q, inputs.position_bias)", "q_pos = q"),
    "row bias dropped": ("primitives.py", "bias = load_row_bias", "bias = 0 * load_row_bias"),
    "dkv: row bias dropped": ("primitives.py", "bias[:, None] if TRANSPOSED", "0 * bias[:, None] if TRANSPOSED"),
    "forward: scale missing": ("scores.py", "s = products * scale", "s = products"),
    "forward: key tile skipped": ("forward_kernel.py", "tl.maximum(lower, upper), end", "BLOCK_N + tl.maximum(lower, upper), end"),
    "forward: one key too many unmasked": ("forward_kernel.py", "tl.minimum(keys, i0 + reach) //", "tl.minimum(keys, i0 + reach + 1) //"),
    "forward: log-sum-exp without the maximum": ("forward_kernel.py", "m_i.to(stat_dtype) + tl.log", "tl.log"),
    "forward: running sum not rescaled": ("forward_kernel.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    "dq: last block of r dropped": ("backward_dq_kernel.py", "c + end + (e - GROUPS)", "c + end + (e + 1 - GROUPS)"),
    "dq: scale missing": ("backward_dq_kernel.py", "grads[0] * scale", "grads[0]"),
    "dq: row of r off by one": ("backward_dq_kernel.py", "rows -= len(partial) * BLOCK_N", "rows -= len(partial) * BLOCK_N - 1"),
    "dkv: first query tile skipped": ("backward_dkv_kernel.py", "tl.maximum(0, j0 - reach + 1) //", "(BLOCK_M + tl.maximum(0, j0 - reach + 1)) //"),
    "dkv: unmasked too early": ("backward_dkv_kernel.py", "j0 + BLOCK_N - reach - first)", "j0 - reach - first)"),
    "dkv: scale missing": ("backward_dkv_kernel.py", "dk * scale", "dk"),
    "dkv: content bias gradient not scaled": ("backward_dkv_kernel.py", "k.to(tl.float32), 0) * scale", "k.to(tl.float32), 0)"),
    "dkv: column sum of ds dropped": ("backward_dkv_kernel.py", "colsum += tl.sum(ds, 1)", "colsum += 0 * tl.sum(ds, 1)"),
    "dr: key off by one": ("backward_dr_kernel.py", "c + i0, bounds", "c + i0 + 1, bounds"),
    "dr: key before the first visible": ("primitives.py", "visible = (offs_n >= 0)", "visible = (offs_n >= -1)"),
    "dr: first tile skipped": ("primitives.py", "edge < lower, edge,", "edge < lower, edge + 1,"),
    "dr: tiles at the end skipped": ("backward_dr_kernel.py", "n_tiles - (upper - lower), num", "lower, num"),
    "dr: rows of the future not cleared": ("backward_dr_kernel.py", "(offs_p < hidden_from)\n", "(offs_p < P)\n"),
    "dr: a batch element left out": ("backward_dr_kernel.py", "(B * (part + 1)) // n_parts", "(B * (part + 1) - 1) // n_parts"),
    "delta: gradient of the log-sum-exp dropped": ("vector_kernels.py", "delta -= tl.load", "delta -= 0 * tl.load"),
    "launcher: distance of row 0 off by one": ("launch.py", "options.first_distance - M,", "options.first_distance - M + 1,"),
    "window: left bound off by one": ("primitives.py", "offs_n >= offs_m + begin", "offs_n >= offs_m + begin + 1"),
    "forward: first tile of the window skipped": ("forward_kernel.py", "tl.range(start, tl.minimum", "tl.range(start + BLOCK_N, tl.minimum"),
    "forward: left edge unmasked": ("forward_kernel.py", "tl.minimum(i0 + BLOCK_M, T) - 1 + begin", "i0 + begin"),
    "dq: left edge unmasked": ("backward_dq_kernel.py", "tl.minimum(i0 + BLOCK_M, T) - 1 + begin", "i0 + begin"),
    "dkv: queries beyond the window": ("backward_dkv_kernel.py", "seen_by_all = j0 - begin + 1", "seen_by_all = j0 - begin + BLOCK_N"),
    "dkv: last query of the window left out": ("backward_dkv_kernel.py", "tl.minimum(T, j0 + BLOCK_N - begin)", "tl.minimum(T, j0 + BLOCK_N - begin - 1)"),
    "dkv: keys beyond the lengths kept": ("backward_dkv_kernel.py", "dv = tl.where((offs_n < keys)[:, None], dv, 0.0)", "dv = dv"),
    "dr: rows below the window not cleared": ("backward_dr_kernel.py", "(offs_p >= hidden_below) &", "(offs_p >= 0) &"),
    "dr: r_bias gradient dropped": ("backward_dr_kernel.py", "tl.store(dr_bias_ptr + (part * H + h) * P + offs_p, colsum,", "tl.store(dr_bias_ptr + (part * H + h) * P + offs_p, 0 * colsum,"),
    "lengths: one key too many": ("primitives.py", "tl.maximum(tl.load(lengths_ptr + b), 0)", "tl.maximum(tl.load(lengths_ptr + b) + 1, 0)"),
    "mask: float mask before the softcap": ("scores.py", "s += tl.where(bias ==", "s += 0.99 * tl.where(bias =="),
    "mask: rows and columns swapped": ("scores.py", "offs_m.to(tl.int64) * stride_mm", "offs_n.to(tl.int64) * stride_mm"),
    "segment: the other score": ("scores.py", "same, other)", "other, same)"),
    "segment: sums swapped": ("backward_dq_kernel.py", "tl.where(same, ds, 0.0)", "tl.where(same, 0.0, ds)"),
    "softcap: slope dropped": ("scores.py", "1.0 - bounded * bounded", "1.0"),
    "dropout: weights not scaled": ("scores.py", "p * keep_scale", "p"),
    "dropout: dp not dropped": ("scores.py", "dropped(dp, terms, offs_m, offs_n) - delta", "dp - delta"),
    "dropout: keyed by the tile": ("scores.py", "key + offs_m.to(tl.uint32)", "key + (offs_m % 16).to(tl.uint32)"),
    "position query: gradient into dq": ("backward_dq_kernel.py", "grads[1] * scale", "grads[1]"),
    "grouped heads: wrong key head": ("forward_kernel.py", "b, h // group", "b, h % group"),
    "mask gradient: batch left out": ("backward_dmask_kernel.py", "b_first + 1, B)", "b_first + 1, 1)"),
    "ranges: not weighted": ("vector_kernels.py", "weight = tl.exp(lse - row_max)", "weight = tl.exp(0.0 * (lse - row_max))"),
    "ranges: first tile skipped": ("forward_kernel.py", "tl.maximum(start, first)", "tl.maximum(start, first + BLOCK_N)"),
    "ranges: too many keys": ("forward_kernel.py", "tl.minimum(end, first + range_keys)", "end"),
    "log-sum-exp: dead rows count": ("vector_kernels.py", 'tl.where(empty, float("inf"), lse.to', 'tl.where(empty, float("-inf"), lse.to'),
}  # fmt: skip


def survives(file: str, old: str, new: str, cache: str) -> bool:
    """Whether the tests pass with the mutation in a copy of the project; those that failed before go first."""
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
        options = ["-q", "-x", "--failed-first", "-o", f"cache_dir={cache}", "-m", "not long"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": directory}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "tests/interpreter"],
            cwd=copy, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if run.returncode not in (0, 1):
            raise SystemExit(f"the tests did not run:\n{run.stdout}{run.stderr}")
        return run.returncode == 0


def main(names: list[str]) -> None:
    """Tries the mutations with one of the given words in their name, or all; exits with 1 if one survives.

    One process for each processor; each remembers which tests its mutations failed.
    """
    chosen = {name: m for name, m in MUTATIONS.items() if not names or any(word in name for word in names)}
    workers = os.cpu_count() or 1
    survivors = []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        caches = queue.SimpleQueue()
        for worker in range(workers):
            caches.put(str(Path(directory) / str(worker)))

        def attempt(mutation: tuple[str, str, str]) -> bool:
            cache = caches.get()
            try:
                return survives(*mutation, cache)
            finally:
                caches.put(cache)

        for (name, mutation), alive in zip(chosen.items(), pool.map(attempt, chosen.values()), strict=True):
            print(f"{'SURVIVED' if alive else 'caught'}  {mutation[0]}: {name}", flush=True)
            survivors += [name] if alive else []
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations caught")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
