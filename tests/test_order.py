"""Laws of order: each sample once an epoch, shuffled, without a list of them; shares exactly.

pytest tests/test_order.py
"""

import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from order import Order, Shares, permute, rng_of

ROOT = Path(__file__).parent.parent


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_takes_every_place_once(n, key):
    assert sorted(permute(place, n, key) for place in range(n)) == list(range(n))


def test_other_keys_permute_otherwise():
    orders = {tuple(permute(place, 50, key) for place in range(50)) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("n", [100, 1000, 4096, 10_007])
def test_a_permutation_looks_like_chance(n):
    for key in range(5):
        order = [permute(place, n, key) for place in range(n)]
        steps = np.abs(np.diff(order))
        assert abs(steps.mean() / (n / 3) - 1) < 0.15  # of two places drawn at random
        assert (steps == 1).sum() < 12  # of which 2 are expected
        assert abs(np.corrcoef(order, range(n))[0, 1]) < 4 / n**0.5


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_row_of_every_file_comes_once_an_epoch(counts, window, seed):
    counts[0] += 1
    order = Order(np.array(counts), seed, window)
    rows = {(file, row) for file, n in enumerate(counts) for row in range(n)}
    for epoch in range(3):
        seen = [order[len(order) * epoch + place] for place in range(len(order))]
        assert {e for e, _, _ in seen} == {epoch}
        assert sorted((file, row) for _, file, row in seen) == sorted(rows)


def test_epochs_and_seeds_have_orders_of_their_own():
    def told(seed: int, epoch: int) -> tuple:
        order = Order(np.array([7, 5, 9]), seed)
        return tuple(order[21 * epoch + place][1:] for place in range(21))

    assert len({told(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_a_sample_stays_in_its_window_of_files():
    order = Order(np.full(40, 25), seed=3, window=4)
    for start in range(0, 1000, 100):
        files = {order[start + i][1] for i in range(100)}
        assert len(files) == 4
        within = [order[start + i][1] for i in range(100)]
        assert len({a for a, b in pairwise(within) if a != b}) == 4  # and is mixed among these
    assert sorted({order[i][1] for i in range(0, 1000)}) == list(range(40))
    windows = [{order[1000 * epoch + i][1] for i in range(100)} for epoch in range(3)]
    assert len({*map(frozenset, windows)}) == 3  # other files together each epoch


def test_an_order_can_be_sent_and_asked_anywhere():
    order = Order(np.array([3, 0, 8]), seed=1)
    again = pickle.loads(pickle.dumps(order))
    assert [again[n] for n in (30, 2, 17)] == [order[n] for n in (30, 2, 17)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_cycle_holds_exactly_the_shares_and_no_source_skips_a_sample(weights, seed):
    shares = Shares(Shares.of([str(w / 10) for w in weights]), seed)
    cycle = len(shares.turns)
    turns = [shares[n] for n in range(4 * cycle)]
    total = sum(weights)
    for start in range(0, 4 * cycle, cycle):
        counted = Counter(source for source, _ in turns[start : start + cycle])
        assert [counted[i] * total for i in range(len(weights))] == [w * cycle for w in weights]
    for source in range(len(weights)):
        numbers = [number for s, number in turns if s == source]
        assert sorted(numbers) == list(range(len(numbers)))


@pytest.mark.parametrize("weights", [
    ["2170337258", "2905954"], ["0.1234567891", "0.9876543211"], ["0.00000001", "1", "1"],
    ["12345678901234567890123", "98765432109876543210987", "1"], [str(w) for w in range(1, 60)]])
def test_shares_that_need_a_long_cycle_are_rounded_and_none_to_nothing(weights):
    exact = Shares.of(weights)
    shares = Shares(exact, 0)
    cycle = len(shares.turns)
    assert cycle <= 2**20 + len(weights) and min(shares.counts) >= 1
    assert all(abs(n - share * cycle) <= 1 + len(weights) * share
               for n, share in zip(shares.counts, exact, strict=True))
    assert {shares[n][0] for n in range(300)} <= {*range(len(weights))}


def test_the_turns_of_sources_follow_no_rhythm():
    shares = Shares(Shares.of(["1", "1"]), 0)
    turns = [shares[n][0] for n in range(2000)]
    assert len({tuple(turns[i : i + 6]) for i in range(0, 1998, 6)}) == 8  # 2^3 of 2 a pair


def test_draws_depend_on_everything_they_are_made_for_and_on_nothing_else():
    assert rng_of(1, 2, "x").random() == rng_of(1, 2, "x").random()
    assert len({rng_of(*what).random() for what in ((1, 2, "x"), (2, 1, "x"), (1, 2, "y"),
                                                    (12, "x"), (1, "2 y"))}) == 5


TWO_BILLION = """
import numpy as np, os, sys
from pathlib import Path
from order import Order
from records import HEADER, ROW, open_rows

def private() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) // 1024

n, path = 2_000_000_000, sys.argv[1]
with open(path, "wb") as file:
    file.truncate(HEADER.size + n * ROW.itemsize)  # sparse
rows, shards, one = open_rows(path), Order(np.full(200_000, 10_000), 0), Order([n], 0)
assert len(rows) == len(shards) == len(one) == n
seen = set()
for i in range(2000):
    number = i * 999_983
    _, file, row = shards[number]
    seen.add(file * 10_000 + row)
    place = one[number][2]
    if i % 40 == 0:
        assert int(rows[place]["offset"]) == 0
assert len(seen) == 2000
print(private())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to ask for memory")
def test_two_billion_samples_take_little_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", TWO_BILLION, tmp_path / "x.idx"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500  # MB
