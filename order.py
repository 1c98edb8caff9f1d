"""Order: which sample is number n of a run, as a function of n and the seed alone.

A run of two billion samples cannot keep a shuffled list of them, and a resumed run must not have
to count its way forward. So the shuffle is a function that can be asked at any place:

    number -> epoch and place in it          each epoch shows every sample once
    place  -> window -> place in the window  files are shuffled, then taken in windows of many;
                                             a sample changes places within its window only,
                                             so that a disk reads from few files at a time
    place in the window -> (file, row)

The state of the data in a checkpoint is therefore one integer, whatever the number of ranks and
workers was or will be. Read with sources.py, which asks for samples by these numbers.
"""

import math
import random
from fractions import Fraction
from functools import lru_cache

import numpy as np

WINDOW = 64  # files; of tar shards as img2dataset writes them, more than half a million samples
MAX_CYCLE = 2**20  # turns in which shares are exact
MASK = 2**64 - 1


def scramble(x: int, key: int) -> int:
    """64 bits -> 64 other bits (the finalizer of SplitMix64; Steele et al. 2014)."""
    x = (x ^ key) + 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def key_of(*numbers: int) -> int:
    """Numbers in their order -> one of 64 bits."""
    key = 0
    for number in numbers:
        key = scramble(key, number)
    return key


def permute(place: int, n: int, key: int) -> int:
    """Place -> place, a random one-to-one map of range(n) that needs no memory.

    A Feistel network of four rounds (Luby & Rackoff 1988) over the next larger power of 4; what
    falls outside goes through it again (Black & Rogaway 2002, "cycle walking").

    >>> sorted(permute(place, 10, key=7) for place in range(10)) == list(range(10))
    True
    """
    half = ((n - 1).bit_length() + 1) // 2
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            left, right = right, left ^ scramble(right | turn << 32, key) & low
        place = left << half | right
        if place < n:
            return place


class Order:
    """order[number] -> (epoch, file, row): every row of every file once an epoch, shuffled.

    counts (files,): the rows of each file.
    """

    def __init__(self, counts: np.ndarray, seed: int, window: int = WINDOW):
        self.counts, self.seed, self.window = np.asarray(counts, np.int64), seed, window
        self.n = int(self.counts.sum())
        self.epoch = lru_cache(2)(self.epoch)

    def __len__(self) -> int:
        return self.n

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's files in order, and how many rows come before each of them (files + 1,)."""
        files = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        return files, np.concatenate([[0], np.cumsum(self.counts[files])])

    def __getitem__(self, number: int) -> tuple[int, int, int]:
        epoch, place = divmod(number, self.n)
        files, before = self.epoch(epoch)
        window = (int(before.searchsorted(place, "right")) - 1) // self.window
        begin = int(before[window * self.window])
        end = int(before[min((window + 1) * self.window, len(files))])
        key = key_of(self.seed, epoch, window)
        place = begin + permute(place - begin, end - begin, key)
        at = int(before.searchsorted(place, "right")) - 1
        return epoch, int(files[at]), place - int(before[at])

    def __getstate__(self):  # a data worker makes its own
        return {"counts": self.counts, "seed": self.seed, "window": self.window}

    def __setstate__(self, state):
        self.__init__(**state)


class Shares:
    """shares[number] -> (source, number within it): the given shares, exactly, all along.

    Each cycle of as many samples as the shares' common denominator holds exactly the share of
    each source, in an order of its own: of 3/5, 1/5, 1/5 every five samples are 3 + 1 + 1. Shares
    that need a cycle of more than MAX_CYCLE are rounded to parts of that, none of them to nothing.
    """

    def __init__(self, shares: list[Fraction], seed: int):
        cycle = min(math.lcm(*(share.denominator for share in shares)), MAX_CYCLE)
        self.counts, self.seed = [max(int(share * cycle), 1) for share in shares], seed
        most_lost = sorted(range(len(shares)), key=lambda i: self.counts[i] - shares[i] * cycle)
        for i in most_lost[: max(cycle - sum(self.counts), 0)]:
            self.counts[i] += 1
        self.turns = np.repeat(np.arange(len(shares)), self.counts)

    @staticmethod
    def of(weights: list[str]) -> list[Fraction]:
        """Weights in decimals -> shares that add up to 1.

        >>> Shares.of(["0.6", "0.3", "0.3"])
        [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
        """
        exact = [Fraction(weight) for weight in weights]
        return [weight / sum(exact) for weight in exact]

    def __getitem__(self, number: int) -> tuple[int, int]:
        cycle, place = divmod(number, len(self.turns))
        source, before = self.turn(cycle, place)
        return source, cycle * self.counts[source] + before

    def turn(self, cycle: int, place: int) -> tuple[int, int]:
        """The source whose turn it is, and how many turns it had before in this cycle."""
        order = permute(place, len(self.turns), key_of(self.seed, cycle))
        source = int(self.turns[order])
        return source, order - sum(self.counts[:source])


def rng_of(*what: object) -> random.Random:
    """A generator for these (say seed, epoch, key): the same draws on every machine."""
    return random.Random(repr(what))
