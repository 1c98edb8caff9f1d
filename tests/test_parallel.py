"""Laws of many ranks: the contrastive loss and its gradients do not depend on how many compute it.

pytest tests/test_parallel.py
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from model import Output
from parallel import contrastive_loss


def features(seed: int, n_text: int, n_image: int, dim: int = 6):
    g = torch.Generator().manual_seed(seed)
    text, image = torch.randn(n_text, dim, generator=g), torch.randn(n_image, dim, generator=g)
    return F.normalize(text, dim=1), F.normalize(image, dim=1)


# What each rank holds: number of <ret>s, how many are real, number of pictures, which they ask for
RANKS = [(3, 3, 4, [2, 0, 3]), (1, 0, 2, [0]), (2, 2, 2, [1, 0])]


def share(rank: int):
    n_text, n_real, n_image, target = RANKS[rank]
    text, image = features(rank, n_text, n_image)
    return text.requires_grad_(), image.requires_grad_(), torch.tensor(target), n_real


def loss_of(text, image, scale, target, n_real):
    return contrastive_loss(Output(None, text, image, scale.exp()), target, n_real)


def everything_on_one():
    """The same features in one process; the stand-in of rank 1 asks for nothing."""
    shares = [share(rank) for rank in range(len(RANKS))]
    scale = torch.tensor(1.3, requires_grad=True)
    offsets = [0, 4, 6]
    text = torch.cat([s[0][: s[3]] for s in shares])
    image = torch.cat([s[1] for s in shares])
    target = torch.cat([s[2][: s[3]] + offset
                        for s, offset in zip(shares, offsets, strict=True)])
    loss, right = loss_of(text, image, scale, target, len(text))
    leaves = [x for s in shares for x in s[:2]]
    grads = torch.autograd.grad(loss, [*leaves, scale], allow_unused=True)
    return loss.detach(), right, grads


def worker(rank: int, store: str, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                            world_size=len(RANKS))
    text, image, target, n_real = share(rank)
    scale = torch.tensor(1.3, requires_grad=True)
    loss, right = loss_of(text, image, scale, target, n_real)
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
    loss, right = loss_of(text, image, scale, torch.arange(5), 5)
    logits = scale.exp() * text @ image.T
    wanted = (F.cross_entropy(logits, torch.arange(5), reduction="sum")
              + F.cross_entropy(logits.T, torch.arange(5), reduction="sum")) / 2
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert right == (logits.argmax(1) == torch.arange(5)).sum()


def test_the_stand_in_of_a_batch_without_ret_weighs_nothing():
    text, image = features(3, 1, 3)
    text, image = text.requires_grad_(), image.requires_grad_()
    loss, right = loss_of(text, image, torch.tensor(1.0), torch.tensor([0]), 0)
    assert loss.item() == 0 and right == 0
    for grad in torch.autograd.grad(loss, (text, image)):
        assert torch.equal(grad, torch.zeros_like(grad))
