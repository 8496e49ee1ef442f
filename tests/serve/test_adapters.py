"""LoRA adapters of PEFT are served beside experts, in one batch."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from t2kernels import tiny
from t2kernels.experts.exchange.lora import LoraAdapter
from t2kernels.factors.matrices import find_matrices
from tests.helpers.serving import served, wait_until

pytest.importorskip("fastapi")
ExpertFolder = pytest.importorskip("t2kernels.serve.experts.folder").ExpertFolder
errors = pytest.importorskip("t2kernels.serve.http.errors")

PROMPTS = ["47+38+59?", "rsx(gcaf)?", "12+30?"]
UPLOAD = {"Content-Type": "application/octet-stream"}


def adapter(model, seed, leaves=("q_proj", "v_proj", "up_proj"), rank=4, size=0.2):
    """An adapter with random pairs that changes the model's texts."""
    g = torch.Generator().manual_seed(seed)
    shapes = {n: m.shape for n, m in find_matrices(model).items() if n.rpartition(".")[2] in leaves}
    return LoraAdapter(
        {
            n: (size * torch.randn(M, rank, generator=g), torch.randn(rank, N, generator=g) / N**0.5)
            for n, (M, N) in shapes.items()
        },
        "t2kernels-tiny",
    )


def merged(made):
    """The built-in model with an adapter added to its weights."""
    model, tokenizer = tiny.load()
    if made is not None:
        matrices = find_matrices(model)
        with torch.no_grad():
            for n, (B, A) in made.pairs.items():
                matrices[n].module.weight += B @ A
    return model, tokenizer


def alone(made):
    model, tokenizer = merged(made)
    out = []
    for prompt in PROMPTS:
        batch = tokenizer([prompt], return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)[0, batch["input_ids"].shape[1] :]
        out.append(tokenizer.decode(ids, skip_special_tokens=True))
    return out


def ask(client, model, prompt):
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def made():
    model, _ = tiny.load()
    return {"ada": adapter(model, 1), "bob": adapter(model, 2, ("q_proj", "down_proj"), rank=2)}


@pytest.fixture
def folder(tmp_path, made):
    home = tmp_path / "experts"
    home.mkdir()
    for name in ("math", "code"):
        shutil.copy(tiny.experts()[name], home / f"{name}.safetensors")
    for name, one in made.items():
        one.save(home / name)
    (home / "notes").mkdir()
    return home


def test_a_batch_of_experts_and_adapters_is_each_alone(folder, made):
    wanted = {name: alone(one) for name, one in made.items()}
    wanted["base"] = alone(None)
    assert len({tuple(texts) for texts in wanted.values()}) == 3, "the adapters change nothing"
    with served(experts=folder) as (client, service):
        assert set(service.experts.current) >= {"math", "code", "ada", "bob"}
        assert "notes" not in service.experts.current
        mixture = "mix:math=0.5,ada=0.5"
        for name in ("math", "code", mixture):
            wanted[name] = [ask(client, name, prompt) for prompt in PROMPTS]
        assert wanted[mixture] not in (wanted["math"], wanted["ada"])
        jobs = [(name, i) for _ in range(3) for name in wanted for i in range(len(PROMPTS))]
        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(lambda job: ask(client, job[0], PROMPTS[job[1]]), jobs))
        assert texts == [wanted[name][i] for name, i in jobs]
        listed = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
        assert listed["ada"]["root"] == made["ada"].digest()[:12]
        experts = {e["id"]: e for e in client.get("/v1/experts").json()["data"]}
        assert (experts["ada"]["kind"], experts["ada"]["rank"]) == ("lora", 4)
        assert experts["ada"]["numbers"] == made["ada"].numel
        assert "kind" not in experts["math"]


def test_adapters_come_and_go_while_requests_run(folder, made):
    other = adapter(tiny.load()[0], 3, ("o_proj",))
    with served(experts=folder) as (client, service):
        wanted = {name: [ask(client, name, p) for p in PROMPTS] for name in ("base", "math", "ada")}
        other.save(folder / "eve")
        with ThreadPoolExecutor(8) as pool:
            jobs = [(name, i) for _ in range(8) for name in wanted for i in range(len(PROMPTS))]
            running = [pool.submit(ask, client, name, PROMPTS[i]) for name, i in jobs]
            for _ in range(3):
                added = client.post("/v1/experts", json={"name": "eve", "file": "eve"})
                assert added.status_code == 201, added.text
                assert [ask(client, "eve", p) for p in PROMPTS] == alone(other)
                assert client.delete("/v1/experts/eve").status_code == 200
                for name in ("bob", "code"):
                    again = client.post("/v1/experts", json={"name": name, "file": "bob", "replace": True})
                    assert again.status_code == 201, again.text
            assert [f.result() for f in running] == [wanted[name][i] for name, i in jobs]
        wait_until(lambda: len(service.model.t2_bank.adapters) == 3, "the versions that were replaced are gone")
        assert [ask(client, "code", p) for p in PROMPTS] == alone(made["bob"])


def test_an_adapter_is_no_upload_and_is_never_deleted(folder, made):
    with served(experts=folder) as (client, service):
        before = dict(service.experts.current)
        weights = (folder / "ada" / "adapter_model.safetensors").read_bytes()
        answer = client.post("/v1/experts?name=new", content=weights, headers=UPLOAD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "lora_adapter")
        assert "copy its folder" in answer.json()["error"]["message"]
        expert = tiny.experts()["math"].read_bytes()
        over = client.post("/v1/experts?name=ada&replace=true", content=expert, headers=UPLOAD)
        assert over.status_code == 409
        assert "the folder of a LoRA adapter has the name 'ada'" in over.json()["error"]["message"]
        gone = client.delete("/v1/experts/ada?file=true")
        assert gone.status_code == 400
        assert "remove it by hand" in gone.json()["error"]["message"]
        examples = [{"prompt": "1+1?", "answer": "=2"}] * 2
        mixed = client.post("/v1/experts/few/few-shot", json={"experts": ["ada"], "examples": examples})
        assert mixed.status_code == 400
        assert "'ada' is a LoRA adapter" in mixed.json()["error"]["message"]
        for wrong in ("notes", "../ada", "nothing"):
            answer = client.post("/v1/experts", json={"name": "new", "file": wrong})
            assert answer.status_code == 400
        assert service.experts.current == before
        assert sorted(p.name for p in folder.iterdir()) == [
            "ada",
            "bob",
            "code.safetensors",
            "math.safetensors",
            "notes",
        ]


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path, made):
    made["ada"].save(tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    made["bob"].save(folder / "half")
    (folder / "half" / "adapter_model.safetensors").unlink()
    (folder / "half" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    for name in ("linked", "half"):
        with pytest.raises(errors.APIError, match="leads out of the experts folder"):
            ExpertFolder(folder).file(name)


def strange(home, made):
    LoraAdapter({"model.x": (torch.ones(2, 1), torch.ones(1, 2))}).save(home / "eve")


def short(home, made):
    LoraAdapter({n: (B[:-1], A) for n, (B, A) in made["ada"].pairs.items()}).save(home / "eve")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda home, made: shutil.copy(tiny.experts()["math"], home / "ada.safetensors"), "both be served as 'ada'"),
        (strange, "eve: .*it changes 1 of 1 matrices"),
        (short, r"eve: .*is \[\d+, \d+\] there, the model has"),
        (lambda home, made: (home / "ada" / "adapter_config.json").write_text("{"), "ada: "),
    ],
)
def test_a_folder_that_cannot_be_served_is_named_before_the_model_is_patched(folder, made, change, words):
    change(folder, made)
    model, _ = tiny.load()
    with pytest.raises(errors.SettingsError, match=words):
        ExpertFolder(folder).check(model, "tiny")
