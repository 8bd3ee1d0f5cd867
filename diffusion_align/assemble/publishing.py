"""What becomes of a finished run: its LoRA for ComfyUI, the check, the card, a merge, an upload.

The room `publish` knows no config; here its facts are gathered. Every text of a person passes the
redactor on its way into a card.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Policy
    from diffusion_align.policy.families import Family
    from diffusion_align.policy.tuned import Tuned
    from diffusion_align.publish.card import Kind
    from diffusion_align.publish.contents import Upload
    from diffusion_align.publish.self_check import Drawn, SelfCheck

Say = Callable[[str], None]

CHECKED_AT_ONCE = 100_000_000
"""Parameters of a pipeline up to which a run ends with the self-check; above, `push` makes it."""
_PICTURES, _CLIPS, _STEPS = 2, 1, 4


def publish_run(config: RunConfig, policy: Policy, folder: Path, say: Say) -> str:
    """Put the ComfyUI layout and the model card beside the weights of a run that just ended.

    Returns:
        The self-check in a sentence, "" where it waits for `push` (a large model, a model in low
        precision, several processes).
    """
    import torch

    from diffusion_align.policy.tuned import find_tuned

    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if shared and torch.distributed.get_rank() != 0:
        return ""
    tuned = find_tuned(folder)
    write_layout(policy.family, tuned, say)
    sentence = ""
    if not shared and _is_cheap(policy):
        try:
            check = check_run(config, policy, tuned)
        except UserError as error:  # the run itself is done and saved
            say(f"its files were not checked: {error}")
        else:
            sentence = check.sentence()
            if not check.passed:
                say(f"warning: {tuned.path} {sentence}")
    write_model_card(config, tuned, sentence, say)
    return sentence


def write_layout(family: Family, tuned: Tuned, say: Say) -> None:
    """The LoRA in ComfyUI's layout, beside it. Where ComfyUI has no name for it, that is said."""
    if tuned.whole:
        return
    from diffusion_align.publish.layouts import write_comfyui

    try:
        write_comfyui(tuned.path, family)
    except UserError as error:
        say(f"no file for ComfyUI was written: {error}")


def check_run(config: RunConfig, policy: Policy, tuned: Tuned) -> SelfCheck:
    """Load the files of a run again and compare their pictures with the policy's."""
    from diffusion_align.publish.self_check import self_check

    return self_check(
        config.model.id,
        tuned,
        _draw(config, policy),
        device=policy.device,
        revision=config.model.revision,
    )


def write_model_card(config: RunConfig, tuned: Tuned, check: str, say: Say) -> None:
    """`README.md` beside the weights; one that a person edited is left alone, which is said."""
    from diffusion_align.assemble.card_facts import card_of
    from diffusion_align.publish.card import render, write_card
    from diffusion_align.secrecy.redaction import redact

    kind: Kind = "model" if tuned.whole else "lora"
    if not write_card(tuned.folder, render(card_of(config, tuned, kind, check), redact)):
        say(f"{tuned.folder / 'README.md'} was edited by hand and stays as it is")


def prepare_upload(
    run: Path,
    repo: str,
    *,
    check: bool,
    device: str,
    checkpoints: bool,
    record: bool,
    merged: Path | None,
    dtype: str,
    say: Say,
) -> list[Upload]:
    """Everything that `push` uploads of a run, checked.

    Args:
        run: its folder, or its final/.
        repo: what the card's example loads.
        check: load the files again and compare pictures first.
        device: for that.
        checkpoints, record: as `contents`.
        merged: a folder for the merged pipeline, which is uploaded in place of the LoRA.
        dtype: of the merged pipeline's weights.

    Raises:
        UserError: nothing to publish, a check that failed, a run whose base model is unknown.
    """
    from diffusion_align.publish.card import relocated
    from diffusion_align.publish.contents import REWARD_FILE, contents, final_of
    from diffusion_align.publish.signature import CARD_FILE, is_untouched

    final = final_of(run)
    root = final.parent if final.name == "final" else final
    if (final / REWARD_FILE).is_file():
        if merged is not None:
            raise UserError("a reward has no LoRA to merge", where=str(run))
        from diffusion_align.assemble.card_facts import write_reward_card

        write_reward_card(final)
    elif merged is not None:
        merge_run(run, merged, dtype=dtype, check=check, device=device, say=say)
        final = merged
    else:
        _prepare_model(final, check=check, device=device, say=say)
    card = final / CARD_FILE
    text = None
    if is_untouched(card):
        text = relocated(card.read_text(encoding="utf-8"), repo)
    else:
        say(f"{card} was edited by hand and goes as it is")
    return contents(final, text, run=root, checkpoints=checkpoints, record=record)


def merge_run(run: Path, out: Path, *, dtype: str, check: bool, device: str, say: Say) -> None:
    """The LoRA of a run folded into its base model, with its card, in the folder `out`.

    Raises:
        UserError: no LoRA there, or pictures of the merged model that are not the LoRA's.
    """
    from diffusion_align.assemble.card_facts import card_of
    from diffusion_align.assemble.loading import load_tuned
    from diffusion_align.policy.tuned import find_lora, find_tuned
    from diffusion_align.publish.card import render, write_card
    from diffusion_align.publish.merge import merge, save_merged
    from diffusion_align.publish.self_check import TOLERANCE, draw_plainly
    from diffusion_align.secrecy.redaction import redact

    lora = find_lora(run)
    config = _config_of(find_tuned(run))
    pipeline = merge(config.model.id, lora, revision=config.model.revision)
    sentence = ""
    if check:
        policy = load_tuned(
            config.model.id, find_tuned(lora), device, revision=config.model.revision
        )
        drawn = _draw(config, policy)
        own = pipeline.scheduler
        pipeline.scheduler = policy.pipeline.scheduler
        again = draw_plainly(pipeline.to(policy.device), policy.family, drawn)
        difference = float((again - drawn.pixels).abs().max())
        pipeline.to("cpu")
        pipeline.scheduler = own
        media = "pictures" if policy.family.frames is None else "clips"
        if not difference <= TOLERANCE:
            raise UserError(
                f"the merged model draws other {media} than the LoRA (by up to {difference:.1e})",
                where=str(lora),
                fix="report this; --no-check merges all the same",
            )
        sentence = (
            f"before it was stored as {dtype}, the merged model drew the {media} of its LoRA "
            f"(largest difference of a pixel {difference:.1e}, bar {TOLERANCE:.0e})"
        )
        say(sentence)
    save_merged(pipeline, out, dtype)
    write_card(out, render(card_of(config, find_tuned(lora), "merged", sentence), redact))


def _prepare_model(final: Path, *, check: bool, device: str, say: Say) -> None:
    """ComfyUI file, self-check and card of a run's final/, as far as its config tells of them."""
    from diffusion_align.assemble.loading import load_tuned
    from diffusion_align.assemble.pictures import run_of
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.policy.families import FAMILIES
    from diffusion_align.policy.tuned import find_tuned
    from diffusion_align.publish.contents import COMFYUI_FILE
    from diffusion_align.publish.signature import CARD_FILE

    tuned = find_tuned(final)
    if run_of(tuned) is None and (final / CARD_FILE).is_file():
        say(f"{final} has no config.yaml beside it: its files go unchecked, as they are")
        return
    config = _config_of(tuned)
    if not check:  # what a finished run has already is not made again
        info = resolve(config.model.id)
        if not (final / COMFYUI_FILE).is_file():
            for family in FAMILIES:
                if family.name == info.family:
                    write_layout(family, tuned, say)
        if not (final / CARD_FILE).is_file():
            write_model_card(config, tuned, "", say)
        return
    policy = load_tuned(config.model.id, tuned, device, revision=config.model.revision)
    write_layout(policy.family, tuned, say)
    found = check_run(config, policy, tuned)
    if not found.passed:
        raise UserError(
            found.sentence(),
            where=str(tuned.path),
            fix="nothing was uploaded; --no-check uploads all the same",
        )
    say(found.sentence())
    write_model_card(config, tuned, found.sentence(), say)


def _config_of(tuned: Tuned) -> RunConfig:
    from diffusion_align.assemble.pictures import run_of

    config = run_of(tuned)
    if config is None:
        raise UserError(
            "there is no config.yaml that says which model was tuned, and how",
            where=str(tuned.folder),
            fix="write a README.md (the model card) beside the weights yourself, then push them\n"
            "as they are; merging needs the run's folder",
        )
    return config


def _is_cheap(policy: Policy) -> bool:
    import torch

    weights = [
        parameter
        for part in policy.pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    ]
    exact = all(weight.dtype == torch.float32 for weight in weights)
    bare = policy.denoiser is getattr(policy.pipeline, policy.family.denoiser)
    return exact and bare and sum(weight.numel() for weight in weights) <= CHECKED_AT_ONCE


def _draw(config: RunConfig, policy: Policy) -> Drawn:
    """A few pictures of the policy, or a clip, in evaluation noise, in few steps without noise."""
    import torch

    from diffusion_align import tf32
    from diffusion_align.assemble.named import heldout_prompts
    from diffusion_align.publish.self_check import Drawn
    from diffusion_align.sampling import normal, resolve_sampling, stream
    from diffusion_align.sampling.rollout import rollout

    how = resolve_sampling(config.sampling, policy.info)
    prompts = heldout_prompts(config)[: _PICTURES if policy.family.frames is None else _CLIPS]
    steps = min(how.steps, _STEPS)
    texts, negatives = [p.text for p in prompts], [p.negative for p in prompts]

    def streams() -> list:
        return [
            stream(config.seed, "eval", iteration=None, position=p, sample=0)
            for p in range(len(prompts))
        ]

    with torch.no_grad(), tf32.switched_off():
        conditioning = policy.encode(
            texts,
            negative_prompts=negatives,
            guidance_scale=how.guidance_scale,
            height=how.height,
            width=how.width,
            frames=how.frames,
        )
        drawn = rollout(
            policy,
            conditioning,
            policy.schedule(steps, height=how.height, width=how.width),
            streams(),
            guidance_scale=how.guidance_scale,
            eta=0.0,
            flow_kind="ode",
            keep="final",
        )
        pixels = policy.decode(drawn.x_0).float().cpu()
    noise = normal(streams(), conditioning.latent_shape)
    return Drawn(
        texts,
        negatives,
        noise,
        pixels,
        steps,
        how.guidance_scale,
        how.height,
        how.width,
        how.frames,
    )
