"""Many ranks as one: sharding, the losses over all ranks, one training step.

What is computed never depends on how many ranks compute it (design law: N ranks == 1 rank):

    token loss        sum over all targets of the global batch / their number. The number is
                      known before the first forward: one all-reduce of a few counts a step.
    contrastive loss  every rank sees the features of all ranks. Its own carry gradients, the
                      others' are constants; each rank's gradient is then exactly its own share,
                      and the sum over ranks is the gradient of the whole.

FSDP *averages* gradients over ranks, so each rank's loss is multiplied by their number.
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Output, VisionLanguageModel


@dataclass(frozen=True)
class Ranks:
    """This process among all of them; torchrun sets the environment, alone it is 0 of 1."""

    rank: int
    size: int
    local: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""
        if dist.is_initialized():
            dist.barrier()


def this_rank() -> Ranks:
    keys = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    return Ranks(*(int(os.environ.get(key, default)) for key, default in keys))


def start_group(ranks: Ranks, device: torch.device) -> None:
    """Join the other ranks; a lone process makes a group of its own."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.size > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: VisionLanguageModel, dtype: torch.dtype, device: torch.device | None = None
          ) -> None:
    """FSDP2 in place: one group per block, the rest in the root; fp32 masters and reductions.

    Every rank copies its own rows to `device` (by default where the model is), and touches no
    others: of weights that are mapped from files it reads only these.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    weights = {name: p.detach() for name, p in model.named_parameters()}
    device = device or model.embed.device
    model.to("meta", torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in (*model.vision.blocks, *model.cross_blocks.values(), *model.blocks):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = parameter.to_local()
            rows = weights[name].chunk(dist.get_world_size())  # as FSDP2 cuts: into equal parts,
            if own.numel():  # the last ones shorter, or nothing
                own.copy_(rows[dist.get_rank()])


def gather_objects(value: object) -> list:
    """A small object of every rank, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(parameter: Tensor) -> Tensor:
    """A parameter as on one rank; every rank must ask for it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter whole, gathered from all ranks if it is sharded."""
    return {name: whole(p) for name, p in model.state_dict().items()}


def all_sum(values: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# ------------------------------------------------------------------------------ contrastive loss


def gather_rows(x: Tensor, counts: list[int]) -> Tensor:
    """x (n, E) of every rank, end to end: (sum of counts, E). Only our own rows carry gradients."""
    padded = F.pad(x.detach(), (0, 0, 0, max(counts) - x.shape[0])).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:n] for part, n in zip(parts, counts, strict=True)]
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def contrastive_loss(out: Output, ret_image: Tensor, image_key: Tensor, n_rets: int
                     ) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over the micro-batches of all ranks (van den Oord 2018; CLIP, section 2.3).

    ret_image (R,) the row of the picture that each <ret> asks for, image_key (U,) equal for equal
    pictures. Every real <ret> chooses among all pictures but the twins of its own; every picture
    that some <ret> asks for chooses among all of these, but for those that ask for its twins.
    Returns the summed loss (both directions halved) and how many chose right, both 0-d. The one
    stand-in of a micro-batch without any <ret> gets weight 0, and still runs everywhere.
    """
    text, image, scale = out.ret_features, out.image_features, out.logit_scale
    real = torch.arange(len(text), device=text.device) < n_rets
    target = ret_image
    if dist.is_initialized():
        size = dist.get_world_size()
        counts = torch.zeros(size, 2, dtype=torch.int64, device=text.device)
        counts[dist.get_rank()] = torch.tensor([len(text), len(image)], device=text.device)
        n_text, n_image = all_sum(counts).T.tolist()
        target = target + sum(n_image[: dist.get_rank()])
        extra = torch.stack([target, real.long()], 1).double()
        target, real = gather_rows(extra, n_text).long().T
        text, image = gather_rows(text, n_text), gather_rows(image, n_image)
        image_key = gather_rows(image_key[:, None].double(), n_image)[:, 0]
        scale = scale / size + scale.detach() * (1 - 1 / size)  # every rank holds all of the loss
    own = image_key[target]  # (R,)
    row, real = torch.arange(len(text), device=text.device), real.float()
    logits = scale * text @ image.T  # (R, U)
    columns = logits[:, target].T  # (R, R): row r is the picture asked for by r, over all <ret>s
    twin = (own[:, None] == image_key).index_put((row, target), torch.zeros_like(real) > 0)
    logits = logits.masked_fill(twin, float("-inf"))
    by_text = F.cross_entropy(logits, target, reduction="none")
    twin = (own[:, None] == own).fill_diagonal_(False)
    columns = columns.masked_fill(twin | (real[None] == 0), float("-inf"))
    columns = columns.where(real[:, None] > 0, 0.0)
    by_image = F.cross_entropy(columns, row, reduction="none")
    right = ((logits.argmax(1) == target) * real).sum()
    return ((by_text + by_image) * real).sum() / 2, right


# ------------------------------------------------------------------------------ one training step


@dataclass
class StepResult:
    """What the log shows of the global batch: means, the gradient's norm unclipped, counts."""

    loss: float
    contrastive: float
    contrastive_right: float
    grad_norm: float
    n_tokens: int
    n_samples: int
    n_targets: int
    data: int  # a number for which samples these were, in whatever order


def losses(model: nn.Module, batches: list, contrastive_weight: float, backward: bool
           ) -> tuple[list[float], list[int]]:
    """Forward (and backward) of this rank's micro-batches of one step.

    Returns [token loss, contrastive loss, share of <ret>s that chose right], means over the global
    batch, and [targets, <ret>s, tokens, samples, data], its counts.
    """
    device = batches[0].tokens.device
    size = dist.get_world_size() if dist.is_initialized() else 1
    counts = all_sum(torch.tensor([[len(b.target_rows), b.n_rets, len(b.tokens), b.n_samples,
                                    b.data_hash] for b in batches], device=device).sum(0)).tolist()
    n_targets, n_rets = max(counts[0], 1), max(counts[1], 1)
    total = torch.zeros(3, device=device)
    for i, batch in enumerate(batches):
        if backward and size > 1:
            model.set_requires_gradient_sync(i == len(batches) - 1)
        out = model(batch)
        loss = out.token_loss / n_targets
        total[0] += loss.detach()
        if len(out.ret_features) and counts[1]:
            pulled, right = contrastive_loss(out, batch.ret_image, batch.image_key, batch.n_rets)
            loss = loss + contrastive_weight * pulled / n_rets
            total[1] += pulled.detach() / n_rets / size
            total[2] += right / n_rets / size
        if backward:
            (loss * size).backward()
    return all_sum(total).tolist(), counts


def train_step(model, optimizer, batches: list, *, contrastive_weight: float,
               grad_clip: float) -> StepResult:
    """One optimizer step over all ranks; a step whose gradient is not finite changes nothing."""
    means, counts = losses(model, batches, contrastive_weight, backward=True)
    for p in model.parameters():  # a checkpoint needs a state of each, also if no <ret> came yet
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(*means, norm, counts[2], counts[3], counts[0], counts[4] % 2**32)
