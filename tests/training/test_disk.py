"""What the disk refuses is told to a person; everything else stays what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusion_align.errors import UserError
from diffusion_align.training.disk import writing

WRITERS = {
    "safetensors": "from safetensors.torch import save_file; save_file({'a': big}, path)",
    "torch": "torch.save({'a': big}, path)",
    "torch, a small file": "torch.save({'a': big[:3]}, path)",
    "python": "open(path, 'wb').write(bytes(big))",
    "flushed late": "stream = open(path, 'w'); stream.write('x'); stream.flush()",
}


def test_a_full_disk_is_told_whoever_writes(tmp_path: Path) -> None:
    """The libraries' own errors, of files that the system really refuses to grow."""
    script = f"""
import resource, torch
from pathlib import Path
from diffusion_align.errors import UserError
from diffusion_align.training.disk import writing
path, big = {str(tmp_path / "file")!r}, torch.zeros(100_000, dtype=torch.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, code in {WRITERS!r}.items():
    try:
        with writing(Path(name)):
            exec(code)
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(told) == len(WRITERS), done.stdout + done.stderr
    for name, line in zip(WRITERS, told, strict=True):
        assert line.startswith(f"{name}: could not be written (")
    assert done.stdout.count("free space or choose another output") == len(WRITERS)


def test_bugs_and_other_peoples_servers_are_no_disk(tmp_path: Path) -> None:
    for error in (ValueError("x"), RuntimeError("shapes"), ConnectionError("refused")):
        with pytest.raises(type(error)), writing(tmp_path):
            raise error
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(SafetensorError), writing(tmp_path):
        load_file(tmp_path / "broken.safetensors")
    with pytest.raises(RuntimeError, match="size"), writing(tmp_path):
        torch.zeros(2) + torch.zeros(3)
    with pytest.raises(UserError, match="inner"), writing(tmp_path):
        raise UserError("inner")
