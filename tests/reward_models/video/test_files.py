"""Frames by number, exactly those; and no score for half a clip."""

from __future__ import annotations

import ast
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.base import RewardError
from reward_models.video import container as video_container
from reward_models.video import files as video_files
from reward_models.video import index as video_index
from reward_models.video.files import VIDEO_SUFFIXES, probe_video, read_frames, walk_frames
from tests.reward_models.video.video_samples import (
    av,
    number_of,
    numbered,
    write_numbered,
    write_sound,
    write_video,
)

COUNT = 20
REORDERED = {"x264-params": "keyint=8:min-keyint=8:bframes=2:b-adapt=0:scenecut=0"}
PLAIN = {"x264-params": "keyint=8:min-keyint=8:bframes=0:scenecut=0"}
OPEN = {"x264-params": "keyint=8:min-keyint=8:bframes=2:b-adapt=0:open-gop=1:scenecut=0"}
REFRESHED = {"x264-params": "keyint=12:intra-refresh=1:bframes=0:scenecut=0"}
UNEVEN = [500 + 40 * i + 13 * (i % 3) for i in range(COUNT)]

FILES: dict[str, dict[str, Any]] = {
    "reordered.mp4": {"options": REORDERED},
    "reordered.mkv": {"options": REORDERED},
    "reordered.mov": {"options": REORDERED},
    "open.mp4": {"options": OPEN},
    "open.ts": {"options": OPEN},
    "refreshed.ts": {"options": REFRESHED},
    "uneven.mp4": {"options": REORDERED, "milliseconds": UNEVEN},
    "uneven.mkv": {"options": REORDERED, "milliseconds": UNEVEN},
    "fragments.mp4": {
        "options": REORDERED,
        "container": {"movflags": "frag_keyframe+empty_moov"},
    },
    "no_times.avi": {"options": REORDERED},
    "no_times.h264": {"options": REORDERED},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "8", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"g": "8", "bf": "2"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "8", "cpu-used": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "8", "cpu-used": "8"}},
    "hevc.mp4": {
        "codec": "libx265",
        "options": {
            "x265-params": "keyint=8:min-keyint=8:open-gop=1:scenecut=0:log-level=none",
            "preset": "ultrafast",
        },
    },
    "animation.gif": {"codec": "gif", "pixels": "rgb8", "rate": 25},
    "intra.mkv": {"codec": "ffv1", "pixels": "yuv420p"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.parametrize("name", FILES)
def test_every_frame_is_the_one_of_its_number(tmp_path: Path, name: str) -> None:
    path = write_numbered(tmp_path / name, COUNT, **FILES[name])
    assert probe_video(path).frames == COUNT
    whole = read_frames(path, range(COUNT))
    assert whole.shape == (COUNT, 3, 48, 64) and whole.dtype == torch.float32
    assert [number_of(frame) for frame in whole] == list(range(COUNT))
    for number in range(COUNT):  # wherever decoding begins, the frame is the same
        assert torch.equal(read_frames(path, [number])[0], whole[number])
    wanted = [15, 3, 3, 19, 0, 12, 11]
    assert torch.equal(read_frames(path, wanted), whole[wanted])


def test_a_lossless_video_is_read_bit_by_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (21, 33, 3)).astype(np.uint8) for _ in range(3)]
    path = write_video(tmp_path / "a.mkv", pictures, codec="ffv1", pixels="bgr0")
    expected = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    assert torch.equal(read_frames(path, range(3)), expected)


def test_stamps_that_deny_the_order_of_showing_are_not_believed(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "a.mp4", COUNT, options=REORDERED)
    path = tmp_path / "b.mp4"
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.dts += 1024
                packet.pts = packet.dts
                packet.stream = stream
                made.mux(packet)
    assert [number_of(frame) for frame in read_frames(path, range(COUNT))] == list(range(COUNT))
    assert number_of(read_frames(path, [17])[0]) == 17


def test_frames_that_are_not_shown_have_no_number(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "a.webm", COUNT, **FILES["vp8.webm"])
    path = tmp_path / "b.webm"
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for place, packet in enumerate(given.demux(given.streams.video[0])):
            if packet.size:
                content = bytearray(bytes(packet))
                content[0] &= ~(1 << 4) if place == 3 else 0xFF  # RFC 6386, 9.1: show_frame
                changed = av.Packet(bytes(content))
                changed.pts, changed.dts, changed.stream = packet.pts, packet.dts, stream
                changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
                made.mux(changed)
    shown = [number for number in range(COUNT) if number != 3]
    assert probe_video(path).frames == COUNT - 1
    assert [number_of(frame) for frame in read_frames(path, range(COUNT - 1))] == shown


def test_numbers_begin_at_the_first_frame_that_can_be_shown(tmp_path: Path) -> None:
    source = write_numbered(tmp_path / "a.ts", COUNT, options=REORDERED)
    path = tmp_path / "b.ts"
    with av.open(str(source)) as given, av.open(str(path), "w") as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        for place, packet in enumerate(given.demux(given.streams.video[0])):
            if packet.size and place >= 4:  # inside the first group of pictures
                packet.stream = stream
                made.mux(packet)
    with av.open(str(path)) as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert 0 < len(shown) < COUNT
    assert probe_video(path).frames == len(shown)
    for number in (0, 1, len(shown) - 1):
        expected = torch.from_numpy(shown[number]).permute(2, 0, 1) / 255
        assert torch.equal(read_frames(path, [number])[0], expected)


# --- what is decoded and held


@dataclass
class Meter:
    """Counts openings and packets behind `open_video`."""

    opened: int = 0
    packets: int = 0
    container: Any = field(default=None, repr=False)

    def seek(self, *args: Any, **kwargs: Any) -> None:
        self.container.seek(*args, **kwargs)

    def demux(self, stream: Any) -> Iterator[Any]:
        for packet in self.container.demux(stream):
            self.packets += 1
            yield packet


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    found = Meter()

    @contextmanager
    def metered(path: Path) -> Iterator[tuple[Any, Any]]:
        with video_container.open_video(path) as (container, stream):
            found.container = container
            found.opened += 1
            yield found, stream

    monkeypatch.setattr(video_files, "open_video", metered)
    return found


GROUPS_OF_EIGHT: dict[str, dict[str, Any]] = {
    "a.mp4": {"options": REORDERED},
    "a.mkv": {"options": REORDERED},
    "a.ts": {"options": REORDERED},
    "a.webm": FILES["vp9.webm"],
    # frames that are shown before a key frame and follow it in the file, yet stand on it alone
    "leading.mp4": {
        "codec": "libx265",
        "options": {
            "x265-params": "keyint=8:min-keyint=8:bframes=2:b-adapt=0:open-gop=0:radl=2:scenecut=0"
            ":log-level=none",
            "preset": "ultrafast",
        },
    },
}


@pytest.mark.parametrize("name", GROUPS_OF_EIGHT)
def test_only_one_group_of_pictures_is_decoded_for_a_frame(
    tmp_path: Path, meter: Meter, name: str
) -> None:
    path = write_numbered(tmp_path / name, 120, **GROUPS_OF_EIGHT[name])
    assert number_of(read_frames(path, [102])[0]) == 102
    # a part of its group, the reordering delay, and the group before where a seek lands early
    assert 4 <= meter.packets <= 20 and meter.opened == 1


def test_a_whole_clip_is_read_in_one_run(tmp_path: Path, meter: Meter) -> None:
    path = write_numbered(tmp_path / "a.mp4", 60, options=REORDERED)
    read_frames(path, range(60))
    assert meter.opened == 1 and meter.packets <= 61


def test_walking_holds_one_frame_at_a_time(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 40, options=REORDERED)
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, frame in walk_frames(path, range(40)):
        seen.append(weakref.ref(frame))
        most = max(most, sum(known() is not None for known in seen))
    assert len(seen) == 40 and most <= 2


def test_more_than_memory_is_refused_but_can_be_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "a.mp4", 10)
    monkeypatch.setattr(video_files, "LARGEST_READ", 4 * 3 * 48 * 64 * 4)
    assert len(read_frames(path, range(4))) == 4
    with pytest.raises(RewardError, match=r"a.mp4: 5 frames of 64 x 48 would take"):
        read_frames(path, range(5))
    assert [number for number, _ in walk_frames(path, range(10))] == list(range(10))


# --- pixels


def set_display_matrix(path: Path, matrix: Sequence[float]) -> Path:
    """Write a, b, c, d of x' = a x + c y, y' = b x + d y into an MP4's track header."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes
    a, b, c, d = (round(value * 65536) for value in matrix)
    entries = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content[place : place + 36] = b"".join(e.to_bytes(4, "big", signed=True) for e in entries)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("matrix", "undo"),
    [
        ((0, -1, 1, 0), lambda x: torch.rot90(x, 1, dims=(1, 2))),
        ((-1, 0, 0, -1), lambda x: torch.rot90(x, 2, dims=(1, 2))),
        ((0, 1, -1, 0), lambda x: torch.rot90(x, 3, dims=(1, 2))),
        ((-1, 0, 0, 1), lambda x: x.flip(2)),
        ((1, 0, 0, -1), lambda x: x.flip(1)),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 2)),
        ((0, -1, -1, 0), lambda x: x.flip(1, 2).transpose(1, 2)),
    ],
)
def test_a_turned_or_mirrored_video_is_upright(tmp_path: Path, matrix, undo) -> None:  # type: ignore[no-untyped-def]
    plain = write_numbered(tmp_path / "a.mp4", 2)
    turned = set_display_matrix(write_numbered(tmp_path / "b.mp4", 2), matrix)
    expected = undo(read_frames(plain, [1])[0])
    assert torch.equal(read_frames(turned, [1])[0], expected)
    info = probe_video(turned)
    assert (info.height, info.width) == expected.shape[1:]


@pytest.mark.parametrize("matrix", [(0.8, 0.6, -0.6, 0.8), (2, 0, 0, 1), (1, 1, 0, 1)])
def test_a_video_turned_by_no_quarter_is_refused(tmp_path: Path, matrix: Sequence[float]) -> None:
    path = set_display_matrix(write_numbered(tmp_path / "a.mp4", 2), matrix)
    with pytest.raises(RewardError, match="turned by no quarter"):
        probe_video(path)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[..., 0] = 255
    picture[:, :8, 3] = 51
    picture[:, 8:, 3] = 255
    path = write_video(tmp_path / "a.mkv", [picture], codec="ffv1", pixels="bgra", source="rgba")
    frame = read_frames(path, [0])[0]
    assert torch.allclose(frame[:, 0, 0], torch.tensor([1.0, 0.8, 0.8]))
    assert torch.allclose(frame[:, 0, 15], torch.tensor([1.0, 0.0, 0.0]))


def test_grey_and_deep_pixels_become_rgb(tmp_path: Path) -> None:
    picture = numbered(0b10110)
    grey = read_frames(write_video(tmp_path / "a.mkv", [picture], codec="ffv1", pixels="gray"), [0])
    deep = write_video(tmp_path / "b.mkv", [picture], codec="ffv1", pixels="yuv444p10le")
    expected = torch.from_numpy(picture).permute(2, 0, 1) / 255
    assert torch.equal(grey[0, 0], grey[0, 2])
    assert (grey[0] - expected).abs().max() < 3 / 255
    assert (read_frames(deep, [0])[0] - expected).abs().max() < 2 / 255


# FFmpeg's number of a colour matrix: its weights of red and blue.
MATRICES = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range_are_those_of_the_file(
    tmp_path: Path, matrix: int, full: bool
) -> None:
    red, blue = MATRICES[matrix]
    rgb = np.array([200, 40, 90]) / 255
    y = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    cb, cr = (rgb[2] - y) / (2 * (1 - blue)), (rgb[0] - y) / (2 * (1 - red))
    planes = [255 * y, 128 + 255 * cb, 128 + 255 * cr]
    if not full:
        planes = [16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr]
    picture = np.stack([np.full((16, 16), round(plane), np.uint8) for plane in planes])
    path = write_video(
        tmp_path / "a.mkv",
        [picture],
        codec="ffv1",
        pixels="yuv444p",
        source="yuv444p",
        tags=(matrix, 2 if full else 1),
    )
    found = read_frames(path, [0])[0].mean(dim=(1, 2)).numpy()
    assert np.abs(found - rgb).max() < 2.5 / 255


# --- what a video says of itself


def test_time_of_a_constant_rate(tmp_path: Path) -> None:
    rate = Fraction(24000, 1001)
    for name in ("a.mp4", "a.mkv"):  # Matroska rounds to milliseconds
        info = probe_video(write_numbered(tmp_path / name, 24, rate=rate, options=REORDERED))
        assert info.fps == pytest.approx(float(rate), rel=1e-6)
        assert info.seconds == pytest.approx(24 / float(rate))
        assert not info.variable_rate and (info.width, info.height) == (64, 48)


def test_time_of_a_variable_rate(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", COUNT, options=REORDERED, milliseconds=UNEVEN)
    info = probe_video(path)
    assert info.variable_rate
    assert info.fps == pytest.approx(1000 * (COUNT - 1) / (UNEVEN[-1] - UNEVEN[0]), rel=1e-3)


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    info = probe_video(write_numbered(tmp_path / "a.mp4", 1))
    assert (info.frames, info.fps, info.variable_rate) == (1, 24.0, False)


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 5)
    assert probe_video(path).frames == 5
    write_numbered(path, 7)
    assert probe_video(path).frames == 7


@pytest.mark.parametrize("name", ["a:b.mp4", "frame%03d.mp4", "http:a.mp4", "blank ä.mp4"])
def test_names_are_names_and_nothing_else(tmp_path: Path, name: str) -> None:
    assert probe_video(write_numbered(tmp_path / name, 3)).frames == 3


def test_pyav_is_imported_late() -> None:
    """It takes a while, is not everybody's, and comes with GPL libraries."""
    for module in (video_files, video_container, video_index):
        tree = ast.parse(inspect.getsource(module))
        names = [
            name
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
        ]
        assert names and not any(str(name).partition(".")[0] == "av" for name in names)


# --- what cannot be read


CUT: dict[str, dict[str, Any]] = {
    "first.mp4": {"container": {"movflags": "faststart"}},
    "last.mp4": {},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mkv": {},
    "a.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "a.avi": {"codec": "mpeg4"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.ts": {},
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.98, 0.7, 0.4])
def test_a_cut_off_file_is_named_and_never_shorter(files: Path, name: str, share: float) -> None:
    whole = files / name
    if not whole.exists():
        write_numbered(whole, COUNT, **CUT[name])
    path = files / f"cut_{name}"
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    for look in (probe_video, lambda p: read_frames(p, [0])):
        with pytest.raises(RewardError, match=rf"cut_{name}: is cut off"):
            look(path)


def test_how_many_frames_are_whole_is_said(tmp_path: Path) -> None:
    path = write_numbered(
        tmp_path / "a.mp4", 30, options=PLAIN, container={"movflags": "faststart"}
    )
    with av.open(str(path)) as file:
        ends = [p.pos + p.size for p in file.demux(video=0) if p.size]
    content = path.read_bytes()
    path.write_bytes(content[: ends[19] + 5])  # twenty frames and five bytes
    with pytest.raises(RewardError, match="at least 20 of 30 frames are whole"):
        probe_video(path)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("share", [1, 2])  # the frame fails, or half of it is made up
def test_a_hole_in_the_middle_is_found_where_it_matters(
    tmp_path: Path, group: int, share: int
) -> None:
    path = write_numbered(tmp_path / "a.mp4", 24, options=PLAIN)
    with av.open(str(path)) as file:
        packets = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    start, size = packets[8 * group + 3]
    content = bytearray(path.read_bytes())
    content[start + 8 : start + size // share] = b"\x55" * (size // share - 8)
    path.write_bytes(content)
    with pytest.raises(RewardError, match=rf"a.mp4: is damaged after {8 * group + 3} whole frames"):
        read_frames(path, [8 * group + 6])
    assert number_of(read_frames(path, [20])[0]) == 20  # in a group of its own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a video at all " * 99, "is not a video"),
        (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nreal.mp4\n#EXT-X-ENDLIST\n",
            "not a video",
        ),
        (b"ffconcat version 1.0\nfile real.mp4\n", "is not a video"),
        (b"\x1a\x45\xdf\xa3", "is not a video"),
    ],
)
def test_what_is_no_video_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_numbered(tmp_path / "real.mp4", 2)  # what a playlist would open
    path = tmp_path / "other.mp4"
    path.write_bytes(content)
    with pytest.raises(RewardError, match=rf"other.mp4: .*{message}"):
        probe_video(path)


def test_pictures_sound_and_folders_are_no_videos(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "picture.mp4")
    with pytest.raises(RewardError, match=r"picture.mp4: is not a video"):
        probe_video(tmp_path / "picture.mp4")
    for name, codec in (("sound.mp4", "aac"), ("sound.mkv", "aac"), ("sound.wav", "pcm_s16le")):
        with pytest.raises(RewardError, match=rf"{name}: has no video stream \(only sound\)"):
            probe_video(write_sound(tmp_path / name, codec))
    with pytest.raises(RewardError, match="no such file"):
        probe_video(tmp_path / "none.mp4")
    with pytest.raises(RewardError, match="is a folder"):
        probe_video(tmp_path)


def test_a_video_without_frames_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", container_options={"movflags": "empty_moov"}) as file:
        stream = file.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        file.start_encoding()
    with pytest.raises(RewardError, match=r"a.mp4: has no frames"):
        probe_video(path)


def test_numbers_outside_the_clip_are_refused(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", 4)
    for number in (4, -1):
        with pytest.raises(RewardError, match=rf"has no frame {number}, only 0 to 3"):
            read_frames(path, [0, number])
    with pytest.raises(RewardError, match="no frame was asked for"):
        read_frames(path, [])


def test_a_change_of_size_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "a.h264", [numbered(0), numbered(1)])
    write_video(tmp_path / "b.h264", [numbered(2, 96, 64)])
    path = tmp_path / "c.h264"
    path.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    with pytest.raises(RewardError, match="changes its size at frame 2"):
        read_frames(path, range(3))


def test_frames_too_large_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_numbered(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(video_container, "LARGEST_FRAME", 64 * 48 - 1)
    with pytest.raises(RewardError, match="frames of 64 x 48 are too large"):
        probe_video(path)


@pytest.mark.parametrize("ending", [".m2ts", ".mts"])
def test_the_transport_stream_of_camcorders_is_read(tmp_path: Path, ending: str) -> None:
    """Its packets of 188 bytes have a time stamp of four before each."""
    path = tmp_path / f"a{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (12, 96, 128, 3), dtype=np.uint8)
    with av.open(str(path), "w", format="mpegts", options={"mpegts_m2ts_mode": "1"}) as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content[4::192].count(b"\x47") == len(content) // 192
    assert ending in VIDEO_SUFFIXES and probe_video(path).frames == 12


def test_common_endings_are_known() -> None:
    assert {".mp4", ".mov", ".mkv", ".webm", ".avi"} <= VIDEO_SUFFIXES
    assert ".gif" not in VIDEO_SUFFIXES  # a picture, whose first frame `media` reads
