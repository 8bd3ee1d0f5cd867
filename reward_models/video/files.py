"""Reading video files: frames by number, exactly those, without holding the clip.

Frames are numbered 0, 1, ... in the order they are shown; time stamps play no part in the numbers,
so a clip of variable rate has as many frames as pictures were stored.

To read, we seek to the last key frame at or before a wanted frame and decode forward. Every frame
on the way must carry the next stamp of the index (`video_index`); where one does not, we begin at
an earlier key frame, at last at the start, and then either the decoder's own order settles the
numbers or the file is damaged.

What pixels are: RGB of 8 bits per channel through FFmpeg's swscale, divided by 255. The file's
colour matrix and range are honoured; an untagged one is BT.601, limited, as FFmpeg takes it.
Deeper pixels are rounded to 8 bits; HDR is not tone-mapped, transparency lies over white, a
display matrix (turned and mirrored phones) is undone, interlaced fields stay woven, and pixels
that are not square stay as stored.

A file that is cut off or damaged raises and says how many frames were whole: half a clip must not
get a score. (A transport or raw stream stores no length: cut exactly between two frames, it is
whole.)
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reward_models.base import RewardError
from reward_models.video.container import REPLACE, open_video
from reward_models.video.index import FrameIndex, frame_index, frame_index_by_decoding

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

FilePath = str | os.PathLike[str]
Numbered = Iterator[tuple[int, "VideoFrame"]]

# Animated GIFs are pictures by their ending (`media` reads the first frame); the functions below
# read all of their frames where they are asked to.
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv"}
    | {".m2ts", ".mts", ".wmv", ".3gp"}
)

_BT601 = 5  # as swscale counts

# What `read_frames` may return, in bytes; `walk_frames` knows no such limit.
LARGEST_READ = 4 * 2**30


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, without its frames.

    Args:
        frames: how many there are, at least 1.
        fps: frames per second; of a variable rate the mean. NaN where nothing in the file says.
        width, height: as shown, a display matrix undone.
        seconds: frames / fps.
        variable_rate: gaps between frames differ by more than rounding.
    """

    frames: int
    fps: float
    width: int
    height: int
    seconds: float
    variable_rate: bool


def probe_video(path: FilePath) -> VideoInfo:
    """Count the frames of a video, and decode its first.

    Raises:
        RewardError: naming the file: it is missing, empty, no video, only sound, without frames,
            cut off or damaged.
    """
    index = frame_index(Path(path))
    _, first = next(walk_frames(path, [0]))
    height, width = first.shape[-2:]
    fps, variable = index.timing()
    return VideoInfo(index.count, fps, width, height, index.count / fps, variable)


def read_frames(path: FilePath, indices: Sequence[int]) -> Tensor:
    """Read the frames of these numbers, in this order.

    Args:
        indices: from 0 on, at least one; a number may come twice.

    Returns:
        float32 [n, 3, H, W] in [0, 1].

    Raises:
        RewardError: as `probe_video`; also a number that the clip does not have, a frame that
            cannot be decoded, and more than `LARGEST_READ` bytes.
    """
    places: dict[int, list[int]] = {}
    for place, number in enumerate(indices):
        places.setdefault(number, []).append(place)
    frames: Tensor | None = None
    for number, frame in walk_frames(path, indices):
        if frames is None:
            size = len(indices) * frame.numel() * frame.element_size()
            if size > LARGEST_READ:
                raise RewardError(
                    f"{len(indices)} frames of {frame.shape[2]} x {frame.shape[1]} would take "
                    f"{size / 2**30:.1f} GiB of memory",
                    where=str(path),
                    fix="look at fewer frames (for instance uniform:8), or make the clip smaller",
                )
            frames = torch.empty(len(indices), *frame.shape)
        frames[places[number]] = frame
    if frames is None:
        raise RewardError("no frame was asked for", where=str(path))
    return frames


def walk_frames(path: FilePath, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The frames of these numbers one at a time, upwards, each once; only one is held.

    Yields:
        (number, float32 [3, H, W] in [0, 1])

    Raises:
        RewardError: as `read_frames`, while walking.
    """
    path = Path(path)
    index, wanted = frame_index(path), sorted(set(indices))
    outside = [number for number in wanted if not 0 <= number < index.count]
    if outside:
        raise RewardError(
            f"has no frame {outside[0]}, only 0 to {index.count - 1}", where=str(path)
        )
    from av.video.reformatter import VideoReformatter

    walk = _by_order(path, wanted) if index.by_order else _by_stamp(path, index, wanted)
    reformatter, shape = VideoReformatter(), None
    for number, frame in walk:
        pixels = _to_rgb(frame, reformatter, path)
        if shape not in (None, pixels.shape):
            raise RewardError(f"changes its size at frame {number}", where=str(path), fix=REPLACE)
        shape = pixels.shape
        yield number, pixels


def _by_stamp(path: Path, index: FrameIndex, wanted: Sequence[int]) -> Numbered:
    """Decode from the nearest key frames; from earlier ones where stamps do not follow."""
    starts = [number for number, _ in index.keys]
    nearest = {number: bisect_right(starts, number) - 1 for number in wanted}
    left = list(wanted)
    while left:
        # One run goes on as long as no group of pictures without a wanted frame can be skipped.
        end = 1
        while end < len(left) and nearest[left[end]] <= nearest[left[end - 1]] + 1:
            end += 1
        run, left = left[:end], left[end:]
        key = nearest[run[0]]
        for start in dict.fromkeys([key, max(0, key - 1), 0]):
            for number, frame in _decode_from(path, index, start, run):
                run = run[1:]
                yield number, frame
            if not run:
                break
        else:  # not even from the start: the stamps are wrong, or frames are broken
            if frame_index_by_decoding(path).count != index.count:
                raise _damaged(path, run[0])
            yield from _by_order(path, run + left)
            return


def _decode_from(path: Path, index: FrameIndex, key: int, wanted: Sequence[int]) -> Numbered:
    """Wanted frames from a key frame on, up to the first frame that is not the next one.

    Frames that are shown before the key frame but follow it in the file (an open group of
    pictures) are passed over: after a seek they are built on frames that were not decoded.
    """
    from av.error import FFmpegError

    first = expected = -1
    chosen = set(wanted)
    with open_video(path) as (container, stream):
        try:
            if key:
                container.seek(index.keys[key][1], stream=stream, backward=True)
            for packet in container.demux(stream):
                if first < 0:
                    if not packet.is_keyframe or packet.pts is None:
                        continue
                    first = expected = index.numbers.get(packet.pts, index.count)
                    if first > wanted[0]:
                        return
                for frame in packet.decode():
                    number = index.numbers.get(frame.pts, -1)
                    if 0 <= number < first:
                        continue
                    if number != expected or frame.is_corrupt:
                        return
                    expected += 1
                    if number in chosen:
                        yield number, frame
                    if number == wanted[-1]:
                        return
        except FFmpegError:
            return  # what is missing is looked for from an earlier key frame


def _by_order(path: Path, wanted: Sequence[int]) -> Numbered:
    """Decode from the start and count."""
    chosen = set(wanted)
    with open_video(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise _damaged(path, number)
            if number in chosen:
                yield number, frame
            if number == wanted[-1]:
                return


def _damaged(path: Path, number: int) -> RewardError:
    return RewardError(f"is damaged after {number} whole frames", where=str(path), fix=REPLACE)


def _to_rgb(frame: VideoFrame, reformatter: VideoReformatter, path: Path) -> Tensor:
    """float32 [3, H, W] in [0, 1], upright."""
    clear = any(component.is_alpha for component in frame.format.components)
    # Named, because older releases of PyAV take BT.601 whatever the frame says, and do so too where
    # the colour space to come, which RGB has not, is the one that was.
    pixels = reformatter.reformat(
        frame,
        format="rgba" if clear else "rgb24",
        src_colorspace=int(frame.colorspace),
        src_color_range=int(frame.color_range),
        dst_colorspace=_BT601,
    ).to_ndarray()
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    if clear:
        image = image[:3] * image[3:] + (1 - image[3:])
    return _upright(image, frame, path).contiguous()


def _upright(image: Tensor, frame: VideoFrame, path: Path) -> Tensor:
    """Undo the display matrix: x' = a x + c y, y' = b x + d y (ISO 14496-12, track header)."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = (value / 65536 for value in struct.unpack("9i", bytes(matrix)))
    if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or a * d == b * c:
        raise RewardError("is to be shown turned by no quarter, or stretched", where=str(path))
    if a:
        return image.flip([axis for axis, sign in ((1, d), (2, a)) if sign < 0])
    return image.transpose(1, 2).flip([axis for axis, sign in ((1, b), (2, c)) if sign < 0])
