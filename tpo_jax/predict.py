"""Answers questions about videos and images; head calls are run, written into the text and drawn.

    python -m tpo_jax.predict --model=runs/demo/stage3/model --video=clip.mp4 \\
        --prompt='When does this happen: "the red circle blinks"?' --out=predictions
    python -m tpo_jax.predict --model=runs/demo/stage3/model --video=clip.mp4 \\
        --prompt='Where does the red circle at <box> go?' --box=0.1,0.2,0.3,0.4 \\
        --box_time=2.5
    python -m tpo_jax.predict --model=runs/demo/stage3/model --input=list.jsonl --out=predictions

A line of the list is {"video": FILE, "prompt": TEXT} and, if wanted, "id", "box" (normalised x1,
y1, x2, y2; its place in the prompt is <box>; or a list of such boxes, one for each <box>),
"box_time" (seconds: the frame that this box is drawn on; by default the first that is shown; or a
list), "points" (normalised [x, y] each, [x, y, 0] for one that is not on the thing that is meant;
for the SAM 2 head), "point_time", "time" (seconds: the frame that a box in the answer is for),
"start" and "end" (seconds). Files are relative to the list. The folder then holds one
annotated mp4 (video) or PNG (image) per question beside NAME.json, or results.jsonl for a list.
Masks are made of every frame of the file, not only of those that the language model is shown, and
the mp4 then has them all; --mask_fps=5 takes five a second, --mask_fps=0 those that are shown. A
list that was stopped, even by kill -9, goes on after its last whole batch; lines that failed are
tried again; settings.json keeps what the answers were made with, and with other weights,
--frames, --mask_fps, --max_new or --max_calls it does not go on. The exit status is 1 if a question
failed.
Model, list and --out may be gs:// paths; videos are local files.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath

from tpo_jax.data import files, video
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.pipeline import row_builder, shown_frames
from tpo_jax.data.records import Example, Turn
from tpo_jax.data.rows import BranchPlan, RowBuilder, RowPlan, row_id, stack_rows
from tpo_jax.data.text import TextCodec
from tpo_jax.data.tiles import level_of
from tpo_jax.errors import MissingFile, Parser, UserError, report
from tpo_jax.generation import draw
from tpo_jax.generation.requests import (
    Clip,
    Request,
    RequestError,
    make_request,
    prompt_length,
    read_list,
)
from tpo_jax.generation.rles import Rles
from tpo_jax.generation.routing import RoutedAnswer, Router
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys
from tpo_jax.generation.whole_video import Film
from tpo_jax.interop.folder import load_model
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.tiling import tiling_of
from tpo_jax.models.heads import HEADS, ClipInfo
from tpo_jax.models.heads.listed import load_listed
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.hashes import hash_weights

SETTINGS, RESULTS = "settings.json", "results.jsonl"
MAX_CALLS = 4  # of heads in one answer; each takes memory, made or not
_TIME_IN_PROMPT = re.compile(r"\bat (\d+(?:\.\d+)?) s\b")


class Predictor:
    """One model, ready to answer requests in batches of fixed shapes."""

    def __init__(self, config: ModelConfig, params: Any, codec: TextCodec, *, prompt_tokens: int,
                 batch_size: int, max_new: int, max_calls: int = MAX_CALLS,
                 features: FeatureStore | None = None, mask_fps: float | None = 0.0,
                 boxes: int = 1, points: int = 0, frames: int = 0):
        self.frames = shown_frames(codec, config, frames)
        self.features, self.mask_fps, self.points = features, mask_fps, points
        self.kinds = [kind for kind in ("clip_features", "text_features") if getattr(config, kind)]
        self.config, self.codec, self.batch_size = config, codec, batch_size
        self.params = jax.tree.map(jax.numpy.asarray, params)
        model = FunctionalModel(config)
        self.sampler = Sampler(model, codec, Sampling(max_new=max_new, events=max_calls))
        self.router = Router(model, codec)
        self.prompt_tokens, self.boxes = prompt_tokens, boxes
        self.tiled = tiling_of(config) is not None
        self._builders: dict[tuple[str, int], RowBuilder] = {}

    def shape_of(self, clip: Clip) -> tuple[str, int]:
        """Medium and tiles of the rows that a clip belongs to; those of one shape go together."""
        if clip.media == "video":
            return "video", 0
        return "image", level_of(self.config, clip.video_info(""))

    def builder(self, media: str, tiles: int) -> RowBuilder:
        """The builder of the rows of one shape."""
        if (media, tiles) not in self._builders:
            self._builders[media, tiles] = row_builder(self.codec, self.config, Bucket(
                name=f"predict_{media}", media=media, batch_size=self.batch_size,
                frames=self.frames if media == "video" else 1, branches=1,
                branch_tokens=self.prompt_tokens, answers=1, windows=1,
                mask_size=self.config.mask_size, tiles=tiles,
                slots={"box": self.boxes} if self.config.heads else {}))
        return self._builders[media, tiles]

    def answer(self, requests: Sequence[Request], clips: Sequence[Clip]
               ) -> list[tuple[RoutedAnswer, Iterable[np.ndarray], np.ndarray]]:
        """At most `batch_size` requests of one shape: answer, frames to draw and their times.

        Returns:
          (answer, n of uint8[h, w, 3], float[n] seconds) per request: the frames that the language
          model is shown, or those that masks are made of.
        """
        builder = self.builder(*self.shape_of(clips[0]))
        plans = [_plan(request, clip) for request, clip in zip(requests, clips, strict=True)]
        rows = [builder.build(plan, row_id("predict", i)) for i, plan in enumerate(plans)]
        batch = stack_rows(rows + [builder.blank()] * (self.batch_size - len(rows)))
        context = self.sampler.prefill(self.params, batch)
        keys = branch_keys(0, np.zeros((self.batch_size, 1), np.uint32))
        generation = self.sampler.generate(self.params, context, batch, keys)
        infos = [_clip_info(request, clip, plan, row) for request, clip, plan, row in zip(
            requests, clips, plans, rows, strict=True)]
        films = [self._film(clip, plan, builder) for clip, plan in zip(clips, plans, strict=True)]
        answers = self.router.route(self.params, context, batch, generation, infos, films=films,
                                    points=self._points(requests, rows))
        return [(answer, *self._to_draw(answer, film, clip, builder.frame_indices(plan)))
                for (answer,), film, clip, plan in zip(answers, films, clips, plans, strict=True)]

    def _points(self, requests: Sequence[Request], rows: Sequence[Mapping[str, Any]]
                ) -> dict[str, np.ndarray] | None:
        """What `Router.route` takes; None where nobody points."""
        if not self.points:
            return None
        B, P = self.batch_size, self.points
        points = {"points": np.zeros((B, P, 2), np.float32),
                  "labels": np.full((B, P), -1, np.int32), "frame": np.zeros(B, np.int32)}
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            for j, (x, y, label) in enumerate(request.points):
                points["points"][i, j], points["labels"][i, j] = (x, y), label
            if request.boxes:
                points["frame"][i] = row["slots"]["box"]["frame"][0]
            elif request.point_time is not None:
                times = row["frame_times"][row["frame_valid"]]
                points["frame"][i] = np.abs(times - request.point_time).argmin()
        return points

    def _film(self, clip: Clip, plan: RowPlan, builder: RowBuilder) -> Film | None:
        """The file, whose frames masks are made of beyond those that are shown; a model that sees
        one frame of a video has no place for others."""
        if clip.media == "image" or self.mask_fps == 0 or builder.bucket.frames == 1:
            return None
        return Film(clip.path, clip.size, plan.start, plan.end, self.mask_fps, builder.prepare)

    def _to_draw(self, answer: RoutedAnswer, film: Film | None, clip: Clip, shown: np.ndarray
                 ) -> tuple[Iterable[np.ndarray], np.ndarray]:
        """Frames and their times; `shown` int[n], the numbers of those that are shown."""
        masks = [event.result for event in answer.events if event.task == "mask"]
        if film and masks and isinstance(masks[0]["masks"], Rles):
            return film.pictures(), np.asarray(masks[0]["times"])
        return clip.frames("", shown), clip.times[shown]


def _plan(request: Request, clip: Clip) -> RowPlan:
    end = request.end if request.end is not None else clip.duration
    targets = {}
    if request.boxes:
        targets = {"input_boxes": request.boxes, "input_times": request.box_times}
    example = Example(request.id, request.id, clip.media, "conversation", "predict",
                      request.start, end, (Turn(request.prompt, ""),), targets)
    branch = BranchPlan(example, 0, request.prompt, None)
    return RowPlan(clip, request.id, request.start, end, (branch,))


def _clip_info(request: Request, clip: Clip, plan: RowPlan, row: dict[str, Any]) -> ClipInfo:
    """Bounds, times and size; the frame asked about is that of `time`, or named in the prompt as
    "at 4 s", or the middle one."""
    count = int(row["frame_valid"].sum())
    named = _TIME_IN_PROMPT.search(request.prompt)
    time = request.time if request.time is not None else named and float(named[1])
    times = row["frame_times"][:count]
    frame = count // 2 if time is None else int(np.argmin(np.abs(times - time)))
    return ClipInfo(plan.start, plan.end, row["frame_times"], row["frame_valid"],
                    clip.probe.height, clip.probe.width, frame)


def write_prediction(out: epath.Path, request: Request, answer: RoutedAnswer,
                     frames: Iterable[np.ndarray], times: np.ndarray, media: str
                     ) -> dict[str, Any]:
    """Draws the answer and returns its record."""
    events = [vars(event) for event in answer.events]
    pages = draw.annotate(frames, times, request.prompt, answer.text, events)
    name = f"{request.id}.mp4" if media == "video" else f"{request.id}.png"
    if media == "video":
        interval = float(times[-1] - times[0]) / max(len(times) - 1, 1)
        draw.write_mp4(out / name, pages, 1 / interval if interval else 1.0)
    else:
        draw.write_png(out / name, next(pages))
    return {"id": request.id, "video": str(request.video), "prompt": request.prompt,
            "media": media, **answer.to_json(), "annotated": name}


def read_results(path: epath.Path, requests: Sequence[Request]) -> dict[str, dict[str, Any]]:
    """Finished records by id. A last line that was cut off is not finished; failures neither."""
    if not path.exists():
        return {}
    asked = {request.id: request for request in requests}
    done = {}
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        record = json.loads(line)
        request = asked.get(record["id"])
        if request and (record["video"], record["prompt"]) != (str(request.video), request.prompt):
            raise RequestError(
                f"{path}: id {record['id']!r} was {record['prompt']!r} about {record['video']}, "
                f"now it is {request.prompt!r} about {request.video}; give another --out")
        done.pop(record["id"], None)
        if "error" not in record:
            done[record["id"]] = record
    return done


def records_of(predictor: Predictor, requests: Sequence[Request],
               out: epath.Path) -> Iterator[list[dict[str, Any]]]:
    """The records of each batch; a file that cannot be read gives one {"id", "error"} by itself."""
    waiting: dict[tuple[str, int], list[tuple[Request, Clip]]] = {}

    def failed(request: Request, error: Exception) -> dict[str, Any]:
        return {"id": request.id, "video": str(request.video), "prompt": request.prompt,
                "error": str(error)}

    def answer(shape: tuple[str, int]) -> list[dict[str, Any]]:
        asked, unread = waiting.pop(shape), []
        while asked:
            try:
                results = predictor.answer(*zip(*asked, strict=True))
                return unread + [write_prediction(out, request, *result, shape[0])
                                 for (request, _), result in zip(asked, results, strict=True)]
            except video.VideoError as error:  # masks read it again, from its middle
                bad = [request for request, clip in asked if str(clip.path) == error.file]
                if not bad:
                    raise
                unread += [failed(request, error) for request in bad]
                asked = [(request, clip) for request, clip in asked if request not in bad]
        return unread

    for request in requests:
        try:
            clip = Clip.read(request, predictor.features, predictor.kinds,
                             whole_images=predictor.tiled)
        except (video.VideoError, ValueError) as error:
            yield [failed(request, error)]
            continue
        shape = predictor.shape_of(clip)
        waiting.setdefault(shape, []).append((request, clip))
        if len(waiting[shape]) == predictor.batch_size:
            yield answer(shape)
    for shape in sorted(waiting, reverse=True):
        yield answer(shape)


def keep_settings(out: epath.Path, settings: Mapping[str, Any]) -> None:
    """Writes what the answers of a list are made with; RequestError where others are there."""
    path = out / SETTINGS
    if (out / RESULTS).exists():
        there = json.loads(path.read_text("utf-8")) if path.exists() else {}
        lines = [f"  {name}: there {there.get(name)!r}, now {settings[name]!r}"
                 for name in settings if there.get(name) != settings[name]]
        if lines:
            raise RequestError("\n".join([
                f"{out / RESULTS}: holds answers that were made otherwise:",
                *lines, "give another --out"]))
    files.write(path, json.dumps(settings, indent=2) + "\n")


def run_list(predictor: Predictor, requests: Sequence[Request], out: epath.Path) -> int:
    """Answers into results.jsonl what is not there yet; returns the number of failed requests."""
    path = out / RESULTS
    done = read_results(path, requests)
    sampling = predictor.sampler.sampling
    keep_settings(out, {"weights": hash_weights(predictor.params), "mask_fps": predictor.mask_fps,
                        "max_new": sampling.max_new, "max_calls": sampling.events,
                        "frames": predictor.frames})
    # Without failures and a cut line.
    lines = files.Lines(path, [json.dumps(record) for record in done.values()])
    todo = [request for request in requests if request.id not in done]
    failed = 0
    with tqdm.tqdm(total=len(requests), initial=len(requests) - len(todo), desc="predict",
                   unit="question") as bar:
        for records in records_of(predictor, todo, out):
            for record in records:
                lines.append(json.dumps(record))
                failed += "error" in record
                bar.write(f"{record['id']}: {record.get('text', record.get('error'))}")
            lines.flush()
            bar.update(len(records))
    lines.close()
    return failed


def run_one(predictor: Predictor, request: Request, out: epath.Path) -> int:
    """Answers one request into NAME.json; returns the number of failed requests."""
    ((record,),) = records_of(predictor, [request], out)
    if "error" in record:
        print(f"error: {record['error']}", file=sys.stderr)
        return 1
    files.write(out / f"{request.id}.json", json.dumps(record, indent=2) + "\n")
    print(record["text"])
    print(out / record["annotated"])
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m tpo_jax.predict", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="model folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--video", help="video or image file")
    what.add_argument("--input", help="JSONL list of questions")
    add("--prompt", help="question about --video; <box> stands for --box")
    add("--box", action="append",
        help="normalised x1,y1,x2,y2 of a box that the question is about; once for every <box>")
    add("--box_time", type=float, action="append",
        help="seconds of the frame that --box is drawn on (default: the first that is shown)")
    add("--point", action="append",
        help="normalised x,y of a point on the thing that is meant, or x,y,0 of one that is not on "
             "it; for a model with a head that reads points (sam2); as often as you like")
    add("--point_time", type=float,
        help="seconds of the frame that the points are on (default: the first that is shown)")
    add("--time", type=float, help="seconds of the frame that a box in the answer is for")
    add("--frames", type=int, default=0,
        help="frames of a video that the language model is shown (default: as many as the model "
             "was published with, else as it takes)")
    add("--mask_fps", type=float,
        help="frames a second that masks are made of; 0: those that the language model is shown "
             "(default: every frame of the file)")
    add("--features", default="",
        help="folder with the clip features of the videos, and the text features of the questions, "
             "for a model whose head reads them")
    add("--out", default="predictions", help="output folder, local or gs:// (default: "
        "%(default)s)")
    add("--max_new", type=int, default=64, help="answer tokens at most (default: %(default)s)")
    add("--max_calls", type=int, default=MAX_CALLS,
        help="calls of heads in one answer at most (default: %(default)s)")
    add("--batch_size", type=int, default=8, help="questions at a time (default: %(default)s)")
    flags = parser.parse_args(arguments)
    if flags.video and not flags.prompt:
        parser.error("--video needs --prompt")
    if flags.frames < 0:
        parser.error(f"--frames: {flags.frames}, expected 1 or more")
    if flags.mask_fps is not None and not 0 <= flags.mask_fps < 1e4:
        parser.error(f"--mask_fps: {flags.mask_fps:g}, expected frames a second, 0 or more")
    for name in ("max_new", "max_calls"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name}: {getattr(flags, name)}, expected 1 or more")
    own = ("prompt", "box", "box_time", "point", "point_time", "time")
    if flags.input and any(getattr(flags, name) is not None for name in own):
        parser.error(
            f"{', '.join(f'--{name}' for name in own)} belong to --video; a list has its own")
    return flags


def requests_of(flags: argparse.Namespace) -> list[Request]:
    """The list, or the one question of the command line."""
    if flags.input:
        return read_list(epath.Path(flags.input))
    boxes, points = ([[_number(value) for value in text.split(",")] for text in given or ()]
                     for given in (flags.box, flags.point))
    stem = re.sub(r"[^\w.-]", "_", pathlib.Path(flags.video).stem)
    entry = {"id": stem, "video": flags.video, "prompt": flags.prompt,
             "box": boxes or None, "box_time": flags.box_time, "points": points or None,
             "point_time": flags.point_time, "time": flags.time}
    request = make_request("command line", entry, pathlib.Path())
    if not request.video.exists():  # of a list, such a line is one that failed
        raise MissingFile(f"--video: {flags.video} does not exist; correct the path")
    return [request]


def most_points(config: ModelConfig, requests: Sequence[Request]) -> int:
    """Of one request; RequestError where no head of the model reads points."""
    pointing = next((request for request in requests if request.points), None)
    if pointing and not any(HEADS[name].reads_points for name in config.heads):
        raise RequestError(
            f"{pointing.id}: points: {list(pointing.points)}: the heads of the model, "
            f"{list(config.heads)}, read none; draw a box, or take a model with "
            f"{[name for name, head in HEADS.items() if head.reads_points]}")
    return max(len(request.points) for request in requests)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # `make_request` names it


def open_features(folder: str, config: ModelConfig) -> FeatureStore | None:
    """The features that the model reads; refused where they are missing, others, or not read."""
    read = config.clip_features or config.text_features
    if read is None:
        if folder:
            raise RequestError(f"--features={folder}: no head of the model reads any; leave it out")
        return None
    if not folder:
        raise RequestError(
            f"--features is missing: a head of the model reads {read}; name the "
            "folder that has them of these videos (`python -m tpo_jax.prepare features`)")
    store = FeatureStore(folder)
    fix = "give those that the model was trained with"
    store.require(config.clip_features, config.text_features, fix)
    return store


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    load_listed()
    flags = parse(arguments)
    out = epath.Path(flags.out)
    try:
        requests = requests_of(flags)
        config, params, codec = load_model(flags.model)
        predictor = Predictor(
            config, params, codec, prompt_tokens=prompt_length(codec, requests),
            batch_size=min(flags.batch_size, len(requests)), max_new=flags.max_new,
            max_calls=flags.max_calls, features=open_features(flags.features, config),
            mask_fps=flags.mask_fps,
            boxes=max(1, *(len(request.boxes) for request in requests)),
            points=most_points(config, requests), frames=flags.frames)
        out.mkdir(parents=True, exist_ok=True)
        if flags.video:
            return run_one(predictor, requests[0], out)
        failed = run_list(predictor, requests, out)
    except UserError as error:
        return report(error)
    print(f"{out / RESULTS}: {len(requests) - failed} answered, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
