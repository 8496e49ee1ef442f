"""What is patched, what is refused, and that the model underneath stays what it was."""

import copy
import inspect

import pytest
import torch
import transformers as tf
from torch import nn

import t2kernels as t2
from t2kernels.factors.matrices import find_matrices
from t2kernels.layers import swiglu
from t2kernels.layers.factored_linear import FactoredLinear
from t2kernels.patching import model_hooks
from tests.helpers.families import build


def draw(bank, size=0.4):
    return bank.expert({n: 1 + size * torch.randn(k) for n, k in bank.matrices.items()})


def prompts():
    return torch.randint(3, 60, (2, 6))


def leaves(bank):
    return {n.rpartition(".")[2] for n in bank.matrices}


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("all", ATTENTION | MLP),
        ("mlp", MLP),
        ("attention", ATTENTION),
        (r"(q|v)_proj", {"q_proj", "v_proj"}),
        (["q_proj", "down_proj"], {"q_proj", "down_proj"}),
        (lambda name, module: module.out_features == 48, {"gate_proj", "up_proj"}),
        (r"layers\.1\..*o_proj", {"o_proj"}),
        ("lm_head", {"lm_head"}),  # not among the usual ones, so it has to be asked for
    ],
)
def test_targets(targets, want):
    bank = t2.patch_model(build("llama"), targets=targets)
    assert leaves(bank) == want


def test_targets_that_select_nothing_or_cut_a_tie():
    with pytest.raises(ValueError, match=r"selects no matrix of LlamaForCausalLM; it has model\.layers\.0"):
        t2.patch_model(build("llama"), targets="c_attn")
    with pytest.raises(ValueError, match="valid regular expression"):
        t2.patch_model(build("llama"), targets="(")
    tied = tf.AutoModelForCausalLM.from_config(
        tf.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=60,
            tie_word_embeddings=True,
        )
    )
    with pytest.raises(ValueError, match="tied to the input embedding"):
        t2.patch_model(tied, targets="lm_head")
    t2.patch_model(tied, form="factored")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_matrices_are_in_model_order_and_ranks_resolve():
    plain = build("llama")
    names = list(find_matrices(plain))
    assert names == [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert list(t2.patch_model(copy.deepcopy(plain)).matrices) == names
    assert set(t2.patch_model(copy.deepcopy(plain), rank=1 / 16).matrices.values()) == {1, 2}  # of 16 and 32
    assert set(t2.patch_model(copy.deepcopy(plain), rank=5).matrices.values()) == {5}
    for bad in (0, -1, 1.5, 0.0, "8", True):
        with pytest.raises(ValueError, match="rank"):
            t2.patch_model(copy.deepcopy(plain), rank=bad)
    with pytest.raises(ValueError, match="form='sparse'"):
        t2.patch_model(plain, form="sparse")
    with pytest.raises(ValueError, match="at least 2"):
        t2.patch_model(plain, rows=1)
    t2.patch_model(plain)  # nothing of the failed attempts is left
    with pytest.raises(ValueError, match="patched already"):
        t2.patch_model(plain)
    with pytest.raises(ValueError, match="not patched"):
        t2.unpatch_model(build("llama"))


def test_auto_takes_the_form_that_reads_less_and_says_so():
    bank = t2.patch_model(build("llama"))
    assert {f for f, _ in bank.plan.values()} == {"factored"}
    assert "14 factored (reads less than delta); reads 1.73x the dense layers" in repr(bank)
    bank = t2.patch_model(build("llama"), rank=4)
    assert {f for f, _ in bank.plan.values()} == {"delta"}
    # k (M + N) summed: 4 (2 * 64 + 2 * 48 + 3 * 80) = 1856 beside 7680 dense numbers a layer
    assert "reads 1.24x the dense layers" in repr(bank)


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_saves_and_loads_as_the_base_model(form, tmp_path):
    for family in ("llama", "gpt2", "qwen2", "qwen3_moe"):
        plain = build(family)
        model = copy.deepcopy(plain)
        bank = t2.patch_model(model, form="auto" if form == "factored" else form)
        bank.add("a", draw(bank))
        assert model.state_dict().keys() == plain.state_dict().keys()
        model.save_pretrained(tmp_path / family)
        again, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path / family, output_loading_info=True)
        assert not any(info.values()), info
        x = prompts()
        with torch.no_grad():
            want, got = plain(x).logits, again(x).logits
        if form == "delta":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert again.config.architectures == [type(plain).__name__]


def test_loading_weights_into_a_patched_model():
    plain, other = build("llama"), build("llama")
    delta, factored = copy.deepcopy(plain), copy.deepcopy(plain)
    t2.patch_model(delta, form="delta")
    t2.patch_model(factored, form="factored")
    delta.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="unpatch_model"):
        factored.load_state_dict(other.state_dict())


def test_delta_form_adds_k_times_m_plus_n_numbers_and_touches_nothing():
    plain = build("llama")
    model = copy.deepcopy(plain)
    weights = {n: p.data_ptr() for n, p in model.named_parameters()}
    k, rows = 4, 3
    bank = t2.patch_model(model, rank=k, form="delta", rows=rows)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == weights
    added = sum(b.numel() for n, b in model.named_buffers() if ".svf." in n)
    sizes = [m.shape for m in find_matrices(plain).values()]
    assert added == sum(k * (m + n) for m, n in sizes) + len(sizes) * k * (1 + rows)  # and sigma, and the table
    assert len(bank.matrices) == len(sizes)
    # The same modules of the same classes, except the MLPs, which got a subclass (tests/layers/test_swiglu.py).
    kept = [
        getattr(type(m), "made_from", (None, type(m)))[1] for n, m in model.named_modules() if n and ".svf" not in n
    ]
    assert kept == [type(m) for n, m in plain.named_modules() if n]


def test_factored_form_drops_each_weight_before_the_next_is_factored():
    model = build("llama")
    held = []

    def watch(name, done, total):
        dense = sum(
            1 for m in find_matrices(model).values() if isinstance(getattr(m.module, "weight", None), nn.Parameter)
        )
        held.append(dense + sum(isinstance(m, FactoredLinear) for m in model.modules()))
        assert (done, total) == (len(held), 14)

    t2.patch_model(model, form="factored", progress=watch)
    assert held == [14] * 14  # every matrix once: dense, or in factors


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_a_patch_that_fails_half_way_is_undone(form):
    plain = build("llama")
    model = copy.deepcopy(plain)

    def stop(name, done, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        t2.patch_model(model, form=form, progress=stop)
    x = prompts()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    if form == "delta":
        assert torch.equal(model(x).logits, plain(x).logits)
    else:
        torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)
    t2.patch_model(model, form=form)


@pytest.mark.parametrize("form", ["delta", "factored"])
def test_a_patch_that_fails_at_its_end_is_undone(form, monkeypatch):
    plain = build("llama")

    def same(model):
        assert not hasattr(model, "t2_bank")
        assert not hasattr(model.model, "t2_bank")
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert hooks(model) == before
        torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)

    def hooks(model):
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    x, model = prompts(), copy.deepcopy(plain)
    before = hooks(model)
    for name, parameters in (("_no_such_method", ("x",)), ("_validate_model_kwargs", ("model_kwargs", "renamed"))):
        monkeypatch.setattr(model_hooks, "OVERRIDDEN", {name: ("a reason", parameters)})
        with pytest.raises(RuntimeError, match=rf"LlamaForCausalLM.{name}.* is expected \(a reason\), but"):
            t2.patch_model(model, form=form)
        same(model)
        monkeypatch.undo()

    def broken(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(swiglu, "install", broken)
    with pytest.raises(KeyboardInterrupt):
        t2.patch_model(model, form=form)
    same(model)


def test_the_private_methods_that_are_overridden_are_the_known_ones():
    """A method of another name would be overridden by nobody, one with other parameters be given the wrong ones."""
    own = [n for n in vars(model_hooks.PatchedModel) if n.startswith("_") and not n.startswith("__")]
    assert sorted(own) == sorted(model_hooks.OVERRIDDEN)
    parameters = {n: list(inspect.signature(getattr(tf.LlamaForCausalLM, n)).parameters)[1:] for n in own}
    assert parameters["_validate_model_kwargs"] == ["model_kwargs"]
    assert {"assistant_model", "model_kwargs"} <= set(parameters["_get_candidate_generator"])


# --- what is refused, by name


def test_meta_and_offloaded_weights_are_refused_by_name(tmp_path):
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is on the meta device"):
        t2.patch_model(model)
    from accelerate import cpu_offload, disk_offload

    for offload in (cpu_offload, lambda m: disk_offload(m, tmp_path)):
        model = build("llama")
        offload(model)
        for form in ("delta", "factored"):
            with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is offloaded"):
                t2.patch_model(model, form=form)


def test_a_damaged_weight_is_refused_by_name():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN"):
        t2.patch_model(model)
    assert not any(hasattr(m, "svf") for m in model.modules())


def test_factored_form_of_a_mixture_of_experts_stack_is_refused():
    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj\.0: mixture-of-experts stacks are patched in delta form"
    ):
        t2.patch_model(build("mixtral"), form="factored")
    with pytest.raises(ValueError, match="all weights of a mixture-of-experts stack, or none; 1 were selected"):
        t2.patch_model(build("mixtral"), targets=r"layers.0.mlp.experts.down_proj.1$")


# --- factors from elsewhere


def test_factors_are_checked_against_the_weights():
    plain, other = build("llama"), build("llama")
    factors = t2.decompose(plain)
    for form in ("delta", "factored"):
        bank = t2.patch_model(copy.deepcopy(plain), factors=factors, form=form)
        assert bank.origin.fingerprints == dict(factors.fingerprints)
    with pytest.raises(ValueError, match=r"q_proj: these factors are of other weights"):
        t2.patch_model(other, factors=factors)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=r"up_proj is \[48, 32\], its factors are of \[32, 48\]"):
        t2.patch_model(copy.deepcopy(plain), targets=name, factors={name: factors["model.layers.0.mlp.down_proj"]})
    with pytest.raises(ValueError, match="has no factors"):
        t2.patch_model(copy.deepcopy(plain), factors=t2.decompose(plain, targets="mlp"))
    with pytest.raises(ValueError, match="the factors hold 4 components, factored form needs"):
        t2.patch_model(copy.deepcopy(plain), factors=factors.cut(4), form="factored")
    t2.patch_model(copy.deepcopy(plain), factors=factors.cut(4), rank=4)


def test_an_expert_fits_the_same_weights_decomposed_again(tmp_path):
    plain = build("llama")
    saved = t2.patch_model(copy.deepcopy(plain), rank=8)
    expert = draw(saved)
    saved.add("a", expert)
    saved.save(tmp_path)
    rounded = copy.deepcopy(plain).double().float()
    for kw in ({"rank": 8}, {"form": "factored"}, {"factors": t2.decompose(plain)}):
        bank = t2.patch_model(copy.deepcopy(rounded), **kw)
        bank.add("a", tmp_path / "a")
    nudged = copy.deepcopy(plain)
    with torch.no_grad():
        for p in nudged.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p))
    with pytest.raises(t2.ExpertMismatch):
        t2.patch_model(nudged, rank=8).add("a", tmp_path / "a")


# --- bases in other formats


def quantise_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())
    return model


def quantise_bnb(model, bits):
    bnb = pytest.importorskip("bitsandbytes")
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and name != "lm_head":
            args = (m.in_features, m.out_features, m.bias is not None)
            new = (
                bnb.nn.Linear8bitLt(*args, has_fp16_weights=False)
                if bits == 8
                else bnb.nn.Linear4bit(*args, compute_dtype=torch.float32)
            )
            new.load_state_dict(m.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    return model.to("cpu")


FORMATS = {
    "torchao-int8": quantise_torchao,
    "bitsandbytes-int8": lambda m: quantise_bnb(m, 8),
    "bitsandbytes-nf4": lambda m: quantise_bnb(m, 4),
}


@pytest.mark.parametrize("fmt", list(FORMATS))
@pytest.mark.parametrize("source", ["checkpoint", "dequantised"])
def test_delta_form_over_a_quantised_base(fmt, source):
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=60
    )
    plain = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in plain.parameters():
        p.data.mul_(3)
    model = FORMATS[fmt](copy.deepcopy(plain))
    x = prompts()
    with torch.no_grad():
        before = model(x).logits
        assert not torch.equal(before, plain(x).logits)  # it is quantised
        factors = t2.decompose(plain, rank=16) if source == "checkpoint" else None
        bank = t2.patch_model(model, rank=16, factors=factors)
        assert {f for f, _ in bank.plan.values()} == {"delta"}
        assert torch.equal(model(x).logits, before)
        bank.add("a", draw(bank))
        got = model(x, experts=["a", None]).logits
        assert torch.equal(got[1], before[1])
        # The same change added by hand to the output of every quantised layer.
        by_hand, hooks = FORMATS[fmt](copy.deepcopy(plain)), []
        for name, m in find_matrices(plain).items():
            f = factors[name] if factors is not None else None
            W = m.read().double() if factors is not None else find_matrices(by_hand)[name].read().double()
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            z = bank["a"].z[name].double()
            dW = (U[:, :16] * (S[:16] * (z - 1))) @ Vh[:16]
            assert f is None or f.sigma.shape == (16,)
            hooks.append(
                by_hand.get_submodule(name).register_forward_hook(
                    lambda mod, a, y, dW=dW: y + (a[0].double() @ dW.t()).to(y.dtype)
                )
            )
        want = by_hand(x).logits
    scale = (want[0] - before[0]).abs().max()
    assert scale > 0.1
    assert (got[0] - want[0]).abs().max() < 2e-3 * scale
    with pytest.raises(ValueError, match=r"q_proj is quantised"):
        t2.unpatch_model(model, expert="a")
    t2.unpatch_model(model)
    assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_factored_form_of_a_quantised_base_is_refused_by_name(fmt):
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=60
    )
    model = FORMATS[fmt](tf.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is quantised"):
        t2.patch_model(model, form="factored")


# --- beside other adapters


def test_lora_of_peft_on_top_of_the_delta_form():
    peft = pytest.importorskip("peft")
    plain = build("llama")
    model = copy.deepcopy(plain)
    bank = t2.patch_model(model, form="delta")
    bank.add("a", draw(bank))
    x = prompts()
    want = model(x, experts=["a", None]).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    torch.testing.assert_close(lora(x, experts=["a", None]).logits, want)
    with torch.no_grad():
        for n, p in lora.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    with_both = lora(x, experts=["a", None]).logits
    assert not torch.allclose(with_both, want, atol=1e-2)
    out = lora.generate(input_ids=x, experts=["a", None], max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 9)
    with lora.disable_adapter():
        torch.testing.assert_close(lora(x, experts=["a", None]).logits, want)
    # And the other way round: the small matrices of another adapter are not factored.
    other = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=4))
    assert not any("lora" in n for n in find_matrices(other))
