"""Who is in which row of the scale tables: a cache of fixed size whose entries can be pinned. No tensors here."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable


class Rows:
    """Rows 1 to count - 1; row 0 is the base model and never given out. The least recently used key that nobody has pinned goes first.

    A pinned row whose key is dropped or replaced stays as it is until the last pin is gone: whoever is in the middle of it ends with it.
    """

    def __init__(self, count: int):
        self.count = count
        self.evictions = 0
        self.on_evict: Callable[[Hashable], None] | None = None  # told each key that gives up its row to another
        self._rows: OrderedDict[Hashable, int] = OrderedDict()  # key -> row, least recently used first
        self._pins: Counter[int] = Counter()
        self._left: set[int] = set()  # pinned rows that have no key any more

    def find(self, key: Hashable) -> int | None:
        """The row of a key, which counts as used now; None if it has none."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def take(self, key: Hashable) -> int:
        """A row for a key that has none. Raises RuntimeError if every row is pinned."""
        row = self.free()
        if row is None:
            victim = next((k for k, r in self._rows.items() if not self._pins[r]), None)
            if victim is None:
                raise RuntimeError(
                    f"all {self.count - 1} rows are in use at the same time; patch with more rows (patch_model(..., rows={2 * self.count})), "
                    "or let go of ids tensors that are no longer needed"
                )
            row = self._rows.pop(victim)
            self.evictions += 1
            if self.on_evict:
                self.on_evict(victim)
        self._rows[key] = row
        return row

    def free(self) -> int | None:
        """A row that nothing is in, or None."""
        used = {*self._rows.values(), *self._left}
        return next((r for r in range(1, self.count) if r not in used), None)

    def room_for(self, key: Hashable) -> bool:
        """Whether a key has a row, or `take` would give it one now."""
        return key in self._rows or self.free() is not None or any(not self._pins[r] for r in self._rows.values())

    @property
    def in_use(self) -> int:
        """Rows that somebody has pinned."""
        return len(self._pins)

    def drop(self, key: Hashable) -> None:
        """Forget a key, if it has a row."""
        row = self._rows.pop(key, None)
        if row is not None and self._pins[row]:
            self._left.add(row)

    def drop_where(self, test: Callable[[Hashable], bool]) -> None:
        for key in [k for k in self._rows if test(k)]:
            self.drop(key)

    def pinned(self, row: int) -> bool:
        return self._pins[row] > 0

    def pin(self, row: int) -> None:
        self._pins[row] += 1

    def unpin(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._pins[row] -= 1
            if not self._pins[row]:
                del self._pins[row]
                self._left.discard(row)

    def without_pins(self, keep: Iterable[Hashable]) -> Rows:
        """A copy in which only the rows of the keys `keep` are pinned, once each: live tensors do not follow a copied model."""
        other = Rows(self.count)
        other._rows = self._rows.copy()
        other._pins = Counter(self._rows[k] for k in keep)
        return other
