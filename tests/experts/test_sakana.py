import os
from collections import OrderedDict

import pytest
import torch
import transformers

from t2kernels.experts.expert import Expert, ExpertError, ExpertMismatch
from t2kernels.experts.sakana import load_factors, load_logits
from t2kernels.factors.decomposition import decompose

LAYERS = 12  # more than ten, so that sorting by number and by string differ


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def mlp(model):
    """The release's order: that of the state dict."""
    return {k: v for k, v in model.state_dict().items() if "mlp" in k}


@pytest.fixture(scope="module")
def decomposed(model):
    parts = {}
    for k, v in model.state_dict().items():
        if "norm" not in k:
            U, S, Vh = torch.linalg.svd(v, full_matrices=False)
            # Signs and contiguity as another library may give them.
            parts |= {f"{k}.U": -U, f"{k}.S": S, f"{k}.V": -Vh.mT}
    return parts


@pytest.fixture(scope="module")
def factors(decomposed, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "llama_decomposed_params.pt"
    torch.save(decomposed, path)
    return load_factors(path, base_model="tiny")


def logits(mlp, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: (0.1 + torch.randn(min(v.shape), generator=g)).bfloat16() for k, v in mlp.items()}


def weight(decomposed, key, mask):
    """W' as the release composes it, in fp64."""
    U, S, V = (decomposed[f"{key}.{x}"].double() for x in "USV")
    return (U @ torch.diag(S * mask) @ V.T) * (S.sum() / (S * mask).sum())


def agrees(expert, factors, decomposed, masks):
    assert list(expert.z) == [k.removesuffix(".weight") for k in masks]
    for key, mask in masks.items():
        name = key.removesuffix(".weight")
        U, sigma, V = (t.double() for t in factors[name])
        ours = (U * (sigma * expert.z[name].double())) @ V.T
        wanted = weight(decomposed, key, mask)
        assert ((ours - wanted).norm() / wanted.norm()).item() < 2e-7


def policy_file(path, p):
    torch.save(OrderedDict((f"learnable_params_module_list.{i}", v) for i, v in enumerate(p.values())), path)
    return path


def combination_file(path, mlp, alphas, count=2):
    state = OrderedDict(adaptive_weights=alphas)
    experts = [logits(mlp, seed) for seed in range(count)]
    for k in mlp:
        for i, e in enumerate(experts):
            state[f"weights_{i}_k_{k.replace('.', '_')}"] = e[k]
    torch.save(state, path)
    return experts


def test_policy(mlp, decomposed, factors, tmp_path):
    p = logits(mlp)
    path = policy_file(tmp_path / "policy_params.pt", p)
    masks = {k: torch.sigmoid(v.double()) for k, v in p.items()}
    expert = Expert.from_sakana(path, factors=factors, base_model="tiny")
    agrees(expert, factors, decomposed, masks)
    agrees(expert, factors, decomposed, {k: 3 * m for k, m in masks.items()})  # max_mult cancels
    for name, z in expert.z.items():
        sigma = factors[name].sigma.double()
        torch.testing.assert_close((sigma * z.double()).sum(), sigma.sum(), rtol=1e-6, atol=0)
    assert expert.manifest["base_model"] == "tiny"
    assert expert.manifest["fingerprint"] == factors.fingerprint
    expert.check(factors)
    again = Expert.load(expert.save(tmp_path / "math"))
    assert again == expert
    again.check(factors)


def test_logits_as_they_are(mlp, factors, tmp_path):
    p = logits(mlp)
    found = load_logits(policy_file(tmp_path / "p.pt", p))
    assert found.keys() == {k.removesuffix(".weight") for k in p}
    assert all(torch.equal(found[k.removesuffix(".weight")], v) for k, v in p.items())
    combination_file(tmp_path / "few.pt", mlp, torch.ones(2, 1))
    with pytest.raises(ExpertError, match="no logits of its own"):
        load_logits(tmp_path / "few.pt")


def test_order_of_keys_in_the_file_does_not_matter(mlp, decomposed, factors, tmp_path):
    p = logits(mlp)
    state = {f"learnable_params_module_list.{i}": v for i, v in enumerate(p.values())}
    torch.save({k: state[k] for k in sorted(state)}, tmp_path / "p.pt")  # 0, 1, 10, 11, ..., 2
    agrees(
        Expert.from_sakana(tmp_path / "p.pt", factors),
        factors,
        decomposed,
        {k: torch.sigmoid(v.double()) for k, v in p.items()},
    )


def test_legacy(mlp, decomposed, factors, tmp_path):
    p = {k: torch.nn.Parameter(v) for k, v in logits(mlp).items()}
    torch.save(p, tmp_path / "learnable_params.pt")
    expert = Expert.from_sakana(tmp_path / "learnable_params.pt", factors=factors)
    agrees(expert, factors, decomposed, {k: torch.sigmoid(v.detach().double()) for k, v in p.items()})
    assert expert.manifest["parametrisation"]["kind"] == "legacy"


@pytest.mark.parametrize("mask", ["identity", "sigmoid"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_few_shot(mlp, decomposed, factors, tmp_path, mask, per_layer):
    alphas = torch.rand(2, len(mlp) if per_layer else 1, generator=torch.Generator().manual_seed(3)) + 0.1
    experts = combination_file(tmp_path / "few.pt", mlp, alphas)
    f = torch.sigmoid if mask == "sigmoid" else torch.clone
    a = alphas.double().expand(2, len(mlp))
    masks = {k: sum(a[j, i] * f(e[k].double()) for j, e in enumerate(experts)) for i, k in enumerate(mlp)}
    expert = Expert.from_sakana(tmp_path / "few.pt", factors, mask=mask)
    for key, m in masks.items():  # identity masks may nearly cancel: z is large then, and fp32 relative to it
        name = key.removesuffix(".weight")
        U, sigma, V = (t.double() for t in factors[name])
        wanted = weight(decomposed, key, m)
        assert (((U * (sigma * expert.z[name].double())) @ V.T - wanted).norm() / wanted.norm()).item() < 1e-6
    # norm_coeffs, which the file does not record, cancels too.
    combination_file(tmp_path / "normed.pt", mlp, alphas / alphas.sum(0))
    normed = Expert.from_sakana(tmp_path / "normed.pt", factors, mask=mask)
    for name in expert.z:
        torch.testing.assert_close(normed.z[name], expert.z[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ExpertError, match="mask='relu'"):
        Expert.from_sakana(tmp_path / "few.pt", factors, mask="relu")


def test_factors_of_the_release(model, decomposed, factors, tmp_path):
    assert list(factors) == [
        k.removesuffix(".weight") for k in decomposed if k.endswith(".U") and "mlp" in k for k in [k[:-2]]
    ]
    for name, f in factors.items():
        torch.testing.assert_close(f.dense(), model.get_parameter(f"{name}.weight").detach(), rtol=0, atol=1e-6)
        assert torch.equal(f.U, decomposed[f"{name}.weight.U"])
        assert torch.equal(f.V, decomposed[f"{name}.weight.V"])
    torch.save(decomposed, tmp_path / "d.pt")
    assert len(load_factors(tmp_path / "d.pt", mlp_only=False)) == LAYERS * 7
    factors.save(tmp_path / "f")
    assert type(factors).load(tmp_path / "f").fingerprint == factors.fingerprint


def test_an_import_on_recomputed_factors_fits_the_release_s(model, mlp, factors, tmp_path):
    """The same fp32 weights, decomposed by another algorithm: other signs, the same z, accepted by both."""
    path, ours = policy_file(tmp_path / "p.pt", logits(mlp)), decompose(model)
    expert = Expert.from_sakana(path, ours)
    for name, z in Expert.from_sakana(path, factors).z.items():
        torch.testing.assert_close(expert.z[name], z, rtol=1e-5, atol=0)
    expert.check(factors)
    expert.check(ours)


def test_sigmas_alone_will_do(mlp, factors, tmp_path):
    path = policy_file(tmp_path / "p.pt", logits(mlp))
    expert = Expert.from_sakana(path, dict(factors.sigmas))
    assert expert == Expert.from_sakana(path, factors)
    assert not expert.sketch


def test_what_does_not_fit_is_refused(model, mlp, factors, tmp_path):
    p = logits(mlp)
    path = policy_file(tmp_path / "p.pt", p)
    with pytest.raises(ExpertMismatch, match="trained on meta-llama/other, the factors are of tiny"):
        Expert.from_sakana(path, factors, base_model="meta-llama/other")
    with pytest.raises(
        ExpertMismatch, match=r"model\.layers\.0\.mlp\.gate_proj has 16 components, the factors have 4.*rank=None"
    ):
        Expert.from_sakana(path, factors.cut(4))
    keys = list(p)
    fewer = policy_file(tmp_path / "fewer.pt", {k: p[k] for k in keys[:-3]})
    with pytest.raises(
        ExpertMismatch,
        match=r"has 33 MLP matrices, the factors have 36; they differ in model\.layers\.11\.mlp\.gate_proj",
    ):
        Expert.from_sakana(fewer, factors)
    with pytest.raises(ExpertError, match="35 vectors are not numbered 0, 1, 2"):
        Expert.from_sakana(policy_file(tmp_path / "odd.pt", {k: p[k] for k in keys[:-1]}), factors)


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def test_bad_files_are_refused_by_name(mlp, factors, tmp_path):
    p = logits(mlp)
    good = {f"learnable_params_module_list.{i}": v for i, v in enumerate(p.values())}
    first = next(iter(good))
    cases = {
        "bomb": ({"a": Bomb()}, "cannot be loaded as plain tensors"),
        "list": ([torch.ones(3)], "is not a dict of tensors"),
        "numbers": ({"a": 1.0}, "is not a dict of tensors"),
        "other": ({"lora_A": torch.ones(3)}, "is not an expert of the release.*got lora_A"),
        "more": (good | {"bias": torch.ones(3)}, "1 of its 37 keys are not learnable_params_module_list.N"),
        "nan": (good | {first: good[first] * float("nan")}, "vector 0 holds NaN"),
        "matrix": (good | {first: torch.ones(2, 8)}, r"vector 0 is torch.float32 \[2, 8\]"),
        "int": (good | {first: torch.ones(16, dtype=torch.int64)}, "vector 0 is torch.int64"),
        "alphas": (
            {"adaptive_weights": torch.ones(3, 1)} | {f"weights_0_k_{k.replace('.', '_')}": v for k, v in p.items()},
            "does not fit 36 matrices",
        ),
    }
    for name, (content, why) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ExpertError, match=rf"{name}\.pt.*{why}"):
            Expert.from_sakana(tmp_path / f"{name}.pt", factors)
    torch.save(good, tmp_path / "cut.pt")
    data = (tmp_path / "cut.pt").read_bytes()
    for size in (0, 10, len(data) // 2):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(ExpertError, match=r"cut\.pt cannot be loaded as plain tensors"):
            Expert.from_sakana(tmp_path / "cut.pt", factors)
    with pytest.raises(ExpertError, match="does not exist"):
        Expert.from_sakana(tmp_path / "none.pt", factors)


def test_bad_factor_files_are_refused(decomposed, tmp_path):
    key = "model.layers.0.mlp.up_proj.weight"
    for change, why in [
        (
            {f"{key}.V": decomposed[f"{key}.V"].T.contiguous()[:, :5]},
            r"model\.layers\.0\.mlp\.up_proj: wanted U \[M, R\]",
        ),
        ({f"{key}.S": decomposed[f"{key}.S"].int()}, "wanted floating-point U, S and V"),
    ]:
        torch.save(decomposed | change, tmp_path / "d.pt")
        with pytest.raises(ExpertError, match=why):
            load_factors(tmp_path / "d.pt")
    torch.save({k: v for k, v in decomposed.items() if k != f"{key}.S"}, tmp_path / "d.pt")
    with pytest.raises(ExpertError, match=r"up_proj: wanted floating-point U, S and V, got \{'U'"):
        load_factors(tmp_path / "d.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "d.pt")
    with pytest.raises(ExpertError, match=r"decomposed_params\.pt"):
        load_factors(tmp_path / "d.pt")
