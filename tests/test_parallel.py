"""Laws of many ranks: the contrastive loss and its gradients do not depend on how many compute it.

pytest tests/test_parallel.py
"""

import os
import pickle
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from data import Image, Ret, Text, collate, collate_options, encode, sample_numbers
from kernels import set_backend
from optim import freeze
from parallel import full_state, info_nce, losses, recompute, shard, train_step, unsharded
from ranks import Ranks, all_sum, start_group, stop_group
from tests.launch import free_port, spawn
from vision import ResamplerConfig
from weights import load_model, save_model


def features(seed: int, n_text: int, n_image: int, dim: int = 6):
    g = torch.Generator().manual_seed(seed)
    text, image = torch.randn(n_text, dim, generator=g), torch.randn(n_image, dim, generator=g)
    return F.normalize(text, dim=1), F.normalize(image, dim=1)


# What each rank holds: number of <ret>s, how many are real, which picture each asks for, and the
# keys of its pictures: the second of rank 0 and the first of rank 2 are twins.
RANKS = [(3, 3, [2, 0, 3], [11, 12, 13, 14]), (1, 0, [0], [15, 16]), (2, 2, [1, 0], [12, 17])]
SCALE = torch.tensor(3.7)


def share(rank: int):
    n_text, n_real, target, keys = RANKS[rank]
    text, image = features(rank, n_text, len(keys))
    return text, image, torch.tensor(target), torch.tensor(keys), torch.arange(n_text) < n_real


def everything_on_one():
    """The same features in one process; the stand-in of rank 1 asks for nothing."""
    shares = [share(rank) for rank in range(len(RANKS))]
    offsets = [0, 4, 6]
    text = torch.cat([s[0][s[4]] for s in shares])
    image = torch.cat([s[1] for s in shares])
    target = torch.cat([s[2][s[4]] + offset for s, offset in zip(shares, offsets, strict=True)])
    keys = torch.cat([s[3] for s in shares])
    return info_nce(text, image, SCALE, target, keys, torch.ones(len(text)) > 0)


def worker(rank: int, store: str, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=len(RANKS))
    text, image, *rest = share(rank)
    results[rank] = info_nce(text, image, SCALE, *rest)
    dist.destroy_process_group()


def test_the_contrastive_loss_over_three_ranks_is_that_of_one(tmp_path):
    results = mp.Manager().dict()
    spawn(worker, (str(tmp_path / "store"), results), nprocs=len(RANKS))
    loss, right, text_grad, image_grad, scale_grad = everything_on_one()
    parts = zip(text_grad.split([3, 0, 2]), image_grad.split([4, 2, 2]), strict=True)
    for rank, wanted in enumerate(parts):
        found, n_right, *gradients, _ = results[rank]
        assert found.item() == pytest.approx(loss.item(), rel=1e-5) and n_right == right
        for ours, part in zip(gradients, wanted, strict=True):
            part = part if len(part) else torch.zeros_like(ours)  # of the stand-in
            torch.testing.assert_close(ours, part, rtol=1e-4, atol=1e-6)
    total = sum(results[rank][-1] for rank in range(len(RANKS)))
    assert total.item() == pytest.approx(scale_grad.item(), rel=1e-4)


def all_real(text, image, scale, target, keys):
    return info_nce(text, image, scale, target, keys, torch.ones(len(text)) > 0)


def test_the_contrastive_loss_is_clips_symmetric_cross_entropy():
    text, image = (x.requires_grad_() for x in features(7, 5, 5))
    scale = torch.tensor(7.0, requires_grad=True)
    loss, right, *gradients = all_real(text, image, scale, torch.arange(5), torch.arange(5))
    logits = scale * text @ image.T
    wanted = (F.cross_entropy(logits, torch.arange(5), reduction="sum")
              + F.cross_entropy(logits.T, torch.arange(5), reduction="sum")) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert right == (logits.argmax(1) == torch.arange(5)).sum()
    for ours, theirs in zip(gradients, torch.autograd.grad(wanted, (text, image, scale)),
                            strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_equal_pictures_are_nobodys_negatives():
    text, image = features(5, 3, 3)
    one = torch.tensor(2.7)
    alone = all_real(text[:2], image[:2], one, torch.arange(2), torch.arange(2))[0]
    first, second = text[:1], text[1:2]
    twice = torch.cat([first, second, first])  # the first is asked for by two texts, shown twice
    shown = torch.cat([image[:2], image[:1]])
    loss = all_real(twice, shown, one, torch.tensor([0, 1, 2]), torch.tensor([7, 8, 7]))[0]
    single = all_real(first, image[:1], one, torch.tensor([0]), torch.tensor([7]))[0]
    assert single.item() == 0 and loss.isfinite() and loss > alone
    only = all_real(twice[::2], shown[::2], one, torch.arange(2), torch.tensor([7, 7]))
    assert only[0].item() == 0 and only[1] == 2  # nothing but twins: nothing to choose from


def test_the_stand_in_of_a_batch_without_ret_weighs_nothing():
    text, image = features(3, 1, 3)
    loss, right, *gradients = info_nce(text, image, torch.tensor(2.7), torch.tensor([0]),
                                       torch.arange(3), torch.tensor([False]))
    assert loss.item() == 0 and right == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_temperature_at_its_cap_can_come_back(tiny_model):
    model = tiny_model(contrastive_dim=8)
    torch.nn.init.constant_(model.contrastive.logit_scale, 9.0)
    model.cap_temperature()
    scale = model.contrastive(torch.randn(2, 32), torch.randn(2, 24))[2]
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert model.contrastive.logit_scale.grad.item() == pytest.approx(100)


# ------------------------------------------------- however a batch is split, however it is sharded


@dataclass(frozen=True)
class Case:
    """How a batch is computed: in how many micro-batches, what is frozen, options of shard()."""

    n_micro: int = 2
    pool: str = "micro"
    frozen: str = "none"
    recompute: str = "none"
    keep: bool = False
    options: tuple = ()


CASES = {
    2: [Case(), Case(pool="global", keep=True, options=(("reshard", False),)),
        Case(pool="global", frozen="vision+decoder", recompute="full",
             options=(("only_trained", True),)),
        Case(n_micro=1, frozen="vision", recompute="selective", options=(("prefetch", 2),)),
        Case(n_micro=4, frozen="vision+decoder"), Case(options=(("replicate", 2),))],
    4: [Case(pool="global", options=(("prefetch", 1),)),
        Case(frozen="vision", recompute="full",
             options=(("only_trained", True), ("replicate", 2)))],
}


def eight_samples(tokenizer) -> list:
    """Captions with pictures and requests for them; of the last two no word sees a picture."""
    random = np.random.default_rng(0)
    samples = []
    for i, words in enumerate(("a red cat at the top", "a cup", "two blue fish on the right",
                               "a tree", "a green car at the left", "a dog and a cat")):
        picture = random.integers(0, 256, (16, 16, 3), np.uint8)
        documents = [[Image(picture), Text(words, learn=True)], [Text(words), Ret(picture)]]
        samples.append([encode(document, tokenizer) for document in documents[: 1 + i % 3]])
    return samples + [[encode([Text(words, learn=True)], tokenizer)] for words in ("no", "a hat")]


def split(samples: list, case: Case, n_ranks: int, options: dict) -> list[list]:
    """The micro-batches of every rank."""
    return [[collate([samples[i] for i in numbers], **options)
             for numbers in sample_numbers(0, 1, batch_size=8, grad_accum_steps=case.n_micro,
                                           rank=rank, world_size=n_ranks)]
            for rank in range(n_ranks)]


def computed(model, case: Case, batches: list) -> tuple[list, dict]:
    means, _ = losses(model, batches, 0.3, backward=True, pool=case.pool, keep=case.keep)
    return means, {name: unsharded(p.grad) for name, p in model.named_parameters()
                   if p.grad is not None}


def one_of_many(rank: int, store: str, work: Path, results):
    model, work = pickle.loads(work.read_bytes())
    size = len(next(iter(work.values())))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for case, batches in work.items():
        own = deepcopy(model)
        freeze(own, case.frozen)
        recompute(own, case.recompute)
        shard(own, torch.float32, **dict(case.options))
        found = computed(own, case, batches[rank])
        if rank == 0:
            results[case] = found
    dist.destroy_process_group()


@pytest.mark.parametrize("n_ranks", CASES)
def test_any_split_and_sharding_gives_the_losses_and_gradients_of_one_process(
    tiny_model, tokenizer, tmp_path, n_ranks
):
    model = tiny_model(contrastive_dim=8, cross_attn_mlp=True, resampler=ResamplerConfig(
        n_latents=3, n_layers=1, n_heads=2, head_dim=16, hidden_dim=40))
    samples, options = eight_samples(tokenizer), collate_options(tokenizer, model.config)
    work = {case: split(samples, case, n_ranks, options) for case in CASES[n_ranks]}
    results = mp.Manager().dict()
    (tmp_path / "work").write_bytes(pickle.dumps((model, work)))  # more tensors than a server takes
    spawn(one_of_many, (str(tmp_path / "store"), tmp_path / "work", results), nprocs=n_ranks)
    for case in CASES[n_ranks]:
        own = deepcopy(model)
        freeze(own, case.frozen)
        same_pool = replace(case, n_micro=1 if case.pool == "global" else case.n_micro)
        means, gradients = computed(own, same_pool, split(samples, same_pool, 1, options)[0])
        assert results[case][0] == pytest.approx(means, rel=1e-5)
        assert results[case][1].keys() == gradients.keys()
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, gradient in gradients.items():
            difference = float((results[case][1][name] - gradient).abs().max())
            assert difference < 1e-5 * largest, (case, name)
        assert all(name.startswith(("vision", "blocks", "norm", "embed", "head")) for name, p in
                   own.named_parameters() if p.grad is None)


def test_the_global_pool_is_another_loss_than_the_pool_of_a_micro_batch(tiny_model, tokenizer):
    model = tiny_model(contrastive_dim=8)
    samples, options = eight_samples(tokenizer), collate_options(tokenizer, model.config)
    micro, large = (computed(deepcopy(model), case, split(samples, case, 1, options)[0])[0]
                    for case in (Case(), Case(pool="global")))
    assert micro[0] == pytest.approx(large[0]) and micro[1] < large[1]


def test_a_step_without_ret_leaves_an_optimizer_state_that_is_whole(tiny_model, tokenizer):
    model = tiny_model(contrastive_dim=8)  # else a checkpoint of it could not be loaded again
    document = encode([Text("a red cat", learn=True)], tokenizer)
    batch = collate([[document]], **collate_options(tokenizer, model.config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, optimizer, [batch], contrastive_weight=0.1, grad_clip=1.0)
    assert batch.n_rets == 0 and set(optimizer.state) == set(model.parameters())


def one_of_two(rank: int, store: str, model, batches, backend: str, results):
    set_backend(backend)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shard(model, torch.float32)
    means, _ = losses(model, [batches[rank]], 0.0, backward=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
    results[rank] = means[0].item(), norm.item()
    dist.destroy_process_group()


def resident(file: Path) -> int:
    """Bytes of a mapped file that this process has in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def shard_of_two(rank: int, store: str, folder: Path, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, _ = load_model(folder)
    mapped = model.state_dict()  # else the file would be let go of
    shard(model, torch.float32)
    results[f"read {rank}"] = resident(folder / "model.safetensors")
    del mapped
    gathered = full_state(model)
    assert rank == 0 or gathered == {}  # two wholes on one machine would be one too many
    for name, tensor in load_model(folder)[0].state_dict().items() if rank == 0 else ():
        assert torch.equal(gathered[name], tensor.float()), name
    dist.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's own counts")
def test_a_rank_reads_only_the_rows_that_it_keeps(tiny_model, tokenizer, tmp_path):
    # Odd, so that shards are uneven; large, for the kernel maps up to 2 MB at a time.
    model = tiny_model(hidden_dim=2**18 + 1, n_kv_heads=1)
    folder = tmp_path / "model"
    save_model(folder, model.config, model.state_dict(), tokenizer)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 190e6
    results = mp.Manager().dict()
    spawn(shard_of_two, (str(tmp_path / "store"), folder, results), nprocs=2)
    for rank in (0, 1):
        assert 0.3 * size < results[f"read {rank}"] < 0.65 * size


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter, which stands in for a GPU"))])
def test_two_ranks_compute_with_every_backend_what_one_does(
    tiny_model, tokenizer, tmp_path, backend
):
    model = tiny_model()
    samples = [[encode([Text(words, learn=True)], tokenizer)]
               for words in ("a red cat at the top", "a cup", "two blue fish on the right")]
    whole, *batches = (collate(part, **collate_options(tokenizer, model.config))
                       for part in (samples, samples[:1], samples[1:]))
    results = mp.Manager().dict()
    spawn(one_of_two, (str(tmp_path / "store"), model, batches, backend, results), nprocs=2)
    means, _ = losses(model, [whole], 0.0, backward=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    for rank in (0, 1):
        assert results[rank] == pytest.approx((means[0].item(), norm), rel=1e-5)


def shard_of_three(rank: int, store: str, folder: Path, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    model, _ = load_model(folder)
    mapped = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard(model, torch.float32)
    own = {name: len(p.to_local()) for name, p in model.named_parameters()}
    gathered = {name: unsharded(p) for name, p in model.state_dict().items()}
    results[rank] = own, [name for name, tensor in mapped.items()
                          if gathered[name].dtype != torch.float32
                          or not torch.equal(gathered[name], tensor.float())]
    dist.destroy_process_group()


@pytest.mark.slow
def test_parameters_that_do_not_divide_over_three_ranks_are_whole_again(tiny_model, tokenizer,
                                                                        tmp_path):
    model = tiny_model(resampler=ResamplerConfig(n_latents=5, n_layers=1, n_heads=2, head_dim=16,
                                                 hidden_dim=40), contrastive_dim=7, hidden_dim=67)
    model.to(torch.bfloat16)
    save_model(tmp_path / "model", model.config, model.state_dict(), tokenizer)
    results = mp.Manager().dict()
    spawn(shard_of_three, (str(tmp_path / "store"), tmp_path / "model", results), nprocs=3)
    rows = {name: len(p) if p.ndim else 1 for name, p in model.named_parameters()}
    assert {n % 3 for n in rows.values()} == {0, 1, 2} and min(rows.values()) == 1
    for rank in range(3):
        own, wrong = results[rank]
        assert not wrong and own.keys() == rows.keys()
    for name, n in rows.items():
        held = [results[rank][0][name] for rank in range(3)]
        assert sum(held) == n and max(held) == -(-n // 3), name


def slow_first_rank(rank: int, port: int, results):
    ranks = Ranks(rank, 2, rank, 2)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "RANK": str(rank)}
    start_group(ranks, torch.device("cpu"), timeout=1)
    for seconds in (1.5, *[0] * 20):  # groups that come and go
        with ranks.first_alone():
            time.sleep(seconds if ranks.is_first else 0)
    results[rank] = all_sum(torch.ones(1)).item()
    stop_group()


def test_the_others_wait_for_the_first_rank_longer_than_the_timeout():
    results = mp.Manager().dict()
    spawn(slow_first_rank, (free_port(), results), nprocs=2)
    assert dict(results) == {0: 2.0, 1: 2.0}
