"""`push` and `merge`: what becomes of a finished run."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from diffusion_align.commands.outputs import check_folder
from diffusion_align.errors import UserError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or its final/.")]
Dtype = Annotated[
    str, typer.Option(help="Weights of the merged model: float32, bfloat16 or float16.")
]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Do not load the files again to compare pictures.")
]
Device = Annotated[str, typer.Option(help="For the check: auto, cpu, cuda, cuda:1 ...")]


def push(
    run: Run,
    to: Annotated[str, typer.Option(metavar="USER/NAME", help="Repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="Upload a whole model with the LoRA folded in.")
    ] = False,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Upload the checkpoints as well.")
    ] = False,
    record: Annotated[
        bool,
        typer.Option(
            "--record", help="Also config.yaml, env.json, run.json and metrics.jsonl of the run."
        ),
    ] = False,
    token_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable that holds the token.")
    ] = "HF_TOKEN",
    no_check: NoCheck = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Upload a run's model with its card to the Hugging Face Hub; private unless --public.

    Example: diffusion-align push runs/mine --to me/mine --dry-run
    """
    from diffusion_align.publish.contents import final_of
    from diffusion_align.publish.push import check_repo, token_from
    from diffusion_align.publish.push import push as upload

    check_repo(to)
    _check_dtype(dtype)
    final_of(run)
    if not merged and dtype != "float32":
        raise UserError("--dtype is of a merged model", fix="say --merged, or leave it out")
    token = "" if dry_run else token_from(token_env)
    from diffusion_align.assemble import prepare_upload

    with ExitStack() as stack:
        place = None
        if merged:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="merged-", dir=run))
            place = Path(folder) / "model"
        uploads = prepare_upload(
            run,
            to,
            check=not (no_check or dry_run),
            device=device,
            checkpoints=checkpoints,
            record=record,
            merged=place,
            dtype=dtype,
            say=_say,
        )
        for file in uploads:
            typer.echo(f"{file.size:>14,}  {file.name}")
        if dry_run:
            visibility = "public" if public else "private"
            typer.echo(f"{len(uploads)} files would go to {to} ({visibility}); nothing was sent")
            return
        done = upload(uploads, to, token=token, token_source=token_env, public=public)
    made = "made" if done.created else "updated"
    typer.echo(f"{made}: {done.url} ({'public' if public else 'private'}, {done.files} files)")


def merge(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the merged model goes.")],
    dtype: Dtype = "float32",
    no_check: NoCheck = False,
    device: Device = "auto",
) -> None:
    """Fold a run's LoRA into its base model: one pipeline that loads without it.

    Example: diffusion-align merge runs/mine --out merged
    """
    _check_dtype(dtype)
    check_folder(out)
    if out.is_dir() and any(out.iterdir()):
        raise UserError(
            "this folder is not empty", where=str(out), fix="choose another place with --out"
        )
    from diffusion_align.assemble import merge_run

    merge_run(run, out, dtype=dtype, check=not no_check, device=device, say=_say)
    typer.echo(f"the merged model: {out}")


def _check_dtype(dtype: str) -> None:
    from diffusion_align.policy.options import ModelOptions

    ModelOptions(dtype=dtype)  # type: ignore[arg-type]  # its own check refuses other words


def _say(line: str) -> None:
    typer.echo(line, err=True)
