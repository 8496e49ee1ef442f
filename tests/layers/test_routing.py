"""Everything that a forward can be wrapped in still gives each row its own expert."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.compile_fx
import transformers as tf

import t2kernels as t2
from tests.helpers.families import build

ROWS = ["a", None, "b", {"a": 0.7, "b": 0.3}]
FORMS = ["factored", "delta"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def patched(family="llama", form="delta", **kw):
    plain = build(family)
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form=form, rows=8, **kw)
    for name in "ab":
        bank.add(name, bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    return plain, model, bank


def prompts(B=4, S=6):
    return torch.randint(3, 60, (B, S))


def row_by_row(model, x, rows, **kw):
    return torch.cat([model.generate(x[i : i + 1], experts=r, **kw) for i, r in enumerate(rows)])


@pytest.mark.parametrize("form", FORMS)
def test_ids_of_every_shape(form):
    plain, model, bank = patched(form=form)
    x = prompts()
    one = {r: model(x, experts=r).logits for r in ("a", "b", None)}
    assert not torch.allclose(one["a"], one["b"], atol=1e-2)
    names = ["a", None, "b", "a"]
    per_row = model(x, expert_ids=bank.ids(names)).logits
    torch.testing.assert_close(per_row, torch.stack([one[n][i] for i, n in enumerate(names)]), **CLOSE)
    torch.testing.assert_close(model(x, expert_ids=bank.ids("b").long()).logits, one["b"], **CLOSE)
    # One expert a token, constant along each sequence, is one expert a sequence.
    tokens = bank.ids([[n] * x.shape[1] for n in names])
    assert tokens.shape == x.shape
    torch.testing.assert_close(model(x, expert_ids=tokens).logits, per_row, **CLOSE)
    # The expert of a late token cannot change earlier ones (attention is causal), and does change its own.
    late = tokens.clone()
    late[:, -1] = bank.ids("b")
    got = model(x, expert_ids=late).logits
    torch.testing.assert_close(got[:, :-1], per_row[:, :-1], **CLOSE)
    assert not torch.allclose(got[0, -1], per_row[0, -1], atol=1e-2)
    # The backbone called directly is routed too.
    torch.testing.assert_close(
        model.lm_head(model.model(x, expert_ids=bank.ids("b")).last_hidden_state), one["b"], **CLOSE
    )
    if form == "delta":
        assert torch.equal(model(x).logits, plain(x).logits)


def test_a_mixture_is_a_row():
    _, model, bank = patched()
    bank.add("mixed", t2.Expert.mix([(bank["a"], 0.7), (bank["b"], 0.3)]))
    x = prompts()
    torch.testing.assert_close(
        model(x, experts=[{"a": 0.7, "b": 0.3}] * 4).logits, model(x, experts="mixed").logits, **CLOSE
    )
    torch.testing.assert_close(model(x, experts={"a": 1.0}).logits, model(x, experts="a").logits)
    assert torch.equal(model(x, experts={"a": 0.0}).logits, model(x).logits)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda o: "-".join(o) or "greedy",
)
@pytest.mark.parametrize("form", FORMS)
def test_generate(form, options):
    _, model, _ = patched(form=form)
    x, options = prompts(), {"max_new_tokens": 6, "do_sample": False, **options}
    assert torch.equal(model.generate(x, experts=ROWS, **options), row_by_row(model, x, ROWS, **options))


def test_generate_gives_every_return_sequence_the_expert_of_its_prompt():
    _, model, _ = patched()
    x = prompts(2)
    out = model.generate(x, experts=["a", "b"], do_sample=True, top_k=1, num_return_sequences=3, max_new_tokens=5)
    greedy = model.generate(x, experts=["a", "b"], do_sample=False, max_new_tokens=5)
    assert torch.equal(out, greedy.repeat_interleave(3, 0))


def test_generate_with_left_padding():
    _, model, _ = patched()
    long, short = prompts(1, 8), prompts(1, 5)
    x = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    out = model.generate(x, attention_mask=mask, experts=["a", "b"], max_new_tokens=6, do_sample=False)
    assert torch.equal(out[0], model.generate(long, experts="a", max_new_tokens=6, do_sample=False)[0])
    assert torch.equal(out[1, 3:], model.generate(short, experts="b", max_new_tokens=6, do_sample=False)[0])


def test_assisted_decoding():
    plain, model, _ = patched()
    x = prompts(1)
    options = {"experts": ["a"], "max_new_tokens": 8, "do_sample": False}
    want = model.generate(x, **options)
    unpatched, other = build("llama"), build("llama")
    t2.patch_model(other)
    for draft in (unpatched, other, plain):
        assert torch.equal(model.generate(x, assistant_model=draft, **options), want)
    assert torch.equal(model.generate(x, prompt_lookup_num_tokens=2, **options), want)


def test_misspelt_arguments_are_still_refused():
    _, model, _ = patched()
    with pytest.raises(ValueError, match="expert_idx"):
        model.generate(prompts(), expert_idx=torch.tensor(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="not both"):
        model.generate(prompts(), experts="a", expert_ids=torch.tensor(1), max_new_tokens=2)
    with pytest.raises(ValueError, match="one expert a token"):
        model.generate(prompts(), experts=[["a"] * 6] * 4, max_new_tokens=2)


def test_use_holds_for_any_batch_and_nests():
    _, model, bank = patched()
    x = prompts()
    a, b, base = (model(x, experts=r).logits for r in ("a", "b", None))
    with bank.use("a") as ids:
        assert ids.dim() == 0
        assert torch.equal(model(x[:2]).logits, model(x[:2], experts="a").logits)
        with bank.use("b"):
            assert torch.equal(model(x).logits, b)
            assert torch.equal(model(x, experts="a").logits, a)  # what is said to the call goes first
            with bank.use(None):
                assert torch.equal(model(x).logits, base)
        assert torch.equal(model(x).logits, a)
        want = model.generate(x, experts=["a"] * 4, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(x, max_new_tokens=3, do_sample=False), want)
    assert torch.equal(model(x).logits, base)
    with bank.use(["a", None, "b", "b"]):
        torch.testing.assert_close(model(x).logits[2], b[2])


def test_an_error_inside_a_forward_leaves_nothing_behind():
    _, model, bank = patched()
    x = prompts()
    base = model(x).logits
    with pytest.raises(ValueError, match="4 sequences"):
        model(x, expert_ids=bank.ids(["a", "b", None]))  # three ids, four rows
    with pytest.raises(IndexError, match="99"):
        model(x, expert_ids=torch.tensor([0, 1, 99, 0]))
    with pytest.raises(ValueError, match="int32"):
        model(x, expert_ids=torch.tensor([0.0, 1, 1, 0]))
    with pytest.raises(KeyError, match="'c'"):
        model(x, experts="c")
    with pytest.raises(IndexError):
        model(x + 1000, experts="a")  # a token that the vocabulary does not have
    with bank.use("a"), pytest.raises(ValueError, match="not both"):
        model(x, experts="a", expert_ids=bank.ids("a"))
    assert bank.routing.active is None
    assert torch.equal(model(x).logits, base)


def test_threads_with_different_experts():
    _, model, bank = patched()
    x = prompts()
    names = ["a", "b", None, {"a": 0.5, "b": 0.5}]
    want = [model(x, experts=n).logits for n in names]
    wrong = []

    def work(i):
        for _ in range(15):
            with torch.no_grad(), bank.use(names[i]):
                wrong.extend([i] * (not torch.equal(model(x).logits, want[i])))
            with torch.no_grad():
                wrong.extend([i] * (not torch.equal(model(x, experts=names[i]).logits, want[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("form", FORMS)
def test_compiles_in_one_graph_for_all_ids(form):
    _, model, bank = patched(form=form)
    x = prompts()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (["a", None, "b", "a"], ["b", "b", "b", "b"], [None, "a", "a", "b"]):
            ids = bank.ids(rows)
            torch.testing.assert_close(
                compiled(x, expert_ids=ids, use_cache=False).logits, model(x, expert_ids=ids).logits, **CLOSE
            )
        bank.add("c", bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
        ids = bank.ids(["c", "c", None, "a"])
        torch.testing.assert_close(
            compiled(x, expert_ids=ids, use_cache=False).logits, model(x, expert_ids=ids).logits, **CLOSE
        )
    assert counter.frame_count == 1


def test_a_compiled_model_takes_names_and_gives_their_rows_back():
    """Dynamo failed over the registry of finalizers, of which the ids of a call are one."""
    torch.manual_seed(0)
    model, x = build("llama"), torch.randint(3, 60, (2, 5))
    bank = t2.patch_model(model, form="delta", rank=4, rows=8)
    for name in "ab":
        bank.add(name, bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for experts in (["a", "b"], ["b", None], [{"a": 0.5}, {"b": 0.3}], "a"):
            want = model(x, experts=experts, use_cache=False).logits
            torch.testing.assert_close(compiled(x, experts=experts, use_cache=False).logits, want, **CLOSE)
    gc.collect()
    bank.remove("a")
    bank.remove("b")


def compiled_generation(backend):
    """On a CPU `generate` compiles only if it is told to; otherwise a test with a static cache would prove nothing."""
    config = tf.CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return {"cache_implementation": "static", "compile_config": config}


@pytest.mark.parametrize("form", FORMS)
def test_static_cache_with_a_compiled_forward(form):
    _, model, bank = patched(form=form)
    x, plain = prompts(), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    compiled, graphs = compiled_generation("aot_eager") | plain, torch._dynamo.utils.counters["stats"]

    def same(rows):
        assert torch.equal(model.generate(x, experts=rows, **compiled), model.generate(x, experts=rows, **plain))

    for rows in (ROWS, [None, "b", "a", "a"], ["b"] * 4):
        same(rows)
    bank.add("c", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    same(["c", None, "a", "c"])
    assert graphs["unique_graphs"] == 1  # experts are values: another one, also a new one, is no other graph
    for name in ("a", "b", "c"):
        same(name)
    assert graphs["unique_graphs"] == 2  # one expert for all is an id without a dimension
    with bank.use("b"):
        assert torch.equal(model.generate(x, **compiled), model.generate(x, **plain))
    assert graphs["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("rows", [ROWS, "a"])
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_of_a_compiled_step_has_the_factors_in_place_and_the_ids_as_an_input(form, rows):
    """What torch calls static is read where it lies when a CUDA graph is replayed, and a graph is recorded again if it
    has moved. That is right for factors and tables, and wrong for ids."""
    _, model, bank = patched(form=form)
    names, inputs = ("Vt", "U", "scale"), []

    def inner(graph, examples, **options):
        inputs.extend((i in set(options["static_input_idxs"]), t) for i, t in enumerate(examples))
        return graph

    def backend(graph, examples):
        return torch._inductor.compile_fx.compile_fx(graph, examples, inner_compile=inner)

    ids = bank.ids(rows)
    model.generate(prompts(), expert_ids=ids, max_new_tokens=3, **compiled_generation(backend))
    moving = [t for static, t in inputs if not static]
    assert sum(t.dtype == ids.dtype and t.shape == ids.shape for t in moving) == 1
    numbers = sum(getattr(layer, n).numel() for layer, _ in bank.layers for n in names)
    assert sum(t.numel() for static, t in inputs if static) >= numbers
    assert sum(t.numel() for t in moving) < numbers / 10


def test_a_model_that_runs_inside_another_keeps_its_own_experts():
    _, outer, _ = patched()
    _, inner, other = patched()
    x, inside = prompts(), []
    want, of_inner = outer(x, experts=ROWS).logits, inner(x, experts="b").logits
    hook = outer.model.layers[0].register_forward_hook(lambda *_: inside.append(inner(x, experts="b").logits))
    torch.testing.assert_close(outer(x, experts=ROWS).logits, want)
    torch.testing.assert_close(inside.pop(), of_inner)
    other.routing.enter(inner)  # a forward that nobody ends
    torch.testing.assert_close(outer(x, experts=ROWS).logits, want)
    hook.remove()
    other.routing.leave(inner)


# --- gradient checkpointing


def gradients(model, bank, x, rows, between=None, checkpointing=False):
    """Gradients of the experts in training.

    between: the experts of another pass that comes before the backward, which then runs on another thread
    """
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    p = [q for n in bank.in_training for q in bank.trained_parameters(n).values()]
    for q in p:
        q.grad = None
    loss = model(x, experts=rows).logits.square().mean()
    if between is None:
        loss.backward()
    else:
        with bank.use(between):
            model(x)
            thread = threading.Thread(target=loss.backward)  # as autograd does on a GPU
            thread.start()
            thread.join()
    if checkpointing:
        model.gradient_checkpointing_disable()
    return [q.grad.clone() for q in p]


def start_training(bank, *names):
    for name in names:
        bank.start_training(name)
        with torch.no_grad():
            for p in bank.trained_parameters(name).values():
                p.normal_(std=0.3)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointed_gradients_belong_to_the_experts_of_the_forward(form):
    _, model, bank = patched(form=form)
    start_training(bank, "t", "u")
    x, rows = prompts(), ["t", "u", None, "a"]
    want = gradients(model, bank, x, rows)
    assert all(g.abs().max() > 0 for g in want)
    for between in (None, "a", "u"):
        for got, w in zip(gradients(model, bank, x, rows, between, True), want, strict=True):
            torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-6)


def test_checkpointing_that_was_on_before_patching_is_routed_too():
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bank = t2.patch_model(model, form="factored")
    start_training(bank, "t")
    x = prompts()
    model.train()
    model(x, experts=["t"] * 4).logits.square().mean().backward()  # outside of the route
    got = [p.grad.clone() for p in bank.trained_parameters("t").values()]
    model.gradient_checkpointing_disable()
    for g, w in zip(got, gradients(model, bank, x, ["t"] * 4), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    bank.stop_training("t")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    t2.unpatch_model(model)
    model.train().requires_grad_(True)(x).logits.sum().backward()


@pytest.mark.parametrize("change", [lambda p: p.data.add_(0.5), lambda p: p.data.copy_(p.data + 0.5)])
@pytest.mark.parametrize("parametrisation", ["raw", "sigmoid"])
def test_a_write_to_the_data_of_a_trained_parameter_is_seen_without_gradients(parametrisation, change):
    """As an EMA, DeepSpeed and hand-written optimisers do it: no version counter and no optimiser step tells of it."""
    _, model, bank = patched(form="factored")
    x, parameters = prompts(), bank.start_training("t", parametrisation)
    with torch.no_grad():
        before = model(x, experts="t").logits
        for i, p in enumerate(parameters):
            change(p)
            p.data[..., 0] += i  # so that a uniform shift of the sigmoid is not all
        after = model(x, experts="t").logits
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(after, model(x, experts="t").logits.detach(), **CLOSE)


# --- copies


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_whole_and_its_own(form, how):
    _, model, bank = patched(form=form)
    x, rows = prompts(), ["a", "b", None, "a"]
    want, base = model(x, experts=rows).logits, model(x).logits
    other = how(model)
    assert isinstance(other, tf.LlamaForCausalLM)
    assert torch.equal(other(x, experts=rows).logits, want)
    assert other.t2_bank is not bank
    # The copy runs its own weights and tables, and changes to it stay with it.
    other.t2_bank.add("a", bank["b"], replace=True)
    torch.testing.assert_close(other(x, experts="a").logits, model(x, experts="b").logits, **CLOSE)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    torch.testing.assert_close(other(x).logits, 2 * base, **CLOSE)
    assert torch.equal(model(x, experts=rows).logits, want)
    with bank.use("a"):
        assert other.t2_bank.routing.active is None
    assert other.generate(x, experts=["b"] * 4, max_new_tokens=3, do_sample=False).shape == (4, 9)


def test_a_replaced_forward_is_still_routed():
    """Some trainers put a function of their own in the place of model.forward and call the backbone from it."""
    _, model, _ = patched()
    x = prompts()
    want = model(x, experts=ROWS).logits

    def forward(input_ids, **kwargs):
        assert "expert_ids" not in kwargs
        return model.lm_head(model.model(input_ids).last_hidden_state)

    model.forward = forward
    assert torch.equal(model(x, experts=ROWS), want)


# --- models that are not decoders of text alone


@pytest.mark.parametrize("form", FORMS)
def test_encoder_decoder(form):
    config = tf.T5Config(
        d_model=32,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        vocab_size=60,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    plain = tf.T5ForConditionalGeneration(config).eval()
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form=form)
    assert any("encoder" in n for n in bank.matrices)
    for name in "ab":
        bank.add(name, bank.expert({n: 1 + 0.6 * torch.randn(k) for n, k in bank.matrices.items()}))
    x, y = prompts(), prompts(4, 3)
    merged = {n: t2.unpatch_model(copy.deepcopy(model), n) for n in "ab"} | {None: plain}
    rows = ["a", None, "b", "a"]
    got = model(input_ids=x, decoder_input_ids=y, experts=rows).logits
    for i, r in enumerate(rows):
        torch.testing.assert_close(got[i], merged[r](input_ids=x, decoder_input_ids=y).logits[i], rtol=1e-3, atol=1e-3)
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        together = model.generate(x, experts=rows, **options)
        for i, r in enumerate(rows):
            assert torch.equal(together[i : i + 1], merged[r].generate(x[i : i + 1], **options))


def test_vision_tower_and_projector_are_left_alone():
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
        ),
        vision_config=tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        ),
        image_token_id=59,
        image_seq_length=4,
        vision_feature_select_strategy="default",
    )
    plain = tf.LlavaForConditionalGeneration(config).eval()
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form="delta")
    assert len(bank.matrices) == 7
    assert not any("vision" in n or "projector" in n for n in bank.matrices)
    bank.add("a", bank.expert({n: 1 + 0.6 * torch.randn(k) for n, k in bank.matrices.items()}))
    x = torch.randint(3, 50, (2, 9))
    x[:, 1:5] = 59
    inputs = {"input_ids": x, "pixel_values": torch.randn(2, 3, 8, 8)}
    got = model(**inputs, experts=["a", None]).logits
    merged = t2.unpatch_model(copy.deepcopy(model), "a")
    torch.testing.assert_close(got[0], merged(**inputs).logits[0], **CLOSE)
    assert torch.equal(got[1], plain(**inputs).logits[1])
