"""Laws of beams.py; what transformers finds with as many beams is compared in test_published.py.

pytest tests/test_beams.py
"""

from itertools import product

import pytest
import torch

from beams import beam_search
from data import Encoded
from tests.test_model import (
    END,
    EVERY_MODEL,
    IMAGE,
    MIXED,
    RET,
    build,  # noqa: F401
    documents,
    logits,
    packed,
    write,
)

NEVER = (IMAGE, RET)


def search(model, prompts, **options):
    return beam_search(model, packed(model, *prompts), forbidden=NEVER, **options)


def score_of(model, prompt: Encoded, tokens: list[int], never=NEVER) -> float:
    """The summed log-probability of an answer, by a full forward pass."""
    whole = Encoded(prompt.ids + tokens, prompt.learn + [False] * len(tokens), prompt.images, [])
    rows = logits(model, packed(model, whole))[len(prompt.ids) - 1 : -1]
    rows[:, list(never)] = float("-inf")
    return float(rows.log_softmax(-1)[range(len(tokens)), tokens].sum())


@EVERY_MODEL
def test_one_beam_is_greedy_writing(build, kind):  # noqa: F811
    model, prompts = build(kind), documents(MIXED)
    for stop in ((), (END, *range(3, 40, 4))):
        greedy = write(model, prompts, max_new_tokens=7, stop=stop)
        found = search(model, prompts, n_beams=1, max_new_tokens=7, stop=stop)
        assert [f.tokens for f in found] == greedy


@EVERY_MODEL
def test_a_score_is_that_of_the_full_forward_and_does_not_depend_on_neighbours(
    build, kind  # noqa: F811
):
    model, prompts = build(kind), documents(MIXED)
    options = dict(n_beams=3, max_new_tokens=6, stop=(END, *range(3, 40, 5)))
    found = search(model, prompts, **options)
    assert found[0].tokens == search(model, prompts[:1], **options)[0].tokens
    for prompt, one in zip(prompts, found, strict=True):
        assert one.score == pytest.approx(score_of(model, prompt, one.tokens), abs=1e-4)
        assert search(model, [prompt], **options)[0].tokens == one.tokens


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_with_beams_enough_the_best_of_all_answers_is_found(build, penalty):  # noqa: F811
    model, (prompt,) = build("all"), documents(["wiw"])
    words, stop = (5, 9, 13), END
    never = tuple(set(range(END + 1)) - {*words, stop})
    (found,) = beam_search(model, packed(model, prompt), n_beams=40, max_new_tokens=3,
                           length_penalty=penalty, stop=(stop,), forbidden=never)

    def value(tokens):
        return score_of(model, prompt, tokens, never)

    answers = [[*some, stop] for n in range(3) for some in product(words, repeat=n)]
    answers += [[*some] for some in product(words, repeat=3)]
    best = max(answers, key=lambda tokens: value(tokens) / len(tokens) ** penalty)
    assert found.tokens == best and found.score == pytest.approx(value(best), abs=1e-4)


def test_more_beams_find_likelier_answers_than_greedy_writing(build):  # noqa: F811
    model, prompts = build("latest"), documents(["w" * n + "iw" for n in range(8)])
    one, four = (search(model, prompts, n_beams=n, max_new_tokens=8) for n in (1, 4))
    gain = torch.tensor([b.score - a.score for a, b in zip(one, four, strict=True)])
    assert gain.mean() > 0.1 and (gain > -1e-4).float().mean() > 0.8


def test_an_answer_is_as_long_as_it_must_and_may_be(build):  # noqa: F811
    model, prompts = build("latest", max_seq_len=12), documents(["w" * 9, "wiw"])
    stop = tuple(range(3, 40, 2))
    one = search(model, prompts, n_beams=3, max_new_tokens=9, min_new_tokens=2, stop=stop)[1]
    assert len(one.tokens) > 2 and not {*one.tokens[:2]} & {*stop}
    long, short = search(model, prompts, n_beams=3, max_new_tokens=5)
    assert (len(long.tokens), len(short.tokens)) == (2, 5)
    with pytest.raises(ValueError, match="shorten it"):
        search(model, documents(["w" * 11]), n_beams=3, max_new_tokens=2)
