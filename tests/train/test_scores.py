"""Log-probabilities, KL and entropy in chunks: the numbers and gradients of fp64, and the memory of one chunk."""

import contextlib
import copy
import weakref

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

import t2kernels as t2
from t2kernels.layers.dense.head import head_of
from t2kernels.layers.routing.route import Route
from t2kernels.ops import dispatch
from t2kernels.rollout.generation import Rollout, completion_logits
from t2kernels.train.policy import reading
from t2kernels.train.policy.reading import read
from t2kernels.train.policy.scores import TokenScorer, finish_of, hidden_states
from tests.helpers.families import COMMON, GQA, QUIET, build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FINISHED = {
    "gemma2": lambda: build("gemma2", final_logit_softcapping=2.0),
    "cohere": lambda: noisy(tf.CohereConfig(**COMMON, **GQA, **QUIET, logit_scale=0.25)),
    "granite": lambda: noisy(tf.GraniteConfig(**COMMON, **GQA, **QUIET, logits_scaling=8.0)),
    "llama": lambda: build("llama"),
    "gpt2": lambda: build("gpt2"),
}


def noisy(config):
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data.mul_(3).add_(torch.randn_like(p) * 0.05)
    return model.requires_grad_(False)


def rollout(rows=5, prompt=4, length=6, vocabulary=60) -> Rollout:
    ids = torch.randint(3, vocabulary, (rows, prompt + length))
    mask = torch.ones_like(ids)
    lengths = torch.randint(1, length + 1, (rows,))
    lengths[0] = length
    completion = torch.arange(length) < lengths[:, None]
    mask[:, prompt:] = completion
    for i in range(1, rows):
        mask[i, : i % prompt] = 0
    return Rollout(ids, mask, completion)


@contextlib.contextmanager
def added(weight, change, sign):
    """The reference is the same model with one weight changed."""
    weight.data += sign * change
    yield
    weight.data -= sign * change


def last_weight(model):
    """A weight of the last block, to train."""
    return [p for n, p in model.named_parameters() if p.dim() == 2 and ("layers.1" in n or ".h.1." in n)][-1]


def exact(model, drawn, reference, temperature, direction, weights):
    """(scores, the gradient of a random sum of them), all logits at once in the model's own arithmetic, then fp64."""
    with torch.no_grad(), reference():
        q = torch.log_softmax(completion_logits(model, drawn).double() / temperature, -1)
    p = torch.log_softmax(completion_logits(model, drawn).double() / temperature, -1)
    taken = p.gather(2, drawn.tokens[..., None])[..., 0]
    a, b = (p, q) if direction == "reverse" else (q, p)
    kl = (a.exp() * (a - b)).sum(-1)
    ((taken * weights[0] + kl * weights[1]) * drawn.completion).sum().backward()
    return taken, kl, -(p.exp() * p).sum(-1)


@pytest.mark.parametrize("family", FINISHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "direction"), [(1.0, "reverse"), (0.7, "forward"), (1.6, "reverse")])
def test_chunks_give_the_numbers_and_gradients_of_the_plain_form(family, dtype, temperature, direction):
    model = FINISHED[family]().to(dtype)
    drawn, weight = rollout(), last_weight(model)
    change = 0.3 * torch.randn_like(weight)
    reference = lambda: added(weight, change, 1)  # noqa: E731
    weights = torch.randn(2, *drawn.completion.shape)
    weight.requires_grad_(True)
    taken, kl, entropy = exact(model, drawn, reference, temperature, direction, weights)
    wanted, weight.grad = weight.grad, None
    for memory in (2**28, 4 * 6 * 60 * 7):  # one chunk, and chunks of seven positions
        scorer = TokenScorer(memory, temperature, direction)
        found = scorer.score(model, drawn, {}, reference)
        assert not scorer.whole
        (found.log_probs * weights[0] + found.kl * weights[1]).sum().backward()
        at = drawn.completion
        # The head of bf16 rounds its products: eager differs from itself by as much in a batch of another size.
        loose = {"atol": 2e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.06, "rtol": 0.03}
        torch.testing.assert_close(found.log_probs[at].double(), taken[at], **loose)
        torch.testing.assert_close(found.kl[at].double(), kl[at], **loose)
        torch.testing.assert_close(found.entropy[at].double(), entropy[at], **loose)
        assert not found.log_probs[~at].any()
        assert not found.kl[~at].any()
        error = (weight.grad - wanted).norm() / wanted.norm()
        assert error < (1e-4 if dtype is torch.float32 else 0.03)
        weight.grad = None


KERNEL = pytest.param(
    True,
    marks=pytest.mark.skipif(
        dispatch.device_of(DEVICE).unsupported("triton") is not None, reason="no Triton interpreter here"
    ),
    id="kernel",
)


def by_formula(x, base, tokens, temperature, direction):
    """(log p of the tokens, entropy, KL) in x's precision, by the formulas."""
    p = torch.log_softmax(x / (temperature or 1), -1)
    q = torch.log_softmax(base / (temperature or 1), -1)
    a, b = (p, q) if direction == "reverse" else (q, p)
    return p.gather(1, tokens), -(p.exp() * p).sum(-1), (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("fused", [pytest.param(False, id="torch"), KERNEL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [50, 4099])
def test_numbers_and_gradients_at_the_logits_are_those_of_fp64(poison, fused, dtype, vocabulary):
    """Every term by itself, against autograd of the formulas in fp64; also where the policy is sure."""
    spread = torch.tensor([0.1, 1, 3, 10, 30, 1, 1])[:, None]
    logits = (torch.randn(7, vocabulary) * spread).to(dtype).to(DEVICE)
    base = torch.randn(7, vocabulary).to(dtype).to(DEVICE)
    tokens = torch.randint(0, vocabulary, (7, 3), device=DEVICE)
    tokens[0] = 4  # the same token twice
    tokens[1, 0] = vocabulary - 1
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
    for direction in ("reverse", "forward"):
        for temperature in (0.0, 0.5, 1.0):
            x, y = logits.clone().requires_grad_(True), logits.double().requires_grad_(True)
            taken, entropy, kl = read(x, lambda: base, tokens, temperature, direction, fused)
            want = by_formula(y, base.double(), tokens, temperature, direction)
            assert taken.dtype == entropy.dtype == kl.dtype == torch.float32
            for mine, exact in zip((taken, entropy, kl), want, strict=True):
                torch.testing.assert_close(mine.double(), exact.detach(), atol=2e-5, rtol=2e-5)
            assert not entropy.requires_grad
            w, v = torch.randn(7, 3, device=DEVICE), torch.randn(7, device=DEVICE)
            ((taken * w).sum() + (kl * v).sum()).backward()
            ((want[0] * w).sum() + (want[2] * v).sum()).backward()
            assert x.grad.dtype == dtype
            torch.testing.assert_close(x.grad.double(), y.grad, atol=2e-5 + rounding, rtol=1e-4 + rounding)
            x.grad = y.grad = None
            taken, _, none = read(x, None, tokens, temperature, direction, fused)
            (taken * w).sum().backward()
            (by_formula(y, base.double(), tokens, temperature, direction)[0] * w).sum().backward()
            assert none is None
            torch.testing.assert_close(x.grad.double(), y.grad, atol=2e-5 + rounding, rtol=1e-4 + rounding)


@pytest.mark.parametrize("wrong", [False, pytest.param(True, id="wrong")])
def test_a_kernel_that_gives_other_numbers_is_not_used(monkeypatch, caplog, wrong):
    token_scores = pytest.importorskip("t2kernels.ops.impls.triton.token_scores")
    if dispatch.device_of(DEVICE).unsupported("triton") is not None:
        pytest.skip("no Triton interpreter here")
    if wrong:
        right = token_scores.backward
        monkeypatch.setattr(token_scores, "backward", lambda *args: right(*args) + 1e-3)
    assert reading.agrees.__wrapped__(DEVICE) is not wrong
    assert ("its kernel failed there" in caplog.text) is wrong


@pytest.mark.parametrize("fused", [pytest.param(False, id="torch"), KERNEL])
def test_a_token_that_cannot_be_drawn_adds_nothing_and_nan_shows(poison, fused):
    """Logits of -inf have probability 0; a NaN in a row makes that row NaN and no other."""
    logits = torch.randn(3, 2100, device=DEVICE)
    logits[0, 7:2000] = -torch.inf
    logits[2, 5] = torch.nan
    base, tokens = torch.randn(3, 2100, device=DEVICE), torch.tensor([[2050], [3], [4]], device=DEVICE)
    x = logits.clone().requires_grad_(True)
    taken, entropy, kl = read(x, lambda: base, tokens, 1.0, "reverse", fused)
    there = torch.cat([torch.arange(7), torch.arange(2000, 2100)]).to(DEVICE)
    p = logits[0, there].double().log_softmax(0)
    q = base[0].double().log_softmax(0)[there]
    torch.testing.assert_close(kl[0].double(), (p.exp() * (p - q)).sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy[0].double(), -(p.exp() * p).sum(), atol=1e-5, rtol=1e-5)
    (taken.sum() + kl.sum()).backward()
    assert taken[:2].isfinite().all()
    assert x.grad[:2].isfinite().all()
    assert (x.grad[0, 7:2000] == 0).all()
    for values in (taken[2], entropy[2], kl[2]):
        assert values.isnan().all()


class Living(TorchDispatchMode):
    """The most bytes of tensors with a row of logits that lived at once, the head's weight left out."""

    def __init__(self, vocabulary: int, kept: int) -> None:
        super().__init__()
        self.vocabulary, self.kept = vocabulary, kept
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(t, torch.Tensor) or not t.dim() or t.shape[-1] != self.vocabulary:
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key == self.kept or key in self.alive:
                continue
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_take_the_memory_that_is_set_whatever_the_batch(large_vocabulary, kl, dtype):
    model = copy.deepcopy(large_vocabulary[0]).to(dtype)
    weight = model.model.layers[-1].mlp.down_proj.weight
    weight.requires_grad_(True)
    budget = 6 * 4 * 50_000 * 4  # four positions of six fp32 tensors
    peaks = []
    for rows in (2, 8):
        drawn = rollout(rows=rows, vocabulary=50_000)
        drawn.completion[:] = True
        drawn.mask[:, 4:] = 1
        scorer = TokenScorer(budget, 1.0, "reverse")
        reference = (lambda: added(weight, 0.1, 1)) if kl else None
        scorer.score(model, drawn, {}, reference)  # the probe
        with Living(50_000, model.lm_head.weight.untyped_storage()._cdata) as living:
            found = scorer.score(model, drawn, {}, reference)
            (found.log_probs.sum() + (0 if found.kl is None else found.kl.sum())).backward()
        peaks.append(living.peak)
        assert 0 < living.peak <= budget
        with Living(50_000, model.lm_head.weight.untyped_storage()._cdata) as plain:
            whole = TokenScorer(budget, 1.0, "reverse", whole=True).score(model, drawn, {}, reference)
            whole.log_probs.sum().backward()
        assert plain.peak > rows * 6 * 50_000 * 4 * 1.5
    assert peaks[1] <= 1.05 * peaks[0]


def test_a_head_that_is_not_understood_is_run_whole():
    model = build("llama")
    drawn = rollout()
    model.lm_head.register_forward_hook(lambda module, args, out: out)
    assert finish_of(model, drawn) is not None
    model.register_forward_hook(lambda module, args, out: _squared(out))
    scorer = TokenScorer(1000, 1.0, "reverse")
    found = scorer.score(model, drawn, {})
    assert scorer.whole
    wanted = torch.log_softmax(completion_logits(model, drawn), -1).gather(2, drawn.tokens[..., None])[..., 0]
    torch.testing.assert_close(found.log_probs[drawn.completion], wanted[drawn.completion])


def _squared(out):
    out.logits = out.logits * out.logits.abs()
    return out


def test_hidden_states_are_those_of_the_head_and_nothing_stays():
    model = build("gemma2", final_logit_softcapping=2.0)
    drawn = rollout()
    states = hidden_states(model, drawn)
    assert not model.lm_head._forward_pre_hooks
    raw = head_of(model)(states)
    torch.testing.assert_close(finish_of(model, drawn)(raw), completion_logits(model, drawn), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(raw, completion_logits(model, drawn), rtol=1e-3, atol=1e-3)  # there is a soft cap


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["delta", "factored"])
def test_a_patched_head_reads_each_position_with_its_expert_also_in_backward(checkpointing, form):
    model = build("llama")
    bank = t2.patch_model(model, ["lm_head", "model.layers.1.mlp.up_proj"], rank=None, form=form)
    parameters = [p for name in ("a", "b") for p in bank.start_training(name)]
    for p in parameters:
        p.data += 0.3 * torch.randn_like(p)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    drawn = rollout()
    ids = bank.ids(["a", "b", "a", "b", "a"])
    weights = torch.randn(2, *drawn.completion.shape)

    def at_head(rows):
        return bank.routing.within(head_of(model), None if rows is None else Route(ids[rows]))

    def gradients(whole, memory):
        for p in parameters:
            p.grad = None
        scorer = TokenScorer(memory, 1.0, "reverse", whole=whole)
        found = scorer.score(model, drawn, {"expert_ids": ids}, lambda: bank.routing.hold(None), at_head)
        (found.log_probs * weights[0] + found.kl * weights[1]).sum().backward()
        assert scorer.whole == whole
        return [found.log_probs.detach(), found.kl.detach(), *(p.grad.clone() for p in parameters)]

    for found, wanted in zip(gradients(False, 4 * 6 * 60 * 7), gradients(True, 1), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-5)
    assert all(p.grad.abs().sum() > 0 for p in parameters)


def test_more_tokens_of_a_position():
    model, drawn = build("llama"), rollout()
    options = torch.randint(0, 60, (*drawn.completion.shape, 3))
    found = TokenScorer(4 * 6 * 60 * 7, 1.0, "reverse").score(model, drawn, {}, options=options)
    wanted = torch.log_softmax(completion_logits(model, drawn), -1).gather(2, options)
    torch.testing.assert_close(found.options[drawn.completion], wanted[drawn.completion], rtol=1e-4, atol=1e-4)


def test_what_a_token_keeps_for_backward_is_counted_without_weights():
    model = build("llama")
    drawn = rollout()
    bank = t2.patch_model(model, rank=4, form="delta")
    bank.start_training("a")
    scorer = TokenScorer(2**28, 1.0, "reverse")
    found = scorer.activation_bytes(model, drawn, lambda experts: {"expert_ids": bank.ids("a")})
    seen = []
    one = drawn.split(1)[0]
    weights = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            seen.append(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        states = hidden_states(model, one, expert_ids=bank.ids("a"))
    by_hand = sum({s.data_ptr(): s.nbytes() for s in seen}.values()) / one.ids.shape[1]
    assert found == pytest.approx(by_hand, rel=0.05)
    assert 32 * 4 < found < sum(p.nbytes for p in model.parameters())
    assert states.requires_grad
