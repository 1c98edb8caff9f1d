"""Laws of the model: who sees which picture, packing, gradients, writing; LLaMA as an oracle.

pytest tests/test_model.py

Documents are made from patterns: behind <s>, every w is a random word, every i a random picture.
"""

import random
from copy import deepcopy
from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as generate_module
from checkpoint import Saver, latest_checkpoint, load_checkpoint
from data import Encoded, collate
from generate import KVCache, Writer, choose, generate
from kernels import decode
from lone import LoneRow
from model import (
    ContrastiveHead,
    DecoderConfig,
    GatedCrossAttentionBlock,
    Span,
    VisionLanguageModel,
)
from parallel import losses, train_step
from vision import ResamplerConfig, VisionConfig

WORDS = 40  # size of the published table
IMAGE, RET, END = WORDS, WORDS + 1, WORDS + 2
LATENTS = ResamplerConfig(n_latents=3, n_layers=1, n_heads=2, head_dim=8, hidden_dim=32)
GROUPED = dict(n_heads=4, n_kv_heads=2, head_dim=8)
ALL = dict(visible_images="all", max_images=4)
MODELS = {
    "latest": dict(cross_attn_mlp=True),
    "all": dict(**ALL, **GROUPED),
    "latest, resampled": dict(**GROUPED, resampler=LATENTS),
    "all, resampled": dict(**ALL, resampler=LATENTS, cross_attn_mlp=True),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)
PATTERN = st.from_regex(r"w{0,3}(iw{0,4}){0,4}", fullmatch=True)
PATTERNS = st.lists(PATTERN, min_size=1, max_size=4)
BLIND = "k_proj.bias"  # shifts all scores of a query alike: its gradient is 0, but for rounding
FEW = settings(max_examples=12, deadline=None)
MIXED = ["wwiwiiww", "wwwww", "iww", "w", "wiwwi"]


@pytest.fixture(scope="module")
def build(tiny_model):
    """build(kind, **changes) -> a model of MODELS, every weight away from its special start.

    The same call gives the same model: copy it before you change it.
    """

    @cache
    def make(kind: str, **changes) -> nn.Module:
        model = tiny_model(**dict(n_layers=4, vocab_size=WORDS) | MODELS[kind] | changes)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 1 or name == "image_index_embed":
                    p += 0.2 * torch.randn(p.shape, generator=generator)
        return model

    return make


def document(pattern: str, seed: int) -> Encoded:
    """The pattern as a document; every other word, by chance, is learned."""
    rng = np.random.default_rng(seed)
    ids = [1, *(IMAGE if letter == "i" else int(rng.integers(3, WORDS)) for letter in pattern)]
    learn = [False, *(letter == "w" and bool(rng.integers(2)) for letter in pattern)]
    pictures = rng.integers(0, 256, (pattern.count("i"), 16, 16, 3), dtype=np.uint8)
    return Encoded(ids, learn, [*pictures], [])


def documents(patterns: list[str], seed: int = 0) -> list[Encoded]:
    return [document(pattern, 10 * seed + n) for n, pattern in enumerate(patterns)]


def search_for(pair: Encoded) -> Encoded:
    """Words and a <ret> that asks for the pair's picture."""
    return Encoded([1, *pair.ids[2:], RET], [False] * len(pair.ids), [],
                   [(len(pair.ids) - 1, pair.images[0])])


def packed(model, *samples: Encoded | list[Encoded]):
    return collate(
        [s if isinstance(s, list) else [s] for s in samples], image_id=IMAGE, image_size=16,
        visible_images=model.config.decoder.visible_images,
        tokens_per_image=model.config.tokens_per_image,
    )


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    end = torch.arange(1, len(batch.tokens) + 1).int()
    pictures, _ = model.encode_images(batch)
    text = Span(batch.text_start, end, batch.text_hints)
    return model.logits(
        model.decode(batch.tokens, batch.positions, text, model.image_span(batch), pictures)
    )


def seen(patterns: list[str], rule: str) -> torch.Tensor:
    """(T, I) bool: which token sees which picture, by reading the patterns from left to right."""
    n_pictures, rows, before = "".join(patterns).count("i"), [], 0
    for pattern in patterns:
        mine = []
        for letter in "s" + pattern:  # behind <s>
            mine += [before + len(mine)] * (letter == "i")
            visible = mine[-1:] if rule == "latest" else mine
            rows.append([k in visible for k in range(n_pictures)])
        before += len(mine)
    return torch.tensor(rows, dtype=torch.bool).view(len(rows), n_pictures)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(T,) bool: which rows are equal bit for bit."""
    return (a.view(torch.int32) == b.view(torch.int32)).all(-1)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the largest number."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def without_cross_blocks(model):
    """The language model alone."""
    plain = deepcopy(model)
    plain.cross_blocks = nn.ModuleDict()
    return plain


# --------------------------------------------------------------------------- law 1: packed == alone


@pytest.mark.quick
@EVERY_MODEL
@FEW
@given(PATTERNS, st.integers(0, 99))
def test_packed_documents_give_the_logits_of_each_alone(build, kind, patterns, seed):
    model, parts = build(kind), documents(patterns, seed)
    together = logits(model, packed(model, *parts)).split([len(d.ids) for d in parts])
    for part, ours in zip(parts, together, strict=True):
        assert_close(ours, logits(model, packed(model, part)))


@EVERY_MODEL
def test_what_stands_in_a_neighbour_of_the_same_length_changes_no_bit(build, kind):
    model = build(kind)
    for kept in range(len(MIXED)):
        one, other = documents(MIXED), documents(MIXED, seed=1)
        other[kept] = one[kept]
        mine = torch.arange(len(MIXED)).repeat_interleave(
            torch.tensor([len(d.ids) for d in one])) == kept
        same = same_bits(logits(model, packed(model, *one)), logits(model, packed(model, *other)))
        assert same[mine].all() and not same[~mine].all()


# -------------------------------------------------------------------- law 2: who sees which picture


def changed_by_picture(model, patterns: list[str], k: int) -> torch.Tensor:
    """(T,) bool: which tokens' logits change with picture k."""
    before = packed(model, *documents(patterns))
    after = packed(model, *documents(patterns))
    after.images[k] = 255 - after.images[k]
    return ~same_bits(logits(model, before), logits(model, after))


@EVERY_MODEL
@FEW
@given(PATTERNS)
def test_a_picture_changes_its_own_document_from_its_place_on_and_nothing_else(
    build, kind, patterns
):
    """Words that no longer see a picture may still hear of it, from earlier words."""
    model = build(kind)
    reach = seen(patterns, "all")
    direct = seen(patterns, model.config.decoder.visible_images)
    for k in range(reach.shape[1]):
        changed = changed_by_picture(model, patterns, k)
        assert not changed[~reach[:, k]].any() and changed[direct[:, k]].all()


@EVERY_MODEL
@FEW
@given(PATTERNS)
def test_a_picture_changes_exactly_the_words_that_see_it_when_words_do_not_talk(
    build, kind, patterns
):
    """With the words' own attention silenced the pictures' is all that is left."""
    model = deepcopy(build(kind))
    for block in model.blocks:
        nn.init.zeros_(block.attn.o_proj.weight)
    sees = seen(patterns, model.config.decoder.visible_images)
    for k in range(sees.shape[1]):
        assert torch.equal(changed_by_picture(model, patterns, k), sees[:, k])


def test_only_its_number_in_the_document_tells_a_picture_from_its_like(build):
    model, one = build("all"), document("i", 0)
    twice = Encoded([1, IMAGE, IMAGE], [False] * 3, one.images * 2, [])
    batch = packed(model, [twice, one])  # one sample: the picture is encoded once
    first, second, other_document = model.encode_images(batch)[0].chunk(3)
    number = model.image_index_embed
    torch.testing.assert_close(second - first, (number[1] - number[0]).expand_as(first))
    assert (second - first).abs().max() > 0.01 and same_bits(first, other_document).all()


# ----------------------------------------------------------- law 3: the language model stays itself


@pytest.mark.quick
def test_tokens_that_see_no_picture_pass_the_open_gated_block_bit_for_bit(build):
    block: GatedCrossAttentionBlock = build("latest").cross_blocks["1"]
    assert block.has_mlp and block.attn_gate.abs() > 0.1 and block.mlp_gate.abs() > 0.1
    start = torch.tensor([0, 0, 0, 4, 4, 8, 8], dtype=torch.int32)
    end = torch.tensor([0, 0, 4, 8, 8, 8, 12], dtype=torch.int32)
    x, pictures = torch.randn(7, 32), torch.randn(12, 32)
    sees = start < end
    out = block(x, pictures, Span(start, end), sees[:, None].float())
    assert torch.equal(same_bits(out, x), ~sees)
    nobody = block(x, pictures, Span(start, start), torch.zeros(7, 1))
    assert same_bits(nobody, x).all()


@pytest.mark.quick
@EVERY_MODEL
def test_text_alone_runs_as_the_plain_decoder_bit_for_bit(build, kind):
    model = build(kind)
    batch = packed(model, *documents(["wwwww", "w", "", "wwwwwwww"]))
    assert same_bits(logits(model, batch), logits(without_cross_blocks(model), batch)).all()


@EVERY_MODEL
def test_words_before_any_picture_are_the_plain_decoders_bit_for_bit(build, kind):
    model = build(kind)
    batch = packed(model, *documents(MIXED))
    same = same_bits(logits(model, batch), logits(without_cross_blocks(model), batch))
    assert torch.equal(same, ~seen(MIXED, "all").any(1))


@EVERY_MODEL
def test_closed_gates_leave_the_plain_decoder_even_when_pictures_are_shown(build, kind):
    model = deepcopy(build(kind))
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            nn.init.zeros_(parameter)
    batch = packed(model, *documents(MIXED))
    assert same_bits(logits(model, batch), logits(without_cross_blocks(model), batch)).all()


def test_a_new_model_has_closed_gates_and_numbers_no_picture(tiny_config):
    model = VisionLanguageModel(tiny_config(**MODELS["all, resampled"]))
    start = [p for name, p in model.named_parameters()
             if name.endswith("_gate") or name == "image_index_embed"]
    assert len(start) == 3 and not any(p.any() for p in start)


# ---------------------------------------------------------------------- law 4: losses and gradients


def gradient(model, batches: list, contrastive_weight: float = 0.0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses(model, batches, contrastive_weight, backward=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_token_loss_is_the_sum_over_learned_targets(build):
    model = build("all")
    parts = documents(MIXED)
    batch = packed(model, *parts)
    alone = [logits(model, packed(model, d)) for d in parts]
    expected = sum(
        F.cross_entropy(rows[i], torch.tensor(d.ids[i + 1]))
        for d, rows in zip(parts, alone, strict=True)
        for i in range(len(d.ids) - 1) if d.learn[i + 1]
    )
    torch.testing.assert_close(model(batch).token_loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["latest", "all, resampled"])
@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)), st.sets(st.integers(1, 5)))
def test_any_split_into_micro_batches_gives_the_same_gradient(build, kind, order, cuts):
    model, parts = build(kind), documents(["wwiwwwwww", "ww", "iww", "i", "wiwwi", "wwwwwwwww"])
    whole = gradient(model, [packed(model, *parts)])
    bounds = [0, *sorted(cuts), 6]
    slices = [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    split = gradient(model, [packed(model, *(parts[n] for n in part)) for part in slices])
    assert whole.keys() == split.keys()
    for name in whole:
        if not name.endswith(BLIND):
            difference = (split[name] - whole[name]).norm()
            assert difference <= 1e-5 * whole[name].norm(), name


@EVERY_MODEL
def test_the_gradient_reaches_every_parameter(build, kind):
    """But CLIP's own pooled feature where the resampler's takes its place."""
    model = deepcopy(build(kind, contrastive_dim=8))
    pairs = [document("iww", n) for n in range(3)]
    batch = packed(model, *pairs, *map(search_for, pairs), document("iwwiiwiw", 9))
    reached = {name for name, g in gradient(model, [batch], 0.5).items() if g.abs().max() > 0}
    idle = {name for name, _ in model.named_parameters() if not name.endswith(BLIND)} - reached
    pooled = {"vision.post_norm.weight", "vision.post_norm.bias", "vision.proj.weight"}
    assert idle == (pooled if model.config.resampler else set())


def test_the_contrastive_loss_alone_teaches_both_sides_through_the_decoder(build):
    model = deepcopy(build("all, resampled", contrastive_dim=8))
    pairs = [document("iww", n) for n in range(3)]
    batch = packed(model, *chain(*((Encoded(p.ids, [False] * 4, p.images, []), search_for(p))
                                   for p in pairs)))
    assert len(batch.target_rows) == 0 and batch.n_rets == 3
    reached = {name for name, g in gradient(model, [batch], 0.5).items() if g.any()}
    learns = ("contrastive", "resampler", "vision.blocks", "special_embed", "blocks", "norm")
    assert all(any(name.startswith(part) for name in reached) for part in learns)
    assert not any(name.startswith(("cross_blocks", "head", "special_head")) for name in reached)


def test_a_micro_batch_without_samples_or_rets_changes_no_gradient(build):
    """One stands in for each that is missing; it must not be learned from."""
    model = deepcopy(build("all", contrastive_dim=8))
    pair = document("iww", 0)
    full = packed(model, pair, search_for(pair), *documents(MIXED))
    unlearned = packed(model, *(Encoded(d.ids, [False] * len(d.ids), d.images, [])
                                for d in documents(MIXED, seed=1)))
    one = gradient(model, [full], 0.5)
    for other in (packed(model), unlearned):
        both = gradient(model, [full, other], 0.5)
        assert all(torch.equal(one[name], both[name]) for name in one.keys() | both.keys())
    alone = gradient(model, [packed(model)])
    assert all(not g.any() for g in alone.values())
    parts = {"blocks": model.blocks, "vision.blocks": model.vision.blocks,
             "cross_blocks": model.cross_blocks}
    for prefix, part in parts.items():  # every rank runs every layer: FSDP would wait for it
        assert alone.keys() >= {name for name, _ in part.named_parameters(prefix=prefix)}


# ----------------------------------------------------------------------------- law 5 and generate()


def write(model, prompts: list[Encoded], **options) -> list[list[int]]:
    """What generate() writes behind every prompt."""
    written = [[] for _ in prompts]
    for step in generate(model, packed(model, *prompts), forbidden=(IMAGE,), **options):
        written[step.document].append(step.token)
    return written


def test_three_words_take_three_passes_however_long_the_prompts_are(build, monkeypatch):
    model, passes = deepcopy(build("all")), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda *args: passes.append(1) or decode(*args))
    written = write(model, documents(MIXED), max_new_tokens=3)
    assert {len(words) for words in written} == {3} and len(passes) == 3


@pytest.mark.quick
@EVERY_MODEL
@FEW
@given(PATTERNS, st.integers(0, 99), st.sampled_from([0.0, 1.0]))
def test_cached_writing_gives_the_logits_of_the_full_forward(
    build, kind, patterns, seed, temperature
):
    """Many tokens stop a document, so that some go on while their neighbours have ended."""
    model, prompts = build(kind), documents(patterns, seed)
    steps = [[] for _ in prompts]
    for step in generate(
        model, packed(model, *prompts), max_new_tokens=6, temperature=temperature, seed=seed,
        stop=(*range(0, WORDS, 5), END), forbidden=(IMAGE,),
    ):
        steps[step.document].append(step)
    whole = [
        Encoded(d.ids + [s.token for s in mine], d.learn + [False] * len(mine), d.images, [])
        for d, mine in zip(prompts, steps, strict=True)
    ]
    full = logits(model, packed(model, *whole)).split([len(d.ids) for d in whole])
    for prompt, mine, rows in zip(prompts, steps, full, strict=True):
        rows = rows[len(prompt.ids) - 1 : -1]
        with torch.no_grad():
            assert_close(model.logits(torch.stack([s.hidden for s in mine])), rows)
        rows[:, IMAGE] = float("-inf")
        expected = rows.log_softmax(-1)[range(len(mine)), [s.token for s in mine]]
        torch.testing.assert_close(
            torch.tensor([s.logprob for s in mine]), expected, rtol=0, atol=1e-3)


@EVERY_MODEL
@pytest.mark.parametrize("n_slots", [1, 2, 4])
def test_where_a_document_ends_the_next_begins_and_none_is_written_otherwise(
    build, kind, n_slots
):
    model, prompts, given = build(kind), documents([*MIXED, "wiwiwiw", "", "iiii", "www"]), []

    def more(n: int):
        given.append(n)
        some = prompts[sum(given[:-1]) : sum(given)]
        return packed(model, *some) if some else None

    options = dict(max_new_tokens=9, stop=(END, *range(0, WORDS, 6)), forbidden=(IMAGE,))
    written, live = [[] for _ in prompts], set()
    for step in generate(model, more, n_slots=n_slots, **options):
        written[step.document].append(step.token)
        live = live | {step.document} if not step.last else live - {step.document}
        assert len(live) <= n_slots
    options.pop("forbidden")
    assert written == [write(model, [prompt], **options)[0] for prompt in prompts]
    assert not live and len(given) > len(prompts) / n_slots


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-9), (torch.float32, 1e-4),
                                         (torch.bfloat16, 0.05)])
@EVERY_MODEL
def test_a_lone_row_computes_what_the_decoder_does(build, kind, dtype, near, monkeypatch):
    model, found = deepcopy(build(kind)).to(dtype), []
    taken = LoneRow.__call__
    monkeypatch.setattr(LoneRow, "__call__", lambda *args: found.append(taken(*args)) or found[-1])
    for prompt in documents([*MIXED, "wiwiwiw"]):
        found.clear()
        steps = [*generate(model, packed(model, prompt), max_new_tokens=5, forbidden=(IMAGE,))]
        assert len(found) == 4
        whole = Encoded(prompt.ids + [s.token for s in steps[:-1]], [False] * (len(prompt.ids) + 4),
                        prompt.images, [])
        with torch.no_grad():
            right = model.hidden_states(packed(model, whole))[0][-4:]
        assert (torch.cat(found) - right).abs().max() <= near * right.abs().max()


def test_a_model_that_wrote_alone_keeps_each_matrix_once_and_can_be_trained(build):
    model, prompt = deepcopy(build("latest")), documents(["wiww"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    written = write(model, prompt, max_new_tokens=4)
    attn = model.blocks[0].attn
    memory = attn.q_proj.weight.untyped_storage()
    assert memory.data_ptr() == attn.v_proj.weight.untyped_storage().data_ptr()
    assert write(model, prompt, max_new_tokens=4) == written
    assert memory.data_ptr() == attn.k_proj.weight.untyped_storage().data_ptr()  # not made anew
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.hidden_states(packed(model, *prompt))[0].sum().backward()
    assert attn.v_proj.weight.grad.abs().max() > 0


def test_words_without_pictures_wait_for_none(build, monkeypatch):
    model = deepcopy(build("latest"))
    wanted = write(model, documents(["www", "w"]), max_new_tokens=4)
    monkeypatch.setattr(model, "encode_images", None)
    assert write(model, documents(["www", "w"]), max_new_tokens=4) == wanted


@EVERY_MODEL
def test_a_step_reads_nothing_back_from_a_gpu_so_that_it_can_be_recorded(build, use, kind):
    """On a device without values, where none can be read."""
    use("triton")
    with torch.device("meta"), torch.inference_mode():
        model = VisionLanguageModel(build(kind).config)
        writer = Writer(model)
        writer.cache = KVCache(model, 4, 32, 2)
        hidden = writer._step(torch.zeros(7, 4, dtype=torch.long))
        assert hidden.shape == (4, model.config.decoder.dim)


@EVERY_MODEL
def test_greedy_writing_is_the_same_every_time_and_beside_any_neighbours(build, kind):
    model, prompts = build(kind), documents(MIXED)
    together = write(model, prompts, max_new_tokens=8)
    assert together == write(model, prompts, max_new_tokens=8, seed=5)
    assert together == [write(model, [p], max_new_tokens=8)[0] for p in prompts]
    assert len(set(map(tuple, together))) > 1


def test_the_likeliest_token_is_written_when_nothing_else_is_left(build):
    model, prompts = build("all"), documents(MIXED)
    greedy = write(model, prompts, max_new_tokens=8)
    assert greedy == write(model, prompts, max_new_tokens=8, temperature=1.0, top_k=1)
    assert greedy == write(model, prompts, max_new_tokens=8, temperature=1.0, top_p=1e-6)


def test_a_seed_fixes_the_draws_and_another_one_changes_them(build):
    model, prompts = build("latest"), documents(MIXED)
    one, again, other = (
        write(model, prompts, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (3, 3, 4))
    assert one == again != other


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_k=9), [0.5, 0.3, 0.15, 0.05]),
        (dict(top_p=0.7), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.9), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (dict(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025]),
    ],
)
def test_draws_follow_the_cut_off_distribution(options, expected):
    shuffle, n = torch.tensor([2, 0, 3, 1]), 20_000
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])[shuffle]
    options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
    rng = random.Random(0)
    drawn = choose(chances.log().expand(n, -1), **options, draws=[rng.random() for _ in range(n)])
    expected = torch.tensor(expected)[shuffle] / sum(expected)
    share = drawn.bincount(minlength=4) / n
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().max() < 5 * 0.5 / n**0.5


def test_the_smallest_temperature_takes_the_likeliest():
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert choose(torch.tensor([[1.0, 3.0, 2.0]]), 1e-40, 0, 1.0, [draw]).tolist() == [1]


def test_no_draw_falls_on_a_token_without_chance():
    logits = torch.tensor([float("-inf"), 0.0, 0.3, 0.1, float("-inf")]).repeat(3, 1)
    for temperature in (0.1, 1.0, 3.0):
        drawn = choose(logits, temperature, 0, 1.0, [0.0, 1 - 2**-53, 0.99])
        assert set(drawn.tolist()) <= {1, 2, 3}


def test_forbidden_tokens_are_never_written(build):
    model, prompts = build("latest"), documents(MIXED)
    allowed = {7, 8, END}
    forbidden = tuple(set(range(WORDS + 3)) - allowed)
    for temperature in (0.0, 1.0, 5.0):
        steps = generate(model, packed(model, *prompts), max_new_tokens=9, forbidden=forbidden,
                         temperature=temperature)
        written = {step.token for step in steps}
        assert written <= allowed and (temperature == 0 or written == allowed)


def test_a_stop_token_is_yielded_and_ends_its_document_alone(build):
    model, prompts = build("all"), documents(MIXED)
    free = write(model, prompts, max_new_tokens=8)
    for stop in {*free[0], *free[1], *free[2]}:
        cut = [w[: w.index(stop) + 1] if stop in w else w for w in free]
        assert write(model, prompts, max_new_tokens=8, stop=(stop,)) == cut


def test_every_document_gets_max_new_tokens(build):
    model, prompts = build("latest"), documents(MIXED)
    for n in (0, 1, 5):
        assert [*map(len, write(model, prompts, max_new_tokens=n))] == [n] * len(prompts)


def test_a_model_never_reads_beyond_max_seq_len(build):
    model, prompts = build("latest", max_seq_len=12), documents(["w" * 10, "wiw", "w" * 5])
    for prompt, written in zip(prompts, write(model, prompts, max_new_tokens=50), strict=True):
        assert 0 < len(written) and len(prompt.ids) + len(written) - 1 <= 12  # the last is not read


def test_no_document_grows_longer_than_max_seq_len(build):
    model, prompts = build("latest", max_seq_len=12), documents(["w" * 10, "wiw", "w" * 5])
    for prompt, written in zip(prompts, write(model, prompts, max_new_tokens=50), strict=True):
        assert len(prompt.ids) + len(written) == 12


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(build):
    model = build("latest", max_seq_len=12)
    for length in (12, 15):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens.*reads 12"):
            write(model, documents(["ww", "w" * (length - 1)]))


# --------------------------------------------------------------------------------------- the oracle


def test_the_decoder_equals_transformers_llama(tiny_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = tiny_model(n_layers=3, cross_attn_every=3, vocab_size=WORDS, **GROUPED,
                      norm_eps=1e-2, rope_theta=500.0)
    c = ours.config.decoder
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=c.dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, max_position_embeddings=c.max_seq_len, tie_word_embeddings=False,
    )).eval()
    names = {
        "model.embed_tokens.weight": "embed", "lm_head.weight": "head", "model.layers": "blocks",
        "self_attn": "attn", "input_layernorm": "attn_norm", "model.norm": "norm",
        "post_attention_layernorm": "mlp_norm",
    }
    copied = {}
    for name, weight in theirs.state_dict().items():
        mine = name
        for part, our_part in names.items():
            mine = mine.replace(part, our_part)
        copied[name] = ours.state_dict()[mine]
        copied[name] += 0.1 * torch.randn(weight.shape)  # ones and zeros would hide a mix-up
    theirs.load_state_dict(copied)

    parts = documents(["w" * 30, "wwww", "w", "w" * 17])
    rows = logits(ours, packed(ours, *parts))[:, :WORDS].split([len(d.ids) for d in parts])
    for part, mine in zip(parts, rows, strict=True):
        with torch.no_grad():
            assert_close(mine, theirs(torch.tensor([part.ids])).logits[0])


# ------------------------------------------------------------------ contrastive head, configuration


def test_features_are_unit_vectors_and_the_temperature_is_capped_at_100():
    torch.manual_seed(0)
    head = ContrastiveHead(text_dim=12, image_dim=20, dim=6)
    text, image, scale = head(7 * torch.randn(5, 12), 0.01 * torch.randn(3, 20))
    assert text.shape == (5, 6) and image.shape == (3, 6)
    for features in (text, image):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(features)))
    assert scale.item() == pytest.approx(1 / 0.07)
    for raw, expected in ((2.0, np.exp(2.0)), (4.7, 100.0), (50.0, 100.0)):
        nn.init.constant_(head.logit_scale, raw)
        assert head(torch.randn(2, 12), torch.randn(2, 20))[2].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DecoderConfig, dict(n_heads=6, n_kv_heads=4), "n_kv_heads 4 must divide n_heads 6"),
        (DecoderConfig, dict(n_heads=2, n_kv_heads=4), "n_kv_heads 4 must divide n_heads 2"),
        (DecoderConfig, dict(n_kv_heads=0), "n_kv_heads 0 must divide n_heads 32"),
        (DecoderConfig, dict(n_layers=9, cross_attn_every=4), "every 4 must divide n_layers 9"),
        (DecoderConfig, dict(cross_attn_every=0), "every 0 must divide n_layers 32"),
        (DecoderConfig, dict(visible_images="some"), "visible_images 'some': .*'latest' or 'all'"),
        (DecoderConfig, dict(visible_images="all"), "max_images 0: for 'latest' 0, else above 0"),
        (DecoderConfig, dict(max_images=3), "max_images 3: for 'latest' 0"),
        (VisionConfig, dict(image_size=100), "image_size 100 must be a multiple of patch_size 14"),
        (VisionConfig, dict(activation="relu"), "activation 'relu': .*'quick_gelu' or 'gelu'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_with_its_values(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_hints_that_are_missing_are_found(build):
    model = build("all, resampled")
    batch, bare = (packed(model, *documents(MIXED)) for _ in range(2))
    bare.text_hints = bare.image_hints = None
    assert same_bits(logits(model, batch), logits(model, bare)).all()


# ---------------------------------------------------------------------------------- every backend

HERE = pytest.param("triton", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="these models are on the CPU, where no interpreter runs"))
OTHERS = pytest.mark.parametrize("backend", [HERE, "reference"])


@EVERY_MODEL
@OTHERS
def test_every_backend_gives_the_same_loss_and_gradients(build, use, kind, backend):
    model = deepcopy(build(kind, contrastive_dim=8))
    pairs = [document("iww", n) for n in range(2)]
    batch = packed(model, *documents(MIXED), *pairs, *map(search_for, pairs))
    means, gradients = losses(model, [batch], 0.5, backward=False)[0], gradient(model, [batch], 0.5)
    use(backend)
    assert losses(model, [batch], 0.5, backward=False)[0] == pytest.approx(means, rel=1e-5)
    for name, ours in gradient(model, [batch], 0.5).items():
        assert (ours - gradients[name]).norm() <= 1e-4 * gradients[name].norm() + 1e-7, name


@OTHERS
@pytest.mark.parametrize("kind", ["latest", "all, resampled"])
@pytest.mark.parametrize("law", [
    test_what_stands_in_a_neighbour_of_the_same_length_changes_no_bit,
    test_words_before_any_picture_are_the_plain_decoders_bit_for_bit,
    test_text_alone_runs_as_the_plain_decoder_bit_for_bit,
    test_closed_gates_leave_the_plain_decoder_even_when_pictures_are_shown,
])
def test_every_backend_keeps_the_laws(build, use, backend, law, kind):
    use(backend)
    law(build, kind)


@OTHERS
def test_every_backend_keeps_documents_and_pictures_apart(build, use, backend):
    use(backend)
    patterns = ["wiwiw", "ww", "iww"]
    model, parts = build("all"), documents(patterns)
    together = logits(model, packed(model, *parts)).split([len(d.ids) for d in parts])
    for part, ours in zip(parts, together, strict=True):
        assert_close(ours, logits(model, packed(model, part)))
    sees = seen(patterns, "all")
    for k in range(sees.shape[1]):
        assert torch.equal(changed_by_picture(model, patterns, k), sees[:, k])


@OTHERS
def test_every_backend_gives_the_same_gradient_for_any_split(build, use, backend):
    use(backend)
    model, parts = deepcopy(build("all")), documents(["wiww", "www", "iwwiw"])
    whole = gradient(model, [packed(model, *parts)])
    split = gradient(model, [packed(model, *parts[:1]), packed(model, *parts[1:])])
    for name in whole.keys() - {name for name in whole if name.endswith(BLIND)}:
        assert (split[name] - whole[name]).norm() <= 1e-5 * whole[name].norm(), name


@OTHERS
def test_every_backend_writes_with_a_cache_what_it_reads_without(
    build, use, monkeypatch, backend
):
    use(backend)
    monkeypatch.setattr(decode, "MIN_KEYS", 16)  # so that rows are split, as in long documents
    monkeypatch.setattr(decode, "KEYS_A_SPLIT", 4)
    model, prompts = build("all, resampled"), documents(["wwiwiww", "w"])
    whole = [list(prompt.ids) for prompt in prompts]
    for step in generate(model, packed(model, *prompts), max_new_tokens=3, forbidden=(IMAGE,)):
        ids, pictures = whole[step.document], prompts[step.document].images
        read = logits(model, packed(model, Encoded(ids, [False] * len(ids), pictures, [])))[-1:]
        with torch.no_grad():
            assert_close(model.logits(step.hidden[None]), read)
        ids.append(step.token)


@OTHERS
def test_every_backend_goes_on_exactly_where_it_stopped(build, use, tmp_path, backend):
    use(backend)
    batch = packed(build("all"), *documents(["wiww", "ww"]))

    def step(model, optimizer):
        train_step(model, optimizer, [batch], contrastive_weight=0.0, grad_clip=1.0)

    def start():
        model = deepcopy(build("all"))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    through, stopped, again = start(), start(), start()
    step(*through)
    step(*through)
    step(*stopped)
    saver = Saver(tmp_path, keep=1)
    saver.save(1, *stopped, {})
    saver.finish()
    load_checkpoint(latest_checkpoint(tmp_path), *again)
    step(*again)
    for ours, wanted in zip(again[0].parameters(), through[0].parameters(), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@EVERY_MODEL
def test_a_gpu_computes_what_the_cpu_does_and_keeps_neighbours_apart(build, kind, dtype, near):
    model = deepcopy(build(kind, contrastive_dim=8))
    one, other = documents(MIXED), documents(MIXED, seed=1)
    right = losses(model, [packed(model, *one)], 0.0, backward=False)[0]
    model.to("cuda", dtype)
    ours = losses(model, [packed(model, *one).to("cuda")], 0.0, backward=False)[0]
    assert ours == pytest.approx(right, rel=near)
    other[0] = one[0]
    features = []
    for parts in (one, other):
        batch = packed(model, *parts).to("cuda")
        end = torch.arange(1, len(batch.tokens) + 1, device="cuda").int()
        with torch.no_grad():
            pictures, _ = model.encode_images(batch)
            features.append(model.decode(
                batch.tokens, batch.positions, Span(batch.text_start, end, batch.text_hints),
                model.image_span(batch), pictures)[: len(one[0].ids)])
    assert torch.equal(*features)


@pytest.mark.gpu
@EVERY_MODEL
def test_a_recorded_step_writes_what_an_eager_one_does(build, kind, monkeypatch):
    model, written = deepcopy(build(kind)).to("cuda"), []
    prompts = [packed(model, prompt).to("cuda") for prompt in documents([*MIXED, "wiwiwiw"])]
    for eager in (10**6, 0):  # steps before one is recorded
        monkeypatch.setattr(generate_module, "EAGER_STEPS", eager)
        source, answers = iter(prompts), [[] for _ in prompts]
        for step in generate(model, lambda n, source=source: next(source, None), n_slots=3,
                             max_new_tokens=12, stop=(END, *range(0, WORDS, 9)),
                             forbidden=(IMAGE,)):
            answers[step.document].append(step.token)
        written.append(answers)
    assert written[0] == written[1]
