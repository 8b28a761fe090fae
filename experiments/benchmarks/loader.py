"""Clips a second from disk: our pipeline on prepared data against decoding videos in a DataLoader.

    python -m experiments.benchmarks.loader --work runs/loader --out experiments/results/benchmarks
    python -m experiments.benchmarks.loader --work runs/loader  # only how long steps wait

A clip is 16 frames of 224 x 224, spread evenly over a 720p H.264 video of 30 s at 30 frames a
second (x264 veryfast, crf 23, a key frame at least every 250 frames), from the same files:

  raw, jpeg   our pipeline on tables made by `python -m tpo_jax.prepare run --fps 2 --size 224`
  video       our pipeline, decoding the files with `tpo_jax.data.video` on every access
  decord      DataLoader of PyTorch with decord.VideoReader
  pyav        DataLoader of PyTorch with PyAV

Each loader has a process of its own. The DataLoaders are first tried at several numbers of workers
and threads, and with the resize inside and after decord's decoder; the fastest goes on. Rounds then
time all five one after the other in turning order while the others are idle; ratios are taken
within a round against the better DataLoader, and medians are reported. `core` figures are clips a
second of CPU time of the process and its children, which other work on the machine disturbs little.
Before that, frame i of every loader has to be closest to frame i of `raw`. What prepared data costs
once (decoding at `prepare`) is reported beside it. Linux only; decord may be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks.clip_loaders import (
    FRAMES,
    OURS,
    READ_AHEAD,
    SECONDS,
    Setting,
    our_batches,
    sampled_times,
    their_batches,
    write_data,
)

TARGETS = {"raw": 10.0, "jpeg": 3.0}
STEP_CLIPS, STEP_SECONDS = 32, 1.0
TICK = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of some clips: wall and CPU seconds, and bytes held by the process and its children."""

    clips: int
    wall: float
    cpu: float
    memory: int

    @property
    def per_second(self) -> float:
        return self.clips / self.wall

    @property
    def per_core(self) -> float:
        """Clips a second of CPU time."""
        return self.clips / self.cpu


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError):
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += family(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    total = 0
    for member in family(pid):
        with contextlib.suppress(FileNotFoundError):
            fields = pathlib.Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICK


def memory_bytes(pid: int) -> int:
    """Resident, pages that are shared between the members counted once."""
    total = 0
    for member in family(pid):
        with contextlib.suppress(FileNotFoundError):
            text = pathlib.Path(f"/proc/{member}/smaps_rollup").read_text()
            total += 1024 * int(text.split("Pss:")[1].split()[0])
    return total


class Loader:
    """A loader in a process of its own.

    Args:
      clips: of one timing.
      cores: that it may run on; None: all.
    """

    def __init__(self, setting: Setting, work: pathlib.Path, clips: int,
                 cores: set[int] | None = None):  # fmt: skip
        self.setting, self.clips = setting, clips
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(setting, work, clips, cores, theirs))
        self._process.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in reversed(family(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.join()

    def ask(self, batches: int, pause: float = 0.0, frames: bool = False) -> Any:
        """(seconds of each batch, CPU seconds, bytes), or the frames of the first batch."""
        self._pipe.send((batches, pause, frames))
        return self._pipe.recv()

    def time(self) -> Timing:
        """Our pipeline in its steady state: what it has read ahead is thrown away before. A
        DataLoader from the first to the last batch of an epoch."""
        if self.setting.reader in OURS:
            self.ask(READ_AHEAD + self.setting.threads)
        seconds, cpu, memory = self.ask(self.clips // self.setting.batch)
        self._rest()
        return Timing(self.clips, sum(seconds), cpu, memory)

    def _rest(self) -> None:
        """Until it has read ahead all that it will."""
        before = -1.0
        while (now := cpu_seconds(self._process.pid)) > before + 0.02:
            before = now
            time.sleep(0.25)


def _serve(setting: Setting, work: pathlib.Path, clips: int, cores: set[int] | None,
           pipe: Any) -> None:  # fmt: skip
    if cores:
        os.sched_setaffinity(0, cores)
    if setting.reader in OURS:
        batches = our_batches(setting, work)
    else:
        batches = their_batches(setting, work, clips)
    epoch = clips // setting.batch
    for _ in range(1 if setting.reader in OURS else epoch):
        next(batches)  # whatever starts at the first use
    while True:
        count, pause, frames = pipe.recv()
        if frames:
            pipe.send([next(batches) for _ in range(count)][0])
            continue
        begin, seconds = cpu_seconds(os.getpid()), []
        for _ in range(count):
            time.sleep(pause)
            start = time.perf_counter()
            next(batches)
            seconds.append(time.perf_counter() - start)
        pipe.send((seconds, cpu_seconds(os.getpid()) - begin, memory_bytes(os.getpid())))


def check_same_frames(loaders: dict[str, Loader], work: pathlib.Path) -> dict[str, float]:
    """Mean difference of grey levels to `raw`; raises if some frame is closer to another one."""
    from tpo_jax.data.records import PreparedDataset

    times, dataset = sampled_times(work), PreparedDataset(work / "raw")
    stored = np.stack([
        dataset.frames(v, np.searchsorted(dataset.video_info(v).timestamps, t - 1e-4))
        for v, t in times.items()
    ]).astype(np.float32)  # fmt: skip
    found = {}
    for name, loader in loaders.items():
        clip = loader.ask(loader.clips // loader.setting.batch, frames=True)[0].astype(np.float32)
        differences = np.abs(clip[None, :, None] - stored[:, None]).mean((3, 4, 5))  # [V, 16, 16]
        video = int(differences.trace(axis1=1, axis2=2).argmin())
        closest = differences[video].argmin(axis=1)
        if closest.tolist() != list(range(FRAMES)):
            raise AssertionError(f"{name}: its frames are those of {closest} in raw")
        found[name] = float(differences[video].trace() / FRAMES)
    return found


def best_setting(settings: list[Setting], work: pathlib.Path, clips: int,
                 say: Callable[..., None]) -> tuple[Setting, list[dict[str, Any]]]:  # fmt: skip
    """The one with the most clips a second, and all that were tried."""
    tried = []
    for setting in settings:
        with Loader(setting, work, clips) as loader:
            timing = loader.time()
        tried.append((timing.per_second, setting))
        say(f"{setting}: {timing.per_second:.2f} clips/s, {timing.per_core:.2f} a core")
    best = max(tried, key=lambda pair: pair[0])[1]
    return best, [dataclasses.asdict(s) | {"clips_per_second": rate} for rate, s in tried]


def rounds_of(
    loaders: dict[str, Loader], rounds: int, say: Callable[..., None]
) -> dict[str, list[Timing]]:
    """{loader: timing of each round}, in turning order."""
    names, found = list(loaders), {name: [] for name in loaders}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(loaders[name].time())
        rates = {n: f"{t[-1].per_second:.2f} ({t[-1].per_core:.2f})" for n, t in found.items()}
        say(f"round {number}: clips/s (a core) {rates}")
    return found


def ratios(found: dict[str, list[Timing]], theirs: list[str]) -> dict[str, dict[str, Any]]:
    """Of our loaders to the better DataLoader of the same round."""
    rows = {}
    for name in set(found) - set(theirs):
        row: dict[str, Any] = {"target": TARGETS.get(name)}
        for kind in ("per_second", "per_core"):
            each = [
                getattr(mine, kind) / max(getattr(found[n][i], kind) for n in theirs)
                for i, mine in enumerate(found[name])
            ]
            row[kind], row[f"{kind}_least"] = statistics.median(each), min(each)
        if row["target"]:
            row["met"] = min(row["per_second"], row["per_core"]) >= row["target"]
        rows[name] = row
    return rows


def scaling(reader: str, work: pathlib.Path, clips: int) -> list[dict[str, Any]]:
    """Clips a second over cores, threads and worker processes."""
    rows = []
    cores = sorted(os.sched_getaffinity(0))
    for count, threads, workers in ((1, 1, 0), (2, 2, 0), (2, 4, 0), (2, 1, 1), (2, 1, 2)):
        setting = Setting(reader, workers, threads)
        with Loader(setting, work, clips, set(cores[:count])) as loader:
            timing = loader.time()
        rows.append({"cores": count, "threads": threads, "workers": workers,
                     "clips_per_second": timing.per_second, "clips_per_core": timing.per_core,
                     "memory": timing.memory})  # fmt: skip
    return rows


def data_wait(reader: str, work: pathlib.Path, cores: int, steps: int) -> dict[str, Any]:
    """How long steps of a second, of 32 clips each, wait for data when loading has few cores."""
    setting = Setting(reader, threads=cores, batch=STEP_CLIPS)
    with Loader(setting, work, 0, set(sorted(os.sched_getaffinity(0))[:cores])) as loader:
        loader.ask(2, STEP_SECONDS)
        seconds, cpu, memory = loader.ask(steps, STEP_SECONDS)
    return {"cores": cores, "steps": steps, "memory": memory, "cpu_seconds_a_step": cpu / steps,
            "wait_share": sum(seconds) / (sum(seconds) + steps * STEP_SECONDS),
            "longest_wait": max(seconds)}  # fmt: skip


def waits(work: pathlib.Path, cores: int) -> dict[str, list[dict[str, Any]]]:
    """`data_wait` of twelve steps by table, on one core and more."""
    return {name: [data_wait(name, work, n, 12) for n in range(1, cores + 1)] for name in TARGETS}


def run(work: pathlib.Path, videos: int, rounds: int, clips: dict[str, int],
        say: Callable[..., None]) -> dict[str, Any]:  # fmt: skip
    """The whole benchmark; see the module."""
    prepared = write_data(work, videos)
    cores = len(os.sched_getaffinity(0))
    grids = {"pyav": [Setting("pyav", w, t, 2) for w, t in ((cores, 1), (1, cores))]}
    if importlib.util.find_spec("decord"):
        grids["decord"] = [
            Setting("decord", w, t, 2, inside)
            for w, t, inside in ((cores, 1, True), (cores, 1, False))
        ]
    settings = {name: Setting(name, threads=cores) for name in ("raw", "jpeg")}
    settings["video"] = Setting("video", threads=cores, batch=1)
    tried = {}
    for name, grid in grids.items():
        settings[name], tried[name] = best_setting(grid, work, clips[name], say)
    with contextlib.ExitStack() as stack:
        loaders = {n: stack.enter_context(Loader(s, work, clips[n]))
                   for n, s in settings.items()}  # fmt: skip
        differences = check_same_frames(loaders, work)
        found = rounds_of(loaders, rounds, say)
    bits = [8 * p.stat().st_size / SECONDS for p in (work / "media").glob("*.mp4")]
    return {
        "ratios": ratios(found, list(grids)),
        "loaders": {name: summary(settings[name], timings) for name, timings in found.items()},
        "settings_tried": tried,
        "scaling": {name: scaling(name, work, clips[name]) for name in TARGETS},
        "data_wait": waits(work, cores),
        "prepare_cpu_seconds_a_video": prepared,
        "bytes_a_video": {name: sum(f.stat().st_size for f in (work / name).rglob("*")) / videos
                          for name in ("media", *TARGETS)},
        "mean_difference_to_raw": differences,
        "videos": videos, "megabits_a_second": statistics.mean(bits) / 1e6, "rounds": rounds,
        "cores": cores, "load_average": os.getloadavg(), "versions": versions(),
    }  # fmt: skip


def summary(setting: Setting, timings: list[Timing]) -> dict[str, Any]:
    row: dict[str, Any] = {"setting": dataclasses.asdict(setting), "clips": timings[0].clips}
    for kind in ("per_second", "per_core", "memory"):
        row[kind] = statistics.median(getattr(timing, kind) for timing in timings)
    return row


def versions() -> dict[str, str]:
    import importlib.metadata

    names = ["av", "grain", "jax", "numpy", "pillow", "torch"]
    names += ["decord"] if importlib.util.find_spec("decord") else []
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=pathlib.Path, required=True, help="folder for videos, kept, and tables")
    add("--out", type=pathlib.Path, help="folder for loader.json; without it, waits are printed")
    add("--videos", type=int, default=4)
    add("--rounds", type=int, default=3)
    flags = parser.parse_args()
    if flags.out is None:
        write_data(flags.work, flags.videos)
        print(json.dumps(waits(flags.work, len(os.sched_getaffinity(0))), indent=2))
        return
    clips = {"raw": 192, "jpeg": 96, "video": 4, "decord": 4, "pyav": 4}
    result = run(flags.work, flags.videos, flags.rounds, clips, lambda x: print(x, flush=True))
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "loader.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
