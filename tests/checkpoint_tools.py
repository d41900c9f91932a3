"""Checkpoints as others write them: module trees with the class names and attributes of the original code."""

import io
import json
import pickle
import sys
import types
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

GOLDEN = np.load(Path(__file__).parent / "golden" / "original_lm.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files if "/" in key})
DROPOUT = {"dropout": 0.1, "dropatt": 0.2}  # of no effect in evaluation mode
LAYERS = ("RelPartialLearnable", "RelLearnable", "", "")
FORMATS = {"zip": True, "legacy": False}


def golden_arguments(case):
    return json.loads(str(GOLDEN[f"{case}/cfg"])) | DROPOUT


def golden_state(case):
    prefix = f"{case}/param/"
    return {k.removeprefix(prefix): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(prefix)}


def assert_golden(model, case):
    """Three segments give the losses and memory of the original; with cutoffs its losses are grouped by cluster."""
    mems = []
    for n in range(3):
        data, target = (torch.from_numpy(GOLDEN[f"{case}/in/{name}{n}"]) for name in ("data", "target"))
        losses, *mems = model(data, target, *mems)
        # the golden scores went through float32 to be masked
        for got, name in [(losses.flatten().sort()[0], f"nll{n}"), *((m, f"mems{n}.{i}") for i, m in enumerate(mems))]:
            wanted = torch.from_numpy(GOLDEN[f"{case}/out/{name}"])
            wanted = wanted.flatten().sort()[0] if name == f"nll{n}" else wanted
            torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)


def _module(where, name, **attributes):
    """An nn.Module of a class of this name in this module, as an import there would find it."""
    home = sys.modules.setdefault(where, types.ModuleType(where))
    sys.modules.setdefault(where.partition(".")[0], home)
    if not hasattr(home, name):
        setattr(home, name, type(name, (nn.Module,), {"__module__": where}))
    module = getattr(home, name)()
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    return module


@contextmanager
def original_names():
    """Forgets the classes of `original_model` afterwards, so that nothing can load them by importing."""
    before = dict(sys.modules)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Couldn't retrieve source code")
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    finally:
        sys.modules.clear()
        sys.modules.update(before)


def _projections(shapes):
    projections = nn.ParameterList()
    for shape in shapes:
        projections.append(None if shape is None else nn.Parameter(torch.empty(shape)))
    return projections


def original_model(arguments, state):
    """What the original's training script hands to torch.save, as far as a pickle shows."""
    c = types.SimpleNamespace(**arguments)
    cutoffs = [*c.cutoffs, c.n_token]
    tokens = np.diff([0, *cutoffs]).tolist() if c.div_val > 1 else [c.n_token]
    widths = [c.d_embed // c.div_val**i for i in range(len(cutoffs))]
    shapes = [(c.d_model, width) if c.div_val > 1 or c.d_model != c.d_embed else None for width in widths]
    common = {"n_token": c.n_token, "d_embed": c.d_embed, "d_proj": c.d_model, "cutoffs": cutoffs, "div_val": c.div_val}
    word_emb = _module(
        *("mem_transformer", "AdaptiveEmbedding"),
        **common,
        emb_scale=c.d_model**0.5,
        emb_layers=nn.ModuleList(nn.Embedding(*size) for size in zip(tokens, widths, strict=False)),
        emb_projs=_projections([s for s in shapes[: len(tokens)] if s]),
    )
    crit = _module(
        *("proj_adaptive_softmax", "ProjectedAdaptiveLogSoftmax"),
        **common,
        n_clusters=len(c.cutoffs),
        out_layers=nn.ModuleList(nn.Linear(*size) for size in zip(widths, tokens, strict=False)),
        out_projs=_projections(shapes),
        keep_order=False,
    )
    if c.cutoffs:
        crit.cluster_weight = nn.Parameter(torch.empty(len(c.cutoffs), c.d_embed))
        crit.cluster_bias = nn.Parameter(torch.empty(len(c.cutoffs)))
    if c.tie_weight:
        for out, embedding in zip(crit.out_layers, word_emb.emb_layers, strict=True):
            out.weight = embedding.weight
    for i, tie in enumerate(c.tie_projs):
        if tie and shapes[i]:
            crit.out_projs[i] = word_emb.emb_projs[0 if c.div_val == 1 else i]
    rows, bias = c.tgt_len + c.ext_len + c.mem_len, (c.n_head, c.d_head)
    names = ("n_token", "d_embed", "d_model", "n_head", "d_head", "n_layer", "attn_type", "same_length", "clamp_len")
    lengths = ("tgt_len", "ext_len", "mem_len")
    model = _module(
        *("mem_transformer", "MemTransformerLM"),
        **{name: arguments[name] for name in (*names, *lengths)},
        max_klen=rows,
        sample_softmax=-1,
        word_emb=word_emb,
        drop=nn.Dropout(c.dropout),
        layers=nn.ModuleList(_layer(c) for _ in range(c.n_layer)),
        crit=crit,
    )
    if c.attn_type in (0, 2):
        model.pos_emb = _module("mem_transformer", "PositionalEmbedding", demb=c.d_model)
        model.pos_emb.register_buffer("inv_freq", torch.empty(c.d_model // 2))
    else:
        model.r_emb = nn.Parameter(torch.empty(c.n_layer, rows, *bias))
    if c.attn_type == 0:
        model.r_w_bias, model.r_r_bias = nn.Parameter(torch.empty(bias)), nn.Parameter(torch.empty(bias))
    if c.attn_type == 1:
        model.r_w_bias = nn.Parameter(torch.empty(c.n_layer, *bias))
        model.r_bias = nn.Parameter(torch.empty(c.n_layer, rows, c.n_head))
    model.double().load_state_dict(state)
    return model


def _layer(c):
    common = {"d_model": c.d_model, "dropout": c.dropout, "pre_lnorm": c.pre_lnorm}
    kind, width = LAYERS[c.attn_type], c.n_head * c.d_head
    inputs = {"qkv_net": 3} if kind else {"q_net": 1, "kv_net": 2}
    inputs |= {"r_net": 1} if c.attn_type == 0 else {}
    attention = _module(
        *("mem_transformer", f"{kind}MultiHeadAttn"),
        **common,
        **{"n_head": c.n_head, "d_head": c.d_head, "scale": c.d_head**-0.5},
        **{name: nn.Linear(c.d_model, n * width, bias=False) for name, n in inputs.items()},
        drop=nn.Dropout(c.dropout),
        dropatt=nn.Dropout(c.dropatt),
        o_net=nn.Linear(width, c.d_model, bias=False),
        layer_norm=nn.LayerNorm(c.d_model),
    )
    core = nn.Sequential(
        *(nn.Linear(c.d_model, c.d_inner), nn.ReLU(inplace=True), nn.Dropout(c.dropout)),
        *(nn.Linear(c.d_inner, c.d_model), nn.Dropout(c.dropout)),
    )
    net = _module(
        *("mem_transformer", "PositionwiseFF"),
        **common,
        d_inner=c.d_inner,
        CoreNet=core,
        layer_norm=nn.LayerNorm(c.d_model),
    )
    return _module("mem_transformer", f"{kind}DecoderLayer", dec_attn=attention, pos_ff=net)


def aged(model):
    """Gives the modules the attributes that they had in PyTorch 1.0, and takes the newer ones."""
    home = sys.modules.setdefault("torch.nn.backends.thnn", types.ModuleType("torch.nn.backends.thnn"))
    home._get_thnn_function_backend = types.FunctionType((lambda: None).__code__, {}, "_get_thnn_function_backend")
    home._get_thnn_function_backend.__module__ = home.__name__
    home._get_thnn_function_backend.__qualname__ = "_get_thnn_function_backend"
    backend = type("Backend", (), {"__reduce__": lambda self: (home._get_thnn_function_backend, ())})()
    kept = {
        "_parameters",
        "_buffers",
        "_backward_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_modules",
        "training",
    }
    for module in model.modules():
        names = [name for name in vars(module) if name.startswith("_") and name not in kept]
        for name in names:
            del vars(module)[name]
        vars(module)["_backend"] = backend
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = torch.Size(module.normalized_shape)
        if isinstance(module, nn.ParameterList):  # then None was registered like a parameter
            vars(module)["_parameters"].update({k: vars(module).pop(k) for k in list(vars(module)) if k.isdigit()})
    return model


def saved(path, content, kind):
    torch.save(content, path, _use_new_zipfile_serialization=FORMATS[kind])
    return path


def crafted(path, pickled, kind, keys=()):
    """A file of this format whose object is this pickle, without storages."""
    if kind == "legacy":
        parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(parts) + pickled + pickle.dumps(list(keys), 2))
        return path
    whole = io.BytesIO()
    torch.save({}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("/data.pkl") else source.read(name))
    return path


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Persistent:
    """Pickles as a persistent id."""

    def __init__(self, pid):
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Persistent) else None


def pickled(content):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()
