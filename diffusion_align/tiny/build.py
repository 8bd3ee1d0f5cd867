"""Rebuild an embedded model from nothing: ``python -m diffusion_align.tiny.build NAME``.

NAME is ``tiny-sd``, ``tiny-clip`` (it learns from samples of ``tiny-sd``, so that comes first),
``rewards`` (tiny-aesthetic, tiny-hps and tiny-mps on that tower) or ``quality`` (measure what is
shipped). Every training is seeded and goes on from its checkpoint in ``--work`` when it was
interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

import reward_models
from diffusion_align.policy.catalogue import MODELS
from diffusion_align.tiny import clip as tiny_clip
from diffusion_align.tiny.quality import measure_clip, measure_sd, measure_vae
from diffusion_align.tiny.rewards import (
    SAMPLED_CAPTIONS,
    TWINS,
    drawn_samples,
    judgements_for,
    measure_twin,
    train_twin,
)
from diffusion_align.tiny.sd import train_sd
from diffusion_align.tiny.vae import train_vae
from reward_models.small_world import HPS_CROWD, judged_pairs

TINY_SD = Path(MODELS["tiny-sd"].source)
ASSETS = Path(reward_models.__file__).parent / "assets"


def build_tiny_sd(work: Path) -> None:
    """VAE, then UNet and text encoder, then the pipeline folder as fp16."""
    folder = work / "vae"
    if not folder.exists():
        train_vae(work).save_pretrained(folder)
    vae = AutoencoderKL.from_pretrained(folder)
    export_pipeline(train_sd(vae, work), TINY_SD)


def export_pipeline(pipeline: StableDiffusionPipeline, target: Path) -> None:
    """Write a pipeline as fp16 safetensors with the checksum of every file."""
    pipeline.to(dtype=torch.float16).save_pretrained(target, safe_serialization=True)
    for path in target.rglob("*.json"):
        # diffusers notes where a part was loaded from: a folder of the builder's machine.
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    write_checksums(target, target / "SHA256SUMS.json")


def write_checksums(folder: Path, listing: Path) -> None:
    """List the sha256 of every file below ``folder`` but the listing itself, as JSON."""
    sums = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != listing and path.suffix != ".py"
    }
    listing.write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def build_tiny_clip(work: Path) -> None:
    """The tower, on pictures of every kind."""
    samples = drawn_samples(shipped_pipeline(), work, "train", SAMPLED_CAPTIONS, seed=51)
    # Whichever crowd is asked: the tower learns the truth of the pictures, nobody's choices.
    clip = tiny_clip.train_clip(work, judged_pairs(55_000, 31, "train", HPS_CROWD, samples))
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "tiny-clip.json").write_text(json.dumps(tiny_clip.CONFIG, indent=1) + "\n")
    save_file(sparse_tokens(clip), ASSETS / "tiny-clip.safetensors")
    write_checksums(ASSETS, ASSETS / "SHA256SUMS")


def build_rewards(work: Path) -> None:
    """The three rewards on the shipped tower."""
    pipeline = shipped_pipeline()
    samples = drawn_samples(pipeline, work, "train", SAMPLED_CAPTIONS, seed=51)
    for name in TWINS:
        judged = judgements_for(name, samples)
        train_twin(name, work, judged, ASSETS / f"{name}.safetensors")
    write_checksums(ASSETS, ASSETS / "SHA256SUMS")


def sparse_tokens(clip: CLIP) -> dict[str, Tensor]:
    """fp16 weights with only those rows of the token table that training could reach."""
    weights = {name: value.half().contiguous() for name, value in clip.state_dict().items()}
    table = weights.pop("token_embedding.weight")
    rows = tiny_clip.used_tokens()
    return weights | {
        "token_embedding.rows": rows.int(),
        "token_embedding.values": table[rows].contiguous(),
    }


def shipped_pipeline() -> StableDiffusionPipeline:
    """``tiny-sd`` as users get it: fp16 weights, computed in fp32."""
    return StableDiffusionPipeline.from_pretrained(TINY_SD, torch_dtype=torch.float32)


def shipped_tower() -> CLIP:
    """``tiny-clip`` as users get it."""
    clip = tiny_clip.new_clip()
    weights = {
        name: value.float() for name, value in load_file(ASSETS / "tiny-clip.safetensors").items()
    }
    rows = weights.pop("token_embedding.rows").long()
    table = torch.zeros_like(clip.token_embedding.weight)
    table[rows] = weights.pop("token_embedding.values")
    clip.load_state_dict(weights | {"token_embedding.weight": table})
    return clip.eval()


def quality() -> dict[str, object]:
    """Measure every shipped model on held-out captions and pictures."""
    pipeline, tower = shipped_pipeline(), shipped_tower()
    found: dict[str, object] = {
        "vae": asdict(measure_vae(pipeline.vae)),
        "tiny-sd": asdict(measure_sd(pipeline, guidance_scale=MODELS["tiny-sd"].guidance_scale)),
        "tiny-clip": measure_clip(tower),
    }
    with TemporaryDirectory() as folder:
        samples = drawn_samples(pipeline, Path(folder), "heldout", 256, seed=52)
    return found | {name: asdict(measure_twin(name, samples, count=4096)) for name in TWINS}


def main() -> None:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_align.tiny.build", description=__doc__
    )
    parser.add_argument("name", choices=["tiny-sd", "tiny-clip", "rewards", "quality"])
    parser.add_argument("--work", type=Path, default=Path("tiny-build"), help="checkpoints")
    arguments = parser.parse_args()
    if arguments.name == "tiny-sd":
        build_tiny_sd(arguments.work)
    elif arguments.name == "tiny-clip":
        build_tiny_clip(arguments.work)
    elif arguments.name == "rewards":
        build_rewards(arguments.work)
    else:
        print(json.dumps(quality(), indent=2))


if __name__ == "__main__":
    main()
