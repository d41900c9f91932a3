"""Makes huggingface_lm.npz: small models of Hugging Face's Transformer-XL over three segments, in float32.

Measured from transformers 4.37.2, the last release in which its Transformer-XL runs; in an environment of its own::

    python -m venv hf && hf/bin/pip install torch 'transformers==4.37.2' 'numpy<2'
    hf/bin/python -m tests.golden.huggingface_lm

Keys: `<case>/config` (its config.json), `<case>/param/<its state_dict name>`, and for each segment n
`<case>/in/data<n>`, `<case>/in/target<n>` (T, B), `<case>/out/nll<n>` (T, B), `<case>/out/mems<n>.<i>`.
"""

import json
from pathlib import Path

import numpy as np
import torch

PATH = Path(__file__).with_suffix(".npz")
SIZES = {"vocab_size": 29, "n_layer": 2, "n_head": 2, "d_model": 12, "d_head": 5, "d_inner": 17}
ADAPTIVE = {"cutoffs": [8, 19], "div_val": 2}
CASES = {
    "plain": {"cutoffs": [], "div_val": 1, "d_embed": 12, "mem_len": 6, "clamp_len": -1, "same_length": False},
    "adaptive": {**ADAPTIVE, "d_embed": 12, "mem_len": 7, "clamp_len": 4, "same_length": True},
    "shared_table": {
        **{"cutoffs": [8, 19], "div_val": 1, "d_embed": 10, "mem_len": 3, "clamp_len": 6, "same_length": True},
        **{"untie_r": False, "pre_lnorm": True},
    },
    "untied": {
        **{**ADAPTIVE, "d_embed": 10, "mem_len": 4, "clamp_len": -1, "same_length": False},
        **{"untie_r": False, "tie_word_embeddings": False, "proj_share_all_but_first": False},
    },
}


def model_of(case):
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    torch.manual_seed(sorted(CASES).index(case))
    model = TransfoXLLMHeadModel(TransfoXLConfig(**SIZES, **CASES[case])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def segments_of(model, n=3, T=5, B=2):
    """For each segment data, target, losses (T, B each) and the memory after it."""
    stream = torch.randint(model.config.vocab_size, (n * T + 1, B))
    mems = None
    for i in range(n):
        data, target = stream[i * T : i * T + T], stream[i * T + 1 : i * T + T + 1]
        out = model(data.t(), mems=mems)
        # labels would be shifted, and losses grouped by cluster
        nll = -out.prediction_scores.gather(2, target.t()[:, :, None])[:, :, 0].t()
        mems = out.mems
        yield data, target, nll, mems


def numbers_of(case):
    model = model_of(case)
    numbers = {"config": np.array(model.config.to_json_string(use_diff=True))}
    numbers |= {f"param/{name}": x.detach().numpy() for name, x in model.state_dict().items()}
    for n, (data, target, nll, mems) in enumerate(segments_of(model)):
        numbers |= {f"in/data{n}": data.numpy(), f"in/target{n}": target.numpy(), f"out/nll{n}": nll.numpy()}
        numbers |= {f"out/mems{n}.{i}": memory.numpy() for i, memory in enumerate(mems)}
    return {f"{case}/{name}": array for name, array in numbers.items()}


if __name__ == "__main__":
    everything = {}
    for case in CASES:
        everything |= numbers_of(case)
    np.savez_compressed(PATH, **everything)
    print(json.dumps({"arrays": len(everything), "bytes": PATH.stat().st_size}))
