"""Laws of many ranks: the contrastive loss and its gradients do not depend on how many compute it.

pytest tests/test_parallel.py
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from data import Text, collate, collate_options, encode
from kernels import set_backend
from model import Output
from parallel import contrastive_loss, full_state, losses, shard, train_step
from vision import ResamplerConfig
from weights import load_model, save_model


def features(seed: int, n_text: int, n_image: int, dim: int = 6):
    g = torch.Generator().manual_seed(seed)
    text, image = torch.randn(n_text, dim, generator=g), torch.randn(n_image, dim, generator=g)
    return F.normalize(text, dim=1), F.normalize(image, dim=1)


# What each rank holds: number of <ret>s, how many are real, which picture each asks for, and the
# keys of its pictures: the second of rank 0 and the first of rank 2 are twins.
RANKS = [(3, 3, [2, 0, 3], [11, 12, 13, 14]), (1, 0, [0], [15, 16]), (2, 2, [1, 0], [12, 17])]


def share(rank: int):
    n_text, n_real, target, keys = RANKS[rank]
    text, image = features(rank, n_text, len(keys))
    return (text.requires_grad_(), image.requires_grad_(), torch.tensor(target),
            torch.tensor(keys), n_real)


def loss_of(text, image, scale, target, keys, n_real):
    return contrastive_loss(Output(None, text, image, scale.exp()), target, keys, n_real)


def everything_on_one():
    """The same features in one process; the stand-in of rank 1 asks for nothing."""
    shares = [share(rank) for rank in range(len(RANKS))]
    scale = torch.tensor(1.3, requires_grad=True)
    offsets = [0, 4, 6]
    text = torch.cat([s[0][: s[4]] for s in shares])
    image = torch.cat([s[1] for s in shares])
    target = torch.cat([s[2][: s[4]] + offset
                        for s, offset in zip(shares, offsets, strict=True)])
    keys = torch.cat([s[3] for s in shares])
    loss, right = loss_of(text, image, scale, target, keys, len(text))
    leaves = [x for s in shares for x in s[:2]]
    grads = torch.autograd.grad(loss, [*leaves, scale], allow_unused=True)
    return loss.detach(), right, grads


def worker(rank: int, store: str, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=len(RANKS))
    text, image, *rest = share(rank)
    scale = torch.tensor(1.3, requires_grad=True)
    loss, right = loss_of(text, image, scale, *rest)
    grads = torch.autograd.grad(loss, [text, image, scale])
    results[rank] = (loss.item(), right.item(), [g.tolist() for g in grads])
    dist.destroy_process_group()


def test_the_contrastive_loss_over_three_ranks_is_that_of_one(tmp_path):
    results = mp.Manager().dict()
    mp.spawn(worker, (str(tmp_path / "store"), results), nprocs=len(RANKS))
    loss, right, grads = everything_on_one()
    scale_grad = 0.0
    for rank in range(len(RANKS)):
        found, n_right, (text_grad, image_grad, of_scale) = results[rank]
        assert found == pytest.approx(loss.item(), rel=1e-5) and n_right == right
        for ours, wanted in ((text_grad, grads[2 * rank]), (image_grad, grads[2 * rank + 1])):
            wanted = torch.zeros_like(torch.tensor(ours)) if wanted is None else wanted
            torch.testing.assert_close(torch.tensor(ours), wanted, rtol=1e-4, atol=1e-6)
        scale_grad += of_scale
    assert scale_grad == pytest.approx(grads[-1].item(), rel=1e-4)


def test_the_contrastive_loss_is_clips_symmetric_cross_entropy():
    text, image = features(7, 5, 5)
    scale = torch.tensor(2.0)
    loss, right = loss_of(text, image, scale, torch.arange(5), torch.arange(5), 5)
    logits = scale.exp() * text @ image.T
    wanted = (F.cross_entropy(logits, torch.arange(5), reduction="sum")
              + F.cross_entropy(logits.T, torch.arange(5), reduction="sum")) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert right == (logits.argmax(1) == torch.arange(5)).sum()


def test_equal_pictures_are_nobodys_negatives():
    text, image = features(5, 3, 3)
    alone, _ = loss_of(text[:2], image[:2], torch.tensor(1.0), torch.arange(2), torch.arange(2), 2)
    first, second = text[:1], text[1:2]
    twice = torch.cat([first, second, first])  # the first is asked for by two texts, shown twice
    shown = torch.cat([image[:2], image[:1]])
    loss, right = loss_of(twice, shown, torch.tensor(1.0), torch.tensor([0, 1, 2]),
                          torch.tensor([7, 8, 7]), 3)
    single, _ = loss_of(first, image[:1], torch.tensor(1.0), torch.tensor([0]),
                        torch.tensor([7]), 1)
    assert single.item() == 0 and loss.isfinite() and loss > alone
    only = loss_of(twice[::2], shown[::2], torch.tensor(1.0), torch.arange(2),
                   torch.tensor([7, 7]), 2)
    assert only[0].item() == 0 and only[1] == 2  # nothing but twins: nothing to choose from


def test_the_stand_in_of_a_batch_without_ret_weighs_nothing():
    text, image = features(3, 1, 3)
    text, image = text.requires_grad_(), image.requires_grad_()
    loss, right = loss_of(text, image, torch.tensor(1.0), torch.tensor([0]), torch.arange(3), 0)
    assert loss.item() == 0 and right == 0
    for grad in torch.autograd.grad(loss, (text, image)):
        assert torch.equal(grad, torch.zeros_like(grad))


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
    results[rank] = means[0], norm.item()
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
    whole = full_state(model)
    for name, tensor in load_model(folder)[0].state_dict().items():
        assert torch.equal(whole[name], tensor.float()), name
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
    mp.spawn(shard_of_two, (str(tmp_path / "store"), folder, results), nprocs=2)
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
    mp.spawn(one_of_two, (str(tmp_path / "store"), model, batches, backend, results), nprocs=2)
    means, _ = losses(model, [whole], 0.0, backward=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    for rank in (0, 1):
        assert results[rank] == (pytest.approx(means[0], rel=1e-5), pytest.approx(norm, rel=1e-5))


def shard_of_three(rank: int, store: str, folder: Path, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    model, _ = load_model(folder)
    mapped = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard(model, torch.float32)
    own = {name: len(p.to_local()) for name, p in model.named_parameters()}
    whole = full_state(model)
    results[rank] = own, [name for name, tensor in mapped.items()
                          if whole[name].dtype != torch.float32
                          or not torch.equal(whole[name], tensor.float())]
    dist.destroy_process_group()


@pytest.mark.slow
def test_parameters_that_do_not_divide_over_three_ranks_are_whole_again(tiny_model, tokenizer,
                                                                        tmp_path):
    model = tiny_model(resampler=ResamplerConfig(n_latents=5, n_layers=1, n_heads=2, head_dim=16,
                                                 hidden_dim=40), contrastive_dim=7, hidden_dim=67)
    model.to(torch.bfloat16)
    save_model(tmp_path / "model", model.config, model.state_dict(), tokenizer)
    results = mp.Manager().dict()
    mp.spawn(shard_of_three, (str(tmp_path / "store"), tmp_path / "model", results), nprocs=3)
    rows = {name: len(p) if p.ndim else 1 for name, p in model.named_parameters()}
    assert {n % 3 for n in rows.values()} == {0, 1, 2} and min(rows.values()) == 1
    for rank in range(3):
        own, wrong = results[rank]
        assert not wrong and own.keys() == rows.keys()
    for name, n in rows.items():
        held = [results[rank][0][name] for rank in range(3)]
        assert sum(held) == n and max(held) == -(-n // 3), name
