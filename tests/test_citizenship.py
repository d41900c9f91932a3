"""The operator and the layers among PyTorch's own: opcheck, compile, export, autocast, functorch, checkpointing."""

import weakref

import pytest
import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.accuracy import outputs_and_gradients
from tests.contract import FEATURES, make_problem
from tests.layer_tools import C, make_layer, original_mask, run
from tests.layer_tools import make_inputs as layer_inputs
from txl_kernels import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn, op, rel_attention

B, H, T, M, D = 2, 4, 7, 5, 8
S = M + T

# Together they use every feature.
COMBINATIONS = {
    "plain": (),
    "everything added": ("bidirectional", "float mask", "segment", "row bias", "softcap", "key lengths"),
    "everything hidden": ("bool mask", "window", "grouped heads", "position query"),
    "no position keys": ("bidirectional", "right window", "no r", "key mask"),
    "a band for each batch element": ("batched r", "band", "head mask"),
    "shared position keys": ("shared r", "key lengths"),
    "a future that wraps": ("wrapped future", "key mask", "row bias"),
}
DROPOUT = 0.3


def problem(combination, **sizes):
    """inputs and options; the ids of segments among the options as contract.make_problem gives them."""
    return make_problem(frozenset(COMBINATIONS[combination]), **({"B": B, "H": H, "T": T, "M": M, "D": D} | sizes))


def arguments(inputs, options):
    """Those of rel_attention."""
    arguments = inputs | options
    if "segment_ids" in arguments:
        arguments["segment"] = (arguments.pop("segment_scores"), *arguments.pop("segment_ids"))
    return arguments


def seeded(function, **arguments):
    torch.manual_seed(3)
    return function(**arguments)


def recorded(monkeypatch, **arguments):
    """What a call of rel_attention hands to the operator."""
    calls, operator = [], op.rel_attention
    monkeypatch.setattr(op, "rel_attention", lambda *args: calls.append(args) or operator(*args))
    rel_attention(**arguments)
    monkeypatch.setattr(op, "rel_attention", operator)
    return calls[0]


def test_the_combinations_use_every_feature():
    assert {feature for features in COMBINATIONS.values() for feature in features} == set(FEATURES)


@pytest.mark.parametrize(
    ("combination", "layout"),
    [*((name, "bhtd") for name in COMBINATIONS), ("plain", "tbhd"), ("everything hidden", "last stride not 1")],
)
def test_operators_pass_opcheck(combination, layout, monkeypatch):
    inputs, options = problem(combination, layout="tbhd" if layout == "tbhd" else "bhtd")
    if layout == "last stride not 1":
        inputs |= {n: inputs[n].mT.contiguous().mT for n in ("q", "k", "v", "r", "q_pos") if n in inputs}
    args = recorded(monkeypatch, **arguments(inputs, options | {"dropout_p": DROPOUT}))
    n = len(op.Inputs._fields)
    leaves = [None if x is None else x.detach() for x in args[:n]]
    for x in leaves:
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    results = torch.library.opcheck(op.rel_attention, (*leaves, *args[n:]))
    assert set(results.values()) == {"SUCCESS"}
    # Not two runs with one another: room for weights that is left over is not initialised.
    alone = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(op.rel_attention_with_weights, args, test_utils=alone)
    assert set(results.values()) == {"SUCCESS"}

    out, lse, weights = op.rel_attention_with_weights(*args)
    assert weights.numel()
    needs_grad = [x is not None and x.requires_grad for x in leaves[: len(op.DIFFERENTIABLE)]]
    *numbers, backend = args[n:]
    dlse = None if combination == "plain" else torch.randn_like(lse)
    saved = (torch.randn_like(out), dlse, *args[:n], out, lse)
    for kept in ((), (weights,)):
        results = torch.library.opcheck(op.rel_attention_backward, (*saved, *numbers, backend, needs_grad, *kept))
        assert set(results.values()) == {"SUCCESS"}


# --- torch.compile and torch.export


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_compiles_as_one_graph_that_serves_all_lengths(combination):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rel_attention, fullgraph=True, backend=counter)
    fixed = {"window": (6, 2), "first_distance": 3, "dropout_p": DROPOUT}  # numbers, which a graph may contain
    for q_len, memory in ((7, 5), (9, 6), (12, 11), (5, 20), (31, 2)):
        inputs, options = problem(combination, T=q_len, M=memory)
        options |= {name: x for name, x in fixed.items() if name in options or name == "dropout_p"}
        dout = torch.randn(B, H, q_len, D)
        got, wanted = (
            seeded(lambda f=f: outputs_and_gradients(f, inputs, dout, **options))  # noqa: B023
            for f in (compiled, rel_attention)
        )
        torch.testing.assert_close(got, wanted)
    assert counter.frame_count <= 2  # the first lengths, then any


def test_compiled_dropout_differs_from_call_to_call():
    inputs, options = problem("plain")
    compiled = torch.compile(rel_attention, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**inputs, **options, dropout_p=DROPOUT) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(
        seeded(compiled, **inputs, dropout_p=DROPOUT), seeded(rel_attention, **inputs, dropout_p=DROPOUT)
    )


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask tensor"])
@pytest.mark.parametrize("cls", [RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn])
def test_a_compiled_training_step_of_any_length(cls, masked):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    learned = cls is RelLearnableMultiHeadAttn
    options = {"dropout": 0.1, "dropatt": DROPOUT}

    def train(wrap):
        layer = make_layer(cls, **options)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        loss_of = wrap(lambda inputs, mask: layer(**inputs, attn_mask=mask).square().mean())
        for q_len, memory in ((7, 5), (9, 4), (12, 11), (5, 20)):
            torch.manual_seed(q_len)
            inputs = layer_inputs(q_len, memory, learned=40 if learned else None)
            optimizer.zero_grad()
            loss_of(inputs, original_mask(q_len, memory) if masked else None).backward()
            optimizer.step()
        return dict(layer.named_parameters())

    compiled = train(lambda f: torch.compile(f, fullgraph=True, backend=counter))
    torch.testing.assert_close(compiled, train(lambda f: f))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("cls", [RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn])
def test_exports_with_dynamic_lengths(cls):
    learned = 40 if cls is RelLearnableMultiHeadAttn else None
    layer = make_layer(cls).eval()

    def inputs(q_len, memory, batch):
        return {n: x.detach() for n, x in layer_inputs(q_len, memory, batch, learned=learned).items()}

    any_length = torch.export.Dim.DYNAMIC
    lengths = {
        name: {0: any_length, 1: any_length} if name in ("w", "mems") else {0: any_length} if name == "r" else None
        for name in inputs(7, 5, 3)
    }
    exported = torch.export.export(layer, (), inputs(7, 5, 3), dynamic_shapes=lengths)
    assert "txl_kernels.rel_attention" in str(exported.graph)
    for sizes in ((7, 5, 3), (3, 20, 2), (12, 4, 5)):
        torch.testing.assert_close(exported.module()(**inputs(*sizes)), layer(**inputs(*sizes)))


@pytest.mark.long
def test_runs_under_inductor():
    torch._dynamo.reset()
    inputs, options = problem("plain")
    compiled = torch.compile(lambda **x: rel_attention(**x) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, **options), rel_attention(**inputs, **options) * 2)


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_autocast_casts_the_large_inputs_only(combination, dtype, monkeypatch):
    inputs, options = problem(combination)
    with torch.autocast("cpu", dtype):
        handed = op.Inputs(*recorded(monkeypatch, **arguments(inputs, options))[: len(op.Inputs._fields)])
        out, lse = rel_attention(**arguments(inputs, options), return_lse=True)
    large = {"q", "k", "v", "r", "q_pos"}
    for name in inputs:
        assert getattr(handed, name).dtype == (dtype if name in large else torch.float32), name
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    cast = {name: x.to(dtype) if name in large else x for name, x in inputs.items()}
    assert torch.equal(out, rel_attention(**arguments(cast, options)))


def test_autocast_casts_masks_and_segment_scores_of_16_bits(monkeypatch):
    inputs, options = problem("everything added", dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        handed = op.Inputs(
            *recorded(
                monkeypatch,
                **arguments(
                    inputs | {"r_bias": inputs["r_bias"].float()},
                    options | {n: inputs[n].float() for n in ("content_bias", "position_bias")},
                ),
            )[: len(op.Inputs._fields)]
        )
    assert handed.attn_mask.dtype == handed.segment_scores.dtype == torch.bfloat16


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_gradients_under_autocast_come_back_in_the_dtype_of_each_input(combination):
    inputs, options = problem(combination)
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs_and_gradients(rel_attention, inputs, torch.ones_like(inputs["q"]), **options)
    assert {got[name].dtype for name in inputs} == {torch.float32}


def test_autocast_leaves_float64_alone():
    inputs, options = problem("everything added", dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert rel_attention(**arguments(inputs, options)).dtype == torch.float64


# --- the other ways of tracing: each records the one operator, and what it records has gradients


def traced_by_jit(inputs, file):
    torch.jit.save(torch.jit.trace(lambda *x: rel_attention(*x), tuple(inputs)), file)
    return torch.jit.load(file), torch.jit.load(file).inlined_graph


def traced_before_dispatch(inputs, _):
    graph = make_fx(lambda *x: rel_attention(*x), pre_dispatch=True)(*inputs)
    return graph, graph.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [traced_by_jit, traced_before_dispatch])
def test_traces_record_the_operator(trace, tmp_path):
    inputs = [x.requires_grad_() for x in problem("plain")[0].values()]
    graph, code = trace(inputs, str(tmp_path / "trace.pt"))
    assert str(code).count("txl_kernels") == 1
    for got, wanted in zip(
        *(torch.autograd.grad(f(*inputs).sum(), inputs) for f in (graph, rel_attention)), strict=True
    ):
        assert torch.equal(got, wanted)


def test_compiled_autograd_has_the_backward_as_one_node():
    inputs = [x.requires_grad_() for x in problem("plain")[0].values()]
    wanted = torch.autograd.grad(rel_attention(*inputs).sum(), inputs)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        rel_attention(*inputs).sum().backward()
    for x, grad in zip(inputs, wanted, strict=True):
        assert torch.equal(x.grad, grad)


# --- autograd, functorch and modes


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_second_derivatives_raise(combination):
    inputs, options = problem(combination)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    (dq,) = torch.autograd.grad(rel_attention(**arguments(inputs, options)).sum(), [inputs["q"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="rel_attention: second derivatives"):
        dq.sum().backward()


def test_forward_mode_is_refused():
    """Rather than a tangent of zero."""
    inputs, _ = problem("plain")
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(lambda q: rel_attention(**inputs | {"q": q}), (inputs["q"],), (torch.ones(B, H, T, D),))


def test_functorch_gradients_are_refused():
    """Rather than gradients of zero."""
    inputs, _ = problem("plain")
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda q: rel_attention(**inputs | {"q": q}).sum())(inputs["q"])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_vmap_is_a_loop(combination):
    problems = [problem(combination, seed=seed)[0] for seed in range(3)]
    options = problem(combination)[1]
    stacked = {name: torch.stack([inputs[name] for inputs in problems]) for name in problems[0]}

    def attend(inputs):
        return rel_attention(**arguments(inputs, options))

    torch.testing.assert_close(torch.vmap(attend)(stacked), torch.stack([attend(inputs) for inputs in problems]))


def test_vmap_with_dropout_asks_for_the_kind_of_randomness():
    inputs, _ = problem("plain")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda q: rel_attention(**inputs | {"q": q}, dropout_p=DROPOUT))(inputs["q"][None])


def test_nothing_is_saved_without_gradients():
    inputs, options = problem("everything added")
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    for mode, saved in ((torch.no_grad, False), (torch.inference_mode, False), (torch.enable_grad, True)):
        q = inputs["q"] * 2  # nobody else keeps it
        kept = weakref.ref(q.untyped_storage())
        with mode():
            out = rel_attention(**arguments(inputs | {"q": q}, options))
        assert (out.grad_fn is not None) == saved
        q = q.detach() if saved else None  # the graph holds it, or nothing does
        assert (kept() is not None) == saved
    with torch.inference_mode():
        assert rel_attention(**arguments(inputs, options)).is_inference()


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_runs_with_deterministic_algorithms_only(combination):
    """Which also fills what torch.empty gives with NaN: nothing uninitialised is read."""
    inputs, options = problem(combination)
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            results.append(outputs_and_gradients(rel_attention, inputs, torch.ones_like(inputs["q"]), **options))
        finally:
            torch.use_deterministic_algorithms(False)
    for name, x in results[0].items():
        assert torch.equal(results[1][name], x), name


# --- dropout


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_manual_seed_repeats_dropout(combination):
    inputs, options = problem(combination)
    call = arguments(inputs, options | {"dropout_p": DROPOUT})
    first = seeded(rel_attention, **call)
    assert not torch.equal(rel_attention(**call), first)
    assert torch.equal(seeded(rel_attention, **call), first)


def test_no_dropout_leaves_the_generator_alone():
    inputs, options = problem("plain")
    state = torch.get_rng_state()
    rel_attention(**inputs, **options, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_activation_checkpointing_repeats_dropout(combination):
    inputs, options = problem(combination)
    options["dropout_p"] = DROPOUT

    def checkpointed(**call):
        return checkpoint(rel_attention, **call, use_reentrant=False)

    dout = torch.randn(B, H, T, D)
    got, wanted = (
        seeded(lambda f=f: outputs_and_gradients(f, inputs, dout, **options)) for f in (checkpointed, rel_attention)
    )
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def test_autocast_of_a_layer_that_is_checkpointed():
    layer, inputs = make_layer(dropatt=DROPOUT), layer_inputs(5, 3)
    gout = torch.ones(5, 3, C)
    wanted = seeded(lambda: run(layer, inputs, gout, autocast=torch.bfloat16))

    def again(**leaves):
        mask = leaves.pop("attn_mask")
        *tensors, mems = leaves.values()
        return checkpoint(layer, *tensors, mask, mems, use_reentrant=False)

    again.named_parameters = layer.named_parameters
    got = seeded(lambda: run(again, inputs, gout, autocast=torch.bfloat16))
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name
