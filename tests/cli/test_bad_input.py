"""Bad input to the real command line: one clear message, exit code 2, nothing lost.

Two processes run all commands one after another, because importing torch and diffusers takes longer
than any answer: one for the mistakes that are found before torch is imported, one for the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

# Reads {"name": [word, ...], ...} and runs each as the console script would. Of every answer: exit
# code, output, what was imported by then, and the contents that were there before and are no more.
PROGRAM = """
import contextlib, hashlib, io, json, sys, traceback
from pathlib import Path
from diffusion_align.cli import main

def contents():
    files = (path for path in Path().rglob("*") if path.is_file())
    return {hashlib.sha256(path.read_bytes()).hexdigest(): str(path) for path in files}

answers = {}
for name, words in json.load(sys.stdin).items():
    out, err, before, code = io.StringIO(), io.StringIO(), contents(), 0
    sys.argv = ["diffusion-align", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
            traceback.print_exc()
    after = contents()
    heavy = [module for module in ("torch", "diffusers") if module in sys.modules]
    lost = [path for content, path in before.items() if content not in after]
    answers[name] = [code, out.getvalue(), err.getvalue(), heavy, lost]
print(json.dumps(answers))
"""

CONFIG = """\
model:
  id: model
  device: cpu
lora:
  rank: 2
prompts:
  source: [a cat, a dog, a cow, a fox]
sampling:
  steps: 2
reward: compressibility
algorithm:
  name: ddpo
  prompts_per_iteration: 2
  samples_per_prompt: 2
  train_batch_size: 2
  advantages: group
train:
  steps: 2
evaluation:
  prompts: [a bird]
  seeds: 1
  rewards: [incompressibility]
"""

PLUG_INS = """
import torch

def flat(images, prompts):
    return torch.zeros(len(images), 2)
"""

# name -> the command line, and what its answer has to say
Case = tuple[str, Sequence[str]]

BEFORE_TORCH: Mapping[str, Case] = {
    "unknown model": (
        "sample tinysd --prompts p.txt --out o",
        ["unknown model 'tinysd'", "did you mean tiny-sd?"],
    ),
    "missing model folder": ("sample ./gone --prompts p.txt --out o", ["./gone: no such folder"]),
    "unknown names in a config, all at once": (
        "train c.yaml model.id=tinysd reward=aestetic algorithm.name=dpo train.stesp=3",
        [
            "unknown model 'tinysd'",
            "unknown reward 'aestetic'",
            "did you mean aesthetic ?",
            "unknown algorithm 'dpo'",
            "did you mean  ddpo ?",
            "train.stesp  unknown key",
            "did you mean  train.steps ?",
            "4 problems found",
        ],
    ),
    "unknown reward": ("score pictures --reward tast", ["did you mean taste"]),
    "bad prompts in a config": (
        "train c.yaml prompts.source=empty.txt evaluation.prompts=latin.txt",
        ["empty.txt: there is no prompt in it", "latin.txt:2: byte 9 (0xe9) is not UTF-8"],
    ),
    "worse prompts in a config": (
        "train c.yaml prompts.source=twice.txt evaluation.prompts=gone.txt",
        ["line 3 repeats line 1: 'a cat'", "gone.txt: no such prompt file or list"],
    ),
    "empty prompts": ("sample model --prompts empty.txt --out o", ["there is no prompt in it"]),
    "prompts of another encoding": (
        "sample model --prompts latin.txt --out o",
        ["latin.txt:2: byte 9 (0xe9) is not UTF-8", "save the file as UTF-8"],
    ),
    "repeated prompts": (
        "sample model --prompts twice.txt --out o",
        ["twice.txt: duplicate prompts", "line 3 repeats line 1: 'a cat'"],
    ),
    "missing prompts": ("sample model --prompts gone.txt --out o", ["no such prompt file"]),
    "a batch that does not divide": (
        "train c.yaml algorithm.train_batch_size=3",
        [
            "2 prompts x 2 samples = 4 samples do not split into batches of 3",
            "nearest that do: 2, 4",
        ],
    ),
    "an accumulation that does not divide": (
        "train c.yaml train.accumulation=3",
        ["4 samples / 2 x 1 inner epochs = 2 minibatches do not split into updates of 3"],
    ),
    "values out of range, all at once": (
        "train c.yaml model.dtype=flaot32 lora.rank=0 lora.dropout=1.0 sampling.steps=0 "
        "sampling.eta=1.5 sampling.guidance_scale=-1 algorithm.clip_range=1e-7 "
        "algorithm.kl_weight=-1 train.learning_rate=-1e-4 train.accumulation=0 evaluation.eta=2",
        [
            "model.dtype  'flaot32' is not float32, bfloat16, float16 or float64",
            "did you mean  float32 ?",
            "lora.rank  must be at least 1, not 0",
            "lora.dropout  must lie in [0, 1), not 1.0",
            "sampling.steps  must be at least 1, not 0",
            "sampling.eta  must lie in [0, 1], not 1.5",
            "sampling.guidance_scale  must be at least 0, not -1.0",
            "algorithm.clip_range  1e-07 (mean) is under ten float32 steps from 1",
            "algorithm.kl_weight  must be at least 0, not -1.0",
            "train.learning_rate  must be above 0, not -0.0001",
            "train.accumulation  must be at least 1, not 0",
            "evaluation.eta  must lie in [0, 1], not 2.0",
            "11 problems found",
        ],
    ),
    "an existing run": (
        "train c.yaml output=run",
        ["run: this folder already holds a run (step 2)", "--resume", "--new"],
    ),
    "a run resumed as another": (
        "train c.yaml output=recorded --resume seed=3 lora.rank=4 train.steps=9",
        ["changed: lora.rank: 2 -> 4", "changed: seed: 0 -> 3", "--new"],
    ),
    "nothing to resume": ("train c.yaml output=o --resume", ["no run to resume"]),
    "pictures into a file": (
        "sample model --prompts p.txt --out p.txt/o",
        ["p.txt: this is a file; a folder is needed"],
    ),
    "a comparison into a file": (
        "compare model --tuned whole --prompts p.txt --reward taste --out p.txt",
        ["p.txt: this is a file; a folder is needed"],
    ),
    "scores into a folder": (
        "score pictures --reward taste --out pictures",
        ["pictures: this is a folder; a file is needed"],
    ),
    "a run into a file": (
        "train c.yaml output=p.txt/run",
        ["p.txt: this is a file; a folder is needed", "choose another folder with output="],
    ),
    "a seed that no generator takes": (
        f"train c.yaml seed={10**20}",
        [f"seed  must lie in [0, 2**63 - 1], not {10**20}"],
    ),
    "targets beside a LoRA to go on from": (
        "train c.yaml lora.path=lora lora.alpha=4 lora.targets=[to_q]",
        ["lora.alpha  is that of the LoRA in lora", "set alpha=null, or leave path out"],
    ),
    "pictures among others": (
        "sample model --prompts p.txt --out pictures",
        ["pictures: this folder is not empty", "--overwrite"],
    ),
    "an unknown dtype": (
        "sample model --prompts p.txt --out o --dtype flaot16",
        ["dtype: must be one of float32", "did you mean float16 ?"],
    ),
    "neither a LoRA nor a model": (
        "compare model --tuned pictures --prompts p.txt --reward taste --out o",
        ["pictures: this folder holds no LoRA weights and no model"],
    ),
    "a part of a model": (
        "sample model --lora model/unet --prompts p.txt --out o",
        ["model/unet: this is a UNet2DConditionModel alone"],
    ),
    "a run without an end": (
        "sample model --lora recorded --prompts p.txt --out o",
        ["recorded: this run has no final/ yet", "--resume"],
    ),
}

# In this order: what needs torch alone comes before what needs diffusers.
WITH_TORCH: Mapping[str, Case] = {
    "only pictures that cannot be read": (
        "score cut.png text.png --reward compressibility --out none.jsonl",
        [
            "not scored: cut.png: the image is damaged or cut off",
            "not scored: text.png: is not an image that can be read",
        ],
    ),
    "scores of a wrong shape": (
        "score pictures --reward mine:flat --out flat.jsonl",
        [
            "module mine",
            "reward mine:flat: values has shape [3, 2] for 3 images",
            "return a float tensor of shape [3]",
        ],
    ),
    "a plug-in that is not there": (
        "score pictures --reward mine:falt --out flat.jsonl",
        ["reward mine:falt: module mine has no falt"],
    ),
    "an unknown device": (
        "score pictures --reward compressibility --device gpu --out gpu.jsonl",
        ["device: unknown device 'gpu'"],
    ),
    "a damaged weight file": (
        "sample damaged --prompts p.txt --out o",
        [
            "damaged/unet/diffusion_pytorch_model.safetensors: the file is damaged",
            "its sha256 is",
        ],
    ),
    "a weight file cut short": (
        "sample short --prompts p.txt --out o",
        ["short: the model could not be loaded", "short/unet/diffusion_pytorch_model.safetensors"],
    ),
    "a damaged LoRA": (
        "sample model --lora lora --prompts p.txt --out o",
        ["lora/pytorch_lora_weights.safetensors: this LoRA does not fit the model"],
    ),
    "a trained reward of a wrong shape": (
        "train c.yaml reward=mine:flat output=flat",
        ["reward mine:flat: values has shape [1, 2] for 1 images"],
    ),
    "damaged checkpoints": (
        "train c.yaml output=run --resume",
        [
            "run/checkpoints/step_000002/state.pt: damaged",
            "run/checkpoints: no checkpoint of this run is sound",
            "begin again with --new",
        ],
    ),
}


@dataclass(frozen=True)
class Answer:
    """What one command line left behind."""

    code: int
    stdout: str
    stderr: str
    heavy: list[str]
    lost: list[str]


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with everything that can be wrong in it."""
    here = tmp_path_factory.mktemp("bad-input")
    for name, content in {
        "p.txt": b"a cat\na dog\n",
        "empty.txt": b"\n \n",
        "latin.txt": b"a cat\ncaf\xe9\n",
        "twice.txt": b"a cat\na dog\na cat\n",
        "c.yaml": CONFIG.encode(),
        "mine.py": PLUG_INS.encode(),
        "text.png": b"no picture",
        "lora/pytorch_lora_weights.safetensors": b"no weights",
        "recorded/config.yaml": (CONFIG + "output: recorded\n").encode(),
        "recorded/metrics.jsonl": b'{"step": 1}\n',
        "run/metrics.jsonl": b'{"step": 2}\n',
        "run/checkpoints/step_000002/state.pt": b"something else",
        "run/checkpoints/step_000002/parameters.safetensors": b"parameters",
        "run/checkpoints/step_000002/manifest.json": json.dumps(
            {
                "parameters.safetensors": hashlib.sha256(b"parameters").hexdigest(),
                "state.pt": "0" * 64,
            }
        ).encode(),
        "whole/model_index.json": b"{}",
    }.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    noise = np.random.default_rng(0)
    (here / "pictures").mkdir()
    for number in range(3):
        pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(here / "pictures" / f"{number}.png")
    (here / "cut.png").write_bytes((here / "pictures" / "0.png").read_bytes()[:1500])
    for name in ("model", "damaged", "short"):
        shutil.copytree(model, here / name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    sound = (model / weights).read_bytes()
    sums = {weights: hashlib.sha256(sound).hexdigest()}
    (here / "damaged" / "SHA256SUMS.json").write_text(json.dumps(sums), encoding="utf-8")
    (here / "damaged" / weights).write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    (here / "short" / weights).write_bytes(sound[:1000])
    return here


def run(folder: Path, commands: Mapping[str, str]) -> dict[str, Answer]:
    """All of `commands` in one process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": "",
            "TERM": "dumb",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        input=json.dumps({name: line.split() for name, line in commands.items()}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return {name: Answer(*fields) for name, fields in found.items()}


@pytest.fixture(scope="module")
def early(folder: Path) -> dict[str, Answer]:
    return run(folder, {name: line for name, (line, _) in BEFORE_TORCH.items()})


@pytest.fixture(scope="module")
def late(folder: Path, early: dict[str, Answer]) -> dict[str, Answer]:
    return run(folder, {name: line for name, (line, _) in WITH_TORCH.items()})


def check(answer: Answer, said: Sequence[str]) -> None:
    assert answer.code == 2, answer.stderr
    for words in said:
        assert words in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout
    assert answer.lost == []


@pytest.mark.parametrize("name", BEFORE_TORCH)
def test_a_mistake_is_answered_before_torch_is_imported(
    early: dict[str, Answer], name: str
) -> None:
    check(early[name], BEFORE_TORCH[name][1])
    assert early[name].stdout == ""
    assert early[name].heavy == []


@pytest.mark.parametrize("name", WITH_TORCH)
def test_what_only_loading_can_tell_is_answered_as_clearly(
    late: dict[str, Answer], name: str
) -> None:
    check(late[name], WITH_TORCH[name][1])


def test_mistakes_leave_no_results_behind(folder: Path, late: dict[str, Answer]) -> None:
    assert not (folder / "o").exists()
    assert not (folder / "runs").exists()
    # set aside under another name, to the byte
    aside = folder / "run" / "checkpoints" / "damaged-step_000002" / "state.pt"
    assert aside.read_bytes() == b"something else"


def test_scoring_files_imports_no_diffusers(late: dict[str, Answer]) -> None:
    assert late["an unknown device"].heavy == ["torch"]
    assert late["only pictures that cannot be read"].heavy == ["torch"]
