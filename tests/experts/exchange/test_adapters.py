"""LoRA adapters beside experts: each row of a batch as it is alone, the adapters as in PEFT."""

import copy
import json
import pickle

import pytest
import torch

import t2kernels as t2
from t2kernels import tiny
from tests.helpers.commandline import t2_, wide  # noqa: F401
from tests.helpers.families import build

peft = pytest.importorskip("peft")
TARGETS = {
    "llama": (["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["q_proj", "o_proj", "down_proj"]),
    "gpt2": (["c_attn"], ["c_fc"], ["c_attn", "c_proj"]),
}


def seeded(family):
    torch.manual_seed(0)
    return build(family)


def random_expert(bank):
    return bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()})


def random_adapter(family, folder, seed, rank, targets):
    """A random adapter in a folder, as PEFT saves it; the model with it."""
    base = seeded(family)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


def adapters(family, folder, count=4):
    """{name: PEFT's model} of adapters of different ranks and targets, saved in `folder`/name."""
    targets = TARGETS[family]
    return {
        f"lora{i}": random_adapter(family, folder / f"lora{i}", i, 2 + 3 * i, targets[i % len(targets)])
        for i in range(count)
    }


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5 * want.abs().max().item())


def logits(model, x, **routing):
    with torch.no_grad():
        return model(input_ids=x, **routing).logits


@pytest.mark.parametrize("form", ["delta", "factored"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_of_experts_and_adapters_equals_each_alone(family, form, tmp_path):
    loras = adapters(family, tmp_path)
    model, x = seeded(family), torch.randint(3, 60, (9, 7))
    bank = t2.patch_model(model, form=form)
    before = logits(model, x)
    for i in range(4):
        bank.add(f"svf{i}", random_expert(bank))
    alone = {f"svf{i}": logits(model, x, experts=f"svf{i}") for i in range(4)}
    for name in loras:
        bank.add(name, tmp_path / name)
    order = ["lora2", "svf0", "svf1", "lora0", None, "lora3", "svf2", "lora1", "svf3"]
    found = logits(model, x, experts=order)
    for i, name in enumerate(order):
        row = x[i : i + 1]
        want = before if name is None else alone[name] if name in alone else loras[name](input_ids=row).logits
        close(found[i : i + 1], (want if want.shape[0] == 1 else want[i : i + 1]).detach())
    # rows without an adapter are what they were, bit for bit
    plain = ["svf0", "svf1", None, "svf2", "svf3"]
    with_columns = logits(model, x[:5], experts=plain)
    for name in loras:
        bank.remove(name)
    assert torch.equal(logits(model, x[:5], experts=plain), with_columns)
    assert not any(hasattr(layer, "lora") for layer, _ in bank.layers)


def test_an_expert_of_its_own_for_each_token_and_mixtures(tmp_path):
    loras = adapters("llama", tmp_path, 2)
    model, x = seeded("llama"), torch.randint(3, 60, (2, 5))
    bank = t2.patch_model(model, form="delta")
    bank.add("svf", random_expert(bank))
    for name in loras:
        bank.add(name, tmp_path / name)
    names = [["lora0"] * 5, ["svf"] * 5]
    close(
        logits(model, x, experts=names),
        torch.cat([logits(model, x[:1], experts="lora0"), logits(model, x[1:], experts="svf")]),
    )
    # a mixture is the sum of the changes: merged into a dense model
    dense = seeded("llama")
    mix = {"svf": 0.5, "lora0": -0.25, "lora1": 2.0}
    expert = bank["svf"]
    factors = t2.decompose(seeded("llama"))
    with torch.no_grad():
        for name, f in factors.items():
            weight = dense.get_submodule(name).weight
            weight += 0.5 * (f.dense(expert.z[name]) - f.dense())
            for lora in ("lora0", "lora1"):
                if name in bank.adapter(lora).pairs:
                    B, A = bank.adapter(lora).pairs[name]
                    weight += mix[lora] * B @ A
    found = logits(model, x, experts=mix)
    torch.testing.assert_close(found, logits(dense, x), rtol=1e-4, atol=1e-3)


def test_generation_and_merging(tmp_path):
    loras = adapters("llama", tmp_path, 2)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for form in ("delta", "factored"):
        model, x = seeded("llama"), torch.randint(3, 60, (3, 5))
        bank = t2.patch_model(model, form=form)
        for name in loras:
            bank.add(name, tmp_path / name)
        text = model.generate(x, experts=["lora0", None, "lora1"], **options)
        for i, lora in ((0, loras["lora0"]), (2, loras["lora1"])):
            assert torch.equal(text[i : i + 1], lora.generate(input_ids=x[i : i + 1], **options))
        t2.unpatch_model(model, expert="lora1")
        with torch.no_grad():
            close(model(x).logits, loras["lora1"](input_ids=x).logits)
        assert not [n for n, m in model.named_modules() if m._forward_hooks]
        base = seeded("llama")
        bank = t2.patch_model(base, form=form)
        bank.add("lora0", tmp_path / "lora0")
        t2.unpatch_model(base)
        close(logits(base, x), logits(seeded("llama"), x))


def test_rows_that_an_adapter_has_left_are_clean(tmp_path):
    """Few rows: experts, searches and training take the row of an adapter in turns."""
    adapters("llama", tmp_path, 2)
    model, x = seeded("llama"), torch.randint(3, 60, (1, 6))
    bank = t2.patch_model(model, form="delta", rows=2)
    svf = random_expert(bank)
    bank.add("svf", svf)
    want = {"svf": logits(model, x, experts="svf"), None: logits(model, x)}
    bank.add("lora0", tmp_path / "lora0")
    bank.add("lora1", tmp_path / "lora1")
    want["lora0"] = logits(model, x, experts="lora0")
    want["lora1"] = logits(model, x, experts="lora1")
    for name in ("svf", "lora1", "svf", "lora0", None, "lora1", "lora0", "svf"):
        close(logits(model, x, experts=name), want[name])
    logits(model, x, experts="lora0")
    with bank.scratch(1) as rows:
        ids = rows.write(bank.vector("svf")[None])
        close(logits(model, x, expert_ids=ids), want["svf"])
    logits(model, x, experts="lora1")
    bank.start_training("new")
    close(logits(model, x, experts="new"), want[None])
    bank.stop_training("new")
    close(logits(model, x, experts="lora1"), want["lora1"])


def test_an_adapter_in_use_is_neither_removed_nor_replaced(tmp_path):
    adapters("llama", tmp_path, 2)
    model = seeded("llama")
    bank = t2.patch_model(model, form="delta")
    bank.add("a", tmp_path / "lora0")
    ids = bank.ids(["a"])
    with pytest.raises(t2.T2Error, match="is in use"):
        bank.remove("a")
    with pytest.raises(t2.T2Error, match="is in use"):
        bank.add("a", tmp_path / "lora1", replace=True)
    assert "a" in bank
    del ids
    mixed = bank.ids([{"a": 0.5}])
    with pytest.raises(t2.T2Error, match="is in use"):
        bank.add("a", random_expert(bank), replace=True)
    del mixed
    bank.add("a", tmp_path / "lora1", replace=True)
    assert bank.adapter("a").ranks.keys() == t2.LoraAdapter.load(tmp_path / "lora1").ranks.keys()
    bank.add("a", random_expert(bank), replace=True)
    assert bank["a"].numel
    with pytest.raises(KeyError, match="no adapter named 'a'"):
        bank.adapter("a")


def test_copies_casts_and_files(tmp_path):
    loras = adapters("llama", tmp_path, 2)
    model, x = seeded("llama"), torch.randint(3, 60, (2, 6))
    bank = t2.patch_model(model, form="delta")
    bank.add("svf", random_expert(bank))
    for name in loras:
        bank.add(name, tmp_path / name)
    want = logits(model, x, experts=["lora1", "svf"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(other, x, experts=["lora1", "svf"]), want)
        other.t2_bank.remove("lora0")
        close(logits(other, x, experts=["lora1", "svf"]), want)
    close(logits(model, x, experts=["lora1", "svf"]), want)
    assert {p.name for p in bank.save(tmp_path / "all")} == {"svf.safetensors", "lora0", "lora1"}
    again = t2.LoraAdapter.load(tmp_path / "all" / "lora1")
    for name, (B, A) in bank.adapter("lora1").pairs.items():
        assert torch.equal(again.pairs[name].B, B)
        assert torch.equal(again.pairs[name].A, A)
    assert set(model.state_dict()) == set(seeded("llama").state_dict())
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert all(layer.lora.weight.dtype == torch.float32 for layer, _ in half.t2_bank.layers if hasattr(layer, "lora"))
    error = (logits(half, x, experts=["lora1", "svf"]).float() - want).abs().max() / want.abs().max()
    assert error < 0.1


def test_a_move_that_fails_leaves_the_adapters_as_they_are(tmp_path):
    adapters("llama", tmp_path, 1)
    model, x = seeded("llama"), torch.randint(3, 60, (2, 6))
    bank = t2.patch_model(model, form="delta")
    bank.add("lora0", tmp_path / "lora0")
    want = logits(model, x, experts="lora0")
    columns = next(layer.lora for layer, _ in bank.layers if hasattr(layer, "lora"))

    def fails(t):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        columns._apply(fails)
    assert torch.equal(logits(model, x, experts="lora0"), want)


def test_gradients_of_an_expert_beside_adapters(tmp_path):
    adapters("llama", tmp_path, 1)
    x = torch.randint(3, 60, (2, 6))
    grads = []
    for with_adapter in (False, True):
        model = seeded("llama")
        bank = t2.patch_model(model, form="delta", rank=4)
        if with_adapter:
            bank.add("lora0", tmp_path / "lora0")
        parameters = bank.start_training("new")
        out = model(x, experts=["new", "lora0" if with_adapter else None]).logits[0]
        out.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    adapters("llama", tmp_path, 2)
    bank = t2.patch_model(seeded("llama"), targets="attention")
    with pytest.raises(t2.T2Error, match=r"changes 6 of 6 matrices that are not patched.*targets"):
        bank.add("mlp", tmp_path / "lora1")
    bank.add("ok", tmp_path / "lora0")
    with pytest.raises(t2.T2Error, match=r"LoRA adapter, not an expert; bank\.adapter\('ok'\)"):
        bank["ok"]
    with pytest.raises(t2.T2Error, match="remove it first"):
        bank.add("ok", tmp_path / "lora0")
    pairs = {n: (torch.ones(3, 1), torch.ones(1, 5)) for n in bank.adapter("ok").pairs}
    with pytest.raises(t2.T2Error, match=r"is \[3, 5\] there, the model has \[32, 32\]"):
        bank.add("small", t2.LoraAdapter(pairs))
    moe = t2.patch_model(build("mixtral"), form="delta")
    with pytest.raises(t2.T2Error, match="not patched"):
        moe.add(
            "slice", t2.LoraAdapter({n: (torch.ones(32, 1), torch.ones(1, 32)) for n in moe.matrices if "experts" in n})
        )


def test_the_command_line_takes_the_folder_of_an_adapter(tmp_path):
    math = t2.Expert.load(tiny.experts()["math"])
    math.to_lora(t2.decompose(tiny.load()[0])).save(tmp_path / "exported")
    text = t2_("generate", "12+9+7+2+4?", "-e", "math", "-e", tmp_path / "exported", "-e", "base", "--json")
    answers = {a["expert"]: a["text"] for a in (json.loads(t) for t in text.splitlines() if t.startswith("{"))}
    assert answers.pop(str(tmp_path / "exported")) == answers["math"] != answers["base"]
