"""Log-probabilities and KL of a rollout's tokens, with few logits in memory at a time.

The head is applied to a chunk of positions, what is needed is read from its logits, and the logits are dropped; the
backward pass computes them again. The memory of logits is then the same for any batch and any length.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2kernels.layers.dense.head import head_of
from t2kernels.rollout.generation import Rollout, completion_logits

from .reading import bytes_of_a_logit, read
from .shared import shared_logits

Context = Callable[[], contextlib.AbstractContextManager[object]]
AtHead = Callable[[Tensor | None], contextlib.AbstractContextManager[object]]


def _anywhere(rows: Tensor | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Scores:
    """What the loss needs of each token of a rollout.

    log_probs: [B, C] fp32 or more; entropy: [B, C], without a gradient; kl: [B, C], or None without a reference.
    Outside the completions all are 0.
    options: [B, C, K] log-probabilities of the tokens that `score` was asked for, or None
    """

    log_probs: Tensor
    entropy: Tensor
    kl: Tensor | None = None
    options: Tensor | None = None


class TokenScorer:
    """Scores the tokens of rollouts.

    memory: bytes of all logits that live at once
    temperature, direction: as in `SVFConfig`
    whole: compute all logits of a rollout at once, as it is done for a model whose head cannot be called by itself
    share: read what rows start with once, as `shared_logits` does
    """

    def __init__(
        self, memory: int, temperature: float, direction: str, whole: bool = False, share: bool = False
    ) -> None:
        self.memory: int = memory
        self.temperature: float = temperature
        self.direction: str = direction
        self.whole: bool = whole
        self._logits: Callable[..., Tensor] = shared_logits if share else completion_logits
        self._activation: float | None = None
        self._finish: Callable[[Tensor], Tensor] | None = None  # from the head's output to the model's logits

    def score(
        self,
        model: nn.Module,
        rollout: Rollout,
        routing: dict[str, Tensor],
        reference: Context | None = None,
        at_head: AtHead = _anywhere,
        options: Tensor | None = None,
    ) -> Scores:
        """The scores of a rollout's tokens under the policy, with gradients.

        routing: arguments of the policy's forward
        reference: a context in which the model is the reference of the KL; None: no KL
        at_head: rows -> a context in which the head, called by itself, computes what it does in the forward of the
            policy; rows: [T] int64, the row of the rollout that each position is of; None: of the reference
        options: [B, C, K] int64, more tokens whose log-probabilities are wanted at each position
        """
        mask = rollout.completion
        rows, columns = mask.nonzero(as_tuple=True)
        tokens = rollout.tokens[mask][:, None]
        if options is not None:
            tokens = torch.cat([tokens, options[rows, columns]], 1)
        if self.whole or not self._probe(model, rollout):
            found = self._at_once(model, rollout, routing, reference, tokens)
        else:
            base = None
            if reference is not None:
                with torch.no_grad(), reference():
                    base = hidden_states(model, rollout, self._logits)[mask]
            states = hidden_states(model, rollout, self._logits, **routing)[mask]
            found = self._in_chunks(model, states, base, tokens, rows, reference, at_head)
        taken, entropy, kl = found

        def spread(values: Tensor) -> Tensor:
            empty = values.new_zeros(*mask.shape, *values.shape[1:])
            return empty.index_put((rows, columns), values)

        return Scores(
            spread(taken[:, 0]),
            spread(entropy),
            None if kl is None else spread(kl),
            None if options is None else spread(taken[:, 1:]),
        )

    def _in_chunks(
        self,
        model: nn.Module,
        states: Tensor,
        base: Tensor | None,
        tokens: Tensor,
        rows: Tensor,
        reference: Context | None,
        at_head: AtHead,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        head: Any = head_of(model)
        size = max(1, self.memory // (bytes_of_a_logit(states) * vocabulary(model, head)))

        def run(h: Tensor, b: Tensor | None, wanted: Tensor, at: Tensor) -> tuple[Tensor | None, ...]:
            def of_base() -> Tensor:
                assert b is not None
                assert reference is not None
                with torch.no_grad(), reference(), at_head(None):
                    return self._finished(head(b))

            with at_head(at):
                logits = self._finished(head(h))
            return read(logits, None if b is None else of_base, wanted, self.temperature, self.direction)

        parts = zip(
            states.split(size), [None] * len(rows) if base is None else base.split(size), tokens.split(size),
            rows.split(size), strict=False,
        )  # fmt: skip
        found = [checkpoint(run, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        taken, entropy, kl = zip(*found, strict=True)
        return torch.cat(taken), torch.cat(entropy), None if base is None else torch.cat(kl)

    def _at_once(
        self, model: nn.Module, rollout: Rollout, routing: dict[str, Tensor], reference: Context | None, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = rollout.completion

        def of_base() -> Tensor:
            assert reference is not None
            with torch.no_grad(), reference():
                return self._logits(model, rollout)[mask]

        logits = self._logits(model, rollout, **routing)[mask]
        return read(logits, None if reference is None else of_base, tokens, self.temperature, self.direction)

    def activation_bytes(
        self, model: nn.Module, rollout: Rollout, routing: Callable[[Sequence[str | None]], dict[str, Tensor]]
    ) -> float:
        """Bytes that a token keeps for the backward pass beside the weights. Measured once, on the shortest row.

        model: not wrapped; routing: of the experts of a rollout
        """
        if self._activation is None:
            self._probe(model, rollout)
            one = rollout.split(1)[0]
            own = {t.untyped_storage().data_ptr() for part in (model.parameters(), model.buffers()) for t in part}
            kept: dict[int, int] = {}

            def pack(t: Tensor) -> Tensor:
                storage = t.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return t

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                (completion_logits if self.whole else hidden_states)(model, one, **routing(one.experts))
            self._activation = sum(kept.values()) / one.ids.shape[1]
        return self._activation

    # --- the head by itself

    def _finished(self, logits: Tensor) -> Tensor:
        return logits if self._finish is None else self._finish(logits)

    def _probe(self, model: nn.Module, rollout: Rollout) -> bool:
        """Whether the head's output, and what the model does to it, are understood. Asks the model once."""
        if self._finish is None:
            self._finish = finish_of(model, rollout)
            self.whole = self._finish is None
        return not self.whole


@contextlib.contextmanager
def captured(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the block, the head gets no positions in this thread; the list gets what it would have got."""
    seen: list[Tensor] = []
    thread = threading.get_ident()

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def hidden_states(
    model: nn.Module, rollout: Rollout, logits: Callable[..., Tensor] = completion_logits, **routing: Tensor
) -> Tensor:
    """[B, C, width]: what the head makes the logits of each token of the completion of.

    logits: `completion_logits`, or another function of the same arguments that runs the model on the completions last
    """
    head: Any = head_of(model)
    with captured(head) as seen:
        logits(model, rollout, **routing)
    return seen[-1][:, -rollout.completion.shape[1] :]


@torch.no_grad()
def finish_of(model: nn.Module, rollout: Rollout) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's output: nothing, a factor or a soft cap, whose values its config names.

    Compares each with the model's own logits for one row of a rollout. Returns None if the head is not called once on
    the hidden states, and if none of them gives the model's logits.
    """
    head = head_of(model)
    if head is None:
        return None
    seen: list[Tensor] = []
    one = rollout.split(1)[0]
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        own = completion_logits(model, one)
    finally:
        handle.remove()
    length = one.completion.shape[1]
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3 or seen[0].shape[1] < length:
        return None
    raw = seen[0][:, -length:]
    for finish in _candidates(model):
        found = finish(raw)
        if found.shape == own.shape and torch.equal(found.to(own.dtype), own):
            return finish
    return None


def _candidates(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    while hasattr(model, "module"):
        model = model.module
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("logit_scale", "logits_scaling", "output_multiplier"):
            if isinstance(k := getattr(part, name, None), (int, float)):
                yield lambda logits, k=k: logits * k
                yield lambda logits, k=k: logits / k
        if isinstance(k := getattr(part, "final_logit_softcapping", None), (int, float)):
            yield lambda logits, k=k: torch.tanh(logits / k) * k
    yield lambda logits: logits  # last: a soft cap does little to small logits


def vocabulary(model: nn.Module, head: Any) -> int:
    """The number of logits of a position."""
    size = getattr(head, "out_features", None) or getattr(getattr(model, "config", None), "vocab_size", None)
    return int(size or head.weight.shape[0])
