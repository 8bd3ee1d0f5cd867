"""The one training loop of the embedded models: seeded, resumable, with a progress bar.

It is deliberately small: these models are made once, by whoever changes the small world. A
checkpoint is written every five minutes, to a temporary file that is then renamed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

CHECKPOINT_SECONDS = 300.0

# A step draws what it needs from the generator and returns the loss (0-d) of one batch.
Step = Callable[[torch.Generator], Tensor]


def fit(
    model: nn.Module,
    step: Step,
    *,
    steps: int,
    learning_rate: float,
    checkpoint: Path,
    seed: int,
    warmup: int = 200,
    ema_decay: float = 0.0,
) -> nn.Module:
    """Train ``model`` in place for ``steps`` of AdamW (warm-up, then cosine to zero); resumable.

    Args:
        step: computes one batch's loss; the randomness comes from the generator it is given,
            which is re-seeded by step number, so that a resumed run sees the same batches.
        checkpoint: file that holds the state; where it exists, training goes on from it.
        ema_decay: above 0, the returned module holds the exponential average of the weights.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)

    def rate(i: int) -> float:
        rise = min(1.0, (i + 1) / warmup)
        return rise * 0.5 * (1 + float(torch.cos(torch.tensor(i / steps * torch.pi))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        average, start = state["average"], state["step"]
    generator = torch.Generator()
    saved_at, running = time.monotonic(), None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    told_at = saved_at
    with Progress(*columns, refresh_per_second=0.2) as progress:
        task = progress.add_task(checkpoint.stem, total=steps, completed=start, loss="-")
        model.train()
        for i in range(start, steps):
            generator.manual_seed(seed * 1_000_003 + i)
            loss = step(generator)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            decay = min(ema_decay, (i + 1) / (i + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value.to(average[name].dtype), 1 - decay)
            if i % 20 == 0:
                value = float(loss.detach())
                running = value if running is None else 0.9 * running + 0.1 * value
                progress.update(task, completed=i + 1, loss=f"{running:.5f}")
                if not progress.console.is_terminal and time.monotonic() - told_at > 30:
                    print(f"{checkpoint.stem}: step {i + 1}/{steps} loss {running:.5f}", flush=True)
                    told_at = time.monotonic()
            if time.monotonic() - saved_at > CHECKPOINT_SECONDS or i + 1 == steps:
                _save(checkpoint, model, optimiser, schedule, average, i + 1)
                saved_at = time.monotonic()
    model.load_state_dict(average)
    return model.eval()


def _save(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    average: dict[str, Tensor],
    step: int,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "average": average,
            "step": step,
        },
        temporary,
    )
    os.replace(temporary, path)
