"""`memory: auto` on several processes: one plan for all, made where the least memory is free.

Ranks with plans of their own would cut batches differently, and wait for each other for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_align.assemble.memory_plan import MemoryPlan, free_memory, settle, with_choice

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig


def settle_together(config: RunConfig, *, resume: bool = False) -> MemoryPlan:
    """`settle` for a process alone; else the main one's plan, of the least free memory of any.

    The processes meet for it, before anything large is loaded.

    Raises:
        UserError: as `settle`, on all processes alike.
    """
    from diffusion_align.policy.devices import device_of
    from diffusion_align.training.distribution import meet, process_count

    if config.memory != "auto" or process_count() == 1:
        return settle(config, resume=resume)
    group = meet(on_cpu=device_of(config.model.device).type == "cpu")
    with group.as_one():
        free = min(group.exchange(free_memory(config)))
        plan = settle(config, resume=resume, free=free) if group.is_main else None
        # Plain values travel; the config itself is on every rank.
        chosen, lines = group.exchange((dict(plan.chosen), plan.lines) if plan else ({}, ()))[0]
    return plan or with_choice(config, chosen, lines)
