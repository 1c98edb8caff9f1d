"""What became of the samples of a run: how many were used, and why the others were not."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from and, if it cannot be used, why: in a word, and in a line."""

    file: str
    key: str
    reason: str = ""
    line: str = ""


MIN_TRIED = 100  # samples before their bad ones count against --max-bad


class Tally:
    """How many samples were used and why the others were not, by reason and by file."""

    def __init__(self, reasons: dict | None = None, files: dict | None = None):
        self.reasons = Counter(reasons)
        self.files = {file: list(counts) for file, counts in (files or {}).items()}

    def add(self, origins: Iterable[Origin]) -> list[str]:
        """Count samples; returns a line for each that is the first one with its reason."""
        news = []
        for origin in origins:
            counts = self.files.setdefault(origin.file, [0, 0])  # tried, bad
            counts[0] += 1
            if origin.reason:
                counts[1] += 1
                if not self.reasons[origin.reason]:
                    news.append(origin.line)
                self.reasons[origin.reason] += 1
        return news

    def merge(self, other: "Tally") -> "Tally":
        files = {file: [sum(n) for n in zip(self.files.get(file, (0, 0)),
                                            other.files.get(file, (0, 0)), strict=True)]
                 for file in {*self.files, *other.files}}
        return Tally(self.reasons + other.reasons, files)

    @property
    def tried(self) -> int:
        return sum(tried for tried, _ in self.files.values())

    @property
    def bad(self) -> int:
        return self.reasons.total()

    def report(self) -> str:
        """Lines: how many, for which reasons, in which files most were lost."""
        lines = [f"samples: {self.tried - self.bad:,} used, {self.bad:,} left out "
                 f"({100 * self.bad / max(self.tried, 1):.1f} %)"]
        lines += [f"  {count:,} {reason}" for reason, count in self.reasons.most_common()]
        lines += [f"  more than half lost in {file}: {lost:,} of {tried:,}"
                  for file, (tried, lost) in sorted(self.files.items()) if 2 * lost > tried]
        return "\n".join(lines)


def too_bad(n_bad: int, n_tried: int, most: float) -> bool:
    """Whether more than this share of the samples could not be used, or none of them could."""
    return n_bad > most * max(n_tried, MIN_TRIED) or n_bad == n_tried >= MIN_TRIED
