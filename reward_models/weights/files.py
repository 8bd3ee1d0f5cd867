"""Weight files: where they are looked for, and how they are fetched.

In this order: the path the user gave; beside the package (the tiny models travel in it); the
folder `REWARD_MODELS_HOME` (default ~/.cache/reward_models); the Hugging Face hub and its cache
(`HF_HOME`, `HF_HUB_OFFLINE` and mirrors are honoured by huggingface_hub itself); a plain URL. Files
with a published sha256 or md5 are verified on the way (`verified`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from uuid import uuid4

from reward_models.base import RewardError
from reward_models.weights.reading import shorten
from reward_models.weights.verified import algorithm_of, home, remember, verify

if TYPE_CHECKING:
    from urllib.request import BaseHandler

ASSETS = Path(__file__).parent.parent / "assets"
ASSET_SUMS = "SHA256SUMS"  # JSON: {file name: sha256}

_BROKEN_INSTALLATION = "the installation is incomplete: reinstall the package"
_PATIENCE = 60.0  # seconds without a byte
_PROBE_PATIENCE = 5.0  # seconds until the hub has answered at all

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightFile:
    """Where one weight file comes from. No torch: the catalogue is made of these.

    Args:
        name: the file's own name, under which users keep it.
        sha256: of the published file, where known; "" means that none is published.
        repo, files, revision: a hub repository, its names there (the first one that can be had is
            taken; () means `name`), a pinned commit or tag. Only the first is the file that
            sha256 and md5 speak of; the others hold the same tensors in another form.
        url: where it is served outside the hub.
        asset: the file travels inside the package (its sha256 is in assets/SHA256SUMS).
        megabytes: download size, for people.
        md5: of the published file; used where no sha256 is published.
        page: where people can download it by hand, if no program can.
    """

    name: str
    sha256: str = ""
    repo: str = ""
    files: tuple[str, ...] = ()
    revision: str = "main"
    url: str = ""
    asset: bool = False
    megabytes: float = 0.0
    md5: str = ""
    page: str = ""

    @property
    def hub_files(self) -> tuple[str, ...]:
        return self.files or (self.name,)

    @property
    def digest(self) -> str:
        """The published digest, the stronger one first; "" where none is published."""
        return self.sha256 or self.md5

    def fetch_command(self) -> str:
        """The exact command that puts the file where `locate` finds it; "" where there is none."""
        if self.repo:
            words = ["hf", "download", self.repo, self.hub_files[0]]
            pin = [] if self.revision == "main" else ["--revision", self.revision]
            return shlex.join([*words, *pin])
        if self.url:
            # -f: the page that reports an error must not become the weight file.
            words = ["curl", "-fL", "--create-dirs", "-o", str(home() / self.name), self.url]
            return shlex.join(words)
        return ""


def on_disk(file: WeightFile) -> Path | None:
    """The file's path when this machine has it already; no network, nothing verified."""
    if file.asset:
        return ASSETS / file.name if (ASSETS / file.name).is_file() else None
    if (home() / file.name).is_file():
        return home() / file.name
    if file.repo:
        from huggingface_hub import try_to_load_from_cache

        for name in file.hub_files:
            cached = try_to_load_from_cache(file.repo, name, revision=file.revision)
            if isinstance(cached, str):
                return Path(cached)
    return None


def locate(file: WeightFile, given: str | os.PathLike[str] | None = None) -> Path:
    """The verified path of a weight file, downloaded when it has to be.

    Args:
        given: the user's own path. It is their choice of weights, so it is verified only when it
            carries the published file's name (then other content means a damaged file).

    Raises:
        RewardError: the file cannot be had (with the command that fetches it) or is damaged.
    """
    if given is not None:
        found = Path(given).expanduser()
        if not found.is_file():
            raise RewardError("no such weight file", where=str(found), fix=_fetch_advice(file))
    else:
        found = on_disk(file) or _download(file)
    published = {file.name, PurePosixPath(file.hub_files[0]).name}
    verify(found, _expected(file) if found.name in published else "")
    return found


def _expected(file: WeightFile) -> str:
    """The published digest; for an asset the sha256 recorded beside it."""
    if not file.asset:
        return file.digest
    try:
        sums = json.loads((ASSETS / ASSET_SUMS).read_text(encoding="utf-8"))
        return str(sums[file.name])
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(
            f"no sha256 of {file.name} is recorded",
            where=str(ASSETS / ASSET_SUMS),
            fix=_BROKEN_INSTALLATION,
        ) from error


def _fetch_advice(file: WeightFile) -> str:
    if file.asset:
        return _BROKEN_INSTALLATION
    target = shlex.quote(str(home() / file.name))
    yourself = (
        f"if you have it, put it at  {target}\n"
        "(in Python also load(..., weights=FILE), or tower=FILE where it is a tower's)"
    )
    if command := file.fetch_command():
        page = f"the authors' page:  {file.page}\n" if file.page else ""
        return f"fetch it with:  {command}\n{page}{yourself}"
    if file.page:
        return f"download it by hand from  {file.page}\n{yourself}"
    return yourself


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _download(file: WeightFile) -> Path:
    """From the hub, else from the URL."""
    reasons = ["offline mode is on"] if (file.repo or file.url) and _offline() else []
    if not reasons:
        for fetch in (_from_hub, _from_url):
            found = fetch(file)
            if isinstance(found, Path):
                return found
            reasons += [found] if found else []
    raise RewardError(
        f"the weights {file.name} are not on this machine"
        + (f" and could not be fetched ({'; '.join(reasons)})" if reasons else ""),
        fix=_fetch_advice(file),
    )


def _from_hub(file: WeightFile) -> Path | str:
    """The path, or why it cannot be had; "" when the file is on no hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reason = ""
    for name in file.hub_files if file.repo else ():
        try:
            status = _hub_answer(file.repo, name, file.revision)
            if status < 400:
                return Path(hf_hub_download(file.repo, name, revision=file.revision))
            reason = f"{file.repo}: {_meaning(status, file.repo)}"
            if status != 404:
                break
        except Exception as error:
            # The hub client raises its own, its HTTP library's and the system's errors, other
            # ones in every version. All mean "cannot be had", and the user reads why.
            reason = f"{file.repo}: {shorten(str(error), 120)}"
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                break  # no connection: asking for the next name would only wait again
    return reason


def _hub_answer(repo: str, name: str, revision: str) -> int:
    """The status that the hub gives to one short question for a file (HTTP HEAD).

    `hf_hub_download` alone asks again and again for half a minute and reports every attempt.

    Raises:
        OSError: no connection, or no answer in time.
    """
    from urllib.error import HTTPError
    from urllib.parse import quote
    from urllib.request import Request, build_opener

    from huggingface_hub import constants, get_token

    headers = {"User-Agent": "reward_models"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    patience = _PROBE_PATIENCE
    if "HF_HUB_ETAG_TIMEOUT" in os.environ:  # the user knows how slow the line is
        patience = float(constants.HF_HUB_ETAG_TIMEOUT)
    page = f"{constants.ENDPOINT}/{repo}/resolve/{quote(revision, safe='')}/{quote(name)}"
    try:
        # Where the file is stored is the download's business, and the token is not for that place.
        opener = build_opener(_no_redirects())
        with opener.open(Request(page, headers=headers, method="HEAD"), timeout=patience) as answer:
            return int(answer.status)
    except HTTPError as error:
        error.close()
        return error.code


def _no_redirects() -> BaseHandler:
    from urllib.request import HTTPRedirectHandler

    class Stay(HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            """Go nowhere: the answer is that of the first place."""

    return Stay()


def _meaning(status: int, repo: str) -> str:
    from http.client import responses

    from huggingface_hub import constants

    if status not in (401, 403):
        return f"the hub answers {status} {responses.get(status, '')}".rstrip()
    return (
        f"private, gated or absent, the hub answers {status}; accept its terms on "
        f"{constants.ENDPOINT}/{repo} and log in with  hf auth login"
    )


def _from_url(file: WeightFile) -> Path | str:
    """The path, or why it cannot be had; "" when the file is at no URL.

    Written beside the target and renamed, so a broken transfer leaves nothing behind.
    """
    from http.client import HTTPException

    if not file.url:
        return ""
    target = home() / file.name
    part = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _log.info("fetching %s (%.0f MB) from %s", file.name, file.megabytes, file.url)
        problem = _transfer(file, part)
        if problem:
            return f"{file.url}: {problem}"
        os.replace(part, target)
        if file.digest:
            remember(target, file.digest)
    except (OSError, HTTPException, ValueError) as error:
        return f"{file.url}: {shorten(str(error), 120)}"
    finally:
        if part.exists():
            part.unlink()
    return target


def _transfer(file: WeightFile, part: Path) -> str:
    """Copy the URL's bytes into `part`, hashing them on the way; why they are not the file."""
    from urllib.request import Request, urlopen

    digest = hashlib.new(algorithm_of(file.digest) if file.digest else "md5", usedforsecurity=False)
    received = 0
    request = Request(file.url, headers={"User-Agent": "reward_models"})
    with urlopen(request, timeout=_PATIENCE) as answer, part.open("xb") as out:
        if answer.headers.get_content_type() == "text/html":
            return "answered with a web page, not with a file"
        length = answer.headers.get("Content-Length")
        while block := answer.read(1 << 20):
            out.write(block)
            digest.update(block)
            received += len(block)
    # A connection that breaks ends the stream like a whole file does.
    if length is not None and received != int(length):
        return f"the transfer broke off after {received} of {length} bytes"
    if file.digest and digest.hexdigest() != file.digest:
        return f"what it serves has another {algorithm_of(file.digest)} than the published file"
    return ""
