"""The model card: what the hub reads of it, what a person reads, and what nobody can inject."""

from __future__ import annotations

import ast
import html
import inspect
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub import ModelCard

from diffusion_align.policy.families import FAMILIES, Family, family_of
from diffusion_align.policy.loading import use_ddim
from diffusion_align.policy.scheduling import use_gaussian_steps
from diffusion_align.publish.card import (
    Base,
    Card,
    Comparison,
    Measure,
    RewardFacts,
    limits,
    relocated,
    render,
    write_card,
)
from diffusion_align.publish.example import example
from diffusion_align.publish.markdown import escaped
from diffusion_align.publish.reward_card import RewardCard, render_reward
from diffusion_align.publish.signature import is_untouched, signed

MEASURES = (
    Measure("tiny-hps", 1.0, 1.25, 0.25, (0.125, 0.375), 0.75, (0.5, 0.875)),
    Measure("verifier/strict", 0.5, 0.25, -0.25, (-0.5, -0.125), None, (None, None)),
    Measure("diversity", 0.5, 0.5, 0.0, (-0.125, 0.125), 0.5, (0.25, 0.75)),
)
CARD = Card(
    name="mine",
    kind="lora",
    base=Base(
        "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CreativeML Open RAIL-M",
        "'stable-diffusion-v1-5/stable-diffusion-v1-5'",
        revision="main",
    ),
    family=family_of("StableDiffusionPipeline", where="card"),
    scheduler="",
    loads_lora=True,
    method="ddpo",
    description="policy gradient",
    citation="Black et al. 2023, arXiv 2305.13301",
    rewards=(RewardFacts("tiny-hps", "a crowd", "Apache-2.0"),),
    prompt_source="animals",
    prompt_count=45,
    prompt_examples=("a cat", "a dog"),
    trained_on=("tiny-hps",),
    comparison=Comparison(64, 32, MEASURES),
    settings=(("lora.rank", "8"),),
    steps=50,
    guidance_scale=7.5,
    eta=0.0,
    height=512,
    width=512,
    frames=None,
    fps=None,
    example="a cat",
    comfyui=True,
    check="loaded again: the same pictures",
    version="1.0",
)
HOSTILE = (
    "<script>alert(1)</script> | a | b\n# heading\n\n```python\nimport os\n``` "
    "[x](http://evil.example) ![y](https://evil.example/p.png) www.evil.example **bold** "
    "<img src=x onerror=alert(1)> $$math$$ \u202ereversed \x00 ---\nlicense: mit"
)


def same(text: str) -> str:
    return text


def parsed(card: Card) -> Any:
    return ModelCard(render(card, same))


def test_the_front_matter_is_what_the_hub_expects() -> None:
    data = parsed(CARD).data.to_dict()
    assert data["license"] == "creativeml-openrail-m" and "license_name" not in data
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["base_model_relation"] == "adapter"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"lora", "comfyui", "ddpo", "stable-diffusion"} <= set(data["tags"])
    whole = parsed(replace(CARD, kind="model")).data.to_dict()
    assert whole["base_model_relation"] == "finetune" and "lora" not in whole["tags"]


def test_an_unknown_licence_or_base_is_said_and_not_made_up() -> None:
    card = replace(CARD, base=Base("own", "", "", "'own'"))
    data = parsed(card).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "unknown")
    assert "base_model" not in data
    assert "licence of the base model own is not known here" in parsed(card).text
    named = replace(CARD, base=replace(CARD.base, licence="Stability AI Community"))
    data = parsed(named).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "stability-ai-community")


def test_numbers_stand_with_their_intervals_and_roles() -> None:
    rows = [line for line in parsed(CARD).text.splitlines() if line.startswith("| ")]
    table = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in rows
    }
    assert table["tiny-hps"] == [
        *("trained on", "1", "1.25"),
        *("+0.25 (+0.125 to +0.375)", "75 % (50 % to 88 %)"),
    ]
    assert table["verifier/strict"][0] == "held out"
    assert table["verifier/strict"][-1] == "none (none to none)"
    assert table["diversity"][0] == "diversity"
    assert table["lora.rank"] == ["8"]
    assert "64 pairs of 32 prompts" in parsed(CARD).text


def test_limits_say_what_the_evidence_does_not_show() -> None:
    text = " ".join(limits(CARD))
    assert "What was not trained on fell: verifier/strict" in text
    assert "No reward was held out" not in text and "no verdict" not in text
    few = replace(CARD, comparison=Comparison(8, 4, MEASURES[:1]), check="")
    text = " ".join(limits(few))
    assert "4 prompts" in text and "No reward was held out" in text
    assert "not loaded again" in text
    assert "nothing here shows that it is better" in " ".join(
        limits(replace(CARD, comparison=None))
    )
    continued = replace(CARD, settings=(("lora.path", "first"),))
    assert "went on from the LoRA first" in " ".join(limits(continued))
    assert "do not rely" in " ".join(limits(replace(CARD, check="OTHER PICTURES than")))


class Tags(HTMLParser):
    """Every tag that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append(tag)


def test_what_a_person_wrote_is_shown_and_never_obeyed() -> None:
    card = replace(
        CARD,
        name=HOSTILE,
        base=replace(CARD.base, name=HOSTILE, licence=HOSTILE),
        rewards=(RewardFacts(HOSTILE, HOSTILE, HOSTILE),),
        prompt_source=HOSTILE,
        prompt_examples=(HOSTILE, "1. one", "- two", "+ three", "# four"),
        trained_on=(HOSTILE,),
        comparison=Comparison(2, 1, (replace(MEASURES[0], name=HOSTILE),)),
        settings=((HOSTILE, HOSTILE),),
        example=HOSTILE,
        check=HOSTILE,
    )
    plain, text = render(CARD, same), render(card, same)
    assert (
        parsed(card).data.to_dict().keys() - {"license_name"} == parsed(CARD).data.to_dict().keys()
    )
    fences = re.split(r"^```.*$", text, flags=re.MULTILINE)
    assert len(fences) == 3
    outside = fences[0] + fences[2]
    seen = Tags()
    seen.feed(outside)
    assert seen.found == []
    for sign in ("http:", "www.", "**", "$$", "\u202e", "\x00", "![", "]("):
        assert sign not in outside
    # As many lines, headings, table rows and list items as in a card without malice.
    assert outside.count("\n#") == plain.count("\n#")
    assert sum(line.count(" | ") for line in outside.splitlines() if line.startswith("| ")) == sum(
        line.count(" | ")
        for line in plain.splitlines()
        if line.startswith("| ") and "verifier" not in line and "diversity" not in line
    )
    assert [escaped(words)[:5] for words in ("1. a", "- b", "+ c", "# d", "> e")] == [
        *("1&#46", "&#45;", "&#43;", "&#35;", "&#62;")
    ]
    literal = fences[1].split("image = pipeline(\n    ")[1].split("\n")[0].rstrip(",")
    assert eval(literal, {"__builtins__": {}}) == HOSTILE
    compile(fences[1], "example", "exec")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "tiny_sd",
            "-0.003",
            "+0.25 (-1 to +2)",
            "small-world:45",
            "a cat!",
            "(best quality:1.2)",
        ),
        *("ddpo_sd15_aesthetic", '"quoted" words', "5 = 2 + 3", "{a|b}".replace("|", "/"), "1.5"),
    ],
)
def test_what_markdown_would_not_change_is_left_as_it_is(text: str) -> None:
    assert escaped(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("_emphasis_", "__strong__", "a _b_ c", "- list", "+ list", "-", "---", "- - -", "==="),
        *("1. one", "2) two", "3.", "see http://x.org", "HTTPS://x.org", "mailto:a", "x :smile: y"),
        *("[a](b)", "`code`", "a | b", "a ~~b~~", "me@x.org", "$x$", "a\\*b", "&amp;", "#1"),
    ],
)
def test_what_markdown_would_change_is_escaped_and_reads_the_same(text: str) -> None:
    assert escaped(text) != text
    assert html.unescape(escaped(text)) == text


def test_a_secret_in_the_text_is_removed_before_it_is_signed(tmp_path: Path) -> None:
    text = render(replace(CARD, name="canary"), lambda words: words.replace("canary", "***"))
    assert "canary" not in text
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert is_untouched(tmp_path / "README.md")


def test_a_card_that_was_edited_is_never_overwritten(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert not is_untouched(card)
    assert write_card(tmp_path, render(CARD, same)) and is_untouched(card)
    assert write_card(tmp_path, render(replace(CARD, name="new"), same))
    assert "# new" in card.read_text(encoding="utf-8")
    edited = card.read_text(encoding="utf-8").replace("# new", "# My own words")
    card.write_text(edited, encoding="utf-8")
    assert not is_untouched(card)
    assert not write_card(tmp_path, render(CARD, same))
    assert card.read_text(encoding="utf-8") == edited
    card.write_text(signed("# whatever\n") + "one more line\n", encoding="utf-8")
    assert not is_untouched(card)


def test_a_card_that_goes_to_the_hub_loads_from_there(tmp_path: Path) -> None:
    for kind, wanted in (("lora", "load_lora_weights('me/mine', "), ("model", "me/mine')")):
        card = replace(CARD, kind=kind)  # type: ignore[arg-type]
        text = relocated(render(card, same), "me/mine")
        assert wanted in text and "'.'" not in text
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        assert is_untouched(tmp_path / "README.md")
    assert "revision='main'" in example(CARD)
    assert "height" not in example(replace(CARD, height=None, width=None))


def test_the_card_of_a_reward_says_what_its_file_says() -> None:
    card = RewardCard(
        name=HOSTILE,
        head="cosine",
        tower="tiny-clip",
        attributes=("overall",),
        range="",
        licence="Apache-2.0",
        source="",
        trained_on=("pairs.jsonl",),
        validation=(("pair_accuracy", 0.75),),
        version="1.0",
    )
    made: Any = ModelCard(render_reward(card, same))
    assert made.data.license == "apache-2.0" and "reward-model" in (made.data.tags or [])
    assert "| pair accuracy | 0.7500 |" in made.text and "<script" not in made.text
    nothing: Any = ModelCard(render_reward(replace(card, licence="", validation=()), same))
    assert nothing.data.license == "other" and "Nothing was held out" in nothing.text


def test_the_examples_scheduler_is_the_one_that_training_used() -> None:
    """Also where the base's file leaves out what DDIM would fill with its own defaults."""
    sparse = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    lines = example(CARD).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("config = "))
    code = "\n".join(lines[start : start + 3])
    for old in (PNDMScheduler, EulerDiscreteScheduler):
        theirs = SimpleNamespace(scheduler=old.from_config(sparse))
        ours = SimpleNamespace(scheduler=old.from_config(sparse))
        exec(code, {"DDIMScheduler": DDIMScheduler, "pipeline": theirs})
        assert use_ddim(ours, "base") is not None
        assert theirs.scheduler.config == ours.scheduler.config
        assert theirs.scheduler.config.clip_sample is False
        assert theirs.scheduler.config.set_alpha_to_one is False


def card_of(family: Family, **changes: Any) -> Card:
    clips: dict[str, Any] = {} if family.frames is None else {"frames": 9, "fps": 8.0}
    return replace(CARD, family=family, **clips, **changes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_an_example_gives_a_pipeline_only_what_it_takes(family: Family) -> None:
    """Held against diffusers' own signatures and its own loaders."""
    for name in family.pipelines:
        kind = getattr(diffusers, name)
        loads = hasattr(kind, "load_lora_weights")
        whole = parsed(card_of(family, loads_lora=loads, kind="merged"))
        lora = parsed(card_of(family, loads_lora=loads))
        for card in (lora, whole):
            code = card.text.split("```python\n")[1].split("```")[0]
            calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
            draws = next(c for c in calls if c.args and ast.unparse(c.args[0]) == "'a cat'")
            given = {keyword.arg for keyword in draws.keywords}
            assert given <= inspect.signature(kind.__call__).parameters.keys()
            assert {"num_inference_steps", "guidance_scale", "height", "width"} <= given
            assert ("eta" in given) == (family.schedule == "ddim")
            assert ("num_frames" in given) == (family.frames is not None)
            assert ("export_to_video(video, 'clip.mp4', fps=8)" in code.replace('"', "'")) == (
                family.frames is not None
            )
            tag = "text-to-image" if family.frames is None else "text-to-video"
            data = card.data.to_dict()
            assert data["pipeline_tag"] == tag == data["tags"][0]
        assert ("load_lora_weights" in lora.text) == loads
        assert ("has no loader for a LoRA" in lora.text) == (not loads)
        assert "has no loader" not in whole.text and "load_lora" not in whole.text


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_base_with_the_familys_own_scheduler_keeps_it(family: Family) -> None:
    code = example(card_of(family, scheduler=family.scheduler))
    assert "scheduler" not in code.lower()
    other = example(card_of(family, scheduler="UniPCMultistepScheduler"))
    assert f"import {', '.join(sorted(['DiffusionPipeline', family.scheduler]))}" in other


@pytest.mark.parametrize(
    ("name", "before"),
    [
        (
            "WanPipeline",
            UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        ),
        ("WanPipeline", FlowMatchEulerDiscreteScheduler(shift=5.0, base_shift=0.25)),
        (
            "CogVideoXPipeline",
            CogVideoXDPMScheduler(
                prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True
            ),
        ),
    ],
)
def test_the_examples_scheduler_of_clips_is_the_one_that_training_used(
    name: str, before: Any
) -> None:
    family = family_of(name, where="card")
    lines = example(card_of(family)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("config = "))
    end = next(i for i, line in enumerate(lines) if line.startswith("pipeline.load_lora"))
    theirs, ours = (SimpleNamespace(scheduler=before) for _ in range(2))
    use_gaussian_steps(ours, family, "base")
    exec("\n".join(lines[start:end]), {**vars(diffusers), "pipeline": theirs})
    assert type(theirs.scheduler).__name__ == family.scheduler == type(ours.scheduler).__name__
    assert theirs.scheduler.config == ours.scheduler.config


def test_a_lora_that_diffusers_cannot_load_is_loaded_from_the_hub_by_this_package() -> None:
    family = family_of("EasyAnimatePipeline", where="card")
    card = card_of(family, loads_lora=False)
    assert "lora_path='.', revision='main')" in example(card)
    text = relocated(render(card, same), "me/mine")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "example", "exec")
    assert "lora_path=snapshot_download('me/mine')" in code and "'.'" not in code
    assert code.count("from huggingface_hub import snapshot_download\n") == 1
