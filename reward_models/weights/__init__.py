"""Weight files: found, fetched, verified, and read without running anything in them.

`files` knows where a file comes from, `verified` compares it with its published sum, `reading`
makes tensors of it (`converted` keeps a safetensors copy of a pickle; `pickled_module`, `unpickle`
and `inert` read one that holds more than tensors), `layouts` brings keys to open_clip's names.
"""

from reward_models.weights.files import ASSET_SUMS, ASSETS, WeightFile, locate, on_disk
from reward_models.weights.reading import load_strict, read_tensors
from reward_models.weights.verified import home, sha256_of, verify

__all__ = [
    "ASSETS",
    "ASSET_SUMS",
    "WeightFile",
    "home",
    "load_strict",
    "locate",
    "on_disk",
    "read_tensors",
    "sha256_of",
    "verify",
]
