"""The memory of a training step as torch's FSDP memory tracker sees it, beside the plan's.

    python -m tests.tracked --preset villa-7b --world-size 32

One rank of a fake group of that size takes two steps with fake tensors: shapes without values. The
Triton kernels' ops stand in for the GPU's, since they say what they keep; nothing is launched.
Prints a JSON list: bytes at the peak by the tracker, and by plan.memory.
"""

import dataclasses
import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench_train import batch_of
from config import TrainConfig, parse
from data import Batch
from kernels import backend, set_backend
from optim import freeze
from parallel import shard
from plan import TOKENS, documents_of, groups, memory, work_of
from presets import preset_model
from weights import shapes


def tracked(c: TrainConfig, batch: Batch) -> float:
    """Bytes at the peak of the second step."""
    n_groups = groups(c, c.world_size)
    sizes = (n_groups, c.world_size // n_groups) if n_groups > 1 else (c.world_size,)
    mesh = device_mesh.init_device_mesh("cpu", sizes,
                                        mesh_dim_names=("replicate", "shard")[-len(sizes):])
    device_mesh.init_device_mesh = lambda *_, **__: mesh  # cannot be made of fake tensors
    model, mode = shapes(preset_model(c.preset, c.shrink)), FakeTensorMode(
        allow_non_fake_inputs=True)
    with mode:
        freeze(model, c.frozen[0])
        shard(model.train(), torch.bfloat16, torch.device("cpu"), reshard=c.reshard == "yes",
              only_trained=c.shard == "trained", replicate=n_groups)
        # Fused, or many at once, the tracker counts the moments wrong.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                      fused=False, foreach=False)
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        tensors = {name: mode.from_tensor(value) for name, value in fields.items()
                   if isinstance(value, torch.Tensor)}
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs(tuple(tensors.values()))
        with tracker:
            for step in range(2):
                out = [t for t in model(Batch(**fields | tensors)) if t.requires_grad]
                torch.autograd.backward(out, [torch.ones_like(t) for t in out])
                del out
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if step == 0:
                    tracker.reset_mod_stats()
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(kinds["Total"] for kinds in snapshot.values())


def main() -> None:
    c = parse([*sys.argv[1:], "--plan"])
    backend.INTERPRETED = True  # or the Triton ops would refuse the CPU
    set_backend("triton")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=c.world_size)
    config, samples = preset_model(c.preset, c.shrink), c.batch_size // c.world_size
    n_documents = documents_of(config, c.stages[0])
    n_tokens = c.mean_tokens or TOKENS[c.stages[0]][0]
    theirs = tracked(c, batch_of(config, samples, n_documents, n_tokens))
    model = shapes(config)
    freeze(model, c.frozen[0])
    ours = memory(c, model, c.world_size, 1, work_of(config, samples, n_documents, n_tokens))
    print(json.dumps([theirs, sum(ours.values())]))


if __name__ == "__main__":
    main()
