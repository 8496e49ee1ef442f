"""Few-shot adaptation: mixtures as rows, a population in one batch, the search, gradient steps."""

import math

import pytest
import torch

import t2kernels as t2
from t2kernels.adapt import CEMConfig, Examples, FewShot, refine, search
from t2kernels.adapt.mixing import Mixer
from t2kernels.rollout.generation import Rollout, completion_logits
from t2kernels.rollout.prefix import hoist, prefill, window_of
from tests.helpers.families import build

NAMES = ["math", "code", "reason"]


def gold(row):
    return "=" + row["answer"]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = t2.tiny.load()
    bank = t2.patch_model(model)
    for name in NAMES:
        bank.add(name, t2.tiny.experts()[name])
    return model, tokenizer, bank


@pytest.fixture
def examples(tiny):
    model, tokenizer, _ = tiny
    task = t2.tasks.load("sub")
    return Examples(model, tokenizer, task.split("train", 4), task, gold)


@pytest.fixture(params=["delta", "factored"])
def random_bank(request):
    model = build("llama")
    bank = t2.patch_model(model, form=request.param, rank=8 if request.param == "delta" else 12)
    bank.model = model
    for i in range(3):
        bank.add(f"e{i}", bank.expert({n: 1 + 0.4 * torch.randn(k) for n, k in bank.matrices.items()}))
    return bank


# --- mixtures


def mixed(bank, alpha, per, mixing):
    """{matrix: z'} in fp64, by the equations."""
    layers = list(dict.fromkeys(n.split(".")[2] for n in bank.matrices))
    out = {}
    for i, name in enumerate(bank.matrices):
        g = {"expert": 0, "layer": layers.index(name.split(".")[2]), "matrix": i}[per]
        zs = [bank[f"e{k}"].z[name].double() for k in range(3)]
        a = alpha[:, g].double()
        if mixing == "delta":
            out[name] = 1 + sum(a[k] * (zs[k] - 1) for k in range(3))
        elif mixing == "z":
            out[name] = sum(a[k] * zs[k] for k in range(3))
        else:
            m = sum(a[k] * torch.logit((zs[k] / (1 + math.exp(-0.1))).clamp(1e-3, 1 - 1e-3)) for k in range(3))
            sigma = bank.sigma(name).double()
            out[name] = m * sigma.sum() / (sigma * m).sum()
    return out


@pytest.mark.parametrize("per", ["expert", "layer", "matrix"])
def test_a_mixture_is_its_equation_and_its_row_the_experts(random_bank, per):
    bank = random_bank
    mixer = Mixer(bank, ["e0", "e1", "e2"], per)
    alpha = torch.randn(4, *mixer.shape)
    rows = mixer(alpha)
    ids = torch.randint(3, 60, (2, 6))
    for p in range(4):
        want = mixed(bank, alpha[p], per, "delta")
        for name, span in bank.spans.items():
            torch.testing.assert_close(1 + rows[p, span].double(), want[name], rtol=1e-5, atol=1e-5)
    with bank.scratch(4) as scratch:
        for layer, _ in bank.layers:
            layer.scale[scratch.ids.long()] = math.nan  # what is not written shows
        got = scratch.write(rows)
        for p in range(4):
            bank.add("one", mixer.expert(alpha[p]), replace=True)
            with torch.no_grad():
                torch.testing.assert_close(
                    bank.model(ids, expert_ids=got[p]).logits,
                    bank.model(ids, experts="one").logits,
                    rtol=1e-4,
                    atol=1e-4,
                )
    assert bank[("one")].manifest["mixed"].keys() == {"e0", "e1", "e2"}


@pytest.mark.parametrize("mixing", ["z", "logits"])
def test_mixing_z_and_logits(mixing):
    model = build("llama")
    bank = t2.patch_model(model, form="factored")
    for i in range(3):
        bank.add(f"e{i}", bank.expert({n: 1 + 0.2 * torch.randn(k) for n, k in bank.matrices.items()}))
    mixer = Mixer(bank, ["e0", "e1", "e2"], "matrix", mixing)
    alpha = 0.5 + torch.rand(2, *mixer.shape)
    want = mixed(bank, alpha[1], "matrix", mixing)
    for name, span in bank.spans.items():
        torch.testing.assert_close(1 + mixer(alpha)[1, span].double(), want[name], rtol=2e-4, atol=2e-4)
    if mixing == "z":  # the paper's sum; the same as deltas where the weights sum to one
        alpha /= alpha.sum(1, keepdim=True)
        torch.testing.assert_close(mixer(alpha), Mixer(bank, ["e0", "e1", "e2"], "matrix")(alpha), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rank=None"):
        Mixer(_partial(), ["e"], mixing=mixing)


@pytest.mark.parametrize("per", ["expert", "layer"])
def test_normalised_mixing_is_that_of_deltas_whose_weights_sum_to_one(random_bank, per):
    names = ["e0", "e1", "e2"]
    mixer = Mixer(random_bank, names, per, "normalised")
    alpha = torch.randn(5, *mixer.shape)
    alpha[:, 0] += torch.where(alpha.sum(1) < 0, -1, 1)  # sums well away from 0
    want = Mixer(random_bank, names, per)(alpha / alpha.sum(1, keepdim=True))
    torch.testing.assert_close(mixer(alpha), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer(-3 * alpha), want, rtol=1e-5, atol=1e-5)
    alpha[0, 2] = -alpha[0, :2].sum(0)
    assert not mixer(alpha)[0].any()  # a sum of 0: the base model, not NaN
    Mixer(_partial(), ["e"], mixing="normalised")  # needs no full support


def _partial():
    bank = t2.patch_model(build("llama"), form="delta", rank=8)
    bank.add("e", bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()}))
    return bank


def test_logits_that_are_known_are_mixed_as_they_are():
    bank = t2.patch_model(build("llama"), form="factored")
    bank.add("e", bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()}))
    p = {n: torch.randn(k).abs() + 0.1 for n, k in bank.matrices.items()}
    mixer = Mixer(bank, ["e"], mixing="logits", logits={"e": p})
    for name, span in bank.spans.items():
        sigma = bank.sigma(name)
        torch.testing.assert_close(
            1 + mixer(torch.full((1, 1, 1), 0.7))[0, span], p[name] * sigma.sum() / (sigma * p[name]).sum()
        )


def test_flat_rows_come_back(random_bank):
    e = random_bank["e1"]
    assert random_bank.from_vector(random_bank.vector("e1")) == e


def test_scratch_rows_are_lent_and_given_back(random_bank):
    bank = random_bank
    before = bank.ids(["e0", "e1"])
    with pytest.raises(RuntimeError, match="rows are in use"):
        bank.scratch(bank.rows - 2)  # two are held by `before`
    held = [layer.scale[before.long()].clone() for layer, _ in bank.layers]
    with bank.scratch(bank.rows - 3) as scratch:
        scratch.write(torch.randn(bank.rows - 3, bank.width))
        assert 0 not in scratch.ids.tolist()
        with pytest.raises(RuntimeError, match="rows are in use"):
            bank.ids("e2")
        with pytest.raises(ValueError, match="not finite"):
            scratch.write(torch.full((1, bank.width), math.nan))
        with pytest.raises(ValueError, match="wanted"):
            scratch.write(torch.zeros(1, bank.width + 1))
    for (layer, _), rows in zip(bank.layers, held, strict=True):
        assert torch.equal(layer.scale[before.long()], rows)
    after = bank.ids("e2")
    for layer, (name,) in bank.layers:
        z = bank["e2"].z[name]
        want = layer.sigma[: len(z)] * (z if layer.form == "factored" else z - 1)
        torch.testing.assert_close(layer.scale[int(after), : len(z)], want, rtol=1e-5, atol=1e-6)


# --- the prompts' common beginning


@pytest.mark.parametrize(("common", "window"), [(0, None), (3, None), (20, None), (20, 29), (20, 28), (20, 20)])
def test_a_hoisted_prefix_changes_no_logit(common, window):
    """The longest row has 29 tokens: where a layer looks back at fewer, nothing is hoisted."""
    kinds = ["sliding_attention", "full_attention"]
    model = build("gemma3", sliding_window=window, layer_types=kinds) if window else build("llama")
    bank = t2.patch_model(model)
    for i in range(2):
        bank.add(f"e{i}", bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()}))
    start = torch.randint(3, 60, (common,))
    lengths, S = (5, 2, 7), common + 7
    ids, mask = torch.zeros(3, S, dtype=torch.long), torch.zeros(3, S, dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, S - common - n :] = torch.cat([start, torch.randint(3, 60, (n,))])
        mask[i, S - common - n :] = 1
        ids[i, S - n] = 3 + i  # no longer a common beginning than that
    completion = torch.ones(6, 2, dtype=torch.bool)
    tokens = torch.randint(3, 60, (6, 2))
    rows = bank.ids(["e0", "e1"])

    def logits(ids, mask, cache):
        rollout = Rollout(
            torch.cat([ids.repeat(2, 1), tokens], 1), torch.cat([mask.repeat(2, 1), completion.long()], 1), completion
        )
        with torch.no_grad():
            return completion_logits(model, rollout, cache=cache, expert_ids=rows.repeat_interleave(3))

    prefix, hoisted, seen = hoist(ids, mask, window_of(model) - 2)
    assert len(prefix) == (common if common >= 16 and window in (None, 29) else 0)
    if len(prefix):
        assert (hoisted[:, :common] == start).all()
    torch.testing.assert_close(
        logits(hoisted, seen, prefill(model, prefix, rows, 3)), logits(ids, mask, None), rtol=1e-4, atol=1e-4
    )


# --- scores


def test_candidates_in_one_batch_score_as_each_alone(tiny, examples):
    model, _, bank = tiny
    mixer = Mixer(bank, NAMES)
    alpha = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.4, 0.2, -0.3]])[..., None]
    with bank.scratch(3) as rows:
        together = examples.score(rows.write(mixer(alpha)))
    alone = [examples.score(bank.ids(name)) for name in ("math", None, dict(zip(NAMES, (0.4, 0.2, -0.3), strict=True)))]
    assert together.answers == [a.answers[0] for a in alone]
    torch.testing.assert_close(together.reward, torch.cat([a.reward for a in alone]))
    torch.testing.assert_close(together.likelihood, torch.cat([a.likelihood for a in alone]), rtol=1e-4, atol=1e-4)
    # The likelihood, from the log-probabilities of each example alone and unpadded.
    total = 0.0
    for row in examples.rows:
        tokens = examples.sampler.tokenizer([row["prompt"] + gold(row)], return_tensors="pt").input_ids
        tokens = torch.cat([tokens, torch.tensor([[examples.sampler.tokenizer.eos_token_id]])], 1)
        with torch.no_grad():
            logp = (
                model(tokens, experts="math")
                .logits.double()
                .log_softmax(-1)[0, :-1]
                .gather(-1, tokens[0, 1:, None])[:, 0]
            )
        total += logp[-len(gold(row)) - 1 :].sum().item()
    assert together.likelihood[0].item() == pytest.approx(total / len(examples), rel=1e-4)


def count_forwards(model):
    calls = []
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: calls.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    return calls, handle


def test_a_generation_is_one_batch_and_memory_cuts_it(tiny, examples):
    model, tokenizer, _ = tiny
    calls, handle = count_forwards(model)
    config = {"population": 8, "iterations": 1, "score": "likelihood"}
    try:
        search(examples, NAMES, config=CEMConfig(**config))
        assert calls == [8 * 4, 4]  # all candidates with all examples at once; then the centre
        calls.clear()
        small = Examples(model, tokenizer, examples.rows, gold=gold, memory=examples.memory)
        small.memory = small.memory / small.chunk() * 3
        assert small.chunk() == 3
        search(small, NAMES, config=CEMConfig(**config))
        assert calls == [3 * 4, 3 * 4, 2 * 4, 4]
        calls.clear()
        search(examples, NAMES, config=CEMConfig(population=8, iterations=1))
        # one batch's decoding, not eight: forwards for the longest answer of any, and one for the likelihood
        assert len(calls) <= 2 * (examples.sampler.max_new_tokens + 1)
    finally:
        handle.remove()


def test_more_experts_cost_no_forward(tiny, examples):
    model, _, bank = tiny
    counts = []
    many = {f"e{i}": bank[NAMES[i % 3]] for i in range(12)}
    for count in (2, 12):
        calls, handle = count_forwards(model)
        search(
            examples, dict(list(many.items())[:count]), config=CEMConfig(population=4, iterations=2, score="likelihood")
        )
        handle.remove()
        counts.append(calls)
    assert counts[0] == counts[1]


# --- the search


def test_search_finds_what_the_reward_wants(tiny, examples):
    """A fitness that depends on alpha alone, through the likelihood's place: the search must reach its peak."""
    _, _, bank = tiny
    peak = torch.tensor([0.8, -0.4, 0.3])
    deltas = torch.stack([bank.vector(n) for n in NAMES])
    basis = torch.linalg.pinv(deltas.double())

    class Peak:
        scorer, gold, rows = object(), object(), None

        def __init__(self):
            self.bank = bank

        def __len__(self):
            return 1

        def chunk(self, samples=1):
            return 16

        def score(self, ids, *args, reward=True):
            from t2kernels.adapt.examples import Scores

            table, sigma, base, _ = next(iter(bank.table._arrays.values()))
            alpha = ((table[ids.long()] - base) / sigma).double() @ basis
            return Scores(-(alpha - peak).square().sum(1, keepdim=True).float(), None, [[""]] * len(ids))

    found = search(
        Peak(),
        NAMES,
        config=CEMConfig(population=64, iterations=30, score="reward", seed=1, patience=30, tolerance=1e-3),
    )
    torch.testing.assert_close(found.alpha[:, 0], peak, atol=0.02, rtol=0)
    assert found.scores[-1] > found.scores[0]
    assert "converged" in found.stopped
    again = search(
        Peak(),
        NAMES,
        config=CEMConfig(population=64, iterations=30, score="reward", seed=1, patience=30, tolerance=1e-3),
    )
    assert torch.equal(again.alpha, found.alpha)
    kept = search(
        Peak(), NAMES, config=CEMConfig(population=16, iterations=6, score="reward", low=0.0, high=1.0, take="best")
    )
    assert kept.scores == sorted(kept.scores)  # the best one stays in
    assert 0 <= kept.alpha.min() <= kept.alpha.max() <= 1


def test_few_shot_beats_the_base_on_a_task_without_an_expert(tiny, tmp_path):
    model, tokenizer, bank = tiny
    task = t2.tasks.load("sub")
    examples = Examples(model, tokenizer, task.split("train", 8, seed=3), task, gold)
    strategy = FewShot(model, tokenizer, examples, NAMES, CEMConfig(population=12, iterations=2, seed=2), name="sub")
    test = task.split("validation", 40)
    batch = tokenizer([row["prompt"] for row in test], padding=True, return_tensors="pt")
    right = {}
    for who, experts in (("base", None), ("found", strategy)):
        out = model.generate(**batch, experts=experts, max_new_tokens=22)[:, batch.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        right[who] = sum(task.right(t, row["answer"]) for t, row in zip(texts, test, strict=True))
    assert right["found"] >= right["base"] + 8  # of 40; .41 against .8 to .9 on 300
    manifest = bank["sub"].manifest
    assert manifest["mixed"].keys() == set(NAMES)
    assert manifest["search"]["seed"] == 2
    assert manifest["examples"] == 8
    bank["sub"].save(tmp_path / "sub")
    assert t2.Expert.load(tmp_path / "sub").manifest["score"] == manifest["score"]
    bank.remove("sub")


def choice_task(options, rows, norm="sum"):
    return t2.tasks.Task("own", lambda *_: rows, check="choice", labels=tuple(options), norm=norm)


def option_sums(model, tokenizer, row, options, expert):
    """log p of each option, by a forward each."""
    found = []
    for option in options:
        head = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{row['prompt']} {option}")["input_ids"]])
        with torch.no_grad():
            logp = model(ids, expert_ids=model.t2_bank.ids([expert])).logits.double().log_softmax(-1)[0, :-1]
        found.append(logp.gather(-1, ids[0, 1:, None])[head - 1 :].sum())
    return torch.stack(found)


def option_scores(model, tokenizer, row, options, expert, norm):
    """(which option is the likeliest in the task's norm, log p of each option among them)."""
    sums = option_sums(model, tokenizer, row, options, expert)
    compared = sums if norm == "sum" else sums / torch.tensor([len(option) for option in options])
    return int(compared.argmax()), sums.log_softmax(0)


@pytest.mark.parametrize("norm", ["sum", "length"])
def test_examples_with_options_are_answered_by_the_likeliest_and_nothing_is_written(tiny, monkeypatch, norm):
    model, tokenizer, bank = tiny
    options = ["=10", "=7+3=12", "a"]
    rows = [{**row, "answer": options[i % 3]} for i, row in enumerate(t2.tasks.load("math").split("train", 6))]
    examples = Examples(model, tokenizer, rows, choice_task(options, rows, norm))
    monkeypatch.setattr(model, "generate", None)
    experts = [None, "math", "code"]
    scores = examples.score(bank.ids(experts))
    for p, expert in enumerate(experts):
        found = [option_scores(model, tokenizer, row, options, expert, norm) for row in rows]
        right = [options.index(row["answer"]) for row in rows]
        assert scores.answers[p] == [options[best] for best, _ in found]
        assert scores.rewards[p].tolist() == [
            1.0 if best == i else -1.0 for (best, _), i in zip(found, right, strict=True)
        ]
        want = torch.stack([logp[i] for (_, logp), i in zip(found, right, strict=True)]).mean()
        torch.testing.assert_close(scores.likelihood[p].double(), want, rtol=0, atol=2e-5)
    assert len(set(map(tuple, scores.answers))) > 1  # the experts differ
    assert examples.score(bank.ids(experts), reward=False).rewards is None
    one = examples.score(bank.ids("code"))
    torch.testing.assert_close(one.likelihood, scores.likelihood[2:], rtol=1e-5, atol=1e-5)
    with pytest.raises(t2.InputError, match="nothing is drawn"):
        examples.score(bank.ids(experts), temperature=1.0, samples=2)
    with pytest.raises(t2.InputError, match="none of the options"):
        Examples(model, tokenizer, [{**rows[0], "answer": "b"}], choice_task(options, rows))


@pytest.mark.parametrize("norm", ["sum", "length"])
def test_the_expected_score_is_the_probability_of_the_right_option_at_equal_sharpness(tiny, norm):
    model, tokenizer, bank = tiny
    options = ["=10", "=7+3=12", "a"]
    rows = [{**row, "answer": options[i % 3]} for i, row in enumerate(t2.tasks.load("math").split("train", 6))]
    examples = Examples(model, tokenizer, rows, choice_task(options, rows, norm))
    experts = [None, "math", "code"]
    got = examples.score(bank.ids(experts)).expected
    for p, expert in enumerate(experts):
        sums = torch.stack([option_sums(model, tokenizer, row, options, expert) for row in rows])
        compared = sums if norm == "sum" else sums / torch.tensor([len(option) for option in options])
        best = math.inf  # the temperature of half the largest entropy, from a grid
        for t in torch.logspace(-3, 3, 4001, dtype=torch.float64):
            q = (compared / t).softmax(-1)
            off = abs(-torch.special.xlogy(q, q).sum(-1).mean().item() - math.log(3) / 2)
            if off < best:
                best, found = off, q
        want = found[torch.arange(6), [options.index(row["answer"]) for row in rows]]
        torch.testing.assert_close(got[p].double(), want, rtol=0, atol=2e-3)
    assert torch.equal(examples.score(bank.ids(experts), reward=False).expected, got)


def test_a_search_by_options_does_not_take_an_expert_for_its_boldness(tiny):
    """Candidates of a stub whose option scores are those of the base model times 1 + alpha: no choice changes."""
    from t2kernels.adapt.cem import cross_entropy_method
    from t2kernels.adapt.examples import Scores
    from t2kernels.rollout.labels import equally_sharp

    bank = tiny[2]
    torch.manual_seed(0)
    sums, right = torch.randn(16, 3), torch.randint(0, 3, (16, 1))
    sums.scatter_add_(1, right, torch.full((16, 1), 0.7))  # the base model knows something

    def score(alpha):
        bold = sums * (1 + alpha.sum((1, 2)).clamp(min=0))[:, None, None]
        p = bold.log_softmax(-1).gather(2, right.expand(len(alpha), 16, 1))[..., 0]
        q = equally_sharp(bold).gather(2, right.expand(len(alpha), 16, 1))[..., 0]
        yield Scores((p > math.log(0.5)).float(), p, None, q)

    make = lambda alpha, **facts: bank["math"]  # noqa: E731
    kept = cross_entropy_method(score, (2, 1), 16, make, CEMConfig.options(seed=3))
    assert not kept.alpha.any()  # the base model, a candidate of the first generation
    bold = cross_entropy_method(score, (2, 1), 16, make, CEMConfig(score="likelihood", take="best", seed=3))
    assert bold.alpha.sum().abs() > 0.1


def test_the_base_model_and_each_expert_are_candidates_of_the_first_generation(tiny):
    from t2kernels.adapt.cem import cross_entropy_method
    from t2kernels.adapt.examples import Scores

    def run(config, shape=(3, 2)):
        seen = []

        def score(alpha):
            seen.append(alpha.clone())
            # Only the second expert alone is right; every other candidate is a little worse the larger it is.
            wanted = torch.tensor([0.0, 1.0, 0.0])[None, : shape[0], None].expand(1, *shape)
            away = (alpha - wanted).abs().amax((1, 2))
            yield Scores(torch.where(away == 0, 1.0, -away)[:, None], None, [[""]] * len(alpha))

        return cross_entropy_method(score, shape, 1, lambda alpha, **facts: tiny[2]["math"], config), seen

    found, seen = run(CEMConfig(score="reward", population=16, iterations=2, take="best", known=True))
    assert torch.equal(seen[0][1:5, :, 1], torch.cat([torch.zeros(1, 3), torch.eye(3)]))
    assert torch.equal(seen[1][1], seen[0][3])  # the best so far stays in
    assert torch.equal(found.alpha, seen[0][3])
    assert found.scores[-1] == 1.0
    assert len(seen) == 2  # the best is not scored again: its answers are greedy
    _, cut = run(CEMConfig(score="reward", population=6, iterations=1, high=0.5, known=True))
    assert torch.equal(cut[0][1:4, :, 0], torch.tensor([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0]]))  # half of six, in range
    drawn = run(CEMConfig(score="reward", population=16, iterations=1))[1][0]
    assert not (drawn == 0).any()
    heavy = CEMConfig(score="reward", population=16, iterations=1, take="best", penalty=3.0, known=True)
    assert not run(heavy)[0].alpha.any()  # 1 - 3 for the second expert, -1 for the base model


def test_caution_by_options_is_of_the_standard_error_of_the_probability_of_the_right_one(tiny, monkeypatch):
    model, tokenizer, bank = tiny
    options = ["=10", "=7+3=12", "a"]
    rows = [{**row, "answer": options[i % 3]} for i, row in enumerate(t2.tasks.load("math").split("train", 6))]
    examples = Examples(model, tokenizer, rows, choice_task(options, rows))
    config = CEMConfig.options(population=6, iterations=1)
    strategy = FewShot(model, tokenizer, examples, NAMES, config, name="by-options", caution=None)
    base, found = examples.score(bank.ids([None, "by-options"])).expected.double()
    gains = found - base
    error = (gains.square().mean() - gains.mean() ** 2).clamp(min=0).sqrt() / 6**0.5
    assert strategy.name == "by-options"
    assert (strategy.gain, strategy.error) == pytest.approx((gains.mean().item(), error.item()), abs=1e-6)
    bank.remove("by-options")
    # Of a gain of 1.75 standard errors a search by options is sure, one by the reward is not.
    monkeypatch.setattr("t2kernels.adapt.few_shot.gain", lambda scores, expected=False: (1.75, 1.0))
    for few, name in ((examples, "by-options"), (Examples(model, tokenizer, rows, t2.tasks.load("math")), None)):
        config = CEMConfig(population=2, iterations=1, score="reward")
        assert FewShot(model, tokenizer, few, NAMES, config, name="by-options").name == name
        bank.remove("by-options")


def test_few_shot_on_a_file_with_labels_chooses_by_likelihood(tiny, tmp_path, monkeypatch):
    model, tokenizer, bank = tiny
    text = "text,label,split\n" + "".join(f"{i}+{i + 1},{'odd' if i % 2 else 'even'},train\n" for i in range(8))
    (tmp_path / "own.csv").write_text(text)
    monkeypatch.setattr(model, "generate", None)
    found = t2.adapt.few_shot.make_few_shot(model, tokenizer, NAMES, examples=tmp_path / "own.csv")
    try:
        assert found.found.candidates >= 32
        assert {text for texts in found.found.answers for text in texts} <= {"odd", "even"}
        assert len(found.found.answers) == 8
        assert set(found.choose(["1+2", "2+3"])) <= {None, "few-shot"}
    finally:
        bank.remove("few-shot")


def test_an_expert_that_gains_nothing_keeps_the_base_model(tiny, examples):
    model, tokenizer, bank = tiny
    nothing = {"same": bank.expert({n: torch.ones(k) for n, k in bank.matrices.items()})}
    config = CEMConfig(population=2, iterations=1)
    found = FewShot(model, tokenizer, examples, nothing, config, name="none")
    assert (found.gain, found.name, found.choose(["1+1?"])) == (0.0, None, [None])
    assert FewShot(model, tokenizer, examples, nothing, config, name="none", replace=True, caution=None).name == "none"
    with pytest.raises(ValueError, match="replace=True"):
        FewShot(model, tokenizer, examples, nothing, config, name="none")
    bank.remove("none")
    # One example more of four is within two standard errors, four of four is not.
    for right, kept in ((1, None), (4, "math")):
        counted = examples.prompts[:right]

        def reward(
            prompts, completions, answer, counted=counted
        ):  # the math expert shows its working, the base model does not
            return [float("," in c and p in counted) for p, c in zip(prompts, completions, strict=True)]

        few = Examples(model, tokenizer, examples.rows, reward, max_new_tokens=6)
        one = FewShot(
            model,
            tokenizer,
            few,
            {"m": bank["math"]},
            CEMConfig(population=1, iterations=1, mean=1.0, score="reward"),
            name="one",
        )
        assert one.gain == right / 4
        assert (one.name is None) == (kept is None)
        bank.remove("one")


def test_refine_makes_right_answers_likelier_and_moves_nothing_else(tiny, examples):
    model, _, bank = tiny
    weights = {n: p.clone() for n, p in model.named_parameters()}
    start = bank["math"]
    one = refine(examples, [[gold(row)] for row in examples.rows], start, steps=6, lr=0.02)
    bank.add("refined", one)
    likelihood = examples.score(bank.ids(["math", "refined"]), reward=False).likelihood
    bank.remove("refined")
    assert likelihood[1] > likelihood[0] + 0.3
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    assert "refined" not in bank
    assert not bank.in_training
    assert one == refine(examples, [[gold(row)] for row in examples.rows], start, steps=6, lr=0.02)
    with pytest.raises(ValueError, match="lists of completions"):
        refine(examples, [["=1"]])
    with pytest.raises(ValueError, match="no example has a right completion"):
        refine(examples, [[] for _ in examples.rows])


# --- refused before any work


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": []}, "there are no examples"),
        ({"rows": "sub"}, "wanted a list of dicts"),
        ({"rows": [{"answer": "1"}]}, "example 0"),
        ({"rows": [{"prompt": "1+1?", "answer": "2"}, {"prompt": "", "answer": "2"}]}, "example 1"),
        ({"rows": [{"prompt": "1+1?"}]}, "its gold answer|answer"),
        ({"reward": None, "gold": None}, "a reward, a gold answer, or both"),
        ({"reward": lambda prompts, completions, **columns: [0.5] * 7}, "7 values for"),
        ({"gold": "solution"}, "'solution' is None"),
        ({"rows": [{"prompt": "1+" * 200, "answer": "2"}]}, "positions"),
    ],
)
def test_examples_that_cannot_be_used(tiny, change, message):
    model, tokenizer, _ = tiny
    task = t2.tasks.load("sub")
    calls, handle = count_forwards(model)
    settings = {
        "rows": task.split("train", 2),
        "reward": task,
        "gold": lambda row: "=" + row.get("answer", ""),
    } | change
    with pytest.raises((ValueError, TypeError), match=message):
        Examples(model, tokenizer, **settings)
    handle.remove()
    assert not calls


@pytest.mark.parametrize(
    "experts, config, message",
    [
        ([], {}, "at least one"),
        ("math", {}, "wanted a list"),
        (["math", "math"], {}, "occurs twice"),
        (["nobody"], {}, "no expert named 'nobody'"),
        (NAMES, {"population": 80}, "rows"),
        (NAMES, {"per": "head"}, "'matrix'"),
        (NAMES, {"mixing": "sum"}, "'logits'"),
    ],
)
def test_searches_that_cannot_work(tiny, examples, experts, config, message):
    model = tiny[0]
    calls, handle = count_forwards(model)
    with pytest.raises((ValueError, KeyError), match=message):
        search(examples, experts, config=CEMConfig(**config))
    handle.remove()
    assert not calls


@pytest.mark.parametrize(
    "setting",
    [
        {"population": 0},
        {"elite": 0},
        {"std": 0},
        {"score": "x"},
        {"samples": 2},
        {"low": 1.0, "high": 0.0},
        {"take": "x"},
        {"penalty": -1.0},
    ],
)
def test_settings_that_cannot_be(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        CEMConfig(**setting)


def test_the_papers_settings():
    c = CEMConfig.paper(iterations=2)
    assert (c.population, c.elites, c.low, c.high, c.std, c.per, c.mixing, c.iterations) == (
        32,
        6,
        0.0,
        1.0,
        0.5,
        "matrix",
        "logits",
        2,
    )


def test_the_papers_search_has_no_prior_and_no_known_candidates():
    c = CEMConfig.paper()
    assert (c.known, c.penalty, c.score, c.take, c.patience) == (False, 0.0, "reward", "best", 50)


def test_a_score_needs_what_it_needs(tiny, examples):
    model, tokenizer, _ = tiny
    task = t2.tasks.load("sub")
    with pytest.raises(ValueError, match="needs gold"):
        search(Examples(model, tokenizer, examples.rows, task), NAMES)
    with pytest.raises(ValueError, match="examples with options"):
        search(examples, NAMES, config=CEMConfig.options())
    with pytest.raises(ValueError, match="needs a reward"):
        search(Examples(model, tokenizer, examples.rows, gold=gold), NAMES)
