"""The table of CLIP towers that scorers stand on, and from which files they come. Data only.

Nothing in this module imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from reward_models.weights import WeightFile


@dataclass(frozen=True)
class Tower:
    """A CLIP tower shared between scorers.

    Args:
        config: an open_clip model name, or a JSON file of assets/ with the same keys.
        weights: its file.
        archive_sha256: of the original TorchScript archive, which is accepted in its place.
    """

    config: str
    weights: WeightFile
    archive_sha256: str = ""


TOWERS: dict[str, Tower] = {
    # OpenAI's CLIP was trained with quick GELU, which the plain "ViT-L-14" of open_clip has not.
    "clip-l": Tower(
        config="ViT-L-14-quickgelu",
        weights=WeightFile(
            name="vit_large_patch14_clip_224.openai.safetensors",
            repo="timm/vit_large_patch14_clip_224.openai",
            files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
            megabytes=1710,
        ),
        archive_sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    # The base of HPS, PickScore and MPS, for training rewards of one's own.
    "clip-h": Tower(
        config="ViT-H-14",
        weights=WeightFile(
            name="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
            megabytes=3945,
        ),
    ),
    "hpsv2": Tower(
        config="ViT-H-14",
        weights=WeightFile(
            name="HPS_v2_compressed.pt",
            md5="fd9180de357abf01fdb4eaad64631db4",
            repo="xswu/HPSv2",
            megabytes=1972,
        ),
    ),
    "hpsv2.1": Tower(
        config="ViT-H-14",
        weights=WeightFile(
            name="HPS_v2.1_compressed.pt",
            md5="4067542e34ba2553a738c5ac6c1d75c0",
            repo="xswu/HPSv2",
            megabytes=1972,
        ),
    ),
    "pickscore": Tower(
        config="ViT-H-14",
        weights=WeightFile(
            name="PickScore_v1.safetensors",
            repo="yuvalkirstain/PickScore_v1",
            files=("model.safetensors", "pytorch_model.bin"),
            megabytes=3945,
        ),
    ),
    "tiny-clip": Tower(
        config="tiny-clip.json", weights=WeightFile("tiny-clip.safetensors", asset=True)
    ),
}
