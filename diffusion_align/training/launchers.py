"""What a launcher asks for that is done otherwise here: DeepSpeed, accelerate's FSDP.

`accelerate launch` hands its settings on in the environment. A DeepSpeed engine makes its step at
the end of every backward that accelerate sees, but an update here is made of many losses; silently
training without the engine would train one model per GPU. So its config is read, checked, and
answered with the setting that does the same.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusion_align.errors import UserError

_SAME = {
    0: "train.distribution=ddp",
    1: "train.distribution=fsdp2 (it shards gradients and weights besides the moments)",
    2: "train.distribution=fsdp2 (it shards weights besides gradients and moments)",
    3: "train.distribution=fsdp2",
}


def check_launcher() -> None:
    """Refuse what would be ignored.

    Raises:
        UserError: DeepSpeed or accelerate's FSDP plugin was asked for, with what to set instead; or
            the DeepSpeed config cannot be read or is none.
    """
    if _on("ACCELERATE_USE_DEEPSPEED"):
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        level = zero_stage(Path(file)) if file and file != "none" else int(stage)
        raise UserError(
            f"DeepSpeed (ZeRO stage {level}) is not supported",
            where=file or "accelerate's configuration",
            fix=f"start with torchrun, or accelerate without DeepSpeed, and set {_SAME[level]}",
        )
    if _on("ACCELERATE_USE_FSDP"):
        raise UserError(
            "accelerate's FSDP settings are not read",
            where="accelerate's configuration",
            fix="start with torchrun, or accelerate without FSDP, and set train.distribution=fsdp2",
        )


def zero_stage(path: Path) -> int:
    """The ZeRO stage (0 to 3) of a DeepSpeed config file.

    Raises:
        UserError: it cannot be read, or is no DeepSpeed config.
    """
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in _SAME:
        raise UserError(
            f"zero_optimization.stage is {stage!r}, not one of 0 to 3",
            where=str(path),
            fix="it must be a DeepSpeed config: a JSON object",
        )
    return int(stage)


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
