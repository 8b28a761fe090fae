"""Renders whole data sets, parallel over processes: one folder per split."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from tpo_jax.data.moving_shapes.annotations import Annotations, annotate_image, annotate_video
from tpo_jax.data.moving_shapes.encode import encode_mp4, encode_png
from tpo_jax.data.moving_shapes.published import split_files
from tpo_jax.data.moving_shapes.render import render
from tpo_jax.data.moving_shapes.scene import simulate, simulate_image
from tpo_jax.data.moving_shapes.world import WorldConfig
from tpo_jax.data.workers import end_with_parent
from tpo_jax.errors import UserError

SPLITS = ("train", "validation", "test")
MEDIA = ("video", "image")
SUMMARY = "world.json"
CHUNK = 8  # scenes per piece of work


class BuildError(UserError):
    """A data set that cannot be written; the message says why and how to fix it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Some scenes of one split and media; `folder` is where the split is written."""

    folder: str
    split: str
    media: str
    seed: int
    indices: tuple[int, ...]
    config: WorldConfig


def scene_seed(seed: int, split: str, media: str, index: int) -> tuple[int, int, int, int]:
    """The seed of one scene; no two scenes of a data set share it, whatever the split sizes."""
    return (seed, SPLITS.index(split), MEDIA.index(media), index)


def scene_name(split: str, media: str, index: int) -> str:
    """File name without suffix, unique over splits and media."""
    return f"{split}_{index:06d}" if media == "video" else f"{split}_image_{index:06d}"


def run_job(job: Job) -> list[Annotations]:
    """Renders and writes the files of a job; returns their labels."""
    results = []
    for index in job.indices:
        seed = scene_seed(job.seed, job.split, job.media, index)
        name = scene_name(job.split, job.media, index)
        if job.media == "video":
            scene = simulate(seed, job.config)
            rendered = render(scene)
            results.append(annotate_video(scene, rendered, name))
            path = epath.Path(job.folder) / "videos" / f"{name}.mp4"
            path.write_bytes(encode_mp4(rendered.frames, job.config))
        else:
            scene = simulate_image(seed, job.config)
            rendered = render(scene)
            results.append(annotate_image(scene, rendered, name))
            path = epath.Path(job.folder) / "images" / f"{name}.png"
            path.write_bytes(encode_png(rendered.frames[0]))
    return results


def build(
    out: epath.PathLike,
    videos: Mapping[str, int],
    images: Mapping[str, int],
    seed: int,
    config: WorldConfig,
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> dict:
    """Writes OUT/<split>/ with media and annotations, and OUT/world.json; returns its content.

    Everything is written beside OUT and moved there at the end, so OUT is complete or absent. An
    OUT that was made by the same call is left as it is.

    Args:
      videos, images: how many per split ("train", "validation", "test").
      progress: called with the number of scenes just finished.

    Raises:
      BuildError: OUT holds something else, or a split is unknown.
    """
    out = epath.Path(out)
    summary = {
        "seed": seed,
        "videos": {s: videos.get(s, 0) for s in SPLITS},
        "images": {s: images.get(s, 0) for s in SPLITS},
        "world": dataclasses.asdict(config),
    }
    _check(out, videos, images, seed)
    if out.exists():
        return _existing(out, summary)
    partial = out.parent / f"{out.name}.partial"
    if partial.exists():
        partial.rmtree()
    jobs = _jobs(partial, videos, images, seed, config)
    _make_folders(partial, jobs)
    labels = _run_all(jobs, processes, progress)
    for split in dict.fromkeys(job.split for job in jobs):
        files = split_files(split, seed, config, labels[split, "video"], labels[split, "image"])
        _write(partial / split, files)
    (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    partial.rename(out)
    return summary


def _check(
    out: epath.Path, videos: Mapping[str, int], images: Mapping[str, int], seed: int
) -> None:
    for name, counts in (("videos", videos), ("images", images)):
        for split, count in counts.items():
            if split not in SPLITS:
                raise BuildError(f"{name}: split {split!r} is not one of {', '.join(SPLITS)}.")
            if count < 0:
                raise BuildError(f"{name}: {split}={count}, expected 0 or more.")
    if not sum(videos.values()) + sum(images.values()):
        raise BuildError(f"videos and images: both 0, so there is nothing to write to {out}.")
    if seed < 0:
        raise BuildError(f"seed: {seed}, expected 0 or more.")


def _existing(out: epath.Path, summary: dict) -> dict:
    """The content of a finished OUT, if it is what was asked for."""
    marker = out / SUMMARY
    if not marker.exists():
        raise BuildError(f"{out} exists and has no {SUMMARY}: choose another --out or remove it.")
    found = json.loads(marker.read_text())
    different = [key for key in summary if found.get(key) != summary[key]]
    if different:
        raise BuildError(
            f"{out} holds another data set ({', '.join(different)} differ, see {marker}): "
            "choose another --out or remove it."
        )
    return found


def _jobs(
    folder: epath.Path, videos: Mapping[str, int], images: Mapping[str, int], seed: int,
    config: WorldConfig,
) -> list[Job]:  # fmt: skip
    return [
        Job(str(folder / split), split, media, seed, tuple(range(i, min(i + CHUNK, count))), config)
        for media, counts in zip(MEDIA, (videos, images), strict=True)
        for split, count in counts.items()
        for i in range(0, count, CHUNK)
    ]


def _make_folders(partial: epath.Path, jobs: Sequence[Job]) -> None:
    for folder in {f"{job.folder}/{job.media}s" for job in jobs}:
        epath.Path(folder).mkdir(parents=True)


def _run_all(
    jobs: Sequence[Job], processes: int, progress: Callable[[int], None]
) -> dict[tuple[str, str], list[Annotations]]:
    """Labels by split and media, in order of the index."""
    labels = {(split, media): [] for split in SPLITS for media in MEDIA}
    if processes <= 1:
        for job in jobs:
            labels[job.split, job.media] += run_job(job)
            progress(len(job.indices))
        return labels
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        for job, result in zip(jobs, pool.map(run_job, jobs), strict=True):
            labels[job.split, job.media] += result
            progress(len(job.indices))
    return labels


def _write(folder: epath.Path, files: Mapping[str, str]) -> None:
    for parent in {(folder / name).parent for name in files}:
        parent.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
