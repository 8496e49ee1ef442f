"""Loads into rows and evictions from them, counted by the label that metrics show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from t2kernels.experts.bank import ExpertBank
from t2kernels.experts.names import Name


class RowCounters:
    """Counts how often experts are written into a row and lose it. The bank reports these events, from any thread.

    bank: whose events are counted
    label: version key -> label, for versions that have left the bank and for those in it
    mixed: label of every mixture

    A count belongs to its version while that is in the bank, and to its label afterwards. So the size is bounded.
    """

    def __init__(self, bank: ExpertBank, label: Callable[[str], str], mixed: str) -> None:
        self._label, self._mixed = label, mixed
        self._hidden: set[str] = set()
        self._loads: Counter[str] = Counter()  # by version key or label
        self._evictions: Counter[str] = Counter()
        bank.watch(lambda name: self._count(self._loads, name), lambda name: self._count(self._evictions, name))

    @property
    def loads(self) -> Counter[str]:
        """Number of loads by label. Their sum is the bank's, without those of hidden versions."""
        return self._by_label(self._loads)

    @property
    def evictions(self) -> Counter[str]:
        """Number of evictions by label."""
        return self._by_label(self._evictions)

    @property
    def hidden(self) -> frozenset[str]:
        """Keys of the versions that are not counted yet."""
        return frozenset(self._hidden)

    def __len__(self) -> int:
        """Number of entries that are kept."""
        return len(self._loads.keys() | self._evictions.keys())

    def hide(self, key: str) -> None:
        """Do not show the counts of a version until `show` or `fold`: it has no name yet."""
        self._hidden.add(key)

    def show(self, key: str) -> None:
        """Show the counts of a version under its label from now on."""
        self._hidden.discard(key)

    def fold(self, key: str, label: str) -> None:
        """Add the counts of a version that leaves the bank, or of a label, to a label."""
        self._hidden.discard(key)
        for counts in (self._loads, self._evictions):
            if count := counts.pop(key, 0):
                counts[label] += count

    def _count(self, counts: Counter[str], name: Name) -> None:
        counts[name if isinstance(name, str) else self._mixed] += 1

    def _by_label(self, counts: Counter[str]) -> Counter[str]:
        out: Counter[str] = Counter()
        for key, count in dict(counts).items():  # a copy, because other threads count
            if key not in self._hidden:
                out[self._label(key)] += count
        return out
