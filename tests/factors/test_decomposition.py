import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from t2kernels import storage
from t2kernels.factors import linalg
from t2kernels.factors.checkpoint import name_of
from t2kernels.factors.decomposition import decompose
from t2kernels.factors.factor import reconstruction_error
from t2kernels.factors.matrices import find_matrices
from t2kernels.factors.store import Factors

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = {"bos_token_id": None, "eos_token_id": None}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TOKENS)).to(dtype)


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **TOKENS)
    )


def moe():
    torch.manual_seed(0)
    config = {**SMALL, **TOKENS, "moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "model", max_shard_size="20kB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    return tmp_path / "model"


@pytest.fixture
def calls(monkeypatch):
    """One entry for each decomposition that was really computed."""
    made, real = [], linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda A, k: made.append(k) or real(A, k))
    return made


def same(a, b):
    return list(a) == list(b) and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.mark.parametrize("workers", [None, 1, 3])
@pytest.mark.parametrize("build", [llama, gpt2, moe])
def test_a_model_in_memory(build, workers):
    model = build()
    before = torch.get_num_threads()
    factors = decompose(model, workers=workers)
    assert torch.get_num_threads() == before
    matrices = find_matrices(model)
    assert list(factors) == list(matrices)
    for name, m in matrices.items():
        W, (U, sigma, V), record = m.read(), factors[name], factors.manifest["matrices"][name]
        assert (U.shape[0], V.shape[0]) == m.shape == factors.shape(name)
        torch.testing.assert_close((U * sigma) @ V.t(), W, rtol=0, atol=1e-6)
        torch.testing.assert_close(sigma.double(), torch.linalg.svdvals(W.double()), rtol=0, atol=1e-7)
        assert record["error"] == pytest.approx(reconstruction_error(W, factors[name]))
        assert record["error"] < 1e-6
        assert record["residual"] < 1e-9
        assert record["fingerprint"] == factors.fingerprints[name]


def test_a_sharded_checkpoint_gives_the_model_s_factors(checkpoint, tmp_path):
    seen = []
    factors = decompose(checkpoint, out=tmp_path / "f", progress=lambda *x: seen.append(x))
    live = decompose(llama())
    assert same(factors, live)
    assert factors.fingerprint == live.fingerprint
    assert same(decompose(checkpoint), live)
    assert [x[1:] for x in seen] == [(i + 1, 14) for i in range(14)]
    assert {x[0] for x in seen} == set(live)
    assert factors.manifest["base_model"] == checkpoint.name
    for record in factors.manifest["matrices"].values():
        assert {
            "weight_hash",
            "algorithm",
            "dtype",
            "error",
            "residual",
            "fingerprint",
            "shape",
            "rank",
            "file",
        } <= set(record)


def test_single_file_and_prefixes(tmp_path):
    live = decompose(gpt2())
    gpt2().transformer.save_pretrained(tmp_path / "bare")  # "h.0.attn...", as GPT-2 is published
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    assert same(decompose(tmp_path / "bare"), live)
    gpt2().save_pretrained(tmp_path / "headed")
    assert same(decompose(str(tmp_path / "headed"), targets="mlp"), decompose(gpt2(), targets="mlp"))


def test_expert_stacks_are_read_slice_by_slice(tmp_path):
    model = moe()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds no tensor 'model\.layers\.0\.mlp\.experts\.gate_up_proj'.*decompose\(AutoModelForCausalLM",
    ):
        decompose(tmp_path)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    factors = decompose(tmp_path)
    assert same(factors, decompose(model))
    assert factors["model.layers.1.mlp.experts.down_proj.2"].U.shape == (32, 16)


def test_rank_and_dtype(checkpoint, tmp_path):
    full = decompose(checkpoint)
    few = decompose(checkpoint, rank=0.25, out=tmp_path / "f")
    assert few.ranks == {n: max(1, r // 4) for n, r in full.ranks.items()}
    for name, f in few.items():
        assert all(torch.equal(x, y) for x, y in zip(f, full[name].cut(few.ranks[name]), strict=True))
        rest = full[name].sigma[few.ranks[name] :].double().norm() / full[name].sigma.double().norm()
        assert few.manifest["matrices"][name]["error"] == pytest.approx(rest.item(), rel=1e-5)
        assert few.shape(name) == full.shape(name)
    half = decompose(checkpoint, dtype=torch.bfloat16)
    for name, f in half.items():
        assert (f.U.dtype, f.sigma.dtype, f.V.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
        assert torch.equal(half.sketches[name], full.sketches[name])
        assert 1e-4 < half.manifest["matrices"][name]["error"] < 1e-2
    with pytest.raises(ValueError, match=r"dtype=torch\.int8"):
        decompose(checkpoint, dtype=torch.int8)
    with pytest.raises(ValueError, match="rank=0"):
        decompose(checkpoint, rank=0)
    with pytest.raises(ValueError, match="workers=0"):
        decompose(checkpoint, workers=0)


def test_bf16_weights(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)
    factors = decompose(tmp_path)
    assert same(factors, decompose(llama(torch.bfloat16)))
    assert factors["model.layers.0.mlp.up_proj"].U.dtype == torch.float32


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_cut_short_goes_on(checkpoint, tmp_path, monkeypatch, workers):
    out, real, left = tmp_path / "f", storage.os.replace, [5]

    def full(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(storage.os, "replace", full)
    with pytest.raises(OSError, match=r"could not write .*No space left"):
        decompose(checkpoint, out=out, workers=workers)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="interrupted"):
        Factors.load(out)
    assert len(list(out.iterdir())) == 5  # whole ones only
    # What a process leaves that is killed while it writes.
    (out / f".model.layers.0.mlp.up_proj.safetensors.1.ab{storage.TEMPORARY}").write_bytes(b"half")
    made, svd = [], linalg.svd
    monkeypatch.setattr(linalg, "svd", lambda A, k: made.append(k) or svd(A, k))
    factors = decompose(checkpoint, out=out)
    assert len(made) == 14 - 5
    assert same(factors, decompose(llama()))
    made.clear()
    decompose(checkpoint, out=out)
    assert not made


def test_only_what_fits_is_used_again(checkpoint, tmp_path, calls):
    out = tmp_path / "f"
    decompose(checkpoint, out=out)
    assert len(calls) == 14

    def again(**kwargs):
        calls.clear()
        factors = decompose(checkpoint, out=out, **kwargs)
        return len(calls), factors

    assert again()[0] == 0
    up = out / "model.layers.0.mlp.up_proj.safetensors"
    up.write_bytes(up.read_bytes()[:-1])
    (out / "model.layers.1.mlp.up_proj.safetensors").write_bytes(b"")
    save_file({"x": torch.ones(2)}, out / "model.layers.0.mlp.down_proj.safetensors")
    assert again()[0] == 3
    # Written whole, but not with the factors that its header describes.
    tensors, facts = storage.read_tensors(up)
    tensors["model.layers.0.mlp.up_proj.U"][3, 3] *= -1
    storage.write_tensors(up, tensors, facts)
    with pytest.warns(UserWarning, match="not those of the fingerprint"):
        assert again()[0] == 1
    assert again(rank=4)[0] == 14
    assert again(rank=4, dtype=torch.float16)[0] == 14
    assert again()[0] == 14
    # Another weight under the same name.
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    shard = checkpoint / index["model.layers.1.mlp.gate_proj.weight"]
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 3] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})
    count, factors = again()
    assert count == 1
    torch.testing.assert_close(
        factors["model.layers.1.mlp.gate_proj"].dense(),
        tensors["model.layers.1.mlp.gate_proj.weight"],
        rtol=0,
        atol=1e-6,
    )
    # Fewer targets leave the other files alone, and out of the result.
    count, factors = again(targets="mlp")
    assert count == 0
    assert len(factors) == 6
    assert again()[0] == 0


def test_bad_weights_are_named(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight \[48, 32\] holds NaN"):
            decompose(model, workers=workers)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight"):
        decompose(tmp_path, out=tmp_path / "f")
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for bad, why in [
        (torch.ones(48, 32, dtype=torch.int8), r"model\.layers\.1\.mlp\.up_proj: .*as I8, a quantised format"),
        (torch.ones(48, 32).to(torch.float8_e4m3fn), "as F8_E4M3, a quantised format"),
        (torch.ones(32, 48), r"as \[32, 48\], its config says \[48, 32\]"),
    ]:
        save_file({**tensors, key: bad}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=why):
            decompose(tmp_path)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: its weight is on the meta device"):
        decompose(empty)


def test_bad_paths_are_named(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="/none/such does not exist"):
        decompose("/none/such")
    with pytest.raises(ValueError, match="is a file"):
        decompose(checkpoint / "config.json")
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline mode is on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"nobody/nothing is not a directory, and the hub did not provide it: LocalEntryNotFoundError: offline",
    ):
        decompose("nobody/nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file$"):
        decompose(empty)
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickles, which are not read"):
        decompose(empty)
    save_file({"x": torch.ones(2)}, empty / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        decompose(empty)
    (empty / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match=r"is not a config that transformers"):
        decompose(empty)
    shards = sorted(checkpoint.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{shards[1].name} cannot be read: it is truncated.*fetch it again"):
        decompose(checkpoint)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 shards that .* names are missing: {shards[1].name}"):
        decompose(checkpoint)


def test_the_hub_gives_a_revision(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(snapshot))
    factors = decompose("a/b", targets="attention")
    assert (factors.manifest["base_model"], factors.manifest["revision"]) == ("a/b", "0123abcd")


def test_a_checkpoint_is_never_held_whole(checkpoint, monkeypatch):
    """The model is built without storage, and one matrix at a time is read."""
    from t2kernels.factors import checkpoint as source

    alive, most, real = [], [0], source.Checkpoint.read

    def read(self, m):
        import weakref

        W = real(self, m)
        alive.append(weakref.ref(W))
        most[0] = max(most[0], sum(r() is not None for r in alive))
        return W

    monkeypatch.setattr(source.Checkpoint, "read", read)
    decompose(checkpoint, workers=1)
    assert len(alive) == 14
    assert most[0] == 1


def test_names_are_hub_ids_or_last_parts_of_paths(tmp_path):
    snapshot = tmp_path / "models--owner--some-model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    assert name_of(snapshot) == ("owner/some-model", "abc123")
    assert name_of(tmp_path / "models--owner--some-model") == ("models--owner--some-model", None)
    assert name_of("meta-llama/Llama-3.1-8B") == ("meta-llama/Llama-3.1-8B", None)
    model = torch.nn.Linear(2, 2)
    assert name_of(model) == ("Linear", None)
    model.config = transformers.LlamaConfig(name_or_path=str(tmp_path))
    assert name_of(model) == (tmp_path.name, None)


def test_the_name_of_a_dtype_is_refused_with_what_is_wanted():
    with pytest.raises(TypeError, match=r"wanted a dtype of torch, such as torch\.bfloat16"):
        decompose(torch.nn.Linear(4, 4), dtype="bfloat16")
