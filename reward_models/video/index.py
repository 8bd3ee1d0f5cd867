"""Numbering the frames of a video: which there are, when each is shown, where decoding may start.

One pass over the packets, without decoding, settles it for most files. Where packets cannot (AVI
and raw streams store no presentation times, VP8 hides frames, a recording may start inside a group
of pictures), frames are counted by decoding once. A file that
is cut off or damaged is refused, with the number of its whole frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from reward_models.base import RewardError
from reward_models.video.container import REPLACE, check_file, is_cut_off, open_video

if TYPE_CHECKING:
    from av import VideoStream

_NO_PRESENTATION_TIMES = ("avi", "h264", "hevc", "av1", "m4v", "mpegvideo")
_HIDES_FRAMES = ("vp8",)


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file in the order they are shown.

    Args:
        stamps: when each is shown, in ticks; None where the file does not say.
        keys: (number, tick to seek to) of the frames that decoding may start at.
        by_order: the only truth is the order in which the decoder gives frames from the start.
        tick: seconds per tick.
        rate: frames per second as the file claims.
    """

    stamps: tuple[int | None, ...]
    keys: tuple[tuple[int, int], ...]
    by_order: bool
    tick: Fraction
    rate: Fraction | None

    @property
    def count(self) -> int:
        """How many frames there are, at least 1."""
        return len(self.stamps)

    @cached_property
    def numbers(self) -> dict[int | None, int]:
        """Stamp -> number."""
        return {stamp: number for number, stamp in enumerate(self.stamps)}

    def timing(self) -> tuple[float, bool]:
        """(frames per second, whether the rate varies); NaN where nothing says how many."""
        stamps = sorted(stamp for stamp in self.stamps if stamp is not None)
        claimed = float(self.rate) if self.rate else float("nan")
        if len(stamps) < max(2, self.count) or stamps[0] == stamps[-1]:
            return claimed, False
        gaps = [after - before for before, after in pairwise(stamps)]
        mean = (stamps[-1] - stamps[0]) / len(gaps)
        fps = 1 / (mean * float(self.tick))
        # Rounding to ticks makes gaps differ by one; it also moves the mean a little.
        if max(gaps) - min(gaps) > max(1, 0.02 * mean):
            return fps, True
        return (claimed if abs(claimed / fps - 1) < 0.02 else fps), False


def frame_index(path: Path) -> FrameIndex:
    """Number the frames of a file; remembered while the file stays the same.

    Raises:
        RewardError: naming the file, as `open_video`; also without frames, cut off or damaged.
    """
    return _remembered(path, by_decoding=False)


def frame_index_by_decoding(path: Path) -> FrameIndex:
    """The same by decoding every frame: slow, and always true. Remembered too."""
    return _remembered(path, by_decoding=True)


def _remembered(path: Path, *, by_decoding: bool) -> FrameIndex:
    check_file(path)
    state = path.stat()
    return _index_once(path, state.st_size, state.st_mtime_ns, by_decoding)


@lru_cache(maxsize=64)
def _index_once(path: Path, size: int, changed: int, by_decoding: bool) -> FrameIndex:
    index = None if by_decoding else _by_packets(path)
    return _by_decoding(path) if index is None else index


def _by_packets(path: Path) -> FrameIndex | None:
    """Count without decoding; None where packets cannot settle the numbers."""
    from av.error import FFmpegError

    packets: list[tuple[int | None, int | None, bool]] = []
    broken = 0
    with open_video(path) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.dts, packet.is_keyframe))
                    broken += packet.is_corrupt
        except FFmpegError:
            broken += 1
        by_order = (
            container.format.name in _NO_PRESENTATION_TIMES
            or stream.codec_context.name in _HIDES_FRAMES
        )
        tick, rate, claimed = stream.time_base or Fraction(1), _rate(stream), stream.frames
    cut = is_cut_off(path)
    if cut or broken:
        # Some formats hand out the half of a last packet as if it were whole.
        whole = max(0, len(packets) - max(1, broken))
        of = f" of {claimed}" if claimed > whole else ""
        raise RewardError(
            f"is {'cut off' if cut else 'damaged'}: at least {whole}{of} frames are whole",
            where=str(path),
            fix=REPLACE,
        )
    if not packets:
        raise RewardError("has no frames", where=str(path), fix=REPLACE)
    stamps = sorted({stamp for stamp, _, _ in packets if stamp is not None})
    # A first packet that is no key frame, or not shown first: is all of that group decodable?
    if by_order or len(stamps) < len(packets) or not packets[0][2] or packets[0][0] != stamps[0]:
        return None
    numbers = {stamp: number for number, stamp in enumerate(stamps)}
    keys = [
        (numbers[shown], shown if decoded is None else decoded)
        for shown, decoded, is_key in packets
        if is_key and shown is not None
    ]
    return FrameIndex(tuple(stamps), tuple(sorted(keys)), False, tick, rate)


def _by_decoding(path: Path) -> FrameIndex:
    from av.error import FFmpegError

    stamps: list[int | None] = []
    with open_video(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                stamps.append(frame.pts)
        except FFmpegError as error:
            raise RewardError(
                f"is damaged after {len(stamps)} whole frames ({error.strerror})",
                where=str(path),
                fix=REPLACE,
            ) from error
        if not stamps:
            raise RewardError("has no frames that can be decoded", where=str(path), fix=REPLACE)
        tick = stream.time_base or Fraction(1)
        return FrameIndex(tuple(stamps), ((0, 0),), True, tick, _rate(stream))


def _rate(stream: VideoStream) -> Fraction | None:
    return stream.average_rate or stream.guessed_rate
