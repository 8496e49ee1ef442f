"""What rows start with is read once: the numbers and gradients of whole rows in fp64, and fewer tokens."""

import contextlib

import pytest
import torch
import transformers as tf

import t2kernels as t2
from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.prefix import MIN_PREFIX
from t2kernels.train.policy.options import pieces
from t2kernels.train.policy.scores import TokenScorer
from t2kernels.train.policy.shared import divide, empty_cache
from tests.helpers.families import COMMON, GQA, MOE_FAMILIES, QUIET, build

FAMILIES = ["llama", "gemma3", "gpt2", "qwen3_moe", "gpt_neox", "opt", "falcon", "deepseek_v3"]


def random(length):
    return torch.randint(3, 60, (length,)).tolist()


def starting(start, lengths=(3, 9, 5, 1)):
    """A rollout of prompts with a common start, and completions of several lengths."""
    return Rollout.of([start + random(n) for n in lengths], [random(1 + n % 3) for n in lengths], 0)


def in_groups():
    """Two prompts, three completions each, in turn."""
    prompts = [random(30), random(24)]
    return Rollout.of([prompts[i % 2] for i in range(6)], [random(n) for n in (1, 4, 2, 5, 3, 3)], 0)


@contextlib.contextmanager
def tokens_read(model):
    """The list gets the number of tokens of each forward."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


def found(model, drawn, share, learned, routing=None, options=None, whole=False):
    """(log-probabilities, entropies, KL, those of `options`, gradients of a sum of them), and the tokens read."""
    scorer = TokenScorer(2**28, 1.0, "reverse", whole=whole, share=share)
    reference = (lambda: model.t2_bank.routing.hold(None)) if routing else contextlib.nullcontext
    weights = torch.linspace(-1, 1, drawn.completion.numel(), dtype=torch.float64).reshape(drawn.completion.shape)
    scorer._probe(model, drawn)
    with tokens_read(model) as tokens:
        scores = scorer.score(model, drawn, routing or {}, reference if routing else None, options=options)
    parts = [scores.log_probs, scores.kl, None if scores.options is None else scores.options.sum(-1)]
    loss = sum((part * weights).sum() for part in parts if part is not None)
    gradients = torch.autograd.grad(loss, learned)
    return [p for p in (*parts, scores.entropy) if p is not None] + list(gradients), tokens


def assert_same(got, wanted):
    """To the fp32 in which some families have their norms and routers."""
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def weights_of(model):
    """The first and the last matrix of the blocks: what changes keys of the prefix, and what does not."""
    blocks = [p for n, p in model.named_parameters() if p.dim() == 2 and (".0." in n or ".1." in n)]
    return [blocks[0].requires_grad_(True), blocks[-1].requires_grad_(True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [lambda: starting(random(25)), in_groups])
@pytest.mark.parametrize("whole", [False, True])
def test_numbers_and_gradients_are_those_of_whole_rows(family, rows, whole):
    model, drawn = build(family).double(), rows()
    if family in MOE_FAMILIES:
        model.set_experts_implementation("eager")  # the grouped matmul knows no fp64
    learned = weights_of(model)
    options = torch.randint(3, 60, (*drawn.completion.shape, 4))
    wanted, plain = found(model, drawn, False, learned, options=options, whole=whole)
    got, tokens = found(model, drawn, True, learned, options=options, whole=whole)
    assert len(tokens) == 2
    assert sum(tokens) < 0.8 * sum(plain)
    assert_same(got, wanted)


@pytest.mark.parametrize("names", [["a", "b"] * 3, ["a", None] * 3, ["b"] * 6])
@pytest.mark.parametrize("rows", [lambda: starting(random(25), (3, 9, 5, 1, 2, 7)), in_groups])
def test_each_expert_reads_the_start_for_itself(names, rows):
    model, drawn = build("llama").double(), rows()
    bank = t2.patch_model(model)
    learned = []
    for name in sorted(set(names) - {None}):
        start = bank.expert({n: 1 + 0.3 * torch.randn(k) for n, k in bank.matrices.items()})
        learned += bank.start_training(name, init=start)
    routing = {"expert_ids": bank.ids(names[0] if len(set(names)) == 1 else names)}
    wanted, _ = found(model, drawn, False, learned, routing)
    got, tokens = found(model, drawn, True, learned, routing)
    assert len(tokens) == 4  # of the policy and of the reference
    assert_same(got, wanted)


@pytest.mark.parametrize(("start", "forwards"), [(25, 2), (34, 1), (60, 1)])
def test_rows_longer_than_a_sliding_window_are_read_whole(start, forwards):
    kinds = ["sliding_attention", "full_attention"]
    model = build("gemma3", sliding_window=40, layer_types=kinds).double()
    drawn = starting(random(start))
    learned = weights_of(model)
    wanted, _ = found(model, drawn, False, learned)
    got, tokens = found(model, drawn, True, learned)
    assert len(tokens) == forwards
    assert_same(got, wanted)


def test_models_without_a_plain_cache_are_read_whole():
    """States of another kind, activations that are computed again, and a module that is not transformers' own."""
    assert empty_cache(build("llama")) is not None
    mamba = tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=60, **QUIET)
    hybrid = tf.Qwen3NextConfig(
        **COMMON, **GQA, **QUIET, head_dim=8, layer_types=["linear_attention", "full_attention"]
    )
    for config in (mamba, hybrid):
        assert empty_cache(tf.AutoModelForCausalLM.from_config(config)) is None
    model = build("llama")
    model.gradient_checkpointing_enable()
    assert empty_cache(model) is None
    assert empty_cache(torch.nn.Linear(2, 2)) is None


def test_adapters_of_peft_share_and_virtual_tokens_do_not():
    peft = pytest.importorskip("peft")
    drawn = starting(random(25))
    lora = peft.get_peft_model(build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for n, p in lora.named_parameters():
        p.data = p.data.double() + (0.1 * torch.randn_like(p) if "lora_" in n else 0)
    learned = [p for p in lora.parameters() if p.requires_grad]
    wanted, _ = found(lora, drawn, False, learned)
    got, tokens = found(lora, drawn, True, learned)
    assert len(tokens) == 2
    assert_same(got, wanted)
    tuned = peft.get_peft_model(build("llama"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert empty_cache(tuned) is None


def test_rows_are_divided_where_that_leaves_fewer_tokens():
    start, B = random(40), 6
    trunk = divide(starting(start, (1, 2, 3, 4, 5, 6)), [0] * B)
    assert trunk.prefixes.tolist() == [start]
    assert trunk.group.tolist() == [0] * B
    each = divide(in_groups(), [0] * B)  # nothing common, but the rows of a prompt
    assert each.group.tolist() == [0, 1] * 3
    assert each.first.tolist() == [0, 1]
    assert each.prefixes.shape == (2, 29)  # all but the last token of the longer prompt
    assert divide(in_groups(), list(range(B))) is None  # an expert each
    assert divide(starting(random(MIN_PREFIX - 2), (1, 1)), [0, 0]) is None  # too short
    assert divide(starting([], (30, 28)), [0, 0]) is None
    assert divide(starting(random(20), (60, 70, 80)), [0] * 3) is None  # too little of the whole


def test_a_piece_counts_rows_not_options():
    """Options of one token share a row; others have a row each."""
    single, double = (random(20), [[5], [6], [7]]), (random(20), [[5, 6], [7]])

    def sizes(rows):
        n, texts = len(rows), [["x"] * len(options) for _, options in rows]
        given = [[1.0] * len(t) for t in texts], [None] * n, [1.0] * n, ["sum"] * n
        made = pieces(rows, [""] * n, texts, *given, 0, 4, torch.device("cpu"))
        return [(len(piece.prompts), len(piece.rollout)) for piece in made]

    assert sizes([single] * 6) == [(4, 4), (2, 2)]
    assert sizes([double] * 3) == [(2, 4), (1, 2)]
    assert sizes([single] * 4 + [double]) == [(4, 4), (1, 2)]
