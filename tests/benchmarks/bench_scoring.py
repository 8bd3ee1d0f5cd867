"""Time of scoring against the bare towers on prepared pixels, and of two scorers on one tower.

    python tests/benchmarks/bench_scoring.py --tower ViT-L-14 --batch 4 --sides 224,512
    python tests/benchmarks/bench_scoring.py --tower ViT-H-14 --batch 4 --sides 512 --rounds 3
    python tests/benchmarks/bench_scoring.py --tower tiny

Four comparisons in turns in one run: an aesthetic reward against image tower and head (the bar is
1.05), a letterboxed cosine (HPS) against image and text tower (1.05), MPS against image tower, text
tower and its fusion network of the published size (1.05; how much of it the fusion is, is printed
too), and an aesthetic reward together with a CLIP score in one pass against the aesthetic reward
alone (1.15). Every call gets
prompts it never saw, so that no remembered text flatters it; the bare text tower reads the same
tokens, all 77 of them, as open_clip's own `encode_text` does.

Weights are random: they cost the same time as real ones. The figures are medians of the rounds
after one that is left out. On the CPU the process's own CPU time is taken, which other programs
disturb less than the clock; on an accelerator the clock. (That each weight file is opened once per
process is counted in `tests/reward_models/test_backbones.py`.) Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from reward_models.aesthetic import AestheticHead, AestheticReward
from reward_models.catalogue import ROWS
from reward_models.clip_score import CosineReward
from reward_models.clip_tower import ClipTower, one_pass
from reward_models.cross_attention import CrossModel
from reward_models.mps import MPSReward

BAR, PAIR_BAR = 1.05, 1.15
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


def random_tower(name: str, device: torch.device) -> ClipTower:
    """An open_clip tower of random weights (or `tiny`)."""
    import open_clip

    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"open_clip knows no model {name}")
    return ClipTower(open_clip.CLIP(**config).to(device))


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


@torch.no_grad()
def measure(
    tower: ClipTower, *, batch: int, side: int, count: int, device: torch.device
) -> list[dict[str, float]]:
    """Rounds of all calls for one picture size."""
    head = AestheticHead((tower.width, *HIDDEN), relu=False).to(device)
    aesthetic = AestheticReward(ROWS["aesthetic"].info, tower, head)
    clip = CosineReward(ROWS["clip"].info, tower)
    hps = CosineReward(ROWS["hpsv2.1"].info, tower, framing="letterbox")
    images = torch.rand(batch, 3, side, side, device=device)
    cross = CrossModel(tower.width, heads=max(1, tower.width // 64)).to(device)
    mps = MPSReward(ROWS["mps"].info, tower, cross)
    pixels = tower.prepare(images)
    tokens, everything = tower.image_tokens(pixels), torch.ones(batch, 77, dtype=torch.bool)
    numbers = itertools.count()

    def prompts() -> list[str]:
        return [f"two cats asleep on a red sofa, number {next(numbers)}" for _ in range(batch)]

    def pair() -> None:
        texts = prompts()
        with one_pass():
            aesthetic.score(images, texts)
            clip.score(images, texts)

    def towers() -> None:
        ids = tower.tokenize(prompts()).ids
        tower.model.encode_image(pixels)
        tower.model.encode_text(ids)

    def fuse() -> None:
        texts = tower.text_tokens(tower.tokenize(prompts()).ids)
        cross.class_token(tower.image_tokens(pixels), texts, everything.to(device))

    texts_of_mps = tower.text_tokens(tower.tokenize(prompts()).ids)
    calls: dict[str, Callable[[], Any]] = {
        "aesthetic": lambda: aesthetic.score(images, prompts()),
        "image tower": lambda: aesthetic.score_embeddings(tower.image_features(pixels)),
        "hps": lambda: hps.score(images, prompts()),
        "both towers": towers,
        "mps": lambda: mps.score(images, prompts()),
        "its networks": fuse,
        "fusion": lambda: cross.class_token(tokens, texts_of_mps, everything.to(device)),
        "pair": pair,
    }
    return rounds(calls, count, device)


RATIOS = (
    ("aesthetic", "image tower", BAR),
    ("hps", "both towers", BAR),
    ("mps", "its networks", BAR),
    ("pair", "aesthetic", PAIR_BAR),
)


def show(side: int, rows: Sequence[Mapping[str, float]]) -> None:
    """A line per ratio; it is the median of the rounds' own ratios."""
    for above, below, bar in RATIOS:
        first, second = (
            1000 * statistics.median(row[name] for row in rows) for name in (above, below)
        )
        ratios = [row[above] / row[below] for row in rows]
        ratio = statistics.median(ratios)
        print(
            f"{side:6d}  {above:>9s} {first:10.1f} ms   {below:>11s} {second:10.1f} ms"
            f"   {ratio:6.3f} ({min(ratios):.3f} to {max(ratios):.3f}), bar {bar}"
            f"{'' if ratio <= bar else '   ABOVE THE BAR'}"
        )
    share = statistics.median(row["fusion"] / row["its networks"] for row in rows)
    print(f"{side:6d}  {share:.0%} of what MPS computes is its fusion network")


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
    tower = random_tower(arguments.tower, device)
    sides = [int(side) for side in arguments.sides.split(",") if side]
    print(
        f"{arguments.tower}, batch {arguments.batch}, {arguments.threads} threads, {device}, "
        f"{arguments.rounds} rounds"
    )
    for side in sides or [tower.image_size, 512]:
        show(
            side,
            measure(tower, batch=arguments.batch, side=side, count=arguments.rounds, device=device),
        )


if __name__ == "__main__":
    main()
