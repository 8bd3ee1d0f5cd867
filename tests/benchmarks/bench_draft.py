"""Memory and time of reward backpropagation by K: replay, autograd, autograd with checkpoints.

    python tests/benchmarks/bench_draft.py --batch 16 --k 1 10 --rounds 7
    python tests/benchmarks/bench_draft.py --model sd15-size --size 512 --batch 4 --steps 50 \
        --k 1 5 10 50 --device cuda --dtype bfloat16

Every figure is of one iteration: rollout, scoring, backward pass.

Memory is the high-water of tensor bytes above the level before it (`training/memory.py`), without
the time. Its bar only means something where one step's graph is what is large, so that is measured
too, on the same meter, and so is plain autograd.

"checkpointed" is what is usually done instead of a replay: the chain is sampled with a graph whose
active steps keep their inputs and are computed again in the backward pass. That makes as many calls
as a rollout and a replay do; they are counted. It lives here alone, does the bare work (no metrics,
no checks, no pictures kept), and its gradient is compared with the replay's. Engines take turns in
every round, and what is printed is the median of the rounds' ratios: run it on an idle machine.
`sd15-size` has Stable Diffusion 1.5's network and VAE with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffusion_align import Draft, DraftOptions, Policy, SamplingOptions
from diffusion_align.algorithms.gradient_chain import Chain
from diffusion_align.algorithms.plan import Plan
from diffusion_align.data.prompts import load_prompts
from diffusion_align.sampling.seeds import normal
from diffusion_align.training.memory import high_water
from reward_models.base import RewardInfo, Scores

PROMPTS = ["a red circle"]
ENGINES = ("replay", "autograd", "checkpointed")
MEMORY_BAR, GROWTH, ACTIVATIONS, TIME_BAR = 1.10, 5.0, 50e6, 1.10


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


def draft_of(policy: Policy, engine: str, k: int, asked: argparse.Namespace) -> Draft:
    return Draft(
        policy,
        Contrast(),
        PROMPTS,
        options=DraftOptions(
            preset="draft-k",
            active_steps=k,
            engine="autograd" if engine == "autograd" else "replay",
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


def by_draft(draft: Draft) -> None:
    """One iteration of the method itself, by the engine that its options name."""
    for minibatch in draft.minibatches(draft.collect(0)):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()


def by_checkpoints(draft: Draft) -> None:
    """The same gradient from one graph of the last K steps, each of them checkpointed."""
    policy, s, options = draft.policy, draft.sampling, draft.options
    schedule = policy.schedule(s.steps, height=s.height, width=s.width)
    chain = Chain(policy, schedule, s, options.plan)
    plan = Plan(load_prompts(PROMPTS), 1, options.samples_per_prompt, 0)
    items, last = plan.items(0), s.steps - 1
    cond = policy.encode(
        [item.prompt.text for item in items],
        guidance_scale=s.guidance_scale,
        height=s.height,
        width=s.width,
    )
    streams, stochastic = plan.rollout_streams(items, 0), chain.stochastic()

    def step(x: Tensor, index: int, noise: Tensor | None) -> Tensor:
        return chain.output(chain.predict(x, index, cond), x, index, noise, last)

    x = policy.initial_noise(normal(streams, cond.latent_shape).to(policy.device))
    for index in range(s.steps):
        noise = normal(streams, cond.latent_shape).to(x) if stochastic[index] else None
        if index < s.steps - options.plan.active_steps:
            with torch.no_grad():
                x = step(x, index, noise)
        else:
            x = checkpoint(partial(step, index=index, noise=noise), x, use_reentrant=False)
    with torch.no_grad():
        pixels = policy.decode(x.detach(), chunk=1)
    leaf = pixels.requires_grad_()
    loss = -draft.reward.score(leaf, PROMPTS * len(leaf)).values.mean()
    (found,) = torch.autograd.grad(loss, leaf)
    x.backward(policy.decode_gradient(x.detach(), found).to(x))


def works(policy: Policy, k: int, asked: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Engine -> one iteration, from no gradients to all of them."""

    def cleared(work: Callable[[], None]) -> None:
        for parameter in policy.trainable_parameters():
            parameter.grad = None
        work()
        if policy.device.type == "cuda":
            torch.cuda.synchronize()

    return {
        engine: partial(
            cleared,
            partial(
                by_checkpoints if engine == "checkpointed" else by_draft,
                draft_of(policy, engine, k, asked),
            ),
        )
        for engine in ENGINES
    }


def gradient(policy: Policy, work: Callable[[], None]) -> tuple[Tensor, int]:
    """(gradient, how many samples the denoiser was given)."""
    calls = 0

    def count(module: Any, args: Any, named: Any) -> None:
        nonlocal calls
        calls += len(args[0] if args else next(iter(named.values())))

    handle = policy.bare_denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        handle.remove()
    parts = [p.grad.flatten() for p in policy.trainable_parameters() if p.grad is not None]
    return torch.cat(parts).double(), calls


def one_step(policy: Policy, asked: argparse.Namespace) -> int:
    """Bytes of one prediction's graph: what a backward pass through one step starts from."""
    cond = policy.encode(
        PROMPTS * asked.batch, guidance_scale=asked.guidance, height=asked.size, width=asked.size
    )
    x = torch.randn(asked.batch, *cond.latent_shape, device=policy.device)
    timestep = policy.schedule(asked.steps, height=asked.size, width=asked.size).timesteps[0]

    def predict() -> None:
        policy.predict(x, timestep, cond, guidance_scale=asked.guidance).sum().backward()

    return high_water(policy.device, predict)[1]


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def memory(policy: Policy, asked: argparse.Namespace) -> None:
    print(f"{'K':>4} {'engine':<13} {'MB':>9}")
    held: dict[tuple[int, str], int] = {}
    for k in asked.k:
        for engine, work in works(policy, k, asked).items():
            try:
                held[k, engine] = high_water(policy.device, work)[1]
                shown = f"{held[k, engine] / 1e6:>9.1f}"
            except torch.OutOfMemoryError:
                shown = f"{'out of memory':>17}"
            print(f"{k:>4} {engine:<13} {shown}", flush=True)
    low, high = min(asked.k), max(asked.k)
    step = one_step(policy, asked)
    print(f"one step with a gradient: {step / 1e6:.1f} MB (bar: at least {ACTIVATIONS / 1e6:.0f})")
    for engine, bar in (("replay", f"at most {MEMORY_BAR}"), ("autograd", f"at least {GROWTH}")):
        if (high, engine) in held and (low, engine) in held:
            ratio = held[high, engine] / held[low, engine]
            print(f"{engine}: K = {high} / K = {low} is {ratio:.3f} (bar: {bar})", flush=True)


def timing(policy: Policy, asked: argparse.Namespace) -> None:
    for k in asked.k:
        compared = works(policy, k, asked)
        found = {engine: gradient(policy, work) for engine, work in compared.items()}
        replayed, _ = found["replay"]
        for engine, (other, count) in found.items():
            off = float((other - replayed).norm() / replayed.norm())
            print(f"K = {k}, {engine}: {count} calls; gradient {off:.1e} off the replay's")
        taken: dict[str, list[float]] = {engine: [] for engine in compared}
        for turn in range(asked.rounds):
            order = list(compared) if turn % 2 == 0 else list(compared)[::-1]
            for engine in order:
                taken[engine].append(seconds(compared[engine]))
        for engine, each in taken.items():
            print(f"K = {k}, {engine}: {statistics.median(each):.2f} s an iteration")
        ratios = sorted(a / b for a, b in zip(taken["replay"], taken["checkpointed"], strict=True))
        print(
            f"K = {k}: replay / checkpointed {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds; bar at K = 10: at most "
            f"{TIME_BAR})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--rounds", type=int, default=7, help="of the time; 0 leaves it out")
    parser.add_argument("--no-memory", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source: Any = asked.model if asked.model != "sd15-size" else random_sd15(Path(place))
        policy = Policy.load(source, lora_rank=4, device=asked.device, dtype=asked.dtype)
    for parameter in policy.trainable_parameters():
        # A fresh LoRA's second matrix is zero, and half of the gradient with it.
        torch.nn.init.normal_(parameter, std=0.02)
    if not asked.no_memory:
        memory(policy, asked)
    if asked.rounds:
        timing(policy, asked)


if __name__ == "__main__":
    main()
