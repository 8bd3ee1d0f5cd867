"""Two gloo processes with sharded parameters, for test_guards: each prints what its guards say.

python guard_ranks.py RANK FILE
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import Guards, GuardStop


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    cut = nn.Linear(4, 4, bias=False)
    model.append(cut)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    named = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in named.values())
    said: list[str] = []
    guards = Guards(GuardOptions(unreached_updates=2), say=said.append)
    for step in (1, 2):
        x = torch.ones(2, 4) * (rank + 1)
        # Of the second weight only the first row has a gradient: one process's shard has none.
        (model(x)[:, 0].sum() * 0 + model[1](model[0](x))[:, 0].sum()).backward()
        guards.gradient(1.0, {}, {"reward/std": 1.0}, named, step)
        model.zero_grad()
    guards.updated(named, 2)
    print(rank, "said", said)
    if rank == 1:  # this shard alone is lost, and every process must know
        with torch.no_grad():
            lost: Any = named["0.weight"]
            lost.to_local().fill_(torch.nan)
    try:
        guards.updated(named, 3)
    except GuardStop as stop:
        print(rank, "stopped", stop.guard)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
