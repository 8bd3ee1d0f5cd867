"""The upload, against a stand-in of the hub on loopback: what is sent, to whom, and what is not."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_align.errors import UserError
from diffusion_align.publish.contents import Upload, contents, final_of
from diffusion_align.publish.push import Pushed, check_repo, push, token_from

TOKEN = "hf_canaryCanaryCanaryCanary0123456789"
CARD = "---\nlicense: mit\ntags:\n- lora\n---\n\n# mine\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, with things beside its weights that are nobody's business."""
    folder = tmp_path / "run"
    for name in ("final/pictures/base", "final/.cache", "checkpoints/step_000002", "samples"):
        (folder / name).mkdir(parents=True)
    for name in ("pytorch_lora_weights", "comfyui_lora"):
        save_file({"w": torch.arange(4.0)}, folder / "final" / f"{name}.safetensors")
    texts = {
        "final/README.md": CARD,
        "final/report.html": "<img src='pictures/base/p0001_s00.png'>",
        "final/summary.json": "{}",
        "final/pictures/base/p0000_s00.png": "not shown beside the report",
        "final/pictures/base/p0001_s00.png": "picture",
        "final/notes.txt": "mine alone",
        "final/.cache/x": "cache",
        "config.yaml": "seed: 0\n",
        "metrics.jsonl": "{}\n",
        "checkpoints/step_000002/state.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


WANTED = {
    ".diffusion-align.json",
    "README.md",
    "comfyui_lora.safetensors",
    "pictures/base/p0001_s00.png",
    "pytorch_lora_weights.safetensors",
    "report.html",
    "summary.json",
}


def send(uploads: list[Upload], repo: str = "me/mine", **how: Any) -> Pushed:
    return push(uploads, repo, **{"token": TOKEN, "token_source": "HF_TOKEN", **how})


def test_only_what_final_is_meant_to_hold_is_chosen(run: Path) -> None:
    final = final_of(run)
    assert final == run / "final" == final_of(run / "final")
    assert {upload.name for upload in contents(final, None)} == WANTED
    more = {upload.name for upload in contents(final, "own", checkpoints=True, record=True)}
    assert more - WANTED == {"checkpoints/step_000002/state.json", "config.yaml", "metrics.jsonl"}
    with pytest.raises(UserError, match="no such run"):
        final_of(run / "nowhere")
    with pytest.raises(UserError, match="no final/"):
        final_of(run / "samples")
    (run / "final").rename(run / "other")
    with pytest.raises(UserError, match="no final/") as found:
        final_of(run)
    assert f"train {run / 'config.yaml'} --resume" in str(found.value)


def test_of_a_whole_model_the_components_go_along(tmp_path: Path) -> None:
    parts = {"_class_name": "P", "unet": ["diffusers", "U"], "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    for name in (
        "unet/config.json",
        "unet/w.safetensors",
        "unet/junk.bin",
        "safety_checker/x.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [upload.name for upload in contents(tmp_path, CARD)]
    assert names == [
        ".diffusion-align.json",
        *("README.md", "model_index.json", "unet/config.json", "unet/w.safetensors"),
    ]
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(UserError, match="damaged"):
        contents(tmp_path, CARD)


def test_the_files_arrive_as_they_are_in_a_private_repository(run: Path, hub: Any) -> None:
    uploads = contents(final_of(run), CARD.replace("mine", "on the hub"))
    done = send(uploads)
    assert done == Pushed(f"{hub.endpoint}/me/mine", created=True, files=len(WANTED))
    there = hub.repositories["me/mine"]
    assert there.private and set(there.files) == WANTED
    for name in WANTED - {"README.md", ".diffusion-align.json"}:
        assert there.files[name] == (run / "final" / name).read_bytes()
    assert b"on the hub" in there.files["README.md"]


def test_public_is_public_only_when_asked_for(run: Path, hub: Any) -> None:
    uploads = contents(final_of(run), None)
    assert send(uploads, public=True).created
    assert not hub.repositories["me/mine"].private
    with pytest.raises(UserError, match="is public, but a private one"):
        send(uploads)
    assert not send(uploads, public=True).created


def test_a_second_upload_updates_and_foreign_files_are_not_touched(run: Path, hub: Any) -> None:
    uploads = contents(final_of(run), None)
    send(uploads)
    hub.repositories["me/mine"].files[".gitattributes"] = b""
    (run / "final" / "summary.json").write_text('{"new": 1}', encoding="utf-8")
    assert not send(contents(final_of(run), None)).created
    assert hub.repositories["me/mine"].files["summary.json"] == b'{"new": 1}'
    hub.repositories["me/mine"].files["thesis.pdf"] = b"precious"
    before = dict(hub.repositories["me/mine"].files)
    with pytest.raises(UserError, match=r"holds other files: thesis\.pdf"):
        send(uploads)
    assert hub.repositories["me/mine"].files == before


def test_an_upload_knows_its_own_earlier_files_and_deletes_those_it_lacks(
    run: Path, hub: Any, tmp_path: Path
) -> None:
    final = final_of(run)
    everything = contents(final, CARD, checkpoints=True, record=True)
    send(everything)
    there = hub.repositories["me/mine"].files
    assert {"config.yaml", "checkpoints/step_000002/state.json"} <= set(there)
    done = send(contents(final, CARD))  # without checkpoints and record
    assert set(there) == WANTED and done.deleted == 3 and not done.created
    (final / "pictures/base/p0001_s00.png").unlink()  # an update with fewer pictures
    send(contents(final, CARD))
    assert set(there) == WANTED - {"pictures/base/p0001_s00.png"}
    merged = tmp_path / "merged"  # a merged pipeline in place of the LoRA, and the LoRA again
    (merged / "unet").mkdir(parents=True)
    (merged / "model_index.json").write_text('{"unet": ["diffusers", "U"]}')
    (merged / "unet" / "config.json").write_text("{}")
    send(contents(merged, CARD, run=run))
    assert set(there) == {
        *(".diffusion-align.json", "README.md", "model_index.json", "unet/config.json")
    }
    send(contents(final, CARD))
    assert "unet/config.json" not in there and "pytorch_lora_weights.safetensors" in there


def test_a_manifest_gives_no_leave_to_touch_what_it_does_not_list(run: Path, hub: Any) -> None:
    send(contents(final_of(run), CARD, record=True))
    there = hub.repositories["me/mine"].files
    there["thesis.pdf"] = b"precious"
    before = dict(there)
    with pytest.raises(UserError, match=r"other files: thesis\.pdf"):
        send(contents(final_of(run), CARD))
    assert there == before
    del there["thesis.pdf"]
    there[".diffusion-align.json"] = b"[damaged"  # nothing is known, so nothing is deleted
    with pytest.raises(UserError, match=r"other files: config\.yaml"):
        send(contents(final_of(run), CARD))


def test_the_token_is_in_the_header_of_the_hub_and_nowhere_else(run: Path, hub: Any) -> None:
    send(contents(final_of(run), None, checkpoints=True, record=True))
    assert hub.requests
    for method, path, headers, body in hub.requests:
        assert TOKEN.encode() not in body and TOKEN not in path
        holding = {name for name, value in headers.items() if TOKEN in value}
        # What is put into the store is addressed to another host in reality.
        assert holding <= (set() if method == "PUT" else {"authorization", "Authorization"})
    for path_ in run.rglob("*"):
        assert not path_.is_file() or TOKEN.encode() not in path_.read_bytes()


def test_a_file_that_holds_the_token_is_not_uploaded(run: Path, hub: Any) -> None:
    (run / "config.yaml").write_text(f"key: {TOKEN}\n", encoding="utf-8")
    send(contents(final_of(run), None))
    sent = len(hub.requests)
    with pytest.raises(UserError, match="holds the value of HF_TOKEN") as found:
        send(contents(final_of(run), None, record=True))
    assert TOKEN not in str(found.value) and "config.yaml" in str(found.value)
    assert len(hub.requests) == sent


def test_refusals_of_the_hub_are_explained(
    run: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    uploads = contents(final_of(run), None)
    with pytest.raises(UserError, match="does not accept this token") as found:
        send(uploads, token="hf_wrong0000", token_source="OTHER")
    assert "OTHER" in str(found.value) and "hf_wrong" not in str(found.value)
    with pytest.raises(UserError, match="may not write to somebody/mine"):
        send(uploads, "somebody/mine")
    with pytest.raises(UserError, match="the hub refused it"):
        send(contents(final_of(run), "---\nlicense: other\ntags: x\n---\n"))
    with socket.socket() as free:  # bound and not listening: nobody answers
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match="could not be reached"):
            send(uploads, endpoint=address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        send(uploads)


def test_a_missing_token_and_a_wrong_name_are_told_before_anything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="no token") as found:
        token_from("HF_TOKEN")
    assert "export HF_TOKEN=" in str(found.value)
    monkeypatch.setenv("MINE", f" {TOKEN}\n")
    assert token_from("MINE") == TOKEN
    for repo in ("mine", "a/b/c", "https://huggingface.co/a/b", "a/b--c", "../x", "a/" + "b" * 99):
        with pytest.raises(UserError, match="no name of a repository"):
            check_repo(repo)
    check_repo("me/mine-1.0")
