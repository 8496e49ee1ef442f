"""Strategies that choose an expert for each prompt: label likelihoods, routing, margins, zero-shot choice, transfer."""

import math
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM

import t2kernels as t2
from t2kernels.adapt import (
    Classifier,
    Nearest,
    Prompt,
    Question,
    Router,
    Strategy,
    ZeroShot,
    alignment,
    labelled,
    shuffled,
    transfer,
)
from t2kernels.adapt.between_models import factors_of, resample
from t2kernels.rollout.labels import label_log_likelihoods
from tests.helpers.families import build

NAMES = ["math", "code", "reason"]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model)
    for name in [*NAMES, "classify"]:
        bank.add(name, t2.tiny.experts()[name])
    return model, tokenizer, bank


def traffic(n, split="test"):
    """n problems of each trained task in turn: (expert, problem)."""
    columns = [t2.tasks.load(name).split(split, n) for name in NAMES]
    return [(name, row) for rows in zip(*columns, strict=True) for name, row in zip(NAMES, rows, strict=True)]


def count_forwards(model):
    calls = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return calls, handle


# --- label likelihoods


@pytest.mark.parametrize("labels", [[[5], [9], [3]], [[7, 5], [7, 9]], [[7, 8, 5, 4], [7, 8, 9], [7, 8, 2, 2]]])
@pytest.mark.parametrize("common", [0, 20])
def test_label_likelihoods_are_those_of_each_label_alone(labels, common):
    model = build("llama")
    bank = t2.patch_model(model)
    bank.add("e", bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
    start, lengths, S = torch.randint(3, 60, (common,)), (4, 6, 3), common + 6
    ids, mask = torch.zeros(3, S, dtype=torch.long), torch.zeros(3, S, dtype=torch.long)
    prompts = [torch.cat([start, torch.randint(3, 60, (n,))]) for n in lengths]
    for i, p in enumerate(prompts):
        ids[i, S - len(p) :], mask[i, S - len(p) :] = p, 1
    row = bank.ids("e")
    calls, handle = count_forwards(model)
    got = label_log_likelihoods(model, ids, mask, labels, row)
    handle.remove()
    shared = len(labels[0]) - 1 if len(labels[0]) < 3 else 2
    longest = max(map(len, labels)) - shared
    assert len(calls) == 1 + (common > 0) + (longest > 1)
    want = torch.zeros(3, len(labels), dtype=torch.float64)
    for i, p in enumerate(prompts):
        for j, label in enumerate(labels):
            whole = torch.cat([p, torch.tensor(label)])[None]
            with torch.no_grad():
                logp = (
                    model(whole, expert_ids=row)
                    .logits.double()
                    .log_softmax(-1)[0, :-1]
                    .gather(-1, whole[0, 1:, None])[:, 0]
                )
            want[i, j] = logp[len(p) - 1 + shared :].sum()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


# --- routing


def test_routing_is_close_to_the_oracle_and_costs_one_forward(tiny):
    model, tokenizer, _ = tiny
    mixed = traffic(30)
    for strategy in (Prompt(model, tokenizer, Question.tiny()), Classifier(model, tokenizer, Question.tiny())):
        calls, handle = count_forwards(model)
        chosen = strategy.choose([row["prompt"] for _, row in mixed])
        handle.remove()
        assert len(calls) == 1
        assert (
            sum(a == b for a, (b, _) in zip(chosen, mixed, strict=True)) >= 88
        )  # of 90: within 2 points of the oracle


def test_routed_answers_are_those_of_asking_by_name(tiny):
    model, tokenizer, _ = tiny
    prompts = [row["prompt"] for _, row in traffic(4)]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    strategies = [
        Classifier(model, tokenizer, Question.tiny()),
        Prompt(model, tokenizer, Question.tiny(), method="generate"),
        ZeroShot(model, tokenizer, NAMES, by="confidence"),
        Router(Prompt(model, tokenizer, Question.tiny())),
    ]
    for strategy in strategies:
        names = strategy.choose(prompts)
        together = model.generate(**batch, experts=strategy, max_new_tokens=12)
        assert torch.equal(together, model.generate(**batch, experts=names, max_new_tokens=12))
    names = strategies[0].choose(prompts)
    assert len(set(names)) == 3
    routed = model.generate(**batch, experts=strategies[0], max_new_tokens=12)
    for name in set(names):  # and those of that expert for the whole batch
        own = model.generate(**batch, experts=name, max_new_tokens=12)
        rows = [i for i, n in enumerate(names) if n == name]
        width = min(own.shape[1], routed.shape[1])
        assert torch.equal(own[rows, :width], routed[rows, :width])
        assert (routed[rows, width:] == tokenizer.pad_token_id).all()


def test_one_expert_for_everything_does_not_change_the_question(tiny):
    model, tokenizer, bank = tiny
    prompts = [row["prompt"] for _, row in traffic(2)]
    strategy = Prompt(model, tokenizer, Question.tiny())
    alone = strategy.log_likelihoods(prompts)
    with bank.use("code"):
        torch.testing.assert_close(strategy.log_likelihoods(prompts), alone, rtol=1e-5, atol=1e-5)


def test_a_margin_abstains_and_is_set_by_validation_data(tiny):
    model, tokenizer, _ = tiny
    strategy = Prompt(model, tokenizer, Question.tiny())
    prompts = [row["prompt"] for _, row in traffic(3)]
    strategy.margin = math.inf
    assert strategy.choose(prompts) == [None] * 9
    # five links: the reason expert ruins what the base model does; the margin must keep it away.
    bad, good = t2.tasks.load("hop5"), t2.tasks.load("math")
    fit = strategy.fit_margin(bad.split("validation", 40), bad)
    assert fit.always < fit.base == fit.routed
    assert (fit.margin, fit.share) == (math.inf, 0.0)
    fit = strategy.fit_margin(good.split("validation", 40), good)
    assert fit.routed > fit.base + 0.3
    assert fit.share >= 1 - fit.base  # where the base model is right anyway, a route is neither gain nor loss
    assert strategy.choose(prompts).count(None) < 9
    with pytest.raises(ValueError, match="no validation data"):
        strategy.fit_margin([], good)
    with pytest.raises(ValueError, match="no margin"):
        Prompt(model, tokenizer, Question.tiny(), method="generate").fit_margin(good.split("validation", 2), good)


def test_a_prior_is_the_mean_over_neutral_prompts_and_is_read_once(tiny):
    model, tokenizer, _ = tiny
    prompts = [row["prompt"] for _, row in traffic(3)]
    plain = Prompt(model, tokenizer, Question.tiny())
    raw = plain.log_likelihoods(prompts)
    torch.testing.assert_close(plain.scores(prompts), raw)
    neutral = ["1+1?", "rsxt(gcafd)?"]
    strategy = Prompt(model, tokenizer, Question.tiny(), neutral=neutral)
    calls, handle = count_forwards(model)
    got = [strategy.scores(prompts) for _ in range(2)]
    handle.remove()
    assert len(calls) == 3  # the prior, then each call
    for scores in got:
        torch.testing.assert_close(scores, raw - plain.log_likelihoods(neutral).mean(0), rtol=1e-5, atol=1e-5)
    prior = strategy.calibrate(prompts)
    torch.testing.assert_close(prior, raw.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(strategy.scores(prompts).mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    biased = Prompt(model, tokenizer, Question.tiny())
    biased.calibrate([prompts[0]] * 2)  # one prompt has no lead over itself
    assert biased.scores(prompts[:1]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no prompts to calibrate on"):
        strategy.calibrate([])


def test_a_length_is_the_number_of_own_tokens(tiny):
    model, tokenizer, _ = tiny
    prompts = [row["prompt"] for _, row in traffic(2)]
    question = Question("kind({prompt})?", {"=m": "math", "=code": "code", "=re": "reason"}, strip="?")
    sums = Prompt(model, tokenizer, question).scores(prompts)
    means = Prompt(model, tokenizer, question, norm="length").scores(prompts)
    torch.testing.assert_close(means * torch.tensor([1.0, 4.0, 2.0]), sums)
    with pytest.raises(ValueError, match="norm='mean'; wanted 'sum' or 'length'"):
        Prompt(model, tokenizer, question, norm="mean")


def test_english_questions_with_and_without_other(tiny):
    tokenizer = tiny[1]
    with_other = Question.for_experts(NAMES, tokenizer)
    without = Question.for_experts(NAMES, tokenizer, other=False)
    assert list(with_other.labels.values()) == [*NAMES, None]
    assert list(without.labels.values()) == list(NAMES)
    assert "other" not in without.template
    assert Question.for_experts(NAMES, tokenizer, chat=True).chat


# --- nearest examples


def test_nearest_is_close_to_the_oracle_and_reads_each_prompt_once(tiny):
    model, tokenizer, bank = tiny
    examples = {name: [row["prompt"] for row in t2.tasks.load(name).split("train", 4)] for name in NAMES}
    strategy = Nearest(model, tokenizer, examples)
    mixed = traffic(30)
    calls, handle = count_forwards(model)
    with bank.use("code"):  # the base model reads, whatever is in use
        chosen = strategy.choose([row["prompt"] for _, row in mixed])
    handle.remove()
    assert sum(shape[0] for shape in calls) == 90
    assert sum(a == b for a, (b, _) in zip(chosen, mixed, strict=True)) >= 88
    strategy.margin = 2.1  # no two cosines are so far apart
    assert strategy.choose([mixed[0][1]["prompt"]]) == [None]


def test_nearest_scores_are_cosines_of_states_of_single_prompts(tiny):
    model, tokenizer, bank = tiny
    examples = {"math": ["1+2?", "12+3+9?"], None: ["rsxt(gcafd)?", "st(abc)?", "x(ab)?"]}

    def state(prompt):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True, expert_ids=bank.ids([None]))
        return out.hidden_states[-1][0, -1].double()

    states = {name: torch.stack([state(p) for p in prompts]) for name, prompts in examples.items()}
    every = torch.cat(list(states.values()))
    mean, std = every.mean(0), every.std(0, unbiased=False).clamp(min=1e-4)
    prompts = ["7+7?", "rx(ab)?"]
    want = torch.stack(
        [
            torch.stack(
                [
                    torch.cosine_similarity((state(p) - mean) / std, ((found - mean) / std).mean(0), dim=0)
                    for found in states.values()
                ]
            )
            for p in prompts
        ]
    )
    got = Nearest(model, tokenizer, examples).scores(prompts).double()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_nearest_needs_two_kinds_of_examples(tiny, tmp_path):
    model, tokenizer, _ = tiny
    for examples in ({"math": ["1+2?"]}, {"math": ["1+2?"], "code": []}):
        with pytest.raises(ValueError, match="wanted two experts or more, each with a prompt"):
            Nearest(model, tokenizer, examples)
    with pytest.raises(ValueError, match="'nobody': no such expert"):
        Nearest(model, tokenizer, {"math": ["1+2?"], "nobody": ["x"]})
    file = tmp_path / "e.jsonl"
    file.write_text('{"prompt": "1+2?", "expert": "base"}\n{"prompt": "1+2?", "expert": "law"}\n')
    with pytest.raises(ValueError, match=r"e\.jsonl, line 2: wanted a prompt, and an expert that is one of math, base"):
        t2.adapt.make_strategy("nearest", model, tokenizer, ["math"], examples=file)


def test_margins_are_the_best_cut(tiny):
    """Made-up leads and rewards: the margin is where the sum of gains is largest."""
    model, tokenizer, _ = tiny

    class Made(Prompt):
        def _leads(self, prompts):
            return [("math", float(len(p))) for p in prompts]

    strategy = Made(model, tokenizer, Question.tiny())
    rows = [
        {"prompt": "1" * n, "gain": gain} for n, gain in ((9, 1), (8, 1), (8, -1), (7, 1), (5, -1), (3, -1), (2, 1))
    ]

    def reward(prompts, completions, gain):
        half = len(prompts) // 2
        return [0.0] * half + [float(g) for g in gain[half:]]

    fit = strategy.fit_margin(rows, reward, max_new_tokens=1)
    assert (fit.margin, fit.share) == (7.0, 4 / 7)
    assert fit.routed == pytest.approx(2 / 7)
    assert fit.always == pytest.approx(1 / 7)


def test_a_strategy_of_another_model_is_refused(tiny):
    model, tokenizer, _ = tiny
    other = build("llama")
    t2.patch_model(other)
    with pytest.raises(ValueError, match="another model"):
        other.generate(torch.ones(1, 3, dtype=torch.long), experts=Prompt(model, tokenizer, Question.tiny()))
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 128), experts=Prompt(model, tokenizer, Question.tiny()))
    with pytest.raises(ValueError, match="not patched"):
        Strategy(build("llama"), tokenizer)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m, t: Prompt(m, t, Question.tiny(["math", "code", "nobody"])), "'nobody': no such expert"),
        (lambda m, t: Prompt(m, t, Question.tiny(), method="guess"), "'generate'"),
        (lambda m, t: Prompt(m, t, Question.tiny(), asked="nobody"), "'nobody'"),
        (lambda m, t: Classifier(m, t), "holds no question"),
        (lambda m, t: Classifier(m, t, classifier="nobody"), "no expert 'nobody'"),
        (lambda m, t: ZeroShot(m, t, []), "at least one"),
        (lambda m, t: ZeroShot(m, t, ["nobody"]), "'nobody'"),
        (lambda m, t: ZeroShot(m, t, NAMES, by="luck"), "'confidence'"),
        (lambda m, t: Question("what?", {"a": None, "b": None}), "no {prompt}"),
        (lambda m, t: Question("{prompt}", {"a": None}), "at least two"),
        (lambda m, t: Question("{prompt}", {"a": None, " ": None}), "not empty"),
        (lambda m, t: Question("{prompt}", {"math": None, "maths": None}), "begins"),
        (lambda m, t: labelled({"=m": t2.tasks.load("math")}, Question.tiny()), "'=c' has no task"),
        (lambda m, t: labelled({"=x": t2.tasks.load("math")}, Question.tiny()), "no label '=x'"),
    ],
)
def test_refused_before_any_forward(tiny, make, message):
    model, tokenizer, _ = tiny
    calls, handle = count_forwards(model)
    with pytest.raises(ValueError, match=message):
        make(model, tokenizer)
    handle.remove()
    assert not calls


# --- questions


def test_questions():
    q = Question.about(["code", "math"], chat=True)
    (message,) = q.ask("What is 2+2?")
    assert message["role"] == "user"
    assert "What is 2+2?" in message["content"]
    assert "code, math, other" in message["content"]
    assert q.labels == {"code": "code", "math": "math", "other": None}
    assert q.ask([{"role": "user", "content": "x {prompt} y"}])[0]["content"].count("x {prompt} y") == 1
    assert Question.about({"a": "e"}, other="none").labels == {" a": "e", " none": None}
    assert "none of them" not in Question.about(["code", "math"], other=None).template
    assert Question.tiny().ask("47+8?") == "kind(47+8)?"
    assert [q.parse(t) for t in ("Math.", "code or math", "", "no idea", "OTHER")] == [
        "math",
        None,
        None,
        None,
        "other",
    ]
    assert Question(**q.record()) == q


def test_labelled_prompts_of_any_tasks():
    task = labelled({f"={n[0]}": t2.tasks.load(n) for n in NAMES}, Question.tiny())
    rows = task.split("train", 60)
    assert len(rows) == 60
    assert {row["answer"] for row in rows} == {"=m", "=c", "=r"}
    assert all(row["prompt"].startswith("kind(") for row in rows)
    assert task.split("train", 60) == rows != task.split("train", 60, seed=1)
    assert task.reward(["p"] * 4, ["=m", "=c", "", "=m=c"], ["=m"] * 4) == [1, -1, -1, -1]
    mine, theirs = ({row["prompt"] for row in task.split(split, 200)} for split in ("train", "test"))
    assert not mine & theirs


# --- zero shot


def test_zero_shot_scores_are_those_of_each_expert(tiny):
    model, tokenizer, bank = tiny
    prompts = [row["prompt"] for _, row in traffic(2)]
    likelihood = ZeroShot(model, tokenizer, NAMES).scores(prompts)
    confidence = ZeroShot(model, tokenizer, NAMES, by="confidence").scores(prompts)
    assert likelihood.shape == confidence.shape == (6, 4)
    for i, prompt in enumerate(prompts):
        ids = tokenizer([prompt], return_tensors="pt").input_ids
        for j, name in enumerate([None, *NAMES]):
            with torch.no_grad():
                logp = model(ids, expert_ids=bank.ids(name)).logits[0].double().log_softmax(-1)
            assert confidence[i, j].item() == pytest.approx(logp[-1].max().item(), rel=1e-3, abs=1e-4)
            assert likelihood[i, j].item() == pytest.approx(
                logp[:-1].gather(-1, ids[0, 1:, None]).sum().item(), rel=1e-3
            )


def test_a_router_mixes_by_probability(tiny):
    model, tokenizer, _ = tiny

    class Judge(Prompt):
        def log_likelihoods(self, prompts):
            return torch.tensor(
                [[0.97, 0.02, 0.01], [0.5, 0.3, 0.2], [0.02, 0.01, 0.97], [0.45, 0.35, 0.2], [0.2, 0.7, 0.1]]
            ).log()

    question = Question("{prompt}", {"m": "math", "c": "code", "o": None})
    judge = Judge(model, tokenizer, question)
    assert Router(judge).choose(["a"] * 5) == [
        "math",
        {"code": 0.25, "math": 0.5},
        None,
        {"code": 0.25, "math": 0.5},
        {"code": 0.75, "math": 0.25},
    ]
    assert Router(judge, step=0.1, most=1).choose(["a"] * 5)[1:] == [{"code": 0.3, "math": 0.5}, None, "math", "code"]


def test_a_router_does_not_run_out_of_rows(tiny):
    model, tokenizer, bank = tiny

    class Judge(Prompt):
        def log_likelihoods(self, prompts):
            return torch.rand(len(prompts), 3, generator=torch.Generator().manual_seed(0)).softmax(1).log()

    chosen = Router(Judge(model, tokenizer, Question.tiny()), step=0.01).choose(["a"] * 200)
    assert 2 <= len({str(c) for c in chosen if isinstance(c, dict)}) <= bank.rows // 4
    bank.ids(chosen)


# --- transfer


def test_transfer_to_the_same_factors_changes_nothing(tiny):
    _, _, bank = tiny
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = transfer(bank["math"], bank, bank)
    assert moved == bank["math"]
    found = alignment(bank, bank)
    assert found.all == pytest.approx(1, abs=1e-5)
    half = transfer(bank["math"], bank, bank, strength=0.5)
    for name, z in half.z.items():
        torch.testing.assert_close(z - 1, 0.5 * (bank["math"].z[name] - 1))


@pytest.mark.parametrize("know", ["factors", "sketch"])
def test_unrelated_models_are_warned_about(tiny, know):
    _, _, bank = tiny
    torch.manual_seed(3)
    other = t2.patch_model(LlamaForCausalLM(tiny[0].config))
    found = alignment(bank if know == "factors" else bank["math"], other)
    assert found.by == ("vectors" if know == "factors" else "sketches")
    assert abs(found.all) < 3 * found.chance
    assert alignment(bank["math"], bank).all == pytest.approx(1, abs=1e-3)
    with pytest.warns(UserWarning, match="may well hurt"):
        moved = transfer(bank["math"], other, bank if know == "factors" else None)
    other.add("math", moved)  # it carries the factors of this model now
    assert moved.manifest["transferred_from"] == "t2kernels-tiny"


def test_other_ranks_are_interpolated_along_the_spectrum():
    z = torch.arange(8.0)
    assert torch.equal(resample(z, 8), z)
    torch.testing.assert_close(resample(z, 4), torch.tensor([0.5, 2.5, 4.5, 6.5]))
    torch.testing.assert_close(resample(z, 16)[1:-1], (torch.arange(1, 15) + 0.5) / 2 - 0.5)
    small, large = (t2.patch_model(build("llama", hidden_size=h, intermediate_size=2 * h)) for h in (16, 32))
    expert = small.expert({n: 1 + 0.3 * torch.randn(k) for n, k in small.matrices.items()})
    with pytest.warns(UserWarning, match="could not be compared"):
        moved = transfer(expert, large, small)
    for name, z in moved.z.items():
        torch.testing.assert_close(z, resample(expert.z[name], large.origin.ranks[name]))
    assert moved.manifest["interpolated"] == sum(len(z) != len(expert.z[n]) for n, z in moved.z.items()) > 6
    with pytest.raises(t2.ExpertMismatch, match="rename"):
        transfer(expert, large, rename=lambda name: "x." + name)


def test_shuffling_keeps_the_values_and_loses_the_order(tiny):
    expert = tiny[2]["math"]
    one, other = shuffled(expert, 0), shuffled(expert, 1)
    assert one != expert
    assert one != other
    assert one == shuffled(expert, 0)
    for name, z in expert.z.items():
        assert torch.equal(z.sort().values, one.z[name].sort().values)


def test_factors_of_a_bank_are_the_models():
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    U, sigma, V = factors_of(t2.patch_model(model))["model.layers.0.mlp.up_proj"]
    torch.testing.assert_close((U * sigma) @ V.T, weight, rtol=1e-4, atol=1e-5)
