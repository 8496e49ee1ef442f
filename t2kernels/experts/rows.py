"""`Rows`: which key has which row of the scale tables. A cache of fixed size with pinned entries, without tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from heapq import heappop, heappush

from t2kernels import StateError

from .names import Name

Callback = Callable[[Name], None]


class RowCounts:
    """How often an expert was written into a row and how often one lost its row, with a callback for each.

    loads: int, rows written with a named expert or a mixture
    evictions: int, experts and mixtures that lost their row to another one
    """

    def __init__(self) -> None:
        self.loads: int = 0
        self.evictions: int = 0
        self.watch(None, None)

    def watch(self, on_load: Callback | None, on_evict: Callback | None) -> None:
        """Set the callbacks. Each gets the name of the expert, or the mixture; None: no callback."""
        self._on_load, self._on_evict = on_load, on_evict

    def loaded(self, key: Hashable) -> None:
        """Count a load. key: as `key_of` returns it."""
        self.loads += 1
        _call(self._on_load, key)

    def evicted(self, key: Hashable) -> None:
        """Count an eviction. key: as `key_of` returns it."""
        self.evictions += 1
        _call(self._on_evict, key)

    def __getstate__(self) -> dict[str, int]:
        # The callbacks belong to whoever watches the original: a copied model has none.
        return {"loads": self.loads, "evictions": self.evictions}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state)
        self.watch(None, None)


def _call(callback: Callback | None, key: Hashable) -> None:
    if callback is not None and isinstance(key, tuple):
        callback(dict(key))
    elif callback is not None and isinstance(key, str):
        callback(key)


class Rows:
    """A map from keys to the rows 1 to count - 1. Row 0 is the base model and is never given out.

    If all rows are taken, the least recently used key without a pin loses its row. If the key of a pinned row is
    dropped, the row stays reserved until the last pin is released: a running forward finishes with the values that it
    started with.

    count: number of rows, row 0 included
    counts: where evictions are counted

    Not thread-safe: the bank calls it with its lock held. Only `release` may be called at any time.
    """

    def __init__(self, count: int, counts: RowCounts):
        self.count = count
        self.counts = counts
        self._rows: OrderedDict[Hashable, int] = OrderedDict()  # key -> row, least recently used first
        self._free: list[int] = list(range(1, count))  # a heap: the lowest free row is given out first
        self._pins: Counter[int] = Counter()
        self._orphans: set[int] = set()  # pinned rows whose key was dropped
        self._released: deque[Iterable[int]] = deque()

    def find(self, key: Hashable) -> int | None:
        """Return the row of a key and mark it as used now; None if the key has no row."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def take(self, key: Hashable) -> int:
        """Give a row to a key that has none. Raises RuntimeError if every row is pinned."""
        if self.has_free():
            row = heappop(self._free)
        else:
            victim = next((k for k, r in self._rows.items() if not self._pins[r]), None)
            if victim is None:
                raise StateError(
                    f"all {self.count - 1} rows are in use at the same time; patch with more rows "
                    f"(patch_model(..., rows={2 * self.count})), or delete tensors returned by bank.ids(): "
                    "each keeps its rows reserved while it is alive"
                )
            row = self._rows.pop(victim)
            self.counts.evicted(victim)
        self._rows[key] = row
        return row

    def has_free(self) -> bool:
        """Return whether some row holds nothing."""
        self._settle()
        return bool(self._free)

    def has_room_for(self, key: Hashable) -> bool:
        """Return whether a key has a row, or `take` would find one for it now."""
        return key in self._rows or self.has_free() or any(not self._pins[r] for r in self._rows.values())

    @property
    def in_use(self) -> int:
        """The number of pinned rows."""
        self._settle()
        return len(self._pins)

    def drop(self, key: Hashable) -> None:
        """Forget a key. Its row is free as soon as nothing pins it. Without effect if the key has no row."""
        row = self._rows.pop(key, None)
        if row is None:
            return
        if self.is_pinned(row):
            self._orphans.add(row)
        else:
            heappush(self._free, row)

    def drop_where(self, test: Callable[[Hashable], bool]) -> None:
        """`drop` every key that the test is true for."""
        for key in [k for k in self._rows if test(k)]:
            self.drop(key)

    def is_pinned(self, row: int) -> bool:
        """Return whether a row has a pin."""
        self._settle()
        return self._pins[row] > 0

    def pin(self, row: int) -> None:
        """Keep a row reserved until `unpin` is called as often as `pin` was."""
        self._pins[row] += 1

    def unpin(self, rows: Iterable[int]) -> None:
        """Remove one pin from each row."""
        for row in rows:
            self._pins[row] -= 1
            if not self._pins[row]:
                del self._pins[row]
                if row in self._orphans:
                    self._orphans.remove(row)
                    heappush(self._free, row)

    def release(self, rows: Iterable[int]) -> None:
        """`unpin`, delayed to the next call that needs to know. Needs no lock.

        A finalizer calls this. The garbage collector may run it between any two instructions, also of a thread that is
        just changing these rows.
        """
        self._released.append(rows)

    def _settle(self) -> None:
        while self._released:
            self.unpin(self._released.popleft())

    def copy(self, keep: Iterable[Hashable]) -> Rows:
        """A copy in which the rows of the keys `keep` have one pin each, and no other row has any.

        The pins of live tensors and the rows of a search belong to the original model, not to its copy.
        """
        other = Rows(self.count, self.counts)
        other._rows = OrderedDict((key, row) for key, row in self._rows.items() if isinstance(key, (str, tuple)))
        other._free = sorted(set(other._free) - set(other._rows.values()))
        other._pins = Counter(self._rows[k] for k in keep)
        return other

    def items(self) -> list[tuple[Hashable, int]]:
        """[(key, row)], the least recently used first."""
        return list(self._rows.items())
