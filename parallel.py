"""Many ranks as one: sharding, the losses over all ranks, one training step.

Read with train.py, after ranks.py. Of N ranks each stores 1/N of what is trained (`shard`) and
computes 1/N of every batch (`losses`). What is computed never depends on N (README, Laws):

    token loss        sum over all targets of the global batch / their number. The number is
                      known before the first forward: one all-reduce of a few counts a step.
    contrastive loss  every rank scores its own <ret>s and pictures against those of all ranks,
                      and the gradients that these owe to the others are summed by an all-reduce.

FSDP *averages* gradients over ranks, so each rank's loss is multiplied by their number.
"""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from config import TrainConfig
from model import Output, VisionLanguageModel
from ranks import Ranks, all_sum, my_rank, world_size
from vision import NO_PICTURE

# --------------------------------------------------------------------------------------- sharding


def distribute(model: VisionLanguageModel, c: TrainConfig, ranks: Ranks, device: torch.device,
               dtype: torch.dtype) -> None:
    """Put the model where it is trained: complete on one device in fp32, or in shards."""
    recompute(model, c.recompute)
    if c.compile == "yes":
        compile_blocks(model)
    if is_plain(ranks, dtype):
        to_device(model, device)
        return
    shard(model, dtype, device, only_trained=c.shard == "trained", reshard=c.reshard == "yes",
          replicate=c.replicate or ranks.size // ranks.n_local, prefetch=c.prefetch)


def is_plain(ranks: Ranks, dtype: torch.dtype) -> bool:
    """Whether neither a group nor FSDP is needed. One GPU in bf16 is FSDP over a single rank, too:
    it supplies the fp32 masters."""
    return ranks.size == 1 and dtype == torch.float32


def shard(model: VisionLanguageModel, dtype: torch.dtype, device: torch.device | None = None,
          *, only_trained: bool = False, reshard: bool = True, replicate: int = 1,
          prefetch: int = 0) -> None:
    """FSDP2 in place. Of N ranks each keeps 1/N of the rows (dim 0) of every trained parameter, in
    fp32, and so of its gradient and of AdamW's two moments.

    Just before a group of modules runs, its rows are gathered in `dtype`; gradients are reduced in
    fp32. Groups are in_groups'; the root holds everything else: tables, head, norms, patch
    embedding, projections. What is frozen by now is frozen for good: it is kept in `dtype`, cut the
    same way or, with only_trained, complete on every rank, where nothing has to be gathered for it.

    reshard: a block's gathered weights are freed after its forward pass and gathered again for the
    backward one. replicate: this many groups of ranks that each hold all of the model (HSDP):
    gathering stays within a group, only gradients cross. prefetch: this many blocks are gathered
    ahead of the one that computes.

    Every rank copies its own rows to `device` (by default where the model is), and touches no
    others: of weights that are mapped from files it reads only these.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    weights = {name: p.detach() for name, p in model.named_parameters()}
    device = device or model.embed.device
    model.to("meta", torch.float32)
    store_frozen_in(model, dtype)
    n_parts = world_size() // replicate
    names = ("replicate", "shard") if replicate > 1 else ("shard",)
    sizes = (replicate, n_parts)[-len(names):]
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    ignored = {p for p in model.parameters() if only_trained and not p.requires_grad}
    groups = [[b for b in group if any(p not in ignored for p in b.parameters())]
              for group in in_groups(model)]
    groups = [group for group in groups if group]
    for group in groups:
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard,
                    ignored_params=ignored)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    register_fsdp_forward_method(model, "next_logits")
    firsts = [group[0] for group in groups]
    for i, first in enumerate(firsts[:-1] if prefetch else ()):
        first.set_modules_to_forward_prefetch(firsts[i + 1 : i + 1 + prefetch])
    model.to_empty(device=device)
    copy_own_rows(model, weights, mesh.get_local_rank("shard"), n_parts)


def store_frozen_in(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """Replace frozen parameters by ones of this dtype, in place."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


@torch.no_grad()
def copy_own_rows(model: VisionLanguageModel, weights: dict[str, Tensor], part: int, n_parts: int
                  ) -> None:
    """Fill a sharded model from the weights it had before, by this rank's part of the rows."""
    for name, parameter in model.named_parameters():
        weight = weights[name]
        if hasattr(parameter, "to_local"):  # cut into equal parts, the last ones shorter
            parameter = parameter.to_local()
            weight = weight.chunk(n_parts)[part] if parameter.numel() else parameter
        if not weight.is_meta:  # else a checkpoint is about to fill it
            parameter.copy_(weight)


def reshard_all(model: VisionLanguageModel) -> None:
    """Free gathered weights, which FSDP keeps for a backward pass that does not come."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def to_device(model: VisionLanguageModel, device: torch.device) -> None:
    """A complete model on one device, in fp32, in place; what has no memory yet gets some."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            new = (torch.empty_like(parameter, device=device) if parameter.is_meta
                   else parameter.detach().to(device, torch.float32))
            setattr(module, name, nn.Parameter(new, parameter.requires_grad))


def in_groups(model: VisionLanguageModel) -> list[list[nn.Module]]:
    """All blocks, in the order in which a forward pass runs them, in the groups that FSDP gathers:
    each alone, but a gated block together with the decoder block after it."""
    resampler = model.resampler.blocks if model.config.resampler else ()
    cross = model.cross_blocks
    return [*([block] for block in (*model.vision.blocks, *resampler)),
            *([cross[str(i)], block] if str(i) in cross else [block]
              for i, block in enumerate(model.blocks))]


def blocks_in_order(model: VisionLanguageModel) -> list[nn.Module]:
    return [block for group in in_groups(model) for block in group]


def recompute(model: VisionLanguageModel, which: str) -> None:
    """Keep less of the forward pass, in place: the backward pass computes it again.

    "full": of every block only its input is kept; "selective": the output of its attention, too.
    Blocks that nothing is trained in or below never keep anything.
    """
    for block in blocks_in_order(model) if which != "none" else ():
        options = {"context_fn": keep_attention} if which == "selective" else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def keep_attention() -> tuple:
    """For torch.utils.checkpoint: attention's outputs are kept, all else is computed again."""
    def policy(context, op, *arguments, **options) -> CheckpointPolicy:
        kept = "attention" in op.name()
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def compile_blocks(model: VisionLanguageModel) -> None:
    """torch.compile for every block, in place; a wrapper would pass FSDP's hooks by."""
    for block in blocks_in_order(model):
        block.compile(dynamic=True)


def unsharded(parameter: Tensor) -> Tensor:
    """A parameter as on one rank, gathered; every rank must call it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def full_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """On the first rank every parameter, gathered, on its CPU, in dtype; on the others nothing."""
    state = {}
    for name, parameter in model.state_dict().items():
        gathered = unsharded(parameter)  # one after another: all of them would not fit on a GPU
        if my_rank() == 0:
            state[name] = gathered.to("cpu", dtype)
    return state


# ------------------------------------------------------------------------------ contrastive loss


class FeatureGradients(NamedTuple):
    """The contrastive loss' gradients by the features of one micro-batch."""

    text: Tensor  # (R, E)
    image: Tensor  # (U, E)
    scale: Tensor  # 0-d, of this rank's share


def contrastive_gradients(outs: list[Output], batches: list
                          ) -> tuple[Tensor, Tensor, list[FeatureGradients]]:
    """The contrastive loss of some micro-batches of every rank as one pool, and its gradients.

    Gradients go to features, not yet to weights: the caller may have computed the features without
    a graph, and compute them again micro-batch by micro-batch (Gao et al. 2021, GradCache). So a
    pool can be as large as the batch. Returns the summed loss and how many <ret>s chose right, over
    all ranks, and the gradients of each micro-batch's features.
    """
    n_text, n_image = [len(o.ret_features) for o in outs], [len(o.image_features) for o in outs]
    offsets = [0, *accumulate(n_image)]
    target = torch.cat([b.ret_image + n for b, n in zip(batches, offsets[:-1], strict=True)])
    real = torch.cat([torch.arange(n, device=target.device) < b.n_rets
                      for b, n in zip(batches, n_text, strict=True)])
    loss, right, text, image, scale = info_nce(
        torch.cat([out.ret_features for out in outs]),
        torch.cat([out.image_features for out in outs]), outs[0].logit_scale, target,
        torch.cat([batch.image_key for batch in batches]), real)
    parts = zip(text.split(n_text), image.split(n_image), strict=True)
    return loss, right, [FeatureGradients(*part, scale / len(outs)) for part in parts]


def info_nce(text: Tensor, image: Tensor, scale: Tensor, target: Tensor, key: Tensor, real: Tensor
             ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Symmetric InfoNCE over the features of all ranks (van den Oord 2018; CLIP, section 2.3).

    text (R, E), image (U, E) of this rank; target (R,) the row of the picture that each <ret> asks
    for; key (U,) equal for equal pictures; real (R,) false for the stand-in of a batch without any
    <ret>, which weighs nothing and still runs everywhere.

    Every real <ret> chooses among all pictures but the twins of its own; every picture that some
    <ret> asks for chooses among all of these, but for those that ask for its twins. Each rank
    scores its own <ret>s against everybody's features, in memory R x U of all, and sends back what
    they owe to those.

    Returns the summed loss (both directions halved) and how many chose right, of all ranks, and the
    gradients of text, image and scale: of the first two whole, of the scale this rank's share.
    """
    first_text, texts = gather_rows(text.detach())
    first_image, images = gather_rows(image.detach())
    mine = slice(first_text, first_text + len(text))
    keys = gather_rows(key[:, None])[1][:, 0]
    asked, is_real = gather_rows(torch.stack([target + first_image, real.long()], 1))[1].T
    own, rows = keys[asked], torch.arange(mine.start, mine.stop, device=text.device)
    weight = real.float()
    with torch.enable_grad():
        leaves = [texts.requires_grad_(), images.requires_grad_(), scale.detach().requires_grad_()]
        texts, images, scale = leaves
        barred = (own[mine, None] == keys) | (keys == NO_PICTURE)  # (R, U of all)
        barred = barred.scatter(1, asked[mine, None], False)
        logits = (scale * texts[mine] @ images.T).masked_fill(barred, -math.inf)
        by_text = F.cross_entropy(logits, asked[mine], reduction="none")
        barred = (own[mine, None] == own) | (is_real == 0)  # (R, R of all)
        barred = barred.scatter(1, rows[:, None], False)
        columns = (scale * images[asked[mine]] @ texts.T).masked_fill(barred, -math.inf)
        by_image = F.cross_entropy(columns, rows, reduction="none")
        loss = ((by_text + by_image) * weight).sum() / 2
        text_grad, image_grad, scale_grad = torch.autograd.grad(loss, leaves)
    right = ((logits.argmax(1) == asked[mine]) * weight).sum()
    loss, right = all_sum(torch.stack([loss.detach(), right]))
    return (loss, right, all_sum(text_grad)[mine],
            all_sum(image_grad)[first_image : first_image + len(image)], scale_grad)


def gather_rows(x: Tensor) -> tuple[int, Tensor]:
    """x (n, E) of every rank, end to end, and where our own rows begin. No gradient passes."""
    if not dist.is_initialized():
        return 0, x.clone()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]  # not on a GPU:
    dist.all_gather(counts, torch.tensor([len(x)]))  # nobody waits for what it still computes
    counts = torch.cat(counts).tolist()
    padded = F.pad(x, (0, 0, 0, max(counts) - len(x))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return (sum(counts[: my_rank()]),
            torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]))


# ------------------------------------------------------------------------------ one training step


@dataclass
class StepResult:
    """What the log shows of the global batch: means, the gradient's norm unclipped, counts."""

    loss: float
    contrastive: float | None  # None: no search was learned
    contrastive_right: float | None
    grad_norm: float
    n_tokens: int
    n_samples: int
    n_targets: int
    skipped: bool  # nothing was changed: the gradient is not finite
    data: int  # a number for which samples these were, in whatever order


class Counts(NamedTuple):
    """What one step holds, over all of its micro-batches and ranks."""

    n_targets: int
    n_rets: int
    n_tokens: int
    n_samples: int
    data: int  # sum of Batch.data_hash


def losses(model: nn.Module, batches: list, contrastive_weight: float, backward: bool,
           pool: str = "micro", keep: bool = False) -> tuple[Tensor, Counts]:
    """Forward (and backward) of this rank's micro-batches of one step.

    pool: whose pictures and <ret>s are negatives, those of one "micro" batch of all ranks, or of
    the "global" batch, whose features are then computed twice. keep: gathered weights stay from one
    micro-batch to the next. Gradients are reduced over ranks once a step.

    Returns [token loss, contrastive loss, share of <ret>s that chose right] (3,), means over the
    global batch, and its counts.
    """
    device, size = batches[0].tokens.device, world_size()
    mine = torch.tensor([[len(b.target_rows), b.n_rets, len(b.tokens), b.n_samples, b.data_hash]
                         for b in batches])
    counts = Counts(*all_sum(mine.sum(0)).tolist())
    n_targets, n_rets = max(counts.n_targets, 1), max(counts.n_rets, 1)
    attracts = model.config.contrastive_dim > 0 and counts.n_rets > 0
    token_loss, chosen, wanted = torch.zeros(1, device=device), torch.zeros(2, device=device), []
    if attracts and pool == "global" and len(batches) > 1:
        with torch.no_grad():
            outs = [model(batch, features_only=True) for batch in batches]
        *chosen, wanted = contrastive_gradients(outs, batches)
    for i, batch in enumerate(batches):
        if backward and hasattr(model, "set_requires_gradient_sync"):
            last = i == len(batches) - 1
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last or not keep)
        out = model(batch)
        token_loss += out.token_loss.detach() / n_targets
        # A sum / its global count, times `size`, by which FSDP divides.
        tensors, gradients = [out.token_loss], [torch.full_like(out.token_loss, size / n_targets)]
        if attracts:
            if len(wanted) <= i:
                *of_batch, new = contrastive_gradients([out], [batch])
                chosen = [a + b for a, b in zip(chosen, of_batch, strict=True)]
                wanted += new
            tensors += out[1:]
            gradients += [size * contrastive_weight / n_rets * g for g in wanted[i]]
        if backward:
            torch.autograd.backward(tensors, gradients)
    means = [all_sum(token_loss)[0], chosen[0] / n_rets, chosen[1] / n_rets]
    return torch.stack(means), counts


def train_step(model, optimizer, batches: list, *, contrastive_weight: float, grad_clip: float,
               pool: str = "micro", keep: bool = False) -> StepResult:
    """One optimizer step over all ranks; a step whose gradient is not finite changes nothing."""
    means, counts = losses(model, batches, contrastive_weight, backward=True, pool=pool,
                           keep=keep)
    for p in model.parameters():  # a checkpoint needs a state of each, also if no <ret> came yet
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    norm = unsharded(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    *means, norm = torch.cat([means, norm[None]]).tolist()  # the only synchronisation of a step
    if not (counts.n_rets and model.config.contrastive_dim):
        means[1:] = None, None
    if math.isfinite(norm):
        optimizer.step()
        model.cap_temperature()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(*means, norm, counts.n_tokens, counts.n_samples, counts.n_targets,
                      not math.isfinite(norm), counts.data % 2**32)
