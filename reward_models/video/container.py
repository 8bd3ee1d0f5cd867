"""Opening video files safely, and knowing whether they are whole.

FFmpeg would open playlists and concatenations too, which name other files and hosts, and takes
whatever it can get from a file that is cut off. Here a file is opened alone, by an allow-list of
formats, and its own headers say where it should end.

PyAV comes with GPL-licensed FFmpeg libraries: we depend on it, import it late, and never bundle it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from reward_models.base import RewardError

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

# A picture of more pixels is a decompression bomb (8K video has 33 million).
LARGEST_FRAME = 2**27
REPLACE = "replace the file, or take it out of the list"
NOTHING_LEFT = "is cut off: none of its frames can be read"

# The audio formats are here to be refused as such.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,ogg,flv,asf,gif,"
    "h264,hevc,av1,ivf,m4v,yuv4mpegpipe,mxf,wav,mp3,flac,aac"
)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container of a local file, and its video stream (a cover picture is none).

    Raises:
        RewardError: naming the file: it is missing, empty, no video, only sound, cut off, or holds
            pictures of more than `LARGEST_FRAME` pixels.
    """
    check_file(path)
    try:
        import av
    except ImportError as error:
        raise RewardError(f"PyAV cannot be imported: {error}", fix="pip install av") from error
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        # The prefix keeps names with colons from being taken for addresses.
        container = av.open(f"file:{path}", container_options=options)
    except OSError as error:
        raise RewardError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except av.error.FFmpegError as error:
        what = NOTHING_LEFT if is_cut_off(path) else "is not a video that can be read"
        raise RewardError(what, where=str(path), fix=REPLACE) from error
    with container:
        yield container, _video_stream(container, path)


def check_file(path: Path) -> None:
    """Refuse what is no file, or an empty one.

    Raises:
        RewardError: naming it.
    """
    if not path.is_file():
        what = "is a folder, not a video" if path.is_dir() else "no such file"
        raise RewardError(what, where=str(path))
    if not path.stat().st_size:
        raise RewardError("is empty", where=str(path), fix=REPLACE)


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        if is_cut_off(path):
            raise RewardError(NOTHING_LEFT, where=str(path), fix=REPLACE)
        sound = " (only sound)" if container.streams.audio else ""
        raise RewardError(f"has no video stream{sound}", where=str(path))
    codec = streams[0].codec_context
    if codec is None:
        raise RewardError("this PyAV has no decoder for its codec", where=str(path))
    if codec.width * codec.height > LARGEST_FRAME:
        raise RewardError(
            f"frames of {codec.width} x {codec.height} are too large", where=str(path), fix=REPLACE
        )
    return streams[0]


def is_cut_off(path: Path) -> bool:
    """Whether the file ends before the end that its own headers give.

    Formats that store no length (transport and raw streams) are only known to be cut where they end
    inside a packet.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(189).ljust(189, b"\0")
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return _end_of_boxes(file, size) > size
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            return _end_of_segment(head) > size
        if head.startswith(b"RIFF"):
            return 8 + int.from_bytes(head[4:8], "little") > size
        if head.startswith(b"GIF8"):
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\x3b"
        if head[:1] == b"\x47" and head[188:] == b"\x47":
            return size % 188 != 0
    return False


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of an MP4 ends; one byte past the file where no index is in it."""
    start, kinds = 0, set()
    while start < size:
        file.seek(start)
        head = file.read(16).ljust(16, b"\0")
        kinds.add(head[4:8])
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # up to the end of the file
            break
        start += max(length, 8)
    return start if b"moov" in kinds else max(start, size + 1)


def _end_of_segment(head: bytes) -> int:
    """Where the segment of a Matroska file ends; 0 where it does not say."""
    header, first = _length(head, 4)
    start = first + header
    if head[start : start + 4] != b"\x18\x53\x80\x67":
        return 0
    length, first = _length(head, start + 4)
    return first + length if length else 0


def _length(head: bytes, start: int) -> tuple[int, int]:
    """(an EBML length, or 0 for an unknown one; where what it counts begins)"""
    width = 9 - head[start].bit_length()
    value = int.from_bytes(head[start : start + width], "big") - (1 << 7 * width)
    unknown = value == (1 << 7 * width) - 1
    return (0 if unknown else value), start + width
