"""Upload a model to the Hugging Face Hub: private unless asked, one commit, only named files.

The token comes from the environment, is handed to huggingface_hub for its requests, and is never
written or shown. A repository that exists is changed only where it holds nothing but what an
earlier upload put there (its manifest says so), and is as private as was asked for. What an earlier
upload put there and this one does not is deleted in the same commit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusion_align.errors import UserError
from diffusion_align.publish.contents import MANIFEST_FILE, Upload, names_in, refuse_secret

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUBS_OWN = {".gitattributes"}


@dataclass(frozen=True)
class Pushed:
    """Where it went: address of the repository, whether it is new, how many files, how many of an
    earlier upload were deleted."""

    url: str
    created: bool
    files: int
    deleted: int = 0


def token_from(variable: str) -> str:
    """The token in an environment variable.

    Raises:
        UserError: there is none.
    """
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            "there is no token in this environment variable",
            where=variable,
            fix="make one that may write at https://huggingface.co/settings/tokens, then\n"
            f"export {variable}=...   (or name another variable with --token-env)",
        )
    return token


def check_repo(repo: str) -> None:
    """Refuse what is no `user/name`."""
    if not _REPO.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo:
        raise UserError(
            f"{repo!r} is no name of a repository", where="--to", fix="user/name, letters and -_."
        )


def push(
    uploads: Sequence[Upload],
    repo: str,
    *,
    token: str,
    token_source: str,
    public: bool = False,
    endpoint: str | None = None,
) -> Pushed:
    """Make the repository if need be, and commit the files.

    Args:
        uploads: what `contents` chose.
        repo: `user/name`.
        token: for the hub; token_source: where it is from, for messages.
        public: whether everybody may see it; an existing repository must be what is asked for.
        endpoint: of the hub; None is huggingface_hub's (HF_ENDPOINT).

    Raises:
        UserError: a refused token, no right to write, no network, a repository with other files
            or other visibility, or a file that holds the token.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repo(repo)
    refuse_secret(list(uploads), token, token_source)
    api = HfApi(endpoint=endpoint, token=token, library_name="diffusion-align")
    stale: list[str] = []
    with _explained(repo, token_source):
        found = _existing(api, repo)
        if found is None:
            api.create_repo(repo, private=not public, repo_type="model")
        else:
            there = {file.rfilename for file in found.siblings or ()}
            earlier = _manifest(api, repo) if MANIFEST_FILE in there else set()
            named = {upload.name for upload in uploads}
            _check_existing(found, repo, there - named - earlier - _HUBS_OWN, public=public)
            stale = sorted((there & earlier) - named - _HUBS_OWN)
        api.create_commit(
            repo,
            operations=[
                CommitOperationAdd(
                    path_in_repo=upload.name,
                    path_or_fileobj=upload.source,
                )
                for upload in uploads
            ]
            + [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale],
            commit_message="Upload with diffusion-align",
            repo_type="model",
        )
    return Pushed(f"{api.endpoint}/{repo}", found is None, len(uploads), len(stale))


def _existing(api: Any, repo: str) -> Any:
    """What the hub says of the repository; None where there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def _manifest(api: Any, repo: str) -> set[str]:
    """What earlier uploads put there, as the newest of them lists it."""
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo, MANIFEST_FILE, local_dir=folder)
        return names_in(Path(path).read_bytes())


def _check_existing(found: Any, repo: str, foreign: set[str], *, public: bool) -> None:
    if foreign:
        others = sorted(foreign)
        shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        raise UserError(
            f"this repository exists and holds other files: {shown}",
            where=repo,
            fix="choose another name with --to, or delete the repository on the hub",
        )
    if bool(found.private) == public:
        now, wanted = ("private", "public") if found.private else ("public", "private")
        raise UserError(
            f"this repository exists and is {now}, but a {wanted} one was asked for",
            where=repo,
            fix="choose another name with --to, change it in the repository's settings, or "
            f"{'leave --public out' if public else 'say --public'}",
        )


@contextmanager
def _explained(repo: str, token_source: str) -> Iterator[None]:
    """Turn what the hub or the network answers into sentences."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # huggingface_hub has changed its HTTP library; the base of its error is that library's error.
    bases: tuple[Any, ...] = HfHubHTTPError.__bases__
    unreachable: tuple[type[Exception], ...] = (*bases, OSError, RuntimeError)
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(
            "HF_HUB_OFFLINE is set: nothing can be uploaded", where=repo, fix="unset HF_HUB_OFFLINE"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        raise _refused(status, repo, token_source, error) from error
    except ValueError as error:  # metadata that the hub does not accept
        raise UserError(f"the hub refused it: {error}", where=repo) from error
    except unreachable as error:
        raise UserError(
            f"the hub could not be reached ({_first_line(error)})",
            where=repo,
            fix="check the network, then push again: nothing is uploaded twice",
        ) from error


def _refused(status: int, repo: str, token_source: str, error: Exception) -> UserError:
    if status == 401:
        return UserError(
            "the hub does not accept this token", where=token_source, fix="is it the right one?"
        )
    if status == 403:
        return UserError(
            f"this token may not write to {repo}",
            where=token_source,
            fix="use your own user name or an organisation of yours, and a token that may write",
        )
    if status == 409:
        return UserError("this repository exists already", where=repo, fix="push again")
    return UserError(f"the hub answered {status or 'nothing'}: {_first_line(error)}", where=repo)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return text.splitlines()[0]
