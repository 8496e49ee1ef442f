"""What is trained and added up is fp32, and gradients that cannot be right are refused."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels.experts.trainables import GradientError
from t2kernels.layers import moe, private
from t2kernels.layers.private import UnsupportedVersionError
from t2kernels.layers.routing import recompute
from t2kernels.layers.scale import z_from_logits
from tests.helpers.families import build

X = torch.arange(3, 15).reshape(2, 6)


@pytest.mark.parametrize("sigma", [[0.0, 0.0, 0.0], [1e-40, 1e-41, 0.0], [3e38, 3e38, 1.0], [1e-30, 1.0, 0.0]])
def test_the_sigmoid_form_keeps_the_trace_of_every_matrix(sigma):
    sigma, p = torch.tensor(sigma), torch.randn(3, requires_grad=True)
    z = z_from_logits(p, sigma)
    (z * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert z.isfinite().all()
    assert p.grad.isfinite().all()
    exact, m = sigma.double(), torch.sigmoid(p.detach().double())
    want = torch.ones(3).double() if exact.sum() == 0 else m * exact.sum() / (exact * m).sum()
    torch.testing.assert_close(z.detach().double(), want, rtol=1e-5, atol=1e-7)


def test_a_matrix_of_zeros_in_training():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    bank = t2.patch_model(model, form="factored")
    bank.start_training("t", "sigmoid")
    with bank.use("t"):
        loss = model(X).logits.square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in bank.trained_parameters("t").values())
    assert any(p.grad.any() for p in bank.trained_parameters("t").values())
    expert = bank.stop_training("t")
    assert all(z.isfinite().all() for z in expert.z.values())


def settings():
    @contextlib.contextmanager
    def default(dtype):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    yield pytest.param(lambda m: m, contextlib.nullcontext, id="fp32")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        name = str(dtype).removeprefix("torch.")
        yield pytest.param(lambda m, d=dtype: m.to(d), contextlib.nullcontext, id=f"model in {name}")
        yield pytest.param(lambda m: m, lambda d=dtype: default(d), id=f"default dtype {name}")
    for dtype in (torch.bfloat16, torch.float16):
        yield pytest.param(lambda m: m, lambda d=dtype: torch.autocast("cpu", d), id=f"autocast {dtype}")
    yield pytest.param(lambda m: m, lambda: torch.device("meta"), id="default device meta")


@pytest.mark.parametrize("form", ["factored", "delta"])
@pytest.mark.parametrize("cast, around", settings())
def test_everything_that_is_trained_is_fp32(form, cast, around):
    model = build("llama")
    bank = t2.patch_model(model, form=form)
    x = X.clone()
    with around():
        bank.start_training("t")
        cast(model)
        parameters = list(bank.trained_parameters("t").values())
        optimiser = torch.optim.Adam(parameters, lr=0.01)
        loss = model(x, experts="t").logits.float().square().mean()
        loss.backward()
        optimiser.step()
    assert {p.dtype for p in parameters} == {torch.float32}
    assert {p.device.type for p in parameters} == {"cpu"}
    assert {p.grad.dtype for p in parameters} == {torch.float32}
    assert {s[key].dtype for s in optimiser.state.values() for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert {layer.scale.dtype for layer, _ in bank.layers} == {layer.sigma.dtype for layer, _ in bank.layers}
    assert {layer.scale.dtype for layer, _ in bank.layers} == {torch.float32}
    assert all(p.grad.any() for p in parameters)
    expert = bank.stop_training("t")
    assert {z.dtype for z in expert.z.values()} == {torch.float32}


class Cut(nn.Linear):
    """A layer in another format whose op has no backward, as torchao's dynamically quantised ones."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        self.weight = nn.Parameter(dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return (x.detach() @ self.weight.to(x.dtype).t()) + 0 * x.sum(-1, keepdim=True)


def test_training_on_a_base_without_a_backward_is_refused_by_name():
    model = build("llama")
    mlp, factors = model.model.layers[1].mlp, t2.decompose(model)
    mlp.up_proj = Cut(mlp.up_proj)
    bank = t2.patch_model(model, form="delta", factors=factors)
    bank.add("a", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    assert model(X, experts="a").logits.isfinite().all()  # it serves
    with pytest.raises(GradientError, match=r"layers.1.mlp.up_proj \(Cut\).*gradient of its input is zero"):
        bank.start_training("t")
    assert "t" not in bank
    assert not bank.in_training


def test_torchao_and_the_same_base_in_another_format():
    q = pytest.importorskip("torchao.quantization")
    for config, right in ((q.Int8WeightOnlyConfig(), True), (q.Int8DynamicActivationInt8WeightConfig(), False)):
        model = build("llama").to(torch.bfloat16)
        factors = t2.decompose(model)
        q.quantize_(model.model.layers, config)
        bank = t2.patch_model(model, form="delta", factors=factors)
        with contextlib.nullcontext() if right else pytest.raises(GradientError, match="q_proj"):
            bank.start_training("t")


def test_a_model_that_was_patched_in_inference_mode_can_be_trained():
    model = build("llama")
    with torch.inference_mode():
        bank = t2.patch_model(model, form="factored")
        bank.add("a", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
        model(X, experts="a")
        bank.start_training("t")
    model(X, experts=["t", "a"]).logits.square().mean().backward()
    assert all(p.grad.any() for p in bank.trained_parameters("t").values())


@pytest.mark.parametrize(
    "owner, name", [(torch._C, "_current_autograd_node"), (torch._C._autograd, "_get_sequence_nr")]
)
def test_private_names_of_torch_are_looked_for_when_a_model_is_patched(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)
    with pytest.raises(UnsupportedVersionError, match=rf"torch .*{name} is expected"):
        t2.patch_model(build("llama"))


def test_private_names_of_transformers_are_looked_for_in_mixtures_of_experts(monkeypatch):
    from tests.helpers.families import MOE_FAMILIES

    model = build(MOE_FAMILIES[0])
    stack = next(m for m in model.modules() if hasattr(m, "_apply_gate"))
    owner = next(c for c in type(stack).__mro__ if "_apply_gate" in vars(c))
    monkeypatch.delattr(owner, "_apply_gate")
    with pytest.raises(UnsupportedVersionError, match=r"transformers .*_apply_gate is expected"):
        t2.patch_model(model, form="delta")


def test_require_names_the_parameters():
    with pytest.raises(UnsupportedVersionError, match="its parameters are none"):
        private.require(recompute, "backward_pass", "a reason", ("graph",))
    private.require(recompute, "backward_pass", "a reason")


FORMS = pytest.mark.parametrize("form", ["factored", "delta"])


def patched(form):
    model = build("llama")
    bank = t2.patch_model(model, form=form)
    bank.add("a", random_expert(bank))
    return model, bank


def random_expert(bank):
    return bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()})


def trains(model, bank, **routing):
    model(X, **(routing or {"experts": "t"})).logits.square().mean().backward()
    return all(p.grad is not None and p.grad.any() for p in bank.trained_parameters("t").values())


@FORMS
def test_ids_that_inference_mode_made_can_be_trained_with(form):
    model, bank = patched(form)
    bank.start_training("t")
    row = bank.ids("t").item()
    with torch.inference_mode():
        ids, own, scope = bank.ids(["t", "a"]), torch.tensor([row, 0], dtype=torch.int32), bank.use("t")
    assert trains(model, bank, expert_ids=ids)
    assert trains(model, bank, expert_ids=own)
    with scope:
        model(X).logits.sum().backward()
    with torch.inference_mode():
        bank.default = "t"
    model(X).logits.sum().backward()


@FORMS
def test_tables_that_are_laid_out_again_in_inference_mode_can_be_trained(form):
    model, bank = patched(form)
    for layer, _ in bank.layers:
        layer.scale, layer.Vt = layer.scale.clone(), layer.Vt.clone()  # as after a move to another device
    with torch.inference_mode():
        bank.add("b", random_expert(bank))
        model(X, experts="b")
    assert not any(t.is_inference() for layer, _ in bank.layers for t in layer.buffers())
    bank.add("c", random_expert(bank))
    bank.start_training("t")
    assert trains(model, bank)


@FORMS
def test_weights_that_inference_mode_made_are_named(form):
    with torch.inference_mode():
        model = build("llama")
    bank = t2.patch_model(model, form=form)
    with pytest.raises(
        GradientError, match=r"model\.embed_tokens\.weight was made, or moved, under torch.inference_mode"
    ):
        bank.start_training("t")


@FORMS
@pytest.mark.parametrize("inside", [True, False])
def test_weights_that_inference_mode_made_and_that_require_gradients_are_patched(form, inside):
    plain = build("llama")
    with torch.inference_mode():
        model = copy.deepcopy(plain).requires_grad_(True)
        want = plain(X).logits
    with torch.inference_mode(inside):
        bank = t2.patch_model(model, form=form)
        bank.add("a", random_expert(bank))
    with torch.no_grad():
        torch.testing.assert_close(model(X).logits, want, atol=1e-5, rtol=1e-5)
        asked = model(X, experts="a").logits
        assert (asked - want).abs().max() > 1e-2
    with torch.inference_mode(inside):
        t2.unpatch_model(model, expert="a")
    with torch.no_grad():
        torch.testing.assert_close(model(X).logits, asked, atol=1e-5, rtol=1e-5)


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_of_an_unknown_class_is_asked_for_its_gradient(copied):
    model = build("llama")
    for block in model.model.layers:
        block.self_attn.v_proj.__class__ = Detached
    t2.patch_model(model, form="delta")
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(
        GradientError, match=r"v_proj \(Detached\) cannot be trained through: its output has no gradient"
    ):
        model.t2_bank.start_training("t")


def test_a_quantised_stack_of_a_mixture_of_experts_is_asked_for_its_gradient(monkeypatch):
    model = build("mixtral")
    bank = t2.patch_model(model, form="delta")
    bank.start_training("t")  # torch knows the backward of a plain stack
    bank.stop_training("t")
    linear = nn.functional.linear
    monkeypatch.setattr(moe, "is_plain", lambda weights: False)
    bank.start_training("u")
    monkeypatch.setattr(nn.functional, "linear", lambda x, W, b=None: linear(x.detach(), W, b))
    with pytest.raises(GradientError, match="its output has no gradient"):
        bank.start_training("v")


def test_asking_for_gradients_leaves_other_threads_their_experts():
    """A hook that is taken off for a moment would answer another thread as the base model."""
    model = build("llama")
    layer, seen = model.model.layers[0].self_attn.v_proj, []
    layer.__class__ = type(
        "Watched", (nn.Linear,), {"forward": lambda s, x: seen.append(len(s._forward_hooks)) or x[..., :16]}
    )
    bank = t2.patch_model(model, form="delta", targets="v_proj")
    before, seen[:] = len(layer._forward_hooks), []
    with contextlib.suppress(GradientError):
        bank.start_training("t")
    assert seen
    assert set(seen) == {before}


@FORMS
@pytest.mark.parametrize("setting", ["autocast bf16", "autocast fp16", "medium"])
def test_factors_and_merged_weights_are_exact_under_every_setting(form, setting):
    model = build("llama")
    dense = copy.deepcopy(model)
    want = t2.decompose(dense)
    bank = t2.patch_model(model, form=form)
    expert = random_expert(bank)
    bank.add("a", expert)
    logits = model(X, experts="a").logits
    kinds = {"autocast bf16": torch.bfloat16, "autocast fp16": torch.float16}
    try:
        torch.set_float32_matmul_precision("medium" if setting == "medium" else "highest")
        with torch.autocast("cpu", kinds[setting]) if setting in kinds else contextlib.nullcontext():
            factors = t2.decompose(dense)
            assert dict(factors.fingerprints) == dict(want.fingerprints)
            for name in want:
                torch.testing.assert_close(factors.sketches[name], want.sketches[name], rtol=1e-5, atol=1e-5)
            other = t2.patch_model(dense, form=form, factors=factors)
            other.add("a", expert)
            t2.unpatch_model(dense, expert="a")
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(dense(X).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["is_transposed", "has_gate", "has_bias", "_is_expert_parallel", "num_experts"])
def test_a_mixture_of_experts_without_a_known_name_is_refused(name):
    model = build("mixtral")
    for stack in [m for m in model.modules() if hasattr(m, "_apply_gate")]:
        delattr(stack, name)
    with pytest.raises(UnsupportedVersionError, match=rf"{name} is expected"):
        t2.patch_model(model, form="delta")


@pytest.mark.parametrize("name", ["_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"])
def test_the_dictionaries_of_hooks_are_looked_for(name):
    model = build("llama")
    delattr(model, name)
    with pytest.raises(UnsupportedVersionError, match=rf"{name} is expected"):
        t2.patch_model(model)


@pytest.mark.parametrize("name", ["_apply", "_save_to_state_dict", "_load_from_state_dict"])
def test_the_methods_of_modules_that_layers_override_are_looked_for(monkeypatch, name):
    model = build("llama")
    monkeypatch.delattr(nn.Module, name)
    with pytest.raises(UnsupportedVersionError, match=rf"{name}\(.*is expected"):
        t2.patch_model(model)
