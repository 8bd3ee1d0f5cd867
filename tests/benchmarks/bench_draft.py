"""Memory and time of reward backpropagation by K: replay, autograd, autograd with checkpoints.

    python tests/benchmarks/bench_draft.py --model tiny-sd --batch 8 --steps 10 --k 1 10
    python tests/benchmarks/bench_draft.py --model sd15-size --size 512 --batch 4 --steps 50 \
        --k 1 5 10 50 --device cuda --dtype bfloat16

Every row is one iteration: rollout, scoring, backward pass. Memory is the high-water of tensor
bytes above the level before it (`training/memory.py`), time the median of the later repetitions,
without the meter. "checkpointed" is autograd over all steps with every denoiser call checkpointed,
which makes as many calls as replay does. `sd15-size` has Stable Diffusion 1.5's network and VAE
with random weights. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion_align import Draft, DraftOptions, Policy, SamplingOptions
from diffusion_align.training.memory import high_water
from reward_models.base import RewardInfo, Scores


class Contrast:
    """A reward that costs nothing: the spread of the pixels."""

    info = RewardInfo("contrast", "image", True, "0 and up", "-", "-")

    def score(
        self, media: Tensor, prompts: Any, *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        return Scores(media.flatten(1).float().std(dim=1))


def random_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5's shapes; of the text encoder only two layers."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=Policy.load("tiny-sd").pipeline.tokenizer,
        unet=UNet(cross_attention_dim=768, attention_head_dim=8, sample_size=64),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@contextmanager
def checkpointed(policy: Policy) -> Iterator[None]:
    """Inside, every prediction with a graph keeps its input only."""
    inner = policy.predict

    def predict(x: Tensor, timestep: Tensor, cond: Any, **how: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return inner(x, timestep, cond, **how)
        result: Tensor = checkpoint(
            lambda latent: inner(latent, timestep, cond, **how), x, use_reentrant=False
        )
        return result

    policy.predict = predict  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        policy.predict = inner  # type: ignore[method-assign]


def iteration(draft: Draft) -> None:
    for parameter in draft.policy.trainable_parameters():
        parameter.grad = None
    for minibatch in draft.minibatches(draft.collect(0)):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
    if draft.policy.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(draft: Draft, repetitions: int) -> float:
    taken = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        iteration(draft)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--repetitions", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source: Any = asked.model if asked.model != "sd15-size" else random_sd15(Path(place))
        policy = Policy.load(source, lora_rank=4, device=asked.device, dtype=asked.dtype)
    print(f"{'K':>4} {'engine':<13} {'GiB':>8} {'s':>8}")
    for k in asked.k:
        for engine in ("replay", "autograd", "checkpointed"):
            draft = Draft(
                policy,
                Contrast(),
                ["a red circle"],
                options=DraftOptions(
                    preset="draft-k",
                    active_steps=k,
                    engine="replay" if engine == "replay" else "autograd",
                    prompts_per_iteration=1,
                    samples_per_prompt=asked.batch,
                    train_batch_size=asked.batch,
                ),
                sampling=SamplingOptions(
                    steps=asked.steps,
                    guidance_scale=asked.guidance,
                    batch_size=asked.batch,
                    height=asked.size,
                    width=asked.size,
                ),
            )
            try:
                with checkpointed(policy) if engine == "checkpointed" else nullcontext():
                    took = seconds(draft, asked.repetitions)
                    _, held = high_water(policy.device, partial(iteration, draft))
            except torch.OutOfMemoryError:
                print(f"{k:>4} {engine:<13} {'out of memory':>17}", flush=True)
                continue
            print(f"{k:>4} {engine:<13} {held / 2**30:>8.3f} {took:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
