"""Weight files: found, fetched and verified; what is missing comes with the exact command."""

from __future__ import annotations

import hashlib
import json
import shlex
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from reward_models.base import RewardError
from reward_models.weights import WeightFile, files, locate, on_disk, verified, verify

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, empty caches: every test says what it adds."""
    home = tmp_path / "home"
    monkeypatch.setenv("REWARD_MODELS_HOME", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    return home


def test_a_file_that_cannot_be_had_comes_with_its_command() -> None:
    hub = WeightFile("head.pth", repo="org/name", files=("other.pth",), revision="abc")
    with pytest.raises(RewardError, match=r"hf download org/name other.pth --revision abc"):
        locate(hub)
    url = WeightFile("a+b.pth", url="https://example.org/a%2Bb.pth")
    with pytest.raises(RewardError, match=r"curl -fL --create-dirs -o \S+a\+b.pth https://"):
        locate(url)
    assert on_disk(hub) is None and on_disk(url) is None


def test_the_users_own_path_comes_first(tmp_path: Path) -> None:
    mine = tmp_path / "mine.pth"
    torch.save(STATE, mine)
    published = WeightFile("head.pth", sha256="0" * 64, repo="org/name")
    assert locate(published, mine) == mine
    with pytest.raises(RewardError, match="no such weight file"):
        locate(published, tmp_path / "none.pth")


def test_a_file_of_the_published_name_must_be_the_published_file(tmp_path: Path) -> None:
    path = tmp_path / "head.pth"
    torch.save(STATE, path)
    published = WeightFile("head.pth", sha256=sha256(path))
    assert locate(published, path) == path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RewardError, match=r"head.pth: sha256 is \w+..., the published file has"):
        locate(published, path)


def test_the_home_folder_is_searched_and_verified(bare_machine: Path) -> None:
    bare_machine.mkdir()
    path = bare_machine / "head.pth"
    torch.save(STATE, path)
    assert locate(WeightFile("head.pth", sha256=sha256(path))) == path
    with pytest.raises(RewardError, match=r"head.pth: sha256"):
        locate(WeightFile("head.pth", sha256="0" * 64))


def test_the_hub_cache_is_searched_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "snapshot" / "second.bin"
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, name, revision: str(cached) if name == "second.bin" else None,
    )
    file = WeightFile("a", repo="org/name", files=("first.safetensors", "second.bin"))
    assert locate(file) == cached


def test_the_hub_is_asked_online_and_then_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bare_machine: Path
) -> None:
    asked: list[str] = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append(f"{repo}/{name}@{revision}")
        raise ConnectionError("unplugged")

    served = tmp_path / "served.pth"
    torch.save(STATE, served)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(files, "_hub_answer", lambda *_: 200)
    file = WeightFile("head.pth", sha256(served), repo="org/name", url=served.as_uri())
    with pytest.raises(RewardError, match="offline mode is on"):
        locate(file)  # neither is tried
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert locate(file) == bare_machine / "head.pth"
    assert asked == ["org/name/head.pth@main"]
    with pytest.raises(RewardError, match=r"fetched \(org/name: unplugged\)"):
        locate(WeightFile("third.pth", repo="org/name", files=("one", "two")))
    assert asked[1:] == ["org/name/one@main"]  # without a connection there is no second try
    damaged = WeightFile("other.pth", "0" * 64, url=served.as_uri())
    with pytest.raises(RewardError, match=r"other.pth .*has another sha256 than the published"):
        locate(damaged)
    assert [path.name for path in bare_machine.iterdir()] == ["head.pth"]


def test_an_embedded_file_is_held_against_its_recorded_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ASSETS", tmp_path)
    file = WeightFile("tiny.safetensors", asset=True)
    with pytest.raises(RewardError, match="reinstall"):
        locate(file)
    save_file(STATE, tmp_path / "tiny.safetensors")
    with pytest.raises(RewardError, match=r"no sha256 of tiny.safetensors"):
        locate(file)
    sums = {"tiny.safetensors": sha256(tmp_path / "tiny.safetensors")}
    (tmp_path / "SHA256SUMS").write_text(json.dumps(sums))
    assert locate(file) == tmp_path / "tiny.safetensors"
    (tmp_path / "SHA256SUMS").write_text(json.dumps({"tiny.safetensors": "0" * 64}))
    with pytest.raises(RewardError, match=r"tiny.safetensors: sha256"):
        locate(file)


def test_nothing_published_nothing_verified(tmp_path: Path) -> None:
    assert not (tmp_path / "absent").exists()
    verify(tmp_path / "absent", "")  # with a sum it would be opened
    with pytest.raises(RewardError):
        verify(tmp_path / "absent", "0" * 64)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_a_published_md5_is_verified_and_a_sha256_goes_first(bare_machine: Path) -> None:
    bare_machine.mkdir()
    path = bare_machine / "head.pth"
    torch.save(STATE, path)
    assert locate(WeightFile("head.pth", md5=md5(path))) == path
    with pytest.raises(RewardError, match=r"head.pth: md5 is \w+..., the published file has 0000"):
        locate(WeightFile("head.pth", md5="0" * 32))
    assert locate(WeightFile("head.pth", sha256=sha256(path), md5="0" * 32)) == path


def test_another_form_of_the_file_has_no_published_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "pytorch_model.bin"
    torch.save(STATE, cached)
    found = {"pytorch_model.bin": str(cached)}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, name, revision: found.get(name)
    )
    file = WeightFile("a", "0" * 64, "org/name", ("model.safetensors", "pytorch_model.bin"))
    assert locate(file) == cached
    with pytest.raises(RewardError, match="sha256"):
        locate(WeightFile("a", "0" * 64, "org/name", ("pytorch_model.bin",)))


def test_commands_survive_a_shell() -> None:
    """What `sh` makes of the words is what was meant."""
    odd = WeightFile("a b+'c.pth", repo="org/na me", files=("sub dir/x;y.pth",), revision="v 1")
    assert shlex.split(odd.fetch_command()) == [
        *("hf", "download", "org/na me", "sub dir/x;y.pth", "--revision", "v 1")
    ]
    url = WeightFile("a b.pth", url="https://example.org/?a=1&b=$(x)")
    words = shlex.split(url.fetch_command())
    assert words[-2:] == [str(files.home() / "a b.pth"), "https://example.org/?a=1&b=$(x)"]
    assert WeightFile("a.pth", asset=True).fetch_command() == ""


def test_a_file_that_no_program_can_fetch_comes_with_its_page(bare_machine: Path) -> None:
    by_hand = WeightFile("M PS.pth", page="https://drive.example.org/file/1")
    assert by_hand.fetch_command() == ""
    with pytest.raises(RewardError) as refused:
        locate(by_hand)
    assert "by hand from  https://drive.example.org/file/1" in str(refused.value)
    assert shlex.quote(str(bare_machine / "M PS.pth")) in str(refused.value)


def test_the_authors_page_stands_beside_the_command() -> None:
    both = WeightFile("w.pth", url="https://example.org/w", page="https://example.org/about")
    with pytest.raises(RewardError) as refused:
        locate(both)
    assert "curl -fL" in str(refused.value)
    assert "the authors' page:  https://example.org/about" in str(refused.value)


class Hub(BaseHTTPRequestHandler):
    """Answers every HEAD with `status`; 0 hangs up without a word."""

    status = 0
    asked: ClassVar[list[str]]

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        if self.status:
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.close_connection = True

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


def refused_by(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    with pytest.raises(RewardError) as refused:
        locate(WeightFile("w", repo="org/name", files=("one.bin", "two.bin"), revision="abc"))
    assert "hf download org/name one.bin --revision abc" in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("status", "names", "message"),
    [
        (0, ["one.bin"], "org/name: "),
        (404, ["one.bin", "two.bin"], "the hub answers 404 Not Found"),
        (503, ["one.bin"], "the hub answers 503"),
        (401, ["one.bin"], "private, gated or absent, the hub answers 401"),
        (403, ["one.bin"], "private, gated or absent, the hub answers 403"),
    ],
)
def test_a_hub_that_gives_nothing_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    status: int,
    names: list[str],
    message: str,
) -> None:
    class Answers(Hub):
        asked: ClassVar[list[str]] = []

    Answers.status = status
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        text = refused_by(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert message in text
    assert Answers.asked == [f"/org/name/resolve/abc/{name}" for name in names]
    assert not caplog.records and capfd.readouterr().err == ""


def test_a_closed_port_is_tried_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        port = taken.getsockname()[1]
        attempts: list[object] = []
        real = socket.create_connection

        def counted(address: tuple[str, int], *rest: object, **options: object) -> object:
            attempts.append(address)
            return real(address, *rest, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "create_connection", counted)
        text = refused_by(f"http://127.0.0.1:{port}", monkeypatch)
    assert attempts == [("127.0.0.1", port)]
    assert "could not be fetched (org/name: " in text
    assert not caplog.records and capfd.readouterr().err == ""


class Server(BaseHTTPRequestHandler):
    """/whole, /cut (promises more than it sends), /page (a web page), everything else is absent."""

    def do_GET(self) -> None:
        content = b"weights" * 1000
        self.send_response(200 if self.path in ("/whole", "/cut", "/page") else 404)
        kind = "text/html" if self.path == "/page" else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) * (2 if self.path == "/cut" else 1)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_is_hashed_on_the_way_and_not_again(
    site: str, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"weights" * 1000
    known = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(verified, "digest_of", None)  # not even once
    path = locate(WeightFile("w.pth", md5=known, url=f"{site}/whole"))
    assert path == bare_machine / "w.pth" and path.read_bytes() == content


@pytest.mark.parametrize(
    ("page", "known", "reason"),
    [
        ("cut", "", "broke off after 7000 of 14000 bytes"),
        ("page", "", "answered with a web page"),
        ("absent", "", "404"),
        ("whole", "0" * 32, "another md5 than the published file"),
        ("whole", "0" * 64, "another sha256 than the published file"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(
    site: str, bare_machine: Path, page: str, known: str, reason: str
) -> None:
    sha, md = (known, "") if len(known) == 64 else ("", known)
    file = WeightFile("w.pth", sha256=sha, md5=md, url=f"{site}/{page}")
    with pytest.raises(RewardError, match=reason) as refused:
        locate(file)
    assert f"curl -fL --create-dirs -o {bare_machine}/w.pth {site}/{page}" in str(refused.value)
    assert list(bare_machine.iterdir()) == []


def test_an_interrupted_download_leaves_nothing_behind(
    site: str, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        locate(WeightFile("w.pth", url=f"{site}/whole"))
    assert list(bare_machine.iterdir()) == []


def test_an_unwritable_home_is_named_and_a_missing_folder_made(
    site: str, bare_machine: Path
) -> None:
    nested = WeightFile("sub/w.pth", url=f"{site}/whole")
    assert locate(nested) == bare_machine / "sub/w.pth"
    (bare_machine / "file").write_text("no folder")
    with pytest.raises(RewardError, match="could not be fetched"):
        locate(WeightFile("file/w.pth", url=f"{site}/whole"))
