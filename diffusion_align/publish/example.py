"""The example of a model card: Python that loads and draws.

What a pipeline's call takes and gives beyond what all of them share follows from its family's row
(`own_arguments`, `media`); the self-check calls by the same rules.

Where the base comes with a scheduler that training replaced (`policy.scheduling`), the example
replaces it likewise: by DDIM, by CogVideoX's DDIM, or, for a flow, by Euler's steps over the noise
levels of the scheduler that was there. Where it comes with the family's own, nothing is replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusion_align.policy.families import DDIM_DEFAULTS, Family
from diffusion_align.policy.tuned import LORA_FILE

if TYPE_CHECKING:
    from diffusion_align.publish.card import Card

_HERE = "'.'"
_OWN_LOADER = "from diffusion_align import Policy\n"


def own_arguments(
    family: Family, *, guidance_scale: float, eta: float, frames: int | None
) -> dict[str, Any]:
    """Arguments that only some families' pipelines take.

    Args:
        guidance_scale: above 1 there is a negative branch, which some pipelines want a text for.
        eta: of DDIM; pipelines of flows have none.
        frames: length of a clip; None leaves it to the pipeline.
    """
    found: dict[str, Any] = {}
    if family.needs_negative and guidance_scale > 1:
        found["negative_prompt"] = ""
    if family.schedule == "ddim":
        found["eta"] = eta
    if family.frames is not None and frames is not None:
        found["num_frames"] = frames
    return found


def media(family: Family) -> str:
    """What the pipeline's result calls them."""
    return "images" if family.frames is None else "frames"


def loads_lora(family: Family) -> bool:
    """Whether diffusers itself has a loader for LoRAs of this family's pipelines.

    Its classes are asked: a pipeline in memory may have been given one (`policy.lora_methods`).
    """
    import diffusers

    return all(hasattr(getattr(diffusers, name), "load_lora_weights") for name in family.pipelines)


def example(card: Card) -> str:
    """Python that loads from ".", the card's own folder; every value in it is a literal.

    A LoRA that diffusers has no loader for is loaded by this package.
    """
    plain = card.kind != "lora" or card.loads_lora
    head, load = _plainly(card) if plain else _by_policy(card)
    clips = card.family.frames is not None
    if clips:
        head.append("from diffusers.utils import export_to_video  # needs imageio[ffmpeg]")
    if card.base.imports and card.kind == "lora":
        head.append(card.base.imports)
    own = own_arguments(
        card.family, guidance_scale=card.guidance_scale, eta=card.eta, frames=card.frames
    )
    sizes = {"height": card.height, "width": card.width}
    arguments = {
        "num_inference_steps": card.steps,
        "guidance_scale": card.guidance_scale,
        **own,
        **{side: size for side, size in sizes.items() if size is not None},
    }
    name = "video" if clips else "image"
    pace = "" if card.fps is None else f", fps={card.fps:g}"
    return "\n".join(
        [
            *sorted(head),
            "",
            *load,
            f"{name} = {'pipeline' if plain else 'policy.pipeline'}(",
            f"    {card.example!a},",
            *(f"    {key}={_literal(value)}," for key, value in arguments.items()),
            f").{media(card.family)}[0]",
            f'export_to_video(video, "clip.mp4"{pace})' if clips else 'image.save("picture.png")',
        ]
    )


def loading_from(text: str, where: str) -> str:
    """A text with an example in it, which then loads from the hub id `where`."""
    for call in ("from_pretrained", "load_lora_weights"):
        text = text.replace(f"{call}({_HERE}", f"{call}({where!a}")
    if f"lora_path={_HERE}" in text:
        hub = "from huggingface_hub import snapshot_download\n"
        text = text.replace(_OWN_LOADER, _OWN_LOADER + hub, 1)
        text = text.replace(f"lora_path={_HERE}", f"lora_path=snapshot_download({where!a})", 1)
    return text


def _plainly(card: Card) -> tuple[list[str], list[str]]:
    """Imports, and the lines that make `pipeline`, with diffusers alone."""
    lora = card.kind == "lora"
    names = ["DiffusionPipeline"]
    source = f"{card.base.code}{_revision(card)}" if lora else _HERE
    lines = [f"pipeline = DiffusionPipeline.from_pretrained({source})"]
    if card.scheduler != card.family.scheduler:
        names.append(card.family.scheduler)
        lines += _scheduler(card.family)
    if lora:
        lines.append(f"pipeline.load_lora_weights({_HERE}, weight_name={LORA_FILE!r})")
    return [f"from diffusers import {', '.join(sorted(names))}"], lines


def _by_policy(card: Card) -> tuple[list[str], list[str]]:
    """Imports, and the lines that make `policy`, whose scheduler is the one of training."""
    loaded = f"policy = Policy.load({card.base.code}, lora_path={_HERE}{_revision(card)})"
    return [_OWN_LOADER.rstrip()], [loaded]


def _revision(card: Card) -> str:
    return f", revision={card.base.revision!r}" if card.base.revision else ""


def _scheduler(family: Family) -> list[str]:
    """The family's scheduler in place of the base's; right also where it is that already."""
    config = "config = pipeline.scheduler.config"
    if family.scheduler == "DDIMScheduler":
        # DDIM's own defaults, where the base says nothing, would clip latents.
        kept = f"{{name: config.get(name, value) for name, value in {DDIM_DEFAULTS!r}.items()}}"
        return [
            config,
            f"kept = {kept}",
            "pipeline.scheduler = DDIMScheduler.from_config(config, **kept)",
        ]
    if family.schedule == "ddim":
        return [config, f"pipeline.scheduler = {family.scheduler}.from_config(config)"]
    return [
        config,
        "if 'flow_shift' in config:  # Euler's steps, over the same noise levels",
        f"    pipeline.scheduler = {family.scheduler}(",
        "        num_train_timesteps=config.get('num_train_timesteps', 1000),",
        "        shift=config['flow_shift'] or 1.0,",
        "        use_dynamic_shifting=config.get('use_dynamic_shifting', False),",
        "    )",
    ]


def _literal(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
