"""Whether a run will fit and how long it takes: estimated first, then one real update measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from diffusion_align.assemble.loading import load_policy, place_of_rewards
from diffusion_align.assemble.named import load_algorithm, training_prompts
from diffusion_align.assemble.one_update import amount, cut_to_one_update, quiet_end

if TYPE_CHECKING:
    from diffusion_align.algorithms.base import Algorithm
    from diffusion_align.assemble.estimate import Estimate
    from diffusion_align.config import RunConfig
    from diffusion_align.training.options import TrainOptions


def _unsaid(text: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Measured:
    """One real update.

    Attributes:
        step: high-water of tensor bytes above the level before it.
        level: bytes of the model's weights, as loaded, on its device.
        seconds: phase -> seconds of a second, warm update, without the meter.
        iteration: phase -> seconds of a whole iteration, in proportion to samples and steps.
        samples, steps: of the update.
    """

    step: int
    level: int
    seconds: Mapping[str, float]
    iteration: Mapping[str, float]
    samples: int
    steps: int


def least_seconds(found: Estimate, config: RunConfig) -> dict[str, float]:
    """Seconds of an iteration by phase, were the network one large matrix product.

    No network gets more out of a device; small ones get a tenth of it.
    """
    from diffusion_align.policy.devices import device_of
    from diffusion_align.policy.loading import dtype_of
    from diffusion_align.training.flops import matrix_product_rate

    precision = {"no": config.model.dtype, "bf16": "bfloat16", "fp16": "float16"}
    dtype = dtype_of(precision[config.train.mixed_precision])
    rate = matrix_product_rate(device_of(config.model.device), dtype)
    return {phase: count / rate for phase, count in found.flops.items()}


def missing_weights(config: RunConfig) -> list[str]:
    """What a real update would have to download first, each as a sentence; empty if nothing."""
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.policy.outline import config_folder
    from reward_models.catalogue import RewardError, components, find

    missing = []
    info = resolve(config.model.id)
    folder = config_folder(info, config.model.revision)
    if not any(folder.glob("*/*.safetensors")):
        missing.append(
            f"the weights of {info.name} are not here:  hf download {info.source} "
            "--include '*.json' --include '*.txt' --include '*.safetensors'"
        )
    for name in components(config.reward):
        try:
            row = find(name)
        except RewardError:
            continue  # a file or a class of the user's own
        if not row.installed:
            missing.append(f"the weights of {name} are not here ({row.megabytes:.0f} MB)")
    return missing


def measure(config: RunConfig, say: Callable[[str], None] = _unsaid) -> Measured:
    """Load everything and run one update, collected and learnt from as the training loop does.

    Once under the meter, then once more for the time. Nothing is written and no tracker is asked.

    Args:
        config: settings of memory must be settled.
        say: told what a setting does not do here.

    Raises:
        UserError, RewardError: anything a person can put right.
    """
    import reward_models
    from diffusion_align.training import random_state
    from diffusion_align.training.memory import high_water, tensor_bytes

    policy = load_policy(config, say=say)
    cut = cut_to_one_update(config, policy.info)
    reward = reward_models.load(config.reward, device=place_of_rewards(config, policy))
    algorithm = load_algorithm(cut, policy, reward, training_prompts(cut))
    modules = [c for c in policy.pipeline.components.values() if hasattr(c, "parameters")]
    copy = policy.reference_copy
    level = sum(map(tensor_bytes, [*modules, *([copy] if copy is not None else [])]))
    with random_state.borrowed(config.seed):
        _, step = high_water(policy.device, lambda: _one_update(algorithm, cut.train))
        seconds = _one_update(algorithm, cut.train)
    quiet = quiet_end(cut, policy)
    whole, part = amount(config, policy.info, quiet), amount(cut, policy.info, quiet)
    factor = {
        "sampling": whole.calls / part.calls,
        "scoring": whole.samples / part.samples,
        "replaying": whole.different / part.different,
        "updating": whole.pairs / part.per_update,
    }
    iteration = {name: seconds[name] * factor[name] for name in factor if name in seconds}
    return Measured(step, level, seconds, iteration, part.samples, part.steps)


def _one_update(algorithm: Algorithm[Any, Any], options: TrainOptions) -> dict[str, float]:
    """Collect, back-propagate, clip, update: seconds by phase."""
    from diffusion_align.algorithms.base import Silence
    from diffusion_align.training.phases import PhaseClock
    from diffusion_align.training.setup import Machinery

    clock = PhaseClock(Silence())
    algorithm.listener = clock
    with Machinery(algorithm, options) as machinery:
        batch = algorithm.collect(0)
        clock.progress("updating", 0, 1)
        for minibatch in islice(algorithm.minibatches(batch), options.accumulation):
            for loss, _ in algorithm.losses(minibatch, 1 / options.accumulation):
                machinery.backward(loss)
        machinery.clip()
        machinery.update(0)
        if machinery.device.type == "cuda":
            import torch

            torch.cuda.synchronize(machinery.device)
        clock.stop()
    return {name.removeprefix("time/"): value for name, value in clock.take().items()}
