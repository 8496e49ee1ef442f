"""An expert as a LoRA adapter, read by the real PEFT, and an adapter as an expert."""

import copy
import json

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from tests.helpers.families import build

peft = pytest.importorskip("peft")
FAMILIES = ("llama", "qwen2", "gemma3", "gpt2", "phi3", "bloom")


def random_expert(factors, sparse=False):
    z = {n: 1 + 0.4 * torch.randn(len(s)) for n, s in factors.sigmas.items()}
    if sparse:
        z = {n: torch.where(torch.rand(len(v)) < 0.3, v, 1.0) for n, v in z.items()}
    return t2.Expert.trained_on(factors, z, name="mine")


def logits(model, x, **routing):
    with torch.no_grad():
        return model(x, **routing).logits


def in_peft(family, folder, x, seed):
    """Logits of a fresh base model with the adapter, and what PEFT has to say."""
    torch.manual_seed(seed)
    return logits(peft.PeftModel.from_pretrained(build(family), folder), x)


@pytest.mark.filterwarnings("error:.*missing:UserWarning")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_peft_equals_its_expert(family, uniform, tmp_path):
    torch.manual_seed(7)
    model, x = build(family), torch.randint(3, 60, (3, 8))
    factors = t2.decompose(model)
    expert = random_expert(factors, sparse=not uniform)
    adapter = expert.to_lora(factors, uniform=uniform)
    assert max(adapter.errors.values()) == 0
    assert (len(set(adapter.ranks.values())) == 1) == uniform
    folder = adapter.save(tmp_path / "lora")
    t2.patch_model(model, factors=factors, form="delta").add("mine", expert)
    want, plain = logits(model, x, experts="mine"), logits(model, x)
    found = in_peft(family, folder, x, 7)
    assert (want - plain).abs().max() > 0.05 * want.abs().max()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_the_experts_of_the_built_in_model_and_their_mixture(tmp_path):
    model, tokenizer = tiny.load()
    factors = t2.decompose(model)
    files = tiny.experts()
    math, code = (t2.Expert.load(files[n]) for n in ("math", "code"))
    x = tokenizer(["12+7=", "ab(cd)?"], return_tensors="pt", padding=True)
    bank = t2.patch_model(model, factors=factors)
    for name, expert in {"math": math, "both": t2.Expert.mix({math: 0.7, code: 0.4})}.items():
        bank.add(name, expert)
        folder = expert.to_lora(factors).save(tmp_path / name)
        lora = peft.PeftModel.from_pretrained(tiny.load()[0], folder)
        with torch.no_grad():
            want, found = model(**x, experts=name).logits, lora(**x).logits
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_the_stated_error_is_that_of_the_pairs():
    torch.manual_seed(1)
    model = build("llama")
    factors = t2.decompose(model)
    expert = random_expert(factors)
    exact = expert.to_lora(factors)
    for wanted in (0.5, 0.1, 0.01):
        adapter = expert.to_lora(factors, max_error=wanted)
        assert max(adapter.errors.values()) <= wanted
        assert any(r < exact.ranks[n] for n, r in adapter.ranks.items())
        for name, (B, A) in adapter.pairs.items():
            f = factors[name]
            change = f.U.double() * (f.sigma.double() * (expert.z[name].double() - 1)) @ f.V.double().T
            error = ((change - B.double() @ A.double()).norm() / change.norm()).item()
            assert error == pytest.approx(adapter.errors[name], abs=1e-6)
            # one component less would be too few
            alone = t2.Expert({name: expert.z[name]})
            assert alone.to_lora({name: f}, rank=adapter.ranks[name] - 1).errors[name] > wanted
    ranked = expert.to_lora(factors, rank=3)
    assert set(ranked.ranks.values()) == {3}
    first = next(iter(ranked.pairs))
    largest = (factors[first].sigma * (expert.z[first] - 1)).abs().topk(3).values
    torch.testing.assert_close(ranked.pairs[first].B.norm(dim=0), largest)


def test_an_expert_of_some_layers_names_them_and_uniform_fills_the_rest(tmp_path):
    torch.manual_seed(2)
    model, x = build("llama"), torch.randint(3, 60, (2, 6))
    factors = t2.decompose(model)
    z = {n: v for n, v in random_expert(factors).z.items() if n in list(factors)[:3] or n.endswith("up_proj")}
    expert = t2.Expert.trained_on(factors, z)
    t2.patch_model(model, factors=factors, form="delta").add("mine", expert)
    want = logits(model, x, experts="mine")
    for uniform in (False, True):
        folder = expert.to_lora(factors, uniform=uniform).save(tmp_path / str(uniform))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert "up_proj" in config["target_modules"]
        assert config["base_model_name_or_path"] == "LlamaForCausalLM"
        assert ("q_proj" in config["target_modules"]) == uniform
        assert not (uniform and config["rank_pattern"])
        torch.testing.assert_close(in_peft("llama", folder, x, 2), want, rtol=1e-5, atol=1e-4)


def test_what_cannot_be_an_adapter_is_refused():
    torch.manual_seed(3)
    factors = t2.decompose(build("llama"))
    expert = random_expert(factors)
    with pytest.raises(t2.T2Error, match="give one of them"):
        expert.to_lora(factors, rank=2, max_error=0.1)
    with pytest.raises(t2.T2Error, match="at least 1"):
        expert.to_lora(factors, rank=0)
    with pytest.raises(t2.T2Error, match=r"max_error=1\.5"):
        expert.to_lora(factors, max_error=1.5)
    with pytest.raises(t2.T2Error, match="int8"):
        expert.to_lora(factors.to_format("int8"))
    with pytest.raises(t2.T2Error, match="first 4"):
        expert.to_lora(factors.cut(4))
    with pytest.raises(t2.T2Error, match="changes no matrix"):
        t2.Expert({n: torch.ones(3) for n in factors}).to_lora(factors)
    with pytest.raises(t2.ExpertMismatch):
        expert.to_lora(t2.decompose(build("llama")))
    moe = t2.decompose(build("mixtral"), targets="mlp")
    with pytest.raises(t2.T2Error, match=r"experts\.\w+\.0 is a slice of a mixture-of-experts stack"):
        random_expert(moe).to_lora(moe)


def trained_lora(family, folder, **settings):
    """A random adapter saved by PEFT, and the model with it."""
    base = build(family)
    config = peft.LoraConfig(r=5, lora_alpha=11, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"1.*": 3}},
    ],
)
def test_an_adapter_of_peft_is_read_as_peft_applies_it(settings, tmp_path):
    torch.manual_seed(4)
    model = trained_lora("llama", tmp_path, **settings)
    adapter = t2.LoraAdapter.load(tmp_path)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapter.pairs.keys() == layers.keys()
    for name, (B, A) in adapter.pairs.items():
        torch.testing.assert_close(B @ A, layers[name].get_delta_weight("default"))
    again = t2.LoraAdapter.load(adapter.save(tmp_path / "again"))
    for name, (B, A) in again.pairs.items():
        torch.testing.assert_close(B @ A, layers[name].get_delta_weight("default"))


def test_an_adapter_is_projected_onto_the_spectrum(tmp_path):
    torch.manual_seed(5)
    trained_lora("llama", tmp_path / "random", target_modules=["q_proj", "down_proj"])
    torch.manual_seed(5)
    factors = t2.decompose(build("llama"))
    adapter = t2.LoraAdapter.load(tmp_path / "random")
    expert = t2.Expert.from_lora(tmp_path / "random", factors, name="projected")
    for name, (B, A) in adapter.pairs.items():
        U, sigma, V = (t.double() for t in factors[name])
        change = B.double() @ A.double()
        z = 1 + (U.T @ change @ V).diag() / sigma
        torch.testing.assert_close(expert.z[name].double(), z, rtol=1e-5, atol=1e-5)
        share = ((U * (sigma * (z - 1))).mm(V.T).norm() / change.norm()).item()
        assert expert.manifest["kept"][name] == pytest.approx(share, abs=1e-5)
        assert share < 0.6
    mine = random_expert(factors)
    back = t2.Expert.from_lora(mine.to_lora(factors), factors)
    for name, z in mine.z.items():
        torch.testing.assert_close(back.z[name], z, rtol=1e-4, atol=1e-4)
    assert min(back.manifest["kept"].values()) == pytest.approx(1, abs=1e-5)


def test_adapters_that_cannot_be_read_are_refused(tmp_path):
    torch.manual_seed(6)
    base = {"target_modules": ["q_proj"]}
    with pytest.raises(t2.T2Error, match=r"no adapter_config\.json"):
        t2.LoraAdapter.load(tmp_path)
    trained_lora("llama", tmp_path / "dora", **base, use_dora=True)
    with pytest.raises(t2.T2Error, match="use_dora"):
        t2.LoraAdapter.load(tmp_path / "dora")
    trained_lora("llama", tmp_path / "bias", **base, bias="lora_only")
    with pytest.raises(t2.T2Error, match="bias"):
        t2.LoraAdapter.load(tmp_path / "bias")
    trained_lora("llama", tmp_path / "saved", **base, modules_to_save=["lm_head"])
    with pytest.raises(t2.T2Error, match="modules_to_save"):
        t2.LoraAdapter.load(tmp_path / "saved")
    trained_lora("llama", tmp_path / "good", **base)
    weights = tmp_path / "good" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(t2.T2Error, match="truncated"):
        t2.LoraAdapter.load(tmp_path / "good")
    ia3 = peft.get_peft_model(
        build("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    )
    ia3.save_pretrained(tmp_path / "ia3")
    with pytest.raises(t2.T2Error, match="IA3"):
        t2.LoraAdapter.load(tmp_path / "ia3")
    other = trained_lora("qwen2", tmp_path / "other", target_modules=["gate_proj"])
    with pytest.raises(t2.T2Error, match="do not have"):
        t2.Expert.from_lora(tmp_path / "other", t2.decompose(other.get_base_model(), targets="attention"))


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, "the rank 3, its pair has 5"),
        ({"rank_pattern": {"q_proj": 6}}, "the rank 6, its pair has 5"),
        ({"lora_alpha": 10**400}, "lora_alpha or alpha_pattern is not what PEFT writes"),
        ({"lora_alpha": True}, "lora_alpha or alpha_pattern is not what PEFT writes"),
        ({"lora_alpha": float("nan")}, "lora_alpha or alpha_pattern is not what PEFT writes"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha or alpha_pattern is not what PEFT writes"),
        ({"alpha_pattern": {"(": 1}}, "lora_alpha or alpha_pattern is not what PEFT writes"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'.*base model that PEFT changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": ["loftq"]}, "init_lora_weights="),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ],
)
def test_a_config_that_does_not_say_what_the_pairs_are_is_refused(changes, message, tmp_path):
    """Another rank or start is another change of the weights; PEFT would fail, or change the base model as well."""
    torch.manual_seed(8)
    trained_lora("llama", tmp_path, target_modules=["q_proj"])
    assert t2.LoraAdapter.load(edited(tmp_path, init_lora_weights="gaussian")).pairs
    with pytest.raises(t2.InputError, match=message):
        t2.LoraAdapter.load(edited(tmp_path, **changes))


def test_pissa_belongs_to_a_base_model_that_peft_changes(tmp_path):
    """Why it is refused: the pairs alone, on the base model as it is, are not what PEFT computes."""
    torch.manual_seed(9)
    x, base = torch.randint(3, 60, (1, 5)), build("llama").eval()
    weights = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")).eval()
    model.save_pretrained(tmp_path)
    want = model(input_ids=x).logits
    with pytest.raises(t2.InputError, match="pissa"):
        t2.LoraAdapter.load(tmp_path)
    plain = build("llama").eval()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(input_ids=x).logits, want, rtol=1e-3, atol=1e-4)  # untrained: no change at all
    bank = t2.patch_model(plain, form="delta")
    bank.add("wrong", t2.LoraAdapter.load(edited(tmp_path, init_lora_weights=True)))
    assert (plain(input_ids=x, experts="wrong").logits - want).abs().max() > 1e-3


def test_the_files_of_an_adapter_of_ours_are_compared(tmp_path):
    torch.manual_seed(10)
    trained_lora("llama", tmp_path / "peft", target_modules=["q_proj"])
    folder = t2.LoraAdapter.load(tmp_path / "peft").save(tmp_path / "ours")
    assert t2.LoraAdapter.load(folder).equals(t2.LoraAdapter.load(tmp_path / "peft"))
    peft.PeftModel.from_pretrained(build("llama"), folder)  # PEFT passes over the digest
    with pytest.raises(t2.InputError, match=r"lora_alpha is not what adapter_model\.safetensors was written with"):
        t2.LoraAdapter.load(edited(folder, lora_alpha=32))
    t2.LoraAdapter.load(tmp_path / "peft").save(folder)
    weights = bytearray((folder / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(t2.InputError, match="is damaged"):
        t2.LoraAdapter.load(folder)
