"""A run that trains a reward: judgements and reward from a config, trained by the one loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.data.judgement_options import COUNT, HELD_OUT_COUNT, JudgementOptions
from diffusion_align.errors import UserError
from diffusion_align.secrecy.redaction import redact

if TYPE_CHECKING:
    from diffusion_align.algorithms.reward_training import RewardTraining
    from diffusion_align.config import RewardRunConfig
    from diffusion_align.data.judgements import Judgements
    from diffusion_align.training.loop import TrainResult


@dataclass(frozen=True)
class TrainedReward:
    """A reward run that ended, and what it left."""

    training: RewardTraining
    result: TrainResult

    @property
    def file(self) -> Path:
        """Where the reward lies."""
        from reward_models.catalogue import TRAINED_FILE

        return self.result.folder / "final" / TRAINED_FILE


def train_reward(
    config: RewardRunConfig, *, resume: bool = False, new: bool = False
) -> TrainedReward:
    """Build the reward and the judgements of a config, then open the run's folder and train.

    Args:
        resume, new: as in `train`. An earlier run is put aside only when all has been loaded.

    Raises:
        UserError, RewardError: anything a person can put right.
    """
    from diffusion_align.algorithms import catalogue
    from diffusion_align.assemble.inputs import look_at_inputs
    from diffusion_align.assemble.run import begin_run
    from diffusion_align.policy.devices import device_of
    from diffusion_align.reporting.console import Console, Quiet
    from diffusion_align.training.distribution import is_main_process
    from diffusion_align.training.final import write_final
    from diffusion_align.training.loop import train

    writes = is_main_process()  # of several processes one talks and writes
    reporter = Console() if writes else Quiet()
    inputs = look_at_inputs(config, resume=resume, say=reporter.message)
    judgements, held_out = load_judgements(config.data, config.seed)
    build: Any = catalogue.load(catalogue.resolve(config.algorithm.name).target)
    training: RewardTraining = build(
        config.reward.plan,
        judgements,
        options=config.algorithm.options,
        validation=held_out,
        seed=config.seed,
        device=str(device_of(config.reward.device)),
        name=redact(Path(str(config.output)).name),
        trained_on=[redact(config.data.source)],
        validate_at_end=False,
    )
    folder = begin_run(config, inputs, resume=resume, new=new)
    result = train(
        training,
        options=config.train,
        guards=config.guards,
        output=folder.path,
        resume=resume,
        seed=config.seed,
        reporter=reporter,
    )
    # Who interrupts a run waits for no validation: the best weights so far are saved already.
    if writes and not result.interrupted:
        training.finish()
        write_final(folder.final, training.save, reporter.message)
    return TrainedReward(training, result)


def load_judgements(options: JudgementOptions, seed: int) -> tuple[Judgements, Judgements | None]:
    """The judgements to learn from, and those held out (None where none are wanted).

    Raises:
        UserError: files that cannot be read, or judgements of two kinds.
    """
    if options.crowd is not None:
        from diffusion_align.data.judgements import small_world_judgements

        crowd: Any = options.crowd
        learnt = small_world_judgements(crowd, options.limit or COUNT, seed, "train")
        if options.validation_share == 0:
            return learnt, None
        count = options.validation_limit or HELD_OUT_COUNT
        return learnt, small_world_judgements(crowd, count, seed, "heldout")
    learnt = _read(options.source, options.pictures, options)
    held_out = None
    if options.validation is not None:
        folder = options.validation_pictures or options.pictures
        held_out = _read(options.validation, folder, options)
        learnt = _with_overlap(learnt, held_out)
    elif options.validation_share > 0:
        learnt, held_out = learnt.split(options.validation_share, seed)
    learnt = _some(learnt, options.limit, seed)
    return learnt, held_out and _some(held_out, options.validation_limit, seed)


def _with_overlap(learnt: Judgements, held_out: Judgements) -> Judgements:
    """`learnt` with a note on the rows held out whose prompt or picture it has as well.

    Raises:
        UserError: all of them are: nothing is held out.
    """
    prompts = {row.prompt for row in learnt.rows if row.prompt}
    pictures = {str(picture) for row in learnt.rows for picture in row.pictures}
    shared = sum(
        row.prompt in prompts or any(str(picture) in pictures for picture in row.pictures)
        for row in held_out.rows
    )
    if shared == len(held_out):
        raise UserError(
            "every row has a prompt or a picture that is trained on: nothing is held out",
            where="data.validation",
            fix="name another file, or leave it out and set data.validation_share",
        )
    if not shared:
        return learnt
    note = f"{shared} of {len(held_out)} rows held out share a prompt or picture with training"
    return replace(learnt, notes=(*learnt.notes, note))


def _read(path: str, folder: str | None, options: JudgementOptions) -> Judgements:
    from diffusion_align.data import read_ava, read_pairs, read_ratings

    how: dict[str, Any] = {"missing": options.missing, "damaged": options.damaged}
    if options.file_kind == "ava":
        if folder is None:
            raise UserError("AVA.txt names pictures by number: give their folder", where="pictures")
        return read_ava(path, folder, **how)
    read = read_pairs if options.file_kind == "pairs" else read_ratings
    return read(path, folder=folder, **how)


def _some(judgements: Judgements, limit: int | None, seed: int) -> Judgements:
    """At most `limit` of the rows, drawn at random, in their order."""
    import numpy as np

    if limit is None or limit >= len(judgements):
        return judgements
    drawn = np.random.default_rng(np.random.Philox(key=seed)).permutation(len(judgements))
    return judgements.pick(sorted(drawn[:limit].tolist()))
