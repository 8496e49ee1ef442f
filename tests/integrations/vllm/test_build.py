"""From a loaded model to a bank, and the hooks themselves, on stand-ins for vLLM's modules."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import t2kernels as t2
from t2kernels.factors.factor import svd
from t2kernels.integrations.vllm import hooks
from t2kernels.integrations.vllm.engine import check
from t2kernels.integrations.vllm.engine.build import build_delta, checkpoint_names
from t2kernels.integrations.vllm.settings import KEY, Settings

H, F = 24, 40
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SIZES = {
    "self_attn.qkv_proj": ("QKVParallelLinear", H, [H, H // 2, H // 2]),
    "self_attn.o_proj": ("RowParallelLinear", H, [H]),
    "mlp.gate_up_proj": ("MergedColumnParallelLinear", H, [F, F]),
    "mlp.down_proj": ("RowParallelLinear", F, [H]),
}


class LinearBase(nn.Module):
    def forward(self, x):
        return self.quant_method.apply(self, x, None)


class UnquantizedLinearMethod:
    def apply(self, layer, x, bias=None):
        return x @ layer.weight.t()


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    linear = ModuleType("vllm.model_executor.layers.linear")
    linear.LinearBase, linear.UnquantizedLinearMethod = LinearBase, UnquantizedLinearMethod
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, linear.__name__, linear)


def model_and_weights(prefix="model"):
    """A model of merged layers, and {matrix: W} by the names of its checkpoint."""
    model, weights = nn.Module(), {}
    model.packed_modules_mapping = PACKED
    for i in range(2):
        for place, (kind, n, sizes) in SIZES.items():
            path = f"{prefix}.layers.{i}.{place}"
            parent, leaf = model, path.split(".")
            for part in leaf[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            layer = type(kind, (LinearBase,), {})()
            layer.tp_rank, layer.tp_size, layer.input_size, layer.num_kv_head_replicas = 0, 1, n, 1
            layer.output_size, layer.output_partition_sizes = sum(sizes), sizes
            layer.weight = nn.Parameter(torch.randn(sum(sizes), n), requires_grad=False)
            layer.quant_method = UnquantizedLinearMethod()
            parent.add_module(leaf[-1], layer)
            names = PACKED.get(leaf[-1], [leaf[-1]])
            for name, W in zip(names, layer.weight.split(sizes), strict=True):
                weights[path.rpartition(".")[0] + "." + name] = W
    return model, weights


def build(model, factors, rank=None, rows=3, **settings):
    token_rows = torch.zeros(8, dtype=torch.int32)
    bank = build_delta(model, factors, Settings("somewhere", rank, **settings), rows, token_rows, torch.float32)
    return bank, token_rows


def test_every_layer_answers_with_the_experts_of_its_tokens():
    model, weights = model_and_weights()
    factors = t2.Factors({n: svd(W) for n, W in weights.items()})
    before = {n: m.quant_method for n, m in model.named_modules() if isinstance(m, LinearBase)}
    bank, token_rows = build(model, factors)
    assert list(bank.matrices) == list(weights)
    experts = {
        e: t2.Expert.trained_on(factors, {n: 1 + 0.5 * torch.randn(r) for n, r in factors.ranks.items()})
        for e in ("a", "b")
    }
    for name, expert in experts.items():
        bank.add(name, expert)
    token_rows[:6] = torch.tensor(bank.pin(["a", None, "b", "a", "b", "b"]))
    who = ["a", None, "b", "a", "b", "b"]
    for path, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        assert type(layer.quant_method) is type(before[path])
        x = torch.randn(6, layer.input_size)
        parent, _, leaf = path.rpartition(".")
        for t, name in enumerate(who):
            dense = []
            for n in PACKED.get(leaf, [leaf]):
                n = f"{parent}.{n}"
                dense.append(weights[n] if name is None else factors[n].dense(experts[name].z[n]))
            torch.testing.assert_close(layer(x)[t], torch.cat(dense) @ x[t], rtol=1e-4, atol=1e-4)


def test_a_rank_leaves_out_what_lies_behind_it():
    model, weights = model_and_weights()
    factors = t2.Factors({n: svd(W) for n, W in weights.items()})
    bank, _ = build(model, factors, rank=4)
    assert set(bank.matrices.values()) == {4}
    whole = t2.Expert.trained_on(factors, {n: torch.full((r,), 1.5) for n, r in factors.ranks.items()})
    with pytest.raises(ValueError, match="would be lost"):
        bank.add("whole", whole)
    bank.add("cut", whole.truncate(4))


def test_some_matrices_only():
    model, weights = model_and_weights()
    chosen = [n for n in weights if n.endswith(("q_proj", "v_proj", "down_proj"))]
    bank, _ = build(model, t2.Factors({n: svd(weights[n]) for n in chosen}))
    assert list(bank.matrices) == chosen
    layer = model.get_submodule("model.layers.0.mlp.gate_up_proj")
    assert not hasattr(layer, "svf")


def test_factors_that_do_not_fit_stop_the_engine():
    def refused(match, change=lambda factors: factors, **settings):
        model, weights = model_and_weights()
        with pytest.raises(ValueError, match=match):
            build(model, t2.Factors(change({n: svd(W) for n, W in weights.items()})), **settings)

    refused(
        "2 matrices of the factors at somewhere are not linear layers",
        lambda f: {**f, "model.layers.2.x": f.popitem()[1], "y": svd(torch.eye(3))},
    )
    refused(
        r"\[24, 24\], the model has \[12, 24\]",
        lambda f: {n: f["model.layers.0.self_attn.q_proj"] if "k_proj" in n else v for n, v in f.items()},
    )
    refused("of other weights", lambda f: {n: svd(torch.randn(v.U.shape[0], v.V.shape[0])) for n, v in f.items()})
    refused("not those that the engine was configured with", fingerprint="0" * 64)
    refused("none at all", lambda f: {"layers.0.mlp.experts.up_proj.0": svd(torch.eye(3))})


def test_names_that_vllm_changes():
    class Mapper:
        def get_rename_mapper(self):
            return self

        def map_name(self, name):
            return name.replace("model.language_model.", "language_model.model.")

    model, weights = model_and_weights("language_model.model")
    model.hf_to_vllm_mapper = Mapper()
    factors = t2.Factors(
        {n.replace("language_model.model.", "model.language_model."): svd(W) for n, W in weights.items()}
    )
    assert checkpoint_names(model, factors).keys() == weights.keys()
    bank, _ = build(model, factors)
    assert list(bank.matrices) == list(factors)  # experts are named by their checkpoint


# --- hooks


def engine(**settings):
    given = {KEY: settings} if settings else {}
    return SimpleNamespace(additional_config=given, model_config=SimpleNamespace(quantization=None, model="somewhere"))


def test_other_engines_get_vllms_own_manager(monkeypatch):
    mixin = SimpleNamespace(LRUCacheWorkerLoRAManager=lambda *args, **kwargs: ("its own", args, kwargs))
    hooks._hook_manager(mixin)
    hooked = mixin.LRUCacheWorkerLoRAManager
    hooks._hook_manager(mixin)
    assert mixin.LRUCacheWorkerLoRAManager is hooked
    config = engine()
    assert hooked(config, "cpu", {}, more=1) == ("its own", (config, "cpu", {}), {"more": 1})
    checked = []
    monkeypatch.setattr(
        "t2kernels.integrations.vllm.engine.engine_manager.check_hooks", lambda: checked.append("hooks")
    )
    monkeypatch.setattr(
        "t2kernels.integrations.vllm.engine.engine_manager.refuse", lambda config: checked.append(config)
    )
    config = engine(factors="x")
    assert hooked(config, "cpu", {}).settings == Settings("x")
    assert checked == ["hooks", config]


def test_requests_are_checked_where_they_come_in(monkeypatch):
    seen = []

    class Processor:
        def __init__(self, config):
            self.vllm_config = config

        def _validate_lora(self, request):
            seen.append(("vllm", request))

    hooks._hook_validation(Processor)
    hooks._hook_validation(Processor)
    monkeypatch.setattr(check, "check_request", lambda config, request: seen.append(("experts", request)))
    for config, request in ((engine(), 1), (engine(factors="x"), 2), (engine(factors="x"), None)):
        Processor(config)._validate_lora(request)
    assert seen == [("vllm", 1), ("vllm", 2), ("experts", 2), ("vllm", None)]
