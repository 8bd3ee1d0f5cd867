"""One iteration of a run on tensors that have shapes and no memory: its own code, run dry.

The model is built from its configs on the `meta` device; its weights then become fake tensors
(`torch._subclasses.fake_tensor`), which any operator accepts and which cost nothing. The
algorithm's own `collect`, `minibatches` and `losses`, the backward pass and the optimiser run on
them, and two meters listen: bytes alive (`training/memory.py`) and arithmetic
(`training/flops.py`). Nothing is fitted: a setting that saves memory saves it here too.

Only what numbers would have to decide is given: a decoder returns black pictures, and a reward
that is not at hand returns a row of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Policy
    from diffusion_align.training.flops import Flops
    from diffusion_align.training.memory import LiveBytes
    from reward_models.base import Reward, Scores

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
        latents: how many latents of each item were kept.
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
    losses: int
    quiet_end: int


def dry_run(config: RunConfig, rewards: Mapping[str, Reward]) -> DryRun:
    """Run one update of `config` dry.

    Args:
        config: all of an iteration's samples and one update of it are run, so give it few.
        rewards: by name; they score black pictures. One that is missing costs nothing.

    Raises:
        UserError: the model's configs are not at hand, or settings that do not fit together.
    """
    import math

    from diffusion_align.assemble.loading import load_policy, set_up
    from diffusion_align.assemble.named import load_algorithm, training_prompts
    from diffusion_align.assemble.one_update import quiet_end
    from diffusion_align.policy.devices import device_of
    from diffusion_align.training.flops import Flops
    from diffusion_align.training.memory import LiveBytes

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
    _make_fake(policy, device_of(config.model.device))
    if config.train.mixed_precision != "no":
        policy.denoiser = _autocasting(policy, config.train.mixed_precision)
    components, trained = _weights(policy)
    scorer: Any = rewards.get(config.reward) or _RowOfNumbers()
    algorithm = load_algorithm(config, policy, scorer, training_prompts(config))
    state = algorithm.state_dict()
    if "replays" in state:  # the replay check compares numbers; it needs less than training
        algorithm.load_state_dict({**state, "replays": False})
    with ExitStack() as stack:
        flops, live = stack.enter_context(Flops()), stack.enter_context(LiveBytes("sampling"))
        marks = _Marks(live, flops)
        algorithm.listener = marks
        _decode_black(policy, marks)
        batch = algorithm.collect(0)
        marks.enter("updating")
        losses = 0
        for minibatch in islice(algorithm.minibatches(batch), config.train.accumulation):
            for loss, _ in algorithm.losses(minibatch, 1.0):
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
        _look(policy, config, rewards)
        cond = batch.trajectory.cond
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
            latents=batch.trajectory.latents.shape[1],
            losses=losses,
            quiet_end=quiet_end(config, policy),
        )
    return found


def _make_fake(policy: Policy, device: torch.device) -> None:
    """Replace every weight by a fake one on `device`, in place."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    modules = [c for c in policy.pipeline.components.values() if isinstance(c, nn.Module)]
    if policy.reference_copy is not None:
        modules.append(policy.reference_copy)
    made: dict[int, Tensor] = {}  # tied weights stay tied
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (inner for outer in modules for inner in outer.modules()):
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if value is None:
                        continue
                    if id(value) not in made:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                        trains = value.requires_grad
                        made[id(value)] = (
                            nn.Parameter(fake, trains) if isinstance(value, nn.Parameter) else fake
                        )
                    store[name] = made[id(value)]  # type: ignore[assignment]
    policy.device = device


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


def _decode_black(policy: Policy, marks: _Marks) -> None:
    """Decode for its memory, and return pixels that have numbers."""
    import torch

    decode = policy.decode

    def black(x_0: Tensor, **how: Any) -> Tensor:
        before = marks.live.phase
        if before != "looking":
            marks.enter("decoding")
        shape = decode(x_0, **how).shape
        marks.picture = shape[1:].numel()
        pixels = torch.zeros(shape, device=policy.device)
        marks.enter(before)
        return pixels

    setattr(policy, "decode", black)  # noqa: B010 - on this one policy, which is thrown away


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
    from diffusion_align.assemble.named import heldout_prompts
    from diffusion_align.evaluation.probe import Probe

    probe = Probe(
        policy,
        heldout_prompts(config),
        rewards=rewards or {"": _RowOfNumbers()},
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

    def progress(self, phase: str, done: int, total: int) -> None:
        self.enter(phase)

    def message(self, text: str) -> None:
        pass


class _RowOfNumbers:
    """A reward that gives its items 0, 1, 2 ... and needs nothing."""

    def __init__(self) -> None:
        from reward_models.base import RewardInfo

        self.info = RewardInfo("not at hand", "image", False, "0 to the number of items", "", "")

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, object]] | None = None,
    ) -> Scores:
        import torch

        from reward_models.base import Scores

        return Scores(torch.arange(float(len(prompts)), device=media.device))
