"""What the loop drives: accelerate, the optimiser and the parameters, set up and given back."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from diffusion_align import tf32
from diffusion_align.algorithms.base import Algorithm
from diffusion_align.errors import UserError
from diffusion_align.training import fsdp
from diffusion_align.training.checkpoint import Checkpoint
from diffusion_align.training.distribution import Processes
from diffusion_align.training.ema import Average
from diffusion_align.training.optimizer import hyperparameters, make_optimizer
from diffusion_align.training.options import TrainOptions


class Machinery:
    """A context that puts the prepared module into the policy's slot and takes it out again.

    The accelerator is built with accumulation 1: `accelerator.backward` would divide every loss of
    a chain. Scaling is the algorithm's.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any, Any],
        options: TrainOptions,
        group: Processes | None = None,
    ) -> None:
        self._group = group or Processes()
        self._shards: dict[str, fsdp.Sharded] = {}  # by slot; empty without FSDP2
        self._failed = False
        self._policy = algorithm.policy
        self._options = options
        self._likelihoods = algorithm.needs.trajectory
        self._chained = algorithm.needs.chained_losses
        self.notes: list[str] = []  # what was changed for the run, for the person who watches
        self.average: Average | None = None  # of the weights, where the options ask for one
        self.parameters: list[nn.Parameter] = list(self._policy.trainable_parameters())
        if not self.parameters:
            raise UserError(
                "this policy has nothing to train",
                where="policy",
                fix="load it with lora_rank=8 (config: lora), or full=True",
            )

    def __enter__(self) -> Machinery:
        on_cpu = torch.device(self._policy.device).type == "cpu"
        if self._chained and self._options.mixed_precision == "fp16":
            raise UserError(
                "each loss is made of the gradient of the one before, and fp16's scaler would "
                "multiply every one of them",
                where="train.mixed_precision",
                fix="use no, or bf16",
            )
        if on_cpu and self._options.mixed_precision == "fp16":
            raise UserError(
                "fp16 needs a GPU", where="train.mixed_precision", fix="use no, or bf16"
            )
        # Whatever is set up is taken down again, also where a later step of this fails.
        with ExitStack() as stack:
            self._accelerator = _accelerator(stack, self._options, on_cpu=on_cpu)
            bare: nn.Module = self._policy.denoiser
            names = {id(parameter): name for name, parameter in bare.named_parameters()}
            self._names = [
                names.get(id(parameter), f"parameter_{number}")
                for number, parameter in enumerate(self.parameters)
            ]
            if self._likelihoods and not on_cpu and self._in_float32(bare) and tf32.in_use():
                stack.enter_context(tf32.switched_off())
                self.notes.append("TF32 is off for this run: likelihood ratios need float32 whole")
            self._fill(stack, "denoiser", for_training=True)
            if getattr(self._policy, "reference_copy", None) is not None:
                # Else the reference would compute in another precision than the policy.
                self._fill(stack, "reference_copy", for_training=False)
            if self._shards:
                self._take_shards()
            bare_optimizer = make_optimizer(self.parameters, self._options, self.device)
            self._optimizer: Any = self._accelerator.prepare_optimizer(bare_optimizer)
            if self._options.ema_decay > 0:
                self.average = Average(
                    self.parameters, self._options.ema_decay, self._options.ema_every
                )
            self._optimizer.zero_grad()
            stack.callback(self._optimizer.zero_grad)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._failed = error[0] is not None
        self._undo.close()

    def _in_float32(self, module: nn.Module) -> bool:
        whole = all(p.dtype == torch.float32 for p in module.parameters() if p.is_floating_point())
        return whole and self._options.mixed_precision == "no"

    def _fill(self, stack: ExitStack, slot: str, *, for_training: bool) -> None:
        """Put the prepared module into a slot of the policy, until the stack unwinds."""

        def empty() -> None:
            module = getattr(self._policy, slot)
            sharded = self._shards.pop(slot, None)
            if sharded is not None and not self._failed:  # else others may be gone: it would hang
                sharded.undo()
            bare = self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)
            setattr(self._policy, slot, bare)

        stack.callback(empty)
        module = getattr(self._policy, slot)
        whole = for_training and not self._group.lockstep
        with warnings.catch_warnings():
            # torch renames an option whose new name accelerate does not know yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            prepared = self._accelerator.prepare_model(module, evaluation_mode=not whole)
        setattr(self._policy, slot, prepared)
        if self._group.lockstep:
            self._shards[slot] = fsdp.Sharded(prepared, self.device.type, self._group.size)

    def _take_shards(self) -> None:
        """Train the shards in place of the parameters they were cut from.

        Raises:
            UserError: parameters that are not the network's own.
        """
        self.parameters = list(self._policy.trainable_parameters())
        if not all(fsdp.is_shard(parameter) for parameter in self.parameters):
            raise UserError(
                "some of what is trained cannot be sharded",
                where="train.distribution",
                fix="use train.distribution=ddp (fsdp2 is for diffusion policies)",
            )

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self._accelerator.device

    @property
    def scaled(self) -> bool:
        """Whether an fp16 gradient scaler is at work."""
        return self._accelerator.scaler is not None

    def no_sync(self) -> AbstractContextManager[Any]:
        """Gradients of losses inside are not exchanged between processes yet."""
        if self._shards:
            return fsdp.unsynchronised(self._policy.denoiser)
        return self._accelerator.no_sync(self._policy.denoiser)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate one loss (fp16: times the scaler's factor)."""
        self._accelerator.backward(loss)

    def clip(self) -> float:
        """Clip the gradient; its norm before."""
        limit = self._options.max_grad_norm or math.inf
        norm = self._accelerator.clip_grad_norm_(self.parameters, limit)
        return float(fsdp.whole(norm)) if norm is not None else math.nan

    def update(self, step: int) -> None:
        """Optimiser step number `step`, from 0, with its learning rate; gradients are dropped."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._options.learning_rate_at(step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step + 1)

    def averaged(self) -> AbstractContextManager[object]:
        """Inside, the policy's weights are the averaged ones, where there are any."""
        return self.average.in_place() if self.average is not None else nullcontext()

    def readings(self) -> dict[str, float]:
        """The learning rate, and the peak memory so far in GiB."""
        return {"train/learning_rate": self._optimizer.param_groups[0]["lr"], **self._memory()}

    def _memory(self) -> dict[str, float]:
        # The device's own, or the process's on a CPU.
        if self.device.type == "cuda":
            return {"memory/peak_gb": torch.cuda.max_memory_allocated(self.device) / 2**30}
        if sys.platform == "win32":
            return {}
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"memory/peak_gb": round(peak / 2**30, 3)}

    def named_parameters(self) -> dict[str, Tensor]:
        """The trained parameters by name, as they are: shards under FSDP2."""
        return dict(zip(self._names, self.parameters, strict=True))

    @torch.no_grad()
    def whole_parameters(self) -> dict[str, Tensor]:
        """The same, whole. Under FSDP2 all ranks must call it."""
        return {name: fsdp.whole(value) for name, value in self.named_parameters().items()}

    def savable(self) -> AbstractContextManager[object]:
        """Inside, the main process can save the policy. Under FSDP2 all ranks must enter it."""
        if not self._shards:
            return nullcontext()
        return self._shards["denoiser"].trained_whole(keep=self._group.is_main)

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, in fp16 the scaler, and the averaged weights where there are any."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": fsdp.whole_state(self._optimizer.state_dict()),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average": None if self.average is None else fsdp.whole_state(self.average.values),
        }

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, algorithm: str) -> None:
        """Put a checkpoint's parameters, optimiser and scaler in place.

        Of the optimiser only its moments are the checkpoint's: learning rate, betas, epsilon and
        weight decay are those of the options, which may have been changed for the resumed run.

        Raises:
            UserError: the checkpoint is another algorithm's, or its parameters are not those of
                this policy (another rank, other targets).
        """
        mine = self.named_parameters()
        problems = _differences(mine, checkpoint.parameters)
        if checkpoint.algorithm != algorithm:
            problems.insert(0, f"it is one of {checkpoint.algorithm}, not of {algorithm}")
        if problems:
            raise UserError(
                "the checkpoint does not fit: " + "; ".join(problems),
                where=f"step {checkpoint.step}",
                fix="resume with the algorithm, model, lora.rank and lora.targets it was made with",
            )
        for name, parameter in mine.items():
            parameter.copy_(fsdp.like(checkpoint.parameters[name], parameter))
        moments = fsdp.like_parameters(checkpoint.state["optimizer"], self.parameters)
        self._optimizer.load_state_dict(moments)
        for group in self._optimizer.param_groups:
            group.update(hyperparameters(self._options))
        if self.average is not None:
            kept = checkpoint.state.get("average")
            own = self.average.values
            self.average.load(kept and [fsdp.like(v, o) for v, o in zip(kept, own, strict=True)])
        if self._accelerator.scaler is not None and checkpoint.state["scaler"]:
            self._accelerator.scaler.load_state_dict(checkpoint.state["scaler"])


def _accelerator(stack: ExitStack, options: TrainOptions, *, on_cpu: bool) -> Accelerator:
    owns_state = not AcceleratorState._shared_state
    # Buffers never change here; broadcasting them at every forward would make a forward without
    # gradients something that all ranks have to do equally often.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        cpu=on_cpu,
        gradient_accumulation_steps=1,
        kwargs_handlers=[ddp],
    )
    if owns_state:
        # accelerate keeps its settings per process; the next run may want others. The group of
        # processes stays, because it cannot be met again.
        alone = accelerator.num_processes == 1
        stack.callback(AcceleratorState._reset_state, reset_partial_state=alone)
    return accelerator


def _differences(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if missing := sorted(set(mine) - set(theirs)):
        problems.append(f"{len(missing)} parameters are missing (first: {missing[0]})")
    if extra := sorted(set(theirs) - set(mine)):
        problems.append(f"{len(extra)} parameters are unknown (first: {extra[0]})")
    for name in sorted(set(mine) & set(theirs)):
        if mine[name].shape != theirs[name].shape:
            problems.append(f"{name} is {list(theirs[name].shape)}, not {list(mine[name].shape)}")
            break
    return problems
