"""What `experiments.benchmarks.loader` compares: the same clips of the same videos, loaded by our
pipeline and by a DataLoader of PyTorch that decodes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

FRAMES, SIZE, SECONDS, RATE = 16, 224, 30, 30
HEIGHT, WIDTH = 720, 1280
STORED_FPS = 2.0
ENCODINGS = ("raw", "jpeg")
OURS, READ_AHEAD = (*ENCODINGS, "video"), 2


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to load.

    Attributes:
      reader: "raw", "jpeg" or "video" of our pipeline; "decord" or "pyav" in a DataLoader.
      workers: processes; 0: this one.
      threads: of our pipeline; else of the decoder in each worker (0: the decoder's choice).
      batch: clips of a batch.
      inside: decord resizes every frame that it decodes; else PyTorch does the sampled ones.
    """

    reader: str
    workers: int = 0
    threads: int = 1
    batch: int = 8
    inside: bool = True


# The data.


def render(path: pathlib.Path, seed: int) -> None:
    """A slow pan over coloured noise, with some noise of its own in every frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2 * HEIGHT // 12, 2 * WIDTH // 12, 3), np.uint8)
    picture = av.VideoFrame.from_ndarray(coarse, format="rgb24").reformat(
        2 * WIDTH, 2 * HEIGHT, interpolation="BICUBIC"
    )
    world = picture.to_ndarray().astype(np.int16)
    grain = rng.normal(0, 2, (8, HEIGHT, WIDTH, 1)).astype(np.int16)
    phases = rng.uniform(0, 6.28, 2)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for index in range(SECONDS * RATE):
            y = int((np.sin(index / 97 + phases[0]) + 1) * HEIGHT / 2)
            x = int((np.sin(index / 61 + phases[1]) + 1) * WIDTH / 2)
            pixels = world[y : y + HEIGHT, x : x + WIDTH] + grain[index % len(grain)]
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_data(work: pathlib.Path, videos: int) -> dict[str, float]:
    """Renders videos and prepares them twice; CPU seconds a video of preparing, by encoding."""
    from tpo_jax import prepare

    media, annotations = work / "media", work / "annotations.jsonl"
    media.mkdir(parents=True, exist_ok=True)
    for number in range(videos):
        if not (path := media / f"{number}.mp4").exists():
            render(path.with_suffix(".part.mp4"), number)
            path.with_suffix(".part.mp4").rename(path)
    turns = [{"question": "What is shown?", "answer": "noise"}]
    annotations.write_text("".join(
        json.dumps({"video": f"{number}.mp4", "turns": turns}) + "\n" for number in range(videos)
    ))  # fmt: skip
    seconds = {}
    for encoding in ENCODINGS:
        out = work / encoding
        shutil.rmtree(out, ignore_errors=True)
        begin = time.process_time()
        status = prepare.main([
            "run", "--media", str(media), "--format", "native", "--annotations", str(annotations),
            "--out", str(out), "--fps", str(STORED_FPS), "--size", str(SIZE), "--encoding", encoding
        ])  # fmt: skip
        if status:
            raise SystemExit(f"prepare ended with status {status}")
        seconds[encoding] = (time.process_time() - begin) / videos
    return seconds


def sampled_times(work: pathlib.Path) -> dict[str, np.ndarray]:
    """float32[16] seconds of each video's frames, as our pipeline draws them."""
    from tpo_jax.data import sampling
    from tpo_jax.data.records import PreparedDataset

    dataset = PreparedDataset(work / "raw")
    times = {video: dataset.video_info(video).timestamps for video in dataset.videos}
    return {video: stamps[sampling.uniform(stamps, FRAMES, 0, SECONDS)]
            for video, stamps in times.items()}  # fmt: skip


# Our pipeline.


def our_batches(setting: Setting, work: pathlib.Path) -> Iterator[np.ndarray]:
    """uint8[B, 16, 224, 224, 3] without end."""
    from tpo_jax.data import video
    from tpo_jax.data.buckets import Bucket
    from tpo_jax.data.mixture import Source
    from tpo_jax.data.pipeline import Pipeline
    from tpo_jax.data.records import PreparedDataset
    from tpo_jax.interop import folder
    from tpo_jax.models import presets

    class Decoded(PreparedDataset):
        """The same videos, read from their files."""

        def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
            decoder = video.Decoder(work / "media" / video_id, STORED_FPS, size=SIZE)
            wanted = set(indices.tolist())
            found = {i: frame for i, (_, frame) in enumerate(decoder) if i in wanted}
            return np.stack([found[i] for i in indices.tolist()])

    base = pathlib.Path(presets.__file__).parents[1] / "assets" / "tiny_base"
    config = folder.load_config(base)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=SIZE))
    bucket = Bucket("clips", "video", setting.batch, FRAMES, branches=1, branch_tokens=32,
                    answers=8)  # fmt: skip
    dataset = Decoded(work / "raw") if setting.reader == "video" else PreparedDataset(
        work / setting.reader)  # fmt: skip
    source = Source(dataset, 1.0, {"conversation": 1.0})
    pipeline = Pipeline([source], folder.load_codec(base), config, (), [bucket], seed=0)
    batches = pipeline.iterator(threads=setting.threads, prefetch=READ_AHEAD,
                                workers=setting.workers)  # fmt: skip
    return (batch["frames"] for _, batch in batches)


# Decoding in a DataLoader.


class VideoFiles:
    """Random access to clips by decoding, as a map-style data set of PyTorch."""

    def __init__(self, setting: Setting, work: pathlib.Path, clips: int):
        self.setting, self.clips = setting, clips
        times = sampled_times(work)
        self.videos = [(os.fspath(work / "media" / name), t) for name, t in times.items()]

    def __len__(self) -> int:
        return self.clips

    def __getitem__(self, index: int) -> Any:
        path, times = self.videos[index % len(self.videos)]
        return {"decord": self._decord, "pyav": self._pyav}[self.setting.reader](path, times)

    def _decord(self, path: str, times: np.ndarray) -> Any:
        import decord
        import torch

        sizes = {"width": SIZE, "height": SIZE} if self.setting.inside else {}
        reader = decord.VideoReader(path, num_threads=self.setting.threads, **sizes)
        indices = np.rint(times * reader.get_avg_fps()).astype(int).tolist()
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy())
        if self.setting.inside:
            return frames
        frames = frames.permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(frames, (SIZE, SIZE), mode="bilinear",
                                                antialias=True)  # fmt: skip
        return small.permute(0, 2, 3, 1).contiguous()

    def _pyav(self, path: str, times: np.ndarray) -> Any:
        """One pass, decoding what lies between; only sampled frames are converted."""
        import torch

        found, wanted = [], iter(times.tolist())
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "AUTO", self.setting.threads
            target = next(wanted)
            for frame in container.decode(stream):
                if frame.time < target - 0.5 / RATE:
                    continue
                small = frame.reformat(SIZE, SIZE, "rgb24", interpolation="BILINEAR")
                found.append(small.to_ndarray())
                target = next(wanted, None)
                if target is None:
                    break
        return torch.from_numpy(np.stack(found))


def their_batches(setting: Setting, work: pathlib.Path, clips: int) -> Iterator[np.ndarray]:
    """uint8[B, 16, 224, 224, 3] in the order of the files, epoch after epoch; between two epochs
    nothing is read ahead."""
    import torch

    torch.set_num_threads(1)
    data = VideoFiles(setting, work, clips)
    more = {"prefetch_factor": 2, "persistent_workers": True} if setting.workers else {}
    loader = torch.utils.data.DataLoader(
        data, setting.batch, num_workers=setting.workers, sampler=range(len(data)), **more
    )
    while True:
        for batch in loader:
            yield batch.numpy()
