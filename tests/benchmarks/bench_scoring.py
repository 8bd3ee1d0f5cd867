"""Time of `reward.score` against the bare tower and head on prepared pixels (the bar is 1.05).

    python tests/benchmarks/bench_scoring.py --tower ViT-B-32 --batch 16 --sides 224,512
    python tests/benchmarks/bench_scoring.py --tower tiny

Weights are random: they cost the same time as real ones. Both are measured in turns in one run; the
figures are medians of five rounds after one that is left out. On the CPU the process's own CPU time
is taken, which other programs disturb less than the clock; on an accelerator the clock.
`prepare` is the part of the difference that resizing and normalising take: checks and the search
for NaN are the rest. (That each weight file is opened once per process is counted in
`tests/reward_models/test_backbones.py`.) Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from reward_models.aesthetic import AestheticHead, AestheticReward
from reward_models.backbones import ClipTower
from reward_models.catalogue import ROWS
from reward_models.preprocess import clip_pixels

BAR = 1.05
HIDDEN = (1024, 128, 64, 16, 1)
# Small enough to try this program with; its ratio says little, for overheads weigh most here.
TINY: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}


def random_reward(name: str, device: torch.device) -> AestheticReward:
    """An aesthetic reward of random weights over an open_clip tower (or `tiny`)."""
    import open_clip

    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"open_clip knows no model {name}")
    tower = ClipTower(open_clip.CLIP(**config).to(device))
    head = AestheticHead((tower.width, *HIDDEN), relu=False).to(device)
    return AestheticReward(ROWS["aesthetic"].info, tower, head)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """CPU time of one call, or wall time with the accelerator's work included."""
    if device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def rounds(
    calls: Mapping[str, Callable[[], Any]], count: int, device: torch.device
) -> list[dict[str, float]]:
    """Seconds of every call in `count` rounds, after one that warms up."""
    rows = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(count + 1)]
    return rows[1:]


def measure(
    reward: AestheticReward, *, batch: int, side: int, count: int, device: torch.device
) -> list[dict[str, float]]:
    """Rounds of the three calls for one picture size."""
    images = torch.rand(batch, 3, side, side, device=device)
    prompts = [""] * batch
    pixels = clip_pixels(images, reward.tower.image_size)
    calls: dict[str, Callable[[], Any]] = {
        "score": lambda: reward.score(images, prompts),
        "bare": lambda: reward.score_embeddings(reward.tower.image_features(pixels)),
        "prepare": lambda: clip_pixels(images, reward.tower.image_size),
    }
    with torch.no_grad():
        return rounds(calls, count, device)


def show(side: int, rows: Sequence[Mapping[str, float]]) -> None:
    """One line of the table; the ratio is the median of the rounds' own ratios."""
    score, bare, prepare = (
        1000 * statistics.median(row[name] for row in rows) for name in ("score", "bare", "prepare")
    )
    ratios = [row["score"] / row["bare"] for row in rows]
    ratio = statistics.median(ratios)
    print(
        f"{side:6d} {score:12.2f} {bare:12.2f} {prepare:12.2f} {ratio:8.3f}"
        f"   {min(ratios):.3f} to {max(ratios):.3f}{'' if ratio <= BAR else '   above the bar'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", default="ViT-B-32", help="an open_clip model, or tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sides", default="", help="picture sizes; default the tower's own, 512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    reward = random_reward(arguments.tower, device)
    sides = [int(side) for side in arguments.sides.split(",") if side]
    print(
        f"{arguments.tower}, batch {arguments.batch}, {arguments.threads} threads, {device}, "
        f"{arguments.rounds} rounds (bar {BAR})"
    )
    print(f"{'side':>6s} {'score ms':>12s} {'bare ms':>12s} {'prepare ms':>12s} {'ratio':>8s}")
    for side in sides or [reward.tower.image_size, 512]:
        rows = measure(
            reward, batch=arguments.batch, side=side, count=arguments.rounds, device=device
        )
        show(side, rows)


if __name__ == "__main__":
    main()
