"""The table of reward models: what there is, who builds it and from which files. Data only.

A row is one scorer. Adding one is a module with one `load_...(row, options)` function and a row
here. Nothing in this module imports torch. Sources, licences and ranges are those of the authors'
pages; ranges are observations, not bounds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from reward_models.base import RewardInfo
from reward_models.towers import TOWERS
from reward_models.weights import WeightFile, on_disk

FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Row:
    """One reward model.

    Args:
        info: what the scorer is.
        target: "module:function", called as function(row, options) -> Reward.
        weights: the scorer's own file, if it has one beside its tower's.
        tower: a name in `TOWERS`, if it stands on one.
        extra: other files that it needs, for instance a vocabulary.
        settings: what `load(settings={...})` may change, with the published values.
    """

    info: RewardInfo
    target: str
    weights: WeightFile | None = None
    tower: str = ""
    extra: tuple[WeightFile, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Every weight file that the scorer needs."""
        own = (self.weights,) if self.weights else ()
        tower = (TOWERS[self.tower].weights,) if self.tower else ()
        return (*own, *tower, *self.extra)

    @property
    def megabytes(self) -> float:
        """What has to be fetched for it, in all."""
        return sum(file.megabytes for file in self.files)

    @property
    def installed(self) -> bool:
        """Whether it can be loaded without a network."""
        return all(on_disk(file) is not None for file in self.files)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a scorer: device, dtype of its tower, the user's own files instead of ours."""

    device: str = "cpu"
    dtype: str = "float32"
    weights: FilePath | None = None
    tower: FilePath | None = None


_LAION = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
_LAION_V1 = "https://github.com/LAION-AI/aesthetic-predictor"
_DDPO = "https://arxiv.org/abs/2305.13301"
_HPS = "https://github.com/tgxs002/HPSv2"
_MPS = "https://github.com/Kwai-Kolors/MPS"
_VBENCH = "https://github.com/Vchitect/VBench"
_SMALL_WORLD = "reward_models.small_world"
_CROP = {"round_to_uint8": False}
_LETTERBOX = {"antialias": True}

_ROWS = (
    Row(
        info=RewardInfo(
            name="aesthetic",
            modality="image",
            differentiable=True,
            range="about 4 to 7 (photographs; higher after optimisation)",
            licence="Apache-2.0 (head), MIT (CLIP)",
            source=f"{_LAION} sac+logos+ava1-l14-linearMSE: LAION v2, the one that DDPO uses",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="sac+logos+ava1-l14-linearMSE.pth",
            sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
            repo="trl-lib/ddpo-aesthetic-predictor",
            files=("aesthetic-model.pth",),
            url=f"{_LAION}/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
            megabytes=3.7,
        ),
        tower="clip-l",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="aesthetic-relu",
            modality="image",
            differentiable=True,
            range="1 to 10 by training; five test photographs lie between 4.0 and 4.4",
            licence="Apache-2.0 (head), MIT (CLIP)",
            source=f"{_LAION} ava+logos-l14-reluMSE",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="ava+logos-l14-reluMSE.pth",
            sha256="0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4",
            url=f"{_LAION}/raw/main/ava%2Blogos-l14-reluMSE.pth",
            megabytes=3.7,
        ),
        tower="clip-l",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="aesthetic-v1",
            modality="image",
            differentiable=True,
            range="about -3 to 11",
            licence="MIT",
            source=f"{_LAION_V1} sa_0_4_vit_l_14_linear",
        ),
        target="reward_models.aesthetic:load_aesthetic",
        weights=WeightFile(
            name="sa_0_4_vit_l_14_linear.pth",
            sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
            url=f"{_LAION_V1}/raw/main/sa_0_4_vit_l_14_linear.pth",
            megabytes=0.004,
        ),
        tower="clip-l",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="hpsv2",
            modality="image",
            differentiable=True,
            range="about 0.2 to 0.35 (cosine; tables print 100 times it)",
            licence="Apache-2.0",
            source=f"{_HPS} v2.0",
            needs_prompt=True,
        ),
        target="reward_models.hps:load_hps",
        tower="hpsv2",
        settings=_LETTERBOX,
    ),
    Row(
        info=RewardInfo(
            name="hpsv2.1",
            modality="image",
            differentiable=True,
            range="about 0.15 to 0.35 (cosine; tables print 100 times it)",
            licence="Apache-2.0",
            source=f"{_HPS} v2.1",
            needs_prompt=True,
        ),
        target="reward_models.hps:load_hps",
        tower="hpsv2.1",
        settings=_LETTERBOX,
    ),
    Row(
        info=RewardInfo(
            name="mps",
            modality="image",
            differentiable=True,
            range="about 5 to 15 (logit scale times cosine)",
            licence="MIT (code), weights unstated",
            source=f"{_MPS} overall",
            needs_prompt=True,
        ),
        target="reward_models.mps:load_mps",
        weights=WeightFile(
            name="MPS_overall.pth",
            md5="1491cbbbd20565747fe07e7572e2ac56",
            page=_MPS,
            url="https://pai-aigc-photog.oss-cn-hangzhou.aliyuncs.com/easyanimate/"
            "Third_Party/MPS_overall.pth",
            megabytes=4418,
        ),
        settings={"threshold": 0.3, **_CROP},
    ),
    Row(
        info=RewardInfo(
            name="pickscore",
            modality="image",
            differentiable=True,
            range="about 19 to 24 (logit scale times cosine)",
            licence="MIT (code), weights unstated",
            source="https://huggingface.co/yuvalkirstain/PickScore_v1",
            needs_prompt=True,
        ),
        target="reward_models.pickscore:load_pickscore",
        tower="pickscore",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="clip",
            modality="image",
            differentiable=True,
            range="about 0.2 to 0.33 (cosine)",
            licence="MIT",
            source="https://github.com/openai/CLIP ViT-L/14; CLIPScore without its factor 2.5",
            needs_prompt=True,
        ),
        target="reward_models.clip_score:load_clip_score",
        tower="clip-l",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="image-reward",
            modality="image",
            differentiable=True,
            range="about -2 to 2",
            licence="Apache-2.0",
            source="https://github.com/zai-org/ImageReward v1.0",
            needs_prompt=True,
        ),
        target="reward_models.image_reward:load_image_reward",
        weights=WeightFile(
            name="ImageReward.pt",
            repo="THUDM/ImageReward",
            revision="5736be03b2652728fb87788c9797b0570450ab72",
            megabytes=1790,
        ),
        extra=(
            WeightFile(
                name="bert-base-uncased-vocab.txt",
                sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                repo="google-bert/bert-base-uncased",
                files=("vocab.txt",),
                megabytes=0.2,
            ),
        ),
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="tiny-aesthetic",
            modality="image",
            differentiable=True,
            range="1 to 10 (ratings of small-world pictures)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: trained on a simulated crowd's ratings",
        ),
        target="reward_models.twins:load_twin",
        weights=WeightFile("tiny-aesthetic.safetensors", asset=True),
        tower="tiny-clip",
    ),
    Row(
        info=RewardInfo(
            name="tiny-clip",
            modality="image",
            differentiable=True,
            range="about 0.43 to 0.59 (cosine)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: trained on renders and samples with their captions",
            needs_prompt=True,
        ),
        target="reward_models.clip_score:load_clip_score",
        tower="tiny-clip",
        settings=_CROP,
    ),
    Row(
        info=RewardInfo(
            name="tiny-hps",
            modality="image",
            differentiable=True,
            range="about 0.44 to 0.55 (cosine)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: trained on a simulated crowd's choices",
            needs_prompt=True,
        ),
        target="reward_models.twins:load_twin",
        weights=WeightFile("tiny-hps.safetensors", asset=True),
        tower="tiny-clip",
    ),
    Row(
        info=RewardInfo(
            name="tiny-mps",
            modality="image",
            differentiable=True,
            range="about 40 to 57 (logit scale times cosine)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: trained on the choices of another crowd",
            needs_prompt=True,
        ),
        target="reward_models.twins:load_twin",
        weights=WeightFile("tiny-mps.safetensors", asset=True),
        tower="tiny-clip",
    ),
    Row(
        info=RewardInfo(
            name="compressibility",
            modality="image",
            differentiable=False,
            range="-300 to -20 at 512 x 512 (minus kilobytes, scales with resolution)",
            licence="Apache-2.0",
            source=f"{_DDPO} section 5.1: JPEG quality 95",
        ),
        target="reward_models.compressibility:load_compressibility",
    ),
    Row(
        info=RewardInfo(
            name="incompressibility",
            modality="image",
            differentiable=False,
            range="20 to 300 at 512 x 512 (kilobytes, scales with resolution)",
            licence="Apache-2.0",
            source=f"{_DDPO} section 5.1: JPEG quality 95",
        ),
        target="reward_models.compressibility:load_incompressibility",
    ),
    Row(
        info=RewardInfo(
            name="verifier",
            modality="image",
            differentiable=False,
            range="0 to 1 (share of the caption's claims that hold)",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: reads the picture back",
            needs_prompt=True,
        ),
        target="reward_models.small_world_rewards:load_verifier",
    ),
    Row(
        info=RewardInfo(
            name="taste",
            modality="image",
            differentiable=False,
            range="0 to 1",
            licence="Apache-2.0",
            source=f"{_SMALL_WORLD}: claims held, neatness, palette",
            needs_prompt=True,
        ),
        target="reward_models.small_world_rewards:load_taste",
    ),
    Row(
        info=RewardInfo(
            name="flicker",
            modality="video",
            differentiable=True,
            range="0 to 1; a frozen picture scores 1: pair it with motion",
            licence="Apache-2.0",
            source=f"{_VBENCH} temporal flickering",
        ),
        target="reward_models.video.temporal:load_flicker",
    ),
    Row(
        info=RewardInfo(
            name="consistency",
            modality="video",
            differentiable=True,
            range="0 to 1; a frozen picture scores 1: pair it with motion",
            licence="Apache-2.0 (measure), MIT (CLIP)",
            source=f"{_VBENCH} subject consistency, on CLIP ViT-L/14",
        ),
        target="reward_models.video.temporal:load_consistency",
        tower="clip-l",
    ),
    Row(
        info=RewardInfo(
            name="motion",
            modality="video",
            differentiable=True,
            range="0 and up; diagonals per second (per frame where fps is unknown)",
            licence="Apache-2.0",
            source="Lucas and Kanade 1981, least-squares displacement",
        ),
        target="reward_models.video.temporal:load_motion",
    ),
    Row(
        info=RewardInfo(
            name="steady-motion",
            modality="video",
            differentiable=True,
            range="0 to 1; a frozen picture scores 0",
            licence="Apache-2.0 (measure), MIT (CLIP)",
            source="consistency x flicker x motion up to a target",
            components=("flicker", "consistency", "motion"),
        ),
        target="reward_models.video.temporal:load_steady_motion",
        tower="clip-l",
        settings={"target": 0.02},
    ),
    Row(
        info=RewardInfo(
            name="tiny-consistency",
            modality="video",
            differentiable=True,
            range="0 to 1; a frozen picture scores 1: pair it with motion",
            licence="Apache-2.0",
            source=f"{_VBENCH} subject consistency, on tiny-clip",
        ),
        target="reward_models.video.temporal:load_consistency",
        tower="tiny-clip",
    ),
    Row(
        info=RewardInfo(
            name="tiny-steady-motion",
            modality="video",
            differentiable=True,
            range="0 to 1; a frozen picture scores 0",
            licence="Apache-2.0",
            source="consistency x flicker x motion up to a target, on tiny-clip",
            components=("flicker", "tiny-consistency", "motion"),
        ),
        target="reward_models.video.temporal:load_steady_motion",
        tower="tiny-clip",
        settings={"target": 0.02},
    ),
)

ROWS: dict[str, Row] = {row.info.name: row for row in _ROWS}
