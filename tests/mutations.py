"""Breaks kernels and patches one line at a time and shows that tests notice: `python -m tests.mutations`.

A mutation whose line is gone is an error, so that these lists follow the code.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

# (file of triton_backend, what stands there, what is put in its place): a test of the interpreter must notice
KERNELS = {
    "rotation off by one": ("primitives.py", "x, columns & (BLOCK_N - 1), axis=1", "x, (columns + 1) & (BLOCK_N - 1), axis=1"),
    "transposed rotation off by one": ("primitives.py", "x, rows & (BLOCK_N - 1), axis=0", "x, (rows + 1) & (BLOCK_N - 1), axis=0"),
    "block of r chosen one column late": ("primitives.py", "(ii + x) // BLOCK_N", "(ii + x + 1) // BLOCK_N"),
    "block taken by the wrong queries": ("primitives.py", "ii // BLOCK_N == 0, raw", "ii // BLOCK_N != 0, raw"),
    "block taken a tile late": ("primitives.py", "ii // BLOCK_N == g - 1, raw", "ii // BLOCK_N == g, raw"),
    "block changed one column late": ("primitives.py", "ii % BLOCK_N, taken,", "ii % BLOCK_N + 1, taken,"),
    "future of one key visible": ("primitives.py", "tl.minimum(offs_m + reach, keys)", "tl.minimum(offs_m + reach + 1, keys)"),
    "key beyond S visible": ("primitives.py", "tl.minimum(offs_m + reach, keys)", "tl.minimum(offs_m + reach, keys + 1)"),
    "row beyond the matrix read": ("primitives.py", "(rows < n_rows))[:, None]", "(rows < n_rows + 1))[:, None]"),
    "row before the matrix read": ("primitives.py", "((rows >= 0) &", "((rows >= -1) &"),
    "padding columns read": ("primitives.py", "inside = inside & (offs_d < D)[None, :]\n        tile", "inside = inside\n        tile"),
    "queries beyond T count": ("primitives.py", 'other=float("inf"))', "other=0.0)"),
    "delta dropped": ("scores.py", "dropped(dp, terms, offs_m, offs_n) - delta", "dropped(dp, terms, offs_m, offs_n)"),
    "content bias dropped": ("operands.py", "q = q if q_content is None else q_content", "q = q"),
    "few queries: content bias of head 0": ("forward_kernel.py", "q = with_bias(q, content_bias_ptr + h * D", "q = with_bias(q, content_bias_ptr"),
    "few queries: position bias after content bias": ("forward_kernel.py", "q_position = with_bias(q, position_bias_ptr", "q = q_position = with_bias(q, position_bias_ptr"),
    "position bias dropped": ("operands.py", "q_pos = q if q_position is None else q_position", "q_pos = q"),
    "plans: options ignored": ("launch_forward.py", "input_precision(q.dtype), options, layout", "input_precision(q.dtype), layout"),
    "plans: wanted gradients ignored": ("launch_backward.py", "options, tuple(needs_grad), layout", "options, layout"),
    "plans: strides ignored": ("plans.py", "x.shape, x.stride(), x.dtype", "x.shape, x.dtype"),
    "plans: tensors of the last call": ("plans.py", "values = self._values.copy()", "values = self._values"),
    "row bias dropped": ("primitives.py", "bias = load_row_bias", "bias = 0 * load_row_bias"),
    "dkv: row bias dropped": ("primitives.py", "bias[:, None] if TRANSPOSED", "0 * bias[:, None] if TRANSPOSED"),
    "forward: scale missing": ("scores.py", "s = products * scale", "s = products"),
    "forward: key tile skipped": ("forward_kernel.py", "tl.range(upper, end", "tl.range(BLOCK_N + upper, end"),
    "forward: one key too many unmasked": ("forward_kernel.py", "tl.minimum(keys, i0 + reach) //", "tl.minimum(keys, i0 + reach + 1) //"),
    "forward: log-sum-exp without the maximum": ("forward_kernel.py", "m_i.to(stat_dtype) + tl.log", "tl.log"),
    "forward: running sum not rescaled": ("forward_kernel.py", "l_i * alpha + tl.sum(p, 1)", "l_i + tl.sum(p, 1)"),
    "scores: stored a row early": ("primitives.py", "ptr + row * stride_row + column", "ptr + (row + 1) * stride_row + column"),
    "scores: rows of the next head overwritten": ("primitives.py", "x, mask=row + rows < n_rows)", "x, mask=row + rows < n_rows + 1)"),
    "raw scores: rows as long as by key": ("primitives.py", "ptr += row * (stride_row + 1) + p0", "ptr += row * stride_row + p0"),
    "raw scores: hidden ones kept": ("primitives.py", "mask=(offs_m < n_rows) & visible_mask(offs_m, offs_n, bounds)", "mask=offs_m < n_rows"),
    "dq: scale missing": ("backward_dq_kernel.py", "grads[0] * scale", "grads[0]"),
    "dq: rows of r unmasked too early": ("backward_dq_kernel.py", "tl.minimum(keys - i_end, reach) + shift", "tl.minimum(keys - i0, reach) + shift"),
    "dq: first rows of r skipped": ("backward_dq_kernel.py", "first = tl.maximum(seen_by_some + shift, 0)", "first = tl.maximum(seen_by_all + shift, 0)"),
    "dq: rows of a short tile unmasked": ("backward_dq_kernel.py", "tl.where(i0 + BLOCK_M > n_rows, 0,", "tl.where(False, 0,"),
    "dq: keys of the left edge unmasked": ("backward_dq_kernel.py", "i_end + begin - first), BLOCK_N)", "i0 + begin - first), BLOCK_N)"),
    "dq: keys of the right edge unmasked": ("backward_dq_kernel.py", "tl.minimum(keys, i0 + reach) - first) //", "tl.minimum(keys, i_end + reach) - first) //"),
    "dq: rows of r below the window read": ("backward_dq_kernel.py", "tl.maximum(seen_by_some, begin), tl.maximum", "seen_by_some, tl.maximum"),
    "dq: position bias gradient of later keys only": ("backward_dq_kernel.py", "* scale, D, BLOCK_D, ADD)", "* scale, D, BLOCK_D, False)"),
    "position query: gradient not scaled": ("backward_dq_kernel.py", "dq_position * scale, rows", "dq_position, rows"),
    "segment: gradient of earlier ranges lost": ("backward_dq_kernel.py", "total += tl.load(ptrs", "total += 0 * tl.load(ptrs"),
    "dkv: gradient of earlier ranges lost": ("backward_dkv_kernel.py", "dk * scale, offs_n, D, BLOCK_D, ADD", "dk * scale, offs_n, D, BLOCK_D, False"),
    "dr: gradient of earlier ranges lost": ("backward_dr_kernel.py", "dr, offs_p, DR, BLOCK_DR, ADD", "dr, offs_p, DR, BLOCK_DR, False"),
    "dr: row bias gradient of earlier ranges lost": ("backward_dr_kernel.py", "dr_bias += tl.load", "dr_bias += 0 * tl.load"),
    "dr: key off by one": ("backward_dr_kernel.py", "c = p0 - shift", "c = p0 - shift + 1"),
    "dr: tiles at the end skipped": ("backward_dr_kernel.py", "n_tiles - (upper - lower)", "lower"),
    "dr: rows of the next range": ("backward_dr_kernel.py", "tl.minimum(n_rows, keys - BLOCK_N + 1 - c)", "keys - BLOCK_N + 1 - c"),
    "dr: a batch element left out": ("backward_dr_kernel.py", "(n_batches * (part + 1)) // n_parts", "(n_batches * (part + 1) - 1) // n_parts"),
    "ranges: blocks of rows left out": ("launch_backward.py", "cdiv(last_row, block)", "last_row // block"),
    "ranges: keys that nobody sees": ("launch_backward.py", "self._ranges[0].j_first > 0", "False"),
    "dkv: first query tile skipped": ("backward_dkv_kernel.py", "tl.maximum(0, j0 - reach + 1) //", "(BLOCK_M + tl.maximum(0, j0 - reach + 1)) //"),
    "dkv: unmasked too early": ("backward_dkv_kernel.py", "j0 + BLOCK_N - reach - first)", "j0 - reach - first)"),
    "dkv: scale missing": ("backward_dkv_kernel.py", "dk * scale", "dk"),
    "dkv: content bias gradient not scaled": ("backward_dkv_kernel.py", "k.to(tl.float32), 0) * scale", "k.to(tl.float32), 0)"),
    "dkv: column sum of ds dropped": ("backward_dkv_kernel.py", "colsum += tl.sum(ds, 1)", "colsum += 0 * tl.sum(ds, 1)"),
    "dr: key before the first visible": ("primitives.py", "visible = (offs_n >= 0)", "visible = (offs_n >= -1)"),
    "dr: first tile skipped": ("primitives.py", "edge < lower, edge,", "edge < lower, edge + 1,"),
    "dr: rows of the future not cleared": ("backward_dr_kernel.py", "(offs_p < hidden_from)\n", "(offs_p < P)\n"),
    "delta: gradient of the log-sum-exp dropped": ("vector_kernels.py", "delta -= tl.load", "delta -= 0 * tl.load"),
    "launcher: distance of row 0 off by one": ("call.py", "options.first_distance - M,", "options.first_distance - M + 1,"),
    "window: left bound off by one": ("primitives.py", "offs_n >= offs_m + begin", "offs_n >= offs_m + begin + 1"),
    "forward: first tile of the window skipped": ("forward_kernel.py", "tl.range(start, tl.minimum", "tl.range(start + BLOCK_N, tl.minimum"),
    "forward: left edge unmasked": ("forward_kernel.py", "tl.minimum(i0 + BLOCK_M, T) - 1 + begin", "i0 + begin"),
    "dkv: queries beyond the window": ("backward_dkv_kernel.py", "seen_by_all = j0 - begin + 1", "seen_by_all = j0 - begin + BLOCK_N"),
    "dkv: last query of the window left out": ("backward_dkv_kernel.py", "tl.minimum(i_last, j0 + BLOCK_N - begin)", "tl.minimum(i_last, j0 + BLOCK_N - begin - 1)"),
    "dkv: keys beyond the lengths kept": ("backward_dkv_kernel.py", "dv = tl.where((offs_n < keys)[:, None], dv, 0.0)", "dv = dv"),
    "dr: rows below the window not cleared": ("backward_dr_kernel.py", "(offs_p >= hidden_below) &", "(offs_p >= 0) &"),
    "lengths: one key too many": ("primitives.py", "tl.maximum(tl.load(lengths_ptr + b), 0)", "tl.maximum(tl.load(lengths_ptr + b) + 1, 0)"),
    "mask: float mask before the softcap": ("scores.py", "s += tl.where(bias ==", "s += 0.99 * tl.where(bias =="),
    "mask: rows and columns swapped": ("scores.py", "offs_m.to(tl.int64) * stride_mm", "offs_n.to(tl.int64) * stride_mm"),
    "segment: the other score": ("scores.py", "same, other)", "other, same)"),
    "segment: sums swapped": ("backward_dq_kernel.py", "tl.where(same, ds, 0.0)", "tl.where(same, 0.0, ds)"),
    "softcap: slope dropped": ("scores.py", "1.0 - bounded * bounded", "1.0"),
    "dropout: weights not scaled": ("scores.py", "p * keep_scale", "p"),
    "dropout: dp not dropped": ("scores.py", "dropped(dp, terms, offs_m, offs_n) - delta", "dp - delta"),
    "dropout: keyed by the tile": ("scores.py", "key + offs_m.to(tl.uint32)", "key + (offs_m % 16).to(tl.uint32)"),
    "grouped heads: wrong key head": ("forward_kernel.py", "b, h // group", "b, h % group"),
    "mask gradient: batch left out": ("backward_dmask_kernel.py", "b_first + 1, B)", "b_first + 1, 1)"),
    "ranges: not weighted": ("vector_kernels.py", "weight = tl.exp(lse - row_max)", "weight = tl.exp(0.0 * (lse - row_max))"),
    "ranges: first tile skipped": ("forward_kernel.py", "tl.maximum(start, first)", "tl.maximum(start, first + BLOCK_N)"),
    "ranges: too many keys": ("forward_kernel.py", "tl.minimum(end, first + range_keys)", "end"),
    "descriptors: keys beyond the lengths kept": ("primitives.py", "if EDGE and CUT:", "if False:"),
    "descriptors: rows of the future read": ("call.py", "r = r[:, :, : self.r_rows]", "r = r"),
    "aligned copies: a column short": ("operands.py", "x.device).copy_(x)", "x.device).copy_(x).index_fill_(-1, torch.tensor([x.shape[-1] - 1]), 0)"),
    "log-sum-exp: dead rows count": ("vector_kernels.py", 'tl.where(empty, float("inf"), lse.to', 'tl.where(empty, float("-inf"), lse.to'),
}  # fmt: skip

# (as above): only compiled kernels show it, so a test of the emulated GPU must notice
COMPILED = {
    "compiled: unrolled loop with its end before its start": ("forward_kernel.py", "tl.range(lower, upper, BLOCK_N, loop", "tl.range(lower, tl.minimum(keys, i0 + reach) // BLOCK_N * BLOCK_N, BLOCK_N, loop"),
    "compiled: scores read and multiplied in one place": ("backward_dq_kernel.py", "ds = of_same + of_others", "ds = ds"),
}  # fmt: skip

# (tests/patching/test_*.py, file of txl_kernels, what stands there, what is put in its place)
PATCHES = {
    "patch: signature not compared": ("patch_refusals", "patching/patch.py", "if got != replacement.parameters:", "if False:"),
    "patch: overridden method replaced": ("patch_refusals", "patching/patch.py", "if getattr(cls, method) is not getattr(known, method):", "if False:"),
    "patch: method of an instance lost": ("patch_refusals", "patching/patch.py", "if method in vars(target):", "if False:"),
    "patch: strict only where nothing is known": ("patch_refusals", "patching/patch.py", "(not entries or report.left_alone)", "not entries"),
    "patch: inherited method left behind": ("patch", "patching/patch.py", "if attribute._txl_inherited:", "if False:"),
    "patch: pickled by the derived class": ("patch", "patching/patch.py", "if not _is_direct(type(self)):", "if True:"),
    "padding: full sequence one key short": ("padding", "patching/padding.py", "torch.where(valid[:, -1], valid.shape[1], lengths)", "torch.where(valid[:, -1], valid.shape[1] - 1, lengths)"),
    "padding: any mask taken for lengths": ("padding", "patching/padding.py", "(behind == valid).all()", "(behind == valid).any()"),
    "padding: rows taken for one": ("padding", "patching/padding.py", "or mask.stride(2) == 0", "or mask.stride(3) == 1"),
    "padding: window read the wrong way round": ("padding", "patching/padding.py", "masks.window(reach, visible)", "masks.window(reach[::-1], visible)"),
    "padding: the longest for the shortest": ("wav2vec2_conformer", "patching/padding.py", "lengths.min()", "lengths.max()"),
    "masks: float mask inverted": ("per_mask", "patching/masks.py", "mask > -torch.inf", "mask == -torch.inf"),
    "masks: window one ahead": ("per_mask", "patching/masks.py", "torch.arange(-here, T,", "torch.arange(1 - here, T + 1,"),
    "masks: unseeing rows widen the window": ("per_mask", "patching/masks.py", "behind.where(entries.amax(1) > 0, 0)", "behind"),
    "per mask: edit unnoticed": ("per_mask", "per_mask.py", "else mask._version", "else -1"),
    "per mask: views of one shape confused": ("padding", "per_mask.py", "mask.stride(), mask.storage_offset()", "mask.stride(), 0"),
    "per mask: second mask confused": ("padding", "per_mask.py", "return WeakIdRef(_base(mask)), version", "return version"),
    "per mask: one layer reads for all forwards": ("padding", "per_mask.py", "(reader is None or reader in readers)", "reader is None"),
    "patch: wide heads": ("xlnet", "patching/patch.py", "if size > MAX_HEAD_SIZE", "if size > 2 * MAX_HEAD_SIZE"),
    "per mask: inference tensors kept": ("padding", "per_mask.py", "torch.is_inference_mode_enabled())", "None)"),
    "dead rows: sum of values": ("wav2vec2_conformer", "patching/dead_rows.py", "v.mean(2", "v.sum(2"),
    "dead rows: values of the wrong head": ("parakeet", "patching/dead_rows.py", "mean.repeat_interleave(out.shape[1] // v.shape[1], dim=1)", "mean.repeat(1, out.shape[1] // v.shape[1], 1, 1)"),
    "Transformer-XL: queries of the memory": ("transformer_xl", "patching/families/transformer_xl.py", "q[-w.shape[0] :]", "q[: w.shape[0]]"),
    "Transformer-XL: hook of the projection left out": ("transformer_xl", "patching/families/transformer_xl.py", "not (net._forward_hooks or", "not (None or"),
    "Transformer-XL: no mask taken for a causal one": ("transformer_xl", "patching/families/transformer_xl.py", "Visibility(future=True)", "Visibility()"),
    "Transformer-XL: NVIDIA's axes not told": ("transformer_xl", "patching/families/transformer_xl.py", "if time_major == batch_first:", "if False:"),
    "XLNet: memory of the other type": ("xlnet", "patching/families/xlnet.py", "nn.functional.pad(types, (M, 0))", "nn.functional.pad(types, (M, 0), value=1)"),
    "XLNet: second stream sees itself": ("xlnet", "patching/families/xlnet.py", "visible._replace(itself=None)", "visible"),
    "XLNet: score of itself of another segment": ("xlnet", "patching/families/xlnet.py", "score + segments[..., 0]", "score + segments[..., 1]"),
    "XLNet: own weight never dropped": ("xlnet", "patching/families/xlnet.py", "nn.functional.dropout(weight, dropout_p)", "weight"),
    "XLNet: distance 0 off by one": ("xlnet", "patching/families/xlnet.py", "first_distance=S,", "first_distance=S - 1,"),
    "Parakeet: u and v swapped": ("parakeet", "patching/families/parakeet.py", "self.bias_u, self.bias_v)", "self.bias_v, self.bias_u)"),
    "Parakeet: padded rows not the mean": ("parakeet", "patching/families/parakeet.py", "~padding.valid", "padding.valid & False"),
    "Parakeet: positions' dropout shared": ("parakeet", "patching/families/parakeet_steps.py", "alike = not (encoder.training and encoder.dropout_positions)", "alike = True"),
    "Nemotron: chunk one frame short": ("nemotron", "patching/families/nemotron.py", "& (ahead <= right)", "& (ahead < right)"),
    "Nemotron: frames that see nothing": ("nemotron", "patching/families/nemotron.py", "lengths[:, None] <= first", "lengths[:, None] < first"),
    "Nemotron: cache not attended to": ("nemotron", "patching/families/nemotron.py", "k, v = past_key_values.update(", "past_key_values.update("),
    "Wav2Vec2: no dropout": ("wav2vec2_conformer", "patching/families/wav2vec2_conformer.py", "self.dropout.p if self.training else 0.0", "0.0"),
    "Wav2Vec2: other positions served": ("wav2vec2_conformer", "patching/families/wav2vec2_conformer.py", 'or self.position_embeddings_type != "relative" or', "or"),
    "FastSpeech2: padding inverted": ("fastspeech2", "patching/families/fastspeech2.py", "attention_mask[:, 0] != 0", "attention_mask[:, 0] == 0"),
    "Gemma: a key too far back": ("gemma_audio", "patching/families/gemma_audio.py", "(self.max_past_horizon - 1,", "(self.max_past_horizon,"),
    "Gemma: dead rows without the block's context": ("gemma_audio", "patching/families/gemma_audio.py", "first - before :]).mean(2)", "first - before :]).sum(2)"),
    "Gemma: first dead query a block late": ("gemma_audio", "patching/families/gemma_audio.py", "first = seeing // chunk * chunk", "first = -(-seeing // chunk) * chunk"),
    "NeMo: left context of chunks a frame long": ("nemo", "patching/families/nemo.py", "return (left + chunk - 1,", "return (left,"),
    "NeMo: padded queries see": ("nemo", "patching/families/nemo.py", "out if visible.padded is None else", "out if True else"),
    "NeMo: empty frames of the cache seen": ("nemo", "patching/families/nemo.py", "filled = frames >= offset[:, None]", "filled = frames >= 0 * offset[:, None]"),
    "NeMo: local distances from the centre": ("nemo", "patching/families/nemo.py", "first_distance=left)", "first_distance=None)"),
    "ESPnet: future not without positions": ("espnet", "patching/families/espnet.py", "r = r[..., :S, :]", "r = r"),
    "ESPnet: legacy rows end at 0": ("espnet", "patching/families/espnet.py", "wrap_future=is_legacy and not self.zero_triu", "wrap_future=False"),
    "ESPnet: plots without weights": ("espnet", "patching/families/espnet.py", "== _PLOTS for", "is None for"),
    "ESPnet transducer: padding in front seen in chunks": ("espnet_transducer", "patching/families/espnet_transducer.py", "else chunks & visible", "else chunks"),
    "SpeechBrain: biases transposed": ("speechbrain", "patching/families/speechbrain.py", "self.pos_bias_u.view(H, -1)", "self.pos_bias_u.view(-1, H).t()"),
    "SpeechBrain: scaled by the head": ("speechbrain", "patching/families/speechbrain.py", "scale=self.scale,", ""),
    "SpeechBrain: one reading of the weight": ("speechbrain", "patching/families/speechbrain.py", "if (query is key or torch.equal(query, key))", "if True or (query is key)"),
    "SpeechBrain: padding in front seen in a float mask": ("speechbrain", "patching/families/speechbrain.py", "mask.masked_fill(~padding, -torch.inf)", "mask"),
    "fairseq: future not without positions": ("fairseq", "patching/families/fairseq.py", "pos_emb[:S] if self.zero_triu else pos_emb", "pos_emb"),
    "DI-engine: second dropout left out": ("ding", "patching/families/ding.py", "self.dropout(self.project(out.permute(2, 0, 1, 3).flatten(2)))", "self.project(out.permute(2, 0, 1, 3).flatten(2))"),
    "DI-engine: window not passed on": ("ding", "patching/families/ding.py", "window=visible.window,", ""),
    "RLlib: gradient into the memory": ("rllib", "patching/families/rllib.py", "memory.detach()", "memory"),
    "RLlib: queries of the memory": ("rllib", "patching/families/rllib.py", "q[:, :, -T:]", "q[:, :, :T]"),
}  # fmt: skip


class Mutation(NamedTuple):
    """A break, by path from the root of the project, and the tests that must notice."""

    tests: str
    file: str
    old: str
    new: str


MUTATIONS = {
    name: Mutation("tests/interpreter", f"txl_kernels/triton_backend/{x[0]}", *x[1:]) for name, x in KERNELS.items()
}
MUTATIONS |= {
    name: Mutation("tests/emulator", f"txl_kernels/triton_backend/{x[0]}", *x[1:]) for name, x in COMPILED.items()
}
MUTATIONS |= {
    name: Mutation(f"tests/patching/test_{x[0]}.py", f"txl_kernels/{x[1]}", *x[2:]) for name, x in PATCHES.items()
}


def outcome(mutation: Mutation, cache: str) -> str:
    """What the tests say to the mutation in a copy of the project; those that failed before go first."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in ("txl_kernels", "reference", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / mutation.file
        text = path.read_text()
        if text.count(mutation.old) < 1:
            raise SystemExit(f"{mutation.file}: nothing to mutate, {mutation.old!r} is not there")
        path.write_text(text.replace(mutation.old, mutation.new))
        options = ["-q", "-x", "--failed-first", "-o", f"cache_dir={cache}", "-m", "not long"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": directory}
        if mutation.tests == "tests/interpreter":
            environment["TRITON_INTERPRET"] = "1"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, mutation.tests],
            cwd=copy, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # nothing is collected where a package is not installed
        outcomes = {0: "SURVIVED", 1: "caught", 5: "not tried"}
        if run.returncode not in outcomes or (run.returncode == 5 and mutation.tests == "tests/interpreter"):
            raise SystemExit(f"the tests did not run:\n{run.stdout}{run.stderr}")
        return outcomes[run.returncode]


def main(names: list[str]) -> None:
    """Tries the mutations with one of the given words in their name, or all; exits with 1 if one survives.

    Those of a family whose package is not installed are not tried. One process for each processor; each remembers
    which tests its mutations failed.
    """
    chosen = {name: m for name, m in MUTATIONS.items() if not names or any(word in name for word in names)}
    workers = os.cpu_count() or 1
    outcomes = []
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(workers) as pool:
        caches = queue.SimpleQueue()
        for worker in range(workers):
            caches.put(str(Path(directory) / str(worker)))

        def attempt(mutation: Mutation) -> str:
            cache = caches.get()
            try:
                return outcome(mutation, cache)
            finally:
                caches.put(cache)

        for (name, mutation), seen in zip(chosen.items(), pool.map(attempt, chosen.values()), strict=True):
            print(f"{seen}  {mutation.file}: {name}", flush=True)
            outcomes.append(seen)
    print(f"{outcomes.count('caught')} of {len(chosen)} mutations caught, {outcomes.count('not tried')} not tried")
    sys.exit("SURVIVED" in outcomes)


if __name__ == "__main__":
    main(sys.argv[1:])
