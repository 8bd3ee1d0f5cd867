"""Config files: YAML plus `key=value`, every problem answered at once, before torch is imported.

Flow: `source` reads YAML and overrides into a tree of texts with places; `edge` turns the rooms'
option dataclasses into pydantic models; `validate` reads each section by its declared types;
`rules` looks at several keys together and at names; `load` puts these together; `problems` is how
it is said; `resuming` says what a resumed run may change.
"""

from __future__ import annotations

from diffusion_align.config.load import (
    config_names,
    copy_config,
    differences,
    find_config,
    json_schema,
    load_config,
    to_yaml,
)
from diffusion_align.config.problems import ConfigError, Problem
from diffusion_align.config.resuming import changes_on_resume
from diffusion_align.config.sections import (
    AlgorithmChoice,
    PromptOptions,
    RewardRunConfig,
    RunConfig,
)

__all__ = [
    "AlgorithmChoice",
    "ConfigError",
    "Problem",
    "PromptOptions",
    "RewardRunConfig",
    "RunConfig",
    "changes_on_resume",
    "config_names",
    "copy_config",
    "differences",
    "find_config",
    "json_schema",
    "load_config",
    "to_yaml",
]
