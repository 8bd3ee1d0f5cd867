"""One iteration of a run on tensors that have shapes and no memory: its own code, run dry.

The model is built from its configs on the `meta` device; its weights then become fake tensors
(`torch._subclasses.fake_tensor`), which any operator accepts and which cost nothing. The
algorithm's own `collect`, `minibatches` and `losses`, the backward pass and the optimiser run on
them, and two meters listen: bytes alive (`training/memory.py`) and arithmetic
(`training/flops.py`). Nothing is fitted: a setting that saves memory saves it here too.

Only what numbers would have to decide is given: a decoder returns noise, and so does its backward
pass; for a reward that is not at hand something stands in (`dry_reward.py`). Where a method looks
at a number of its gradients (is it zero? is the replay off?), the answer is `NEXT_TO_NOTHING`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Conditioning, Policy
    from diffusion_align.training.flops import Flops
    from diffusion_align.training.memory import LiveBytes
    from reward_models.base import Reward

PHASES = ("sampling", "decoding", "scoring", "updating", "optimiser", "looking")


@dataclass(frozen=True)
class DryRun:
    """What one iteration with one update, and a look at the model after it, did.

    Attributes:
        peaks: phase -> the most bytes alive in it, above the level before the step.
        kept: phase -> bytes alive when it first began.
        peak: the most in any phase of the update.
        flops: phase -> floating point operations.
        components: component -> bytes of its weights; the denoiser's without the trained ones.
        trained: bytes of the trained parameters.
        conditioning: bytes of one item's embeddings; latent: numbers of one item's latent;
            picture: numbers of one picture.
        latents: how many latents of each item were kept, gradients and noise in their shape
            counted.
        log_probs: whether log-probabilities of every step were kept beside them.
        losses: how many losses the update had.
        quiet_end: how many steps at the end of a sample take no noise.
    """

    peaks: Mapping[str, int]
    kept: Mapping[str, int]
    peak: int
    flops: Mapping[str, float]
    components: Mapping[str, int]
    trained: int
    conditioning: int
    latent: int
    picture: int
    latents: int
    log_probs: bool
    losses: int
    quiet_end: int


def dry_run(config: RunConfig, rewards: Mapping[str, Reward]) -> DryRun:
    """Run one update of `config` dry.

    Args:
        config: all of an iteration's samples and one update of it are run, so give it few.
        rewards: by name; they score noise. For one that is missing something stands in
            (`dry_reward.py`).

    Raises:
        UserError: the model's configs are not at hand, or settings that do not fit together.
    """
    import math

    from torch import nn

    from diffusion_align.assemble.dry_reward import stand_in
    from diffusion_align.assemble.loading import load_policy, set_up
    from diffusion_align.assemble.named import load_algorithm, scored_with, training_prompts
    from diffusion_align.assemble.one_update import quiet_end, without_meaning
    from diffusion_align.assemble.weightless import answering, make_fake
    from diffusion_align.policy.devices import device_of
    from diffusion_align.training.flops import Flops
    from diffusion_align.training.memory import LiveBytes

    config = without_meaning(config)
    policy = load_policy(config, weights=False)
    # These act on modules, not on numbers; kernels and layouts change no size.
    acting = replace(
        config.model,
        attention_backend=None,
        channels_last=False,
        compile=False,
        release_text_encoders=False,
    )
    set_up(policy, acting, _ignore)
    modules = [c for c in policy.pipeline.components.values() if isinstance(c, nn.Module)]
    if policy.reference_copy is not None:
        modules.append(policy.reference_copy)
    policy.device = device_of(config.model.device)
    make_fake(modules, policy.device)
    if config.train.mixed_precision != "no":
        policy.denoiser = _autocasting(policy, config.train.mixed_precision)
    components, trained = _weights(policy)
    scorers: dict[str, Any] = {
        name: rewards.get(name) or stand_in(name, config) for name in scored_with(config)
    }
    prompts = training_prompts(config)
    algorithm = load_algorithm(config, policy, scorers[config.reward], prompts)
    state = algorithm.state_dict()
    if "replays" in state:  # the replay check compares numbers; it needs less than training
        algorithm.load_state_dict({**state, "replays": False})
    with ExitStack() as stack:
        flops, live = stack.enter_context(Flops()), stack.enter_context(LiveBytes("sampling"))
        if algorithm.needs.chained_losses:
            stack.enter_context(answering())
        marks = _Marks(live, flops)
        algorithm.listener = marks
        _decode_noise(policy, marks)
        batch = algorithm.collect(0)
        marks.enter("updating")
        losses = 0
        for minibatch in islice(algorithm.minibatches(batch), config.train.accumulation):
            for loss, _ in algorithm.losses(minibatch, 1 / config.train.accumulation):
                loss.backward()
                losses += 1
        del minibatch, loss
        marks.enter("optimiser")
        parameters = algorithm.policy.trainable_parameters()
        _step(parameters, config)
        for parameter in parameters:
            parameter.grad = None
        peak = live.peak
        marks.enter("looking")
        _look(policy, config, scorers)
        cond = _conditioning(batch)
        found = DryRun(
            peaks=dict(live.peaks),
            kept=dict(live.kept),
            peak=peak,
            flops=dict(flops.by_phase),
            components=components,
            trained=trained,
            conditioning=cond.nbytes // len(cond),
            latent=math.prod(cond.latent_shape),
            picture=marks.picture,
            latents=_latents(batch, cond),
            log_probs=not algorithm.needs.chained_losses,
            losses=losses,
            quiet_end=quiet_end(config, policy),
        )
    return found


def _weights(policy: Policy) -> tuple[dict[str, int], int]:
    """Bytes of every component's frozen weights, and of the trained parameters."""
    from torch import nn

    from diffusion_align.training.memory import tensor_bytes

    trained = sum(p.numel() * p.element_size() for p in policy.trainable_parameters())
    components = {
        name: tensor_bytes(component) - (trained if name == policy.family.denoiser else 0)
        for name, component in policy.pipeline.components.items()
        if isinstance(component, nn.Module)
    }
    if policy.reference_copy is not None:
        components["reference copy"] = tensor_bytes(policy.reference_copy)
    return components, trained


def _autocasting(policy: Policy, precision: str) -> nn.Module:
    """What accelerate's `prepare_model` makes of the denoiser: autocast inside, float32 outside."""
    import torch
    from torch import nn

    bare, kind = policy.denoiser, policy.device.type
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    class Autocasting(nn.Module):
        def forward(self, *args: Any, **named: Any) -> Any:
            with torch.autocast(kind, dtype=narrow):
                output = bare(*args, **{**named, "return_dict": False})
            return tuple(value.float() for value in output)

    return Autocasting()


def _decode_noise(policy: Policy, marks: _Marks) -> None:
    """Decode, and decode backwards, for the memory of it; return noise, which has numbers."""
    import torch

    decode, decode_gradient = policy.decode, policy.decode_gradient

    def noise(shape: torch.Size) -> Tensor:
        source = torch.Generator(policy.device).manual_seed(0)
        return torch.rand(shape, device=policy.device, generator=source)

    def decoded(x_0: Tensor, **how: Any) -> Tensor:
        with marks.within("decoding"):
            shape = decode(x_0, **how).shape
            marks.picture = shape[1:].numel()
            return noise(shape)

    def differentiated(
        x_0: Tensor, pixel_gradient: Tensor, *, chunk: int | None = None, **how: Any
    ) -> Tensor:
        size = chunk or 1
        with marks.within("decoding"), marks.flops.times(len(x_0) / min(size, len(x_0))):
            # Chunks go one after another: the first is as full as any.
            decode_gradient(x_0[:size], pixel_gradient[:size], chunk=chunk, **how)
            return noise(x_0.shape)

    # On this one policy, which is thrown away.
    setattr(policy, "decode", decoded)  # noqa: B010
    setattr(policy, "decode_gradient", differentiated)  # noqa: B010


def _conditioning(batch: object) -> Conditioning:
    """What a batch keeps of its prompts."""
    from diffusion_align.policy import Conditioning
    from diffusion_align.training.memory import reachable

    return next(thing for thing in reachable(batch) if isinstance(thing, Conditioning))


def _latents(batch: object, cond: Conditioning) -> int:
    """How many latents, or tensors in their shape, a batch keeps of each of its items."""
    import math

    from torch import Tensor

    from diffusion_align.training.memory import reachable

    shape, held = tuple(cond.latent_shape), dict[int, int]()
    for thing in reachable(batch):
        if isinstance(thing, Tensor) and thing.shape[-len(shape) :] == shape:
            held[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return round(sum(held.values()) / (4 * len(cond) * math.prod(shape)))


def _step(parameters: Sequence[nn.Parameter], config: RunConfig) -> None:
    """One AdamW step; of the 8-bit kind only the bytes of its two moments."""
    import torch

    if config.train.optimizer == "adamw8bit":
        held = [torch.empty(2 * p.numel(), dtype=torch.uint8, device="meta") for p in parameters]
        del held
        return
    # Fake parameters are not taken for what torch would choose the fast form for.
    on_gpu = any(p.device.type == "cuda" for p in parameters)
    torch.optim.AdamW(parameters, lr=0.0, foreach=on_gpu).step()


def _look(policy: Policy, config: RunConfig, rewards: Mapping[str, Reward]) -> None:
    """Pictures of held-out prompts, scored, as a run makes them on the way and at its end."""
    from diffusion_align.assemble.dry_reward import RowOfNumbers
    from diffusion_align.assemble.named import heldout_prompts
    from diffusion_align.evaluation.probe import Probe

    # A scorer of images takes no clips as they are.
    clips = policy.info.modality == "video"
    probe = Probe(
        policy,
        heldout_prompts(config),
        rewards={
            name: RowOfNumbers() if clips and reward.info.modality == "image" else reward
            for name, reward in rewards.items()
        },
        options=config.evaluation,
        sampling=config.sampling,
        run_seed=config.seed,
    )
    probe.scores(0)


def _ignore(text: str) -> None:
    """Lines about settings are said where the real model is set up."""


class _Marks:
    """The listener that tells both meters which phase has begun."""

    def __init__(self, live: LiveBytes, flops: Flops) -> None:
        self.live, self.flops = live, flops
        self.picture = 0  # numbers of one

    def enter(self, phase: str) -> None:
        self.live.enter_phase(phase)
        self.flops.phase = phase

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """`phase`, and afterwards the one before; a look at pictures is one phase."""
        before = self.live.phase
        if before != "looking":
            self.enter(phase)
        yield
        self.enter(before)

    def progress(self, phase: str, done: int, total: int) -> None:
        self.enter(phase)

    def message(self, text: str) -> None:
        pass
