"""Warnings of a run that learns nothing, or that falls into one answer."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Mapping, Sequence
from statistics import median

logger: logging.Logger = logging.getLogger(__name__)

PATIENCE = 5
"""Batches in a row with a sign of trouble, before a warning."""
SAME = 0.95
"""Share of completions with one text from which they count as one."""
ENOUGH = 8
"""Completions of a batch, from which on equal texts mean something."""
SURE = 0.05
"""Share of the first batches' entropy below which the policy has stopped trying other answers."""
FAR = 4.0
"""Nats of KL a completion that are no cause for concern, however fast it grew."""
GAP = 0.1
"""Mean |log pi - log mu| of a token, from which sampler and trainer do not run one policy."""
CUT = 0.1
"""Share of cut importance ratios from which the gradient is far from that of the samples."""
ADVICE = (
    "lower learning_rate, raise kl_coef, or compare completions of one prompt (num_generations=4, "
    'advantage="leave_one_out"); keep_best=True with an eval_dataset keeps the best expert so far'
)


class Watch:
    """Looks at each batch and warns once for each expert and sign. speaks: whether this process may warn."""

    def __init__(self, speaks: bool) -> None:
        self.speaks: bool = speaks
        self._counts: Counter[tuple[Hashable, str]] = Counter()
        self._varied: set[str | None] = set()  # experts that have given different answers
        self._past: dict[tuple[Hashable, str], deque[float]] = defaultdict(lambda: deque(maxlen=20))

    def rewards(
        self, everyone: Sequence[tuple[str | None, float, float]], reward_range: Sequence[float] | None
    ) -> None:
        """Warn if all rewards of an expert were equal, within a batch, for PATIENCE batches in a row.

        everyone: (expert, reward, cut reward) of the batch, of all processes
        """
        for expert in dict.fromkeys(e for e, *_ in everyone):
            rewards = [reward for e, reward, _ in everyone if e == expert]
            cut = [value for e, _, value in everyone if e == expert]
            if not self._again(expert, "equal", len(cut) > 1 and len(set(cut)) == 1):
                continue
            same = len(set(rewards)) == 1
            why = "" if same else f"; they do differ before the cut to reward_range={list(reward_range or ())}"
            logger.warning(
                "every reward%s in the last %d batches was %g: there is nothing to learn from%s",
                _of(expert),
                PATIENCE,
                cut[0],
                why,
            )

    def texts(
        self,
        experts: Sequence[str | None],
        prompts: Sequence[object],
        texts: Sequence[str],
        right: Sequence[bool],
    ) -> dict[str | None, float]:
        """Warn if an expert gives nearly all prompts one answer, which is not the right one for nearly all.

        Returns the share of the most common text, for each expert.
        """
        shares = {}
        for expert in dict.fromkeys(experts):
            at = [i for i, e in enumerate(experts) if e == expert]
            text, count = Counter(texts[i] for i in at).most_common(1)[0]
            shares[expert] = count / len(at)
            asked = len({str(prompts[i]) for i in at})
            wrong = sum(right[i] for i in at) < SAME * len(at)
            sign = len(at) >= ENOUGH and asked > 1 and count >= SAME * len(at) and wrong
            self._varied |= set() if sign else {expert}
            if self._again(expert, "text", sign):
                since = "have collapsed into one" if expert in self._varied else "were one from the start"
                logger.warning(
                    "%d of %d completions%s were %r in this batch, and as many in the %d before, for different "
                    "prompts: the answers %s; %s",
                    count, len(at), _of(expert), text[:40], PATIENCE - 1, since, ADVICE,
                )  # fmt: skip
        return shares

    def levels(self, expert: str | None, means: Mapping[str, float]) -> None:
        """Warn if the KL runs off, or the entropy of the policy is gone while there are wrong answers.

        means: of the batch of one expert: "kl", "entropy" (of a token), "accuracy", each if it is known
        """
        kl, entropy = means.get("kl"), means.get("entropy")
        if kl is not None:
            past = self._past[expert, "kl"]
            sign = len(past) >= PATIENCE and kl > FAR and kl > 2 * median(past)
            if self._again(expert, "kl", sign, 2):
                logger.warning(
                    "the KL%s to the base model is %.1f nats a completion, and was %.1f: the expert is running off; %s",
                    _of(expert), kl, median(past), ADVICE,
                )  # fmt: skip
            if not sign:
                past.append(kl)
        if entropy is not None:
            past = self._past[expert, "entropy"]
            start = sum(list(past)[:PATIENCE]) / PATIENCE
            sign = len(past) >= PATIENCE and entropy < SURE * start and means.get("accuracy", 0.0) < SAME
            if self._again(expert, "entropy", sign):
                logger.warning(
                    "the entropy of a token%s is %.3f nats, and was %.3f at first, with %.0f %% right: it tries no "
                    "other answer any more; %s",
                    _of(expert), entropy, start, 100 * means.get("accuracy", 0.0), ADVICE,
                )  # fmt: skip
            if len(past) < PATIENCE:
                past.append(entropy)

    def sampler(self, gap: float, largest: float, cut: float, stale: int) -> None:
        """Warn if the engine that draws runs another policy than the trainer, or one that is too old.

        gap: mean |log pi - log mu| of a token; largest: pi / mu; cut: share of ratios above the cap; stale: updates
            between the policy that drew and the one in training
        """
        if self._again(None, "gap", not stale and gap > GAP, 2):
            logger.warning(
                "the sampler and the trainer give a token log-probabilities that are %.2f nats apart on average "
                "(largest ratio %.3g): they do not run one policy; compare their weights, factors, rank and dtype",
                gap, largest,
            )  # fmt: skip
        if self._again(None, "cut", cut > CUT):
            logger.warning(
                "%.0f %% of the tokens count less than they should, since they are much likelier now than when they "
                "were drawn, %d updates ago: lower max_staleness or learning_rate, or raise importance_cap",
                100 * cut, stale,
            )  # fmt: skip

    def _again(self, expert: Hashable, sign: str, seen: bool, patience: int = PATIENCE) -> bool:
        """Whether a sign was seen `patience` times in a row now, for the first time."""
        key = (expert, sign)
        if self._counts[key] >= patience:
            return False  # told already
        self._counts[key] = self._counts[key] + 1 if seen else 0
        return self._counts[key] == patience and self.speaks


def _of(expert: str | None) -> str:
    return "" if expert is None else f" of expert {expert!r}"
