"""`RolloutTrainer`: the part of a trainer that has completions drawn and scored. Which engine draws is a setting."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t2kernels import InputError
from t2kernels.experts.expert import Expert
from t2kernels.rollout.engines import Draw, EngineContext, open_engine, parse_spec
from t2kernels.rollout.generation import Rollout
from t2kernels.rollout.rewards import advantages
from t2kernels.train.loss import row_weights
from t2kernels.train.processes import gather

from .answers import right_answers
from .choosing import ChoiceTrainer
from .drawing import Drawing, closing


class RolloutTrainer(ChoiceTrainer):
    """A `ChoiceTrainer` whose completions come from `args.rollout`, up to `args.max_staleness` updates ahead.

    drawing: the engine of the running train(), or None; stale: updates since the policy that drew the newest rollout
    """

    drawing: Drawing | None = None
    stale: int = 0

    def policy(self, name: str) -> Expert | None:
        """The present policy of an expert's name, for engines outside; None: the base model.

        Raises InputError for a trainer that trains no experts.
        """
        raise InputError(
            f"rollout={self.args.rollout!r} draws with experts, and {type(self).__name__} trains something else; leave "
            "rollout out, or define policy(name)"
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train. The engine that draws is closed at the end."""
        with closing(self):
            return super().train(*args, **kwargs)

    def begin_drawing(self) -> None:
        """Open the engine at the start of a run, so that one that is not there fails before any step."""
        self._ahead: deque[Mapping[str, Any]] = deque()  # batches whose completions are being drawn
        self._number: int | None = None  # of the next batch to be drawn ahead
        if not self.choosers and not self.args.supervised:
            self._opened()

    def _opened(self) -> Drawing:
        if self.drawing is None:
            args = self.args
            context = EngineContext(
                self.accelerator.unwrap_model(self.model),
                self.sampler,
                self.routing,
                parse_spec(args.rollout)[1],
                args.rollout_options or {},
                len(self.scorers),
                args.seed,
            )
            engine = open_engine(args.rollout, context)
            if args.max_staleness and not engine.keeps_versions:
                engine.close()
                raise InputError(
                    f"max_staleness={args.max_staleness} with rollout={args.rollout!r}: this engine draws with the "
                    'model in training and cannot draw while it changes; take rollout="vllm", or max_staleness=0'
                )
            self.drawing = Drawing(engine, self.policy, bool(args.max_staleness))
        return self.drawing

    # --- ahead of time

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As Trainer's. With `max_staleness` it reads that many updates further, and has their completions drawn by the
        present policy while this update trains. At the end of an epoch there is nothing to read ahead."""
        if not self.args.max_staleness or self.choosers or self.args.supervised:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        each = self.args.gradient_accumulation_steps
        if self._number is None:
            self._number = self.state.global_step * each
        wanted = min(
            num_batches + self.args.max_staleness * each, self.state.max_steps * each - self._number + len(self._ahead)
        )
        while len(self._ahead) < wanted and (batch := next(epoch_iterator, None)) is not None:
            self._start(batch["rows"], self._number)
            self._ahead.append(batch)
            self._number += 1
        taken = [self._ahead.popleft() for _ in range(min(num_batches, len(self._ahead)))]
        return super().get_batch_samples(iter(taken), num_batches, device)

    def _start(self, rows: Sequence[Mapping[str, Any]], number: int) -> None:
        """Have the completions of a batch drawn. number: of the batch in the run, which is its seed"""
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        ids, mask = self.sampler.encode([row["prompt"] for row in rows], args.device)
        seed = int.from_bytes(hashlib.sha256(f"{args.seed} {rank} {number}".encode()).digest()[:4]) >> 2
        self._opened().start(
            rows,
            ids,
            mask,
            [row.get("expert") for row in rows],
            self.state.global_step * world + rank,  # two processes may publish to one server
            Draw(args.temperature, args.num_generations, seed),
        )

    def _draw(self, rows: Sequence[Mapping[str, Any]]) -> Rollout:
        if not self.args.max_staleness:
            self._start(rows, self.state.global_step * self.args.gradient_accumulation_steps + max(0, self._micro[1]))
        rollout, version = self._opened().take(rows)
        self.stale = self.state.global_step - version // self.accelerator.num_processes
        return rollout

    # --- from completions to a rollout with advantages and weights

    @torch.no_grad()
    def rollout(self, rows: Sequence[Mapping[str, Any]]) -> Rollout:
        """Draw `num_generations` completions of each row's prompt and score them."""
        args, samples = self.args, self.args.num_generations
        out = self._draw(rows)
        rows = [row for row in rows for _ in range(samples)]
        out.experts = [row.get("expert") for row in rows]
        prompts = [row["prompt"] for row in rows]
        lengths, tokens = out.completion.sum(1), out.completion_ids()
        texts = self.sampler.read(tokens, prompts)
        rewards = self.score(rows, texts, tokens)
        cut = rewards if args.reward_range is None else rewards.clamp(*args.reward_range)
        parts = gather(
            list(zip(out.experts, rewards.tolist(), cut.tolist(), lengths.tolist(), strict=True)),
            self.accelerator.num_processes,
        )
        everyone = [one for part in parts for one in part]
        names = [name for name, *_ in everyone]
        scored = [(name, reward, value) for name, reward, value, _ in everyone]
        self.measures.watch.rewards([one for one in scored if not math.isnan(one[1])], args.reward_range)
        start = sum(map(len, parts[: self.accelerator.process_index]))
        out.advantages = self._advantages(cut, out.experts, scored, start).to(out.ids.device)
        self._weigh(out, names, [length for *_, length in everyone], start)
        there = (~rewards.isnan()).nonzero()[:, 0]  # NaN: no reward applies
        self.measures.note([out.experts[i] for i in there.tolist()], reward=rewards[there], accuracy=rewards[there] > 0)
        self.measures.note(out.experts, completion_length=lengths)
        self.measures.answers(out.experts, prompts, texts, rewards > 0)
        return out

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> Rollout:
        """The right answers of the rows, in the place of completions."""
        out = right_answers(self.sampler, rows, self.args.device)
        lengths = out.completion.sum(1)
        parts = gather(list(zip(out.experts, lengths.tolist(), strict=True)), self.accelerator.num_processes)
        names, everyone = zip(*(one for part in parts for one in part), strict=True)
        self._weigh(out, names, everyone, sum(map(len, parts[: self.accelerator.process_index])))
        self.measures.note(out.experts, completion_length=lengths)
        return out

    def _weigh(self, out: Rollout, names: Sequence[str | None], lengths: Sequence[int], start: int) -> None:
        """Set the weights of the rows, which begin at `start` among those of all processes.

        A mean for each expert, not over the batch: its gradient must not depend on the other rows of the batch.
        """
        self._counts(names)
        limit = self.sampler.max_new_tokens
        weights = row_weights(self.args.loss_type, [max(1, length) for length in lengths], names, limit)
        own = weights[start : start + len(out)]
        out.weights = torch.tensor(own, dtype=torch.float32, device=out.ids.device) * self.accelerator.num_processes

    def _advantages(
        self,
        cut: Tensor,
        experts: Sequence[str | None],
        everyone: Sequence[tuple[str | None, float, float]],
        start: int,
    ) -> Tensor:
        """[B] of this process, whose rows begin at `start` in `everyone`, the (expert, reward, cut reward) of all."""
        args = self.args
        if args.advantage != "batch":
            return advantages(cut, experts, args.num_generations, args.advantage, args.advantage_clip)
        names, _, values = zip(*everyone, strict=True)
        out = advantages(torch.tensor(values, dtype=torch.float32), names, 1, "batch", args.advantage_clip)
        return out[start : start + len(cut)]
