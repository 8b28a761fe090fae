"""Scores a model on held-out videos, the floors that it is read against, or a submission file.

    python -m tpo_jax.evaluate --model=runs/demo/stage3/model --data=runs/demo/data/test \\
        --pairs=runs/demo/pairs/test/pairs.jsonl --out=runs/demo/eval/stage3.json
    python -m tpo_jax.evaluate --model=runs/demo/blind/model --data=runs/demo/data/test \\
        --evidence=blind --out=runs/demo/eval/blind.json
    python -m tpo_jax.evaluate --floors_from=runs/demo/data/train \\
        --data=runs/demo/data/test --blind=runs/demo/eval/blind.json \\
        --middle_frame=runs/demo/eval/middle_frame.json --out=runs/demo/eval/floors.json
    python -m tpo_jax.evaluate --model=runs/demo/dpo/model --data=runs/demo/data/test \\
        --floors=runs/demo/eval/floors.json --out=dpo.json
    python -m tpo_jax.evaluate --data=runs/demo/data/test --tasks=preference \\
        --pairs=runs/demo/pairs/test/pairs.jsonl \\
        --model=runs/demo/stage1/model --out=stage1.json \\
        --model=runs/demo/stage2/model --out=stage2.json
    python -m tpo_jax.evaluate --model=runs/mine/model --data=prepared/valid_u --tasks=mask \\
        --mask_frames=all --benchmark=mevis --submission=out/valid_u --out=eval.json
    python -m tpo_jax.evaluate --predictions=preds.jsonl --benchmark=qvhighlights \\
        --annotations=highlight_val_release.jsonl

Multiple choice is decided by the likelihood of the options. Masks and tracks are scored on the
frames that the language model is shown; with --mask_frames=all the heads are taken over every frame
that the prepared folder stores, and every annotated frame is scored once, as benchmarks do (prepare
with --fps of the annotations' rate). --submission then writes the files that the programs of
MeViS, Ref-YouTube-VOS, DAVIS, GOT-10k and LaSOT score, also about splits that are published without
labels (prepare with --unlabelled), which are in no metric. docs/metrics.md says which metrics are
those of LaSOT, GOT-10k, DAVIS and image segmentation. Head metrics come from free generation:
where the model does not emit the head's routing token they are 0. Metrics under "forced/" give the
head its slot in the labelled answer instead. Intervals are 95 % bootstrap intervals over videos.
A submission file is scored as the benchmark's official program scores it, in percent; no model is
loaded. Several models are scored one after another, each with the --out of its place. On SIGTERM a
model's evaluation stops before the next batch, writes nothing of it and exits with status 75: the
same command starts over.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import evidence
from tpo_jax.data.evaluation_rows import count_unlabelled
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.pipeline import shown_frames
from tpo_jax.data.records import Example, PreparedDataset, VideoInfo
from tpo_jax.data.text import TextCodec
from tpo_jax.data.text_features import Texts
from tpo_jax.errors import Parser, UserError, report
from tpo_jax.evaluation import (
    all_frames,
    benchmarks,
    floors,
    results,
    submissions,
    track_files,
)
from tpo_jax.evaluation.evaluator import Evaluator, Settings, called_by_task, evaluable_tasks
from tpo_jax.generation.task_text import TEXT_TASKS
from tpo_jax.interop.folder import load_model
from tpo_jax.models.config import ClipFeaturesConfig, ModelConfig
from tpo_jax.models.heads import heads_of
from tpo_jax.models.heads.listed import load_listed
from tpo_jax.training.preemption import EXIT_STATUS, Preempted, Preemption

FLOOR_FRAMES = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """Part of a prepared split: the same for every model and for the floors.

    Attributes:
      count: only the first videos (`--limit`); 0 for all.
      calls: questions to each head about one video (`--calls_per_video`), drawn by their name from
        those that there are; 0 for all. Any regular choice would favour some kind of question,
        since annotations list those about one frame in an order of their own.
    """

    dataset: PreparedDataset
    count: int
    calls: int

    @property
    def path(self) -> Any:
        return self.dataset.path

    @property
    def videos(self) -> list[str]:
        return self.dataset.videos[: self.count or None]

    def video_info(self, video_id: str) -> VideoInfo:
        return self.dataset.video_info(video_id)

    def examples(self, video_id: str) -> list[Example]:
        examples = self.dataset.examples(video_id)
        if not self.calls:
            return examples
        left_out: set[str] = set()
        for task in called_by_task():
            asked = [example.example_id for example in examples if example.task == task]
            drawn = sorted(asked, key=lambda name: hashlib.sha256(name.encode()).digest())
            left_out.update(drawn[self.calls :])
        return [example for example in examples if example.example_id not in left_out]

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        """uint8[n, h, w, 3] of the n `indices` int[n]."""
        return self.dataset.frames(video_id, indices)

    @property
    def clip_features_config(self) -> ClipFeaturesConfig | None:
        return self.dataset.clip_features_config

    def clip_features(self, video_id: str) -> np.ndarray:
        """float32[n, width] of the whole video, in the order of its clips."""
        return self.dataset.clip_features(video_id)

    @property
    def texts(self) -> Texts | None:
        return self.dataset.texts


def evaluate(flags: argparse.Namespace, preemption: Preemption) -> None:
    """Scores the models and writes metrics, intervals, items and samples of each.

    Raises:
      Preempted: told to stop; nothing is written of the model that was being scored.
    """
    beside = results.read_floors(flags.floors, flags.data) if flags.floors else {}
    evaluator = None
    for model, out in zip(flags.models, flags.outs, strict=True):
        evaluator = score_model(flags, model, out, beside, preemption, evaluator)


def score_model(
    flags: argparse.Namespace,
    model: str,
    out: str,
    beside: Mapping[str, float],
    preemption: Preemption,
    before: Evaluator | None,
) -> Evaluator:
    """Scores one model; `beside` are the floors to print beside its metrics.

    Returns what scored it: where the next model only has other weights, that one's programs are
    compiled already (`before`).
    """
    started = time.monotonic()
    config, params, codec = load_model(model)
    answered = TEXT_TASKS if flags.task_text else tuple(heads_of(config.heads))
    tasks = choose_tasks(flags.tasks, flags.evidence, answered, flags.pairs)
    frames = shown_frames(codec, config, flags.frames)
    called = [task for task in tasks if task in called_by_task()]
    if flags.mask_frames == "all":
        heads = {called_by_task()[task] for task in called}
        all_frames.check(config.heads, heads, task_text=flags.task_text)
    settings = Settings(
        batch_size=flags.batch_size,
        evidence=flags.evidence,
        frames=frames,
        mask_frames=flags.mask_frames,
    )
    dataset = Part(PreparedDataset(flags.data), flags.limit, flags.calls_per_video)
    if flags.submission:
        track_files.check(flags.benchmark, dataset.dataset, tasks, flags.mask_frames)
    if before is not None and _same_model(before, config, codec):
        evaluator = before.with_params(params)
    else:
        evaluator = Evaluator(config, params, codec, settings, preemption.check)
    if "qa" in tasks:
        evaluator.questions(dataset)
    if called:
        (evaluator.task_text if flags.task_text else evaluator.heads)(dataset, called)
    if "preference" in tasks:
        evaluator.preferences(Part(PairedDataset(flags.data, flags.pairs), flags.limit, 0))
    record = results.evaluation_record(
        evaluator.results.table.item_scores(),
        routing=benchmarks.routing_counts(evaluator.results.pairs),
        about={
            "model": model,
            "data": flags.data,
            "pairs": flags.pairs,
            "evidence": flags.evidence,
            "frames": frames,
            "mask_frames": flags.mask_frames,
            "frames_of_masks": evaluator.results.frames,
            "unlabelled": count_unlabelled(dataset, called),
            "task_text": flags.task_text,
            "tasks": tasks,
            "floors": beside,
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    write_evaluation(flags, out, record, evaluator.results.samples)
    if flags.submission:
        samples = evaluator.results.samples
        count = track_files.write(flags.submission, flags.benchmark, dataset, samples)
        print(f"{flags.submission}: {count} files")
    return evaluator


def write_evaluation(
    flags: argparse.Namespace,
    out: str,
    record: dict[str, Any],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """The files of one model, and what the command says of it."""
    results.write_json(out, record)
    results.write_samples(out, samples)
    print(results.format_metrics(record))
    print(results.format_sizes(record) + results.format_unlabelled(record), end="")
    if flags.mask_frames == "all":
        print(results.format_frames(record))
    print(out)


def _same_model(evaluator: Evaluator, config: ModelConfig, codec: TextCodec) -> bool:
    """Whether another model differs from an evaluator's in its weights alone."""
    one, two = ((c.tokenizer.to_str(), c.template) for c in (evaluator.codec, codec))
    return evaluator.config == config and one == two


def compute_floors(flags: argparse.Namespace) -> None:
    """Chooses constants on the training split, scores them on the test split."""
    train = PreparedDataset(flags.floors_from)
    test = Part(PreparedDataset(flags.data), flags.limit, flags.calls_per_video)
    found = floors.constant_floors(train, test, flags.frames or FLOOR_FRAMES)
    trained = {"text-only model": flags.blind, "middle-frame model": flags.middle_frame}
    models = {name: results.read_json(path)["metrics"] for name, path in trained.items() if path}
    found = floors.with_trained_models(found, models)
    record = results.floors_record(found, train=flags.floors_from, data=flags.data)
    (out,) = flags.outs
    results.write_json(out, record)
    print(results.format_floors(record))
    print(out)


def score_submission(flags: argparse.Namespace) -> None:
    """Scores a file in a benchmark's own format."""
    report = submissions.score_files(
        flags.benchmark, flags.predictions, flags.annotations, flags.answers
    )
    print(submissions.format_report(report))
    for out in flags.outs:
        results.write_json(out, report)
        print(out)


def choose_tasks(asked: str, shown: str, answered: Sequence[str], pairs: str) -> list[str]:
    """The tasks to score: those asked for, or all that model, evidence and pairs allow.

    `answered` are the tasks that the model's heads, or its words, answer.
    """
    refused: dict[str, str] = {}
    for task, called in called_by_task().items():
        if called not in answered:
            refused[task] = f"the model answers {list(answered)}"
        elif shown != "full":
            refused[task] = f"--evidence={shown} hides the frames that heads answer for"
    if not pairs:
        refused["preference"] = "give the held-out pairs with --pairs=FILE.jsonl"
    if not asked:
        return [task for task in evaluable_tasks() if task not in refused]
    for task in asked.split(","):
        if task not in (known := evaluable_tasks()):
            raise UserError(f"--tasks: {task!r} is not a task; known: {', '.join(known)}")
        if task in refused:
            raise UserError(f"--tasks: {task!r} cannot be scored: {refused[task]}")
    return asked.split(",")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m tpo_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", dest="models", action="append", default=[],
        help="model folder to score; may be repeated, with an --out each",
    )  # fmt: skip
    what.add_argument("--floors_from", help="prepared training split: compute floors instead")
    what.add_argument("--predictions", help="submission file to score, without a model")
    parser.add_argument("--data", default="", help="prepared split to score on")
    parser.add_argument(
        "--pairs",
        default="",
        metavar="FILE.jsonl",
        help="held-out preference pairs about the videos of --data",
    )
    parser.add_argument(
        "--out", dest="outs", action="append", default=[], help="JSON file to write"
    )
    _add_scoring(parser)
    _add_beside(parser)
    flags = parser.parse_args(arguments)
    _check_options(parser, flags)
    return flags


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    """Of a model: what it is asked, what it is shown, and how its answers are read."""
    known = ",".join(evaluable_tasks())
    parser.add_argument("--tasks", default="", help=f"comma-separated, of {known}")
    parser.add_argument("--limit", type=_count, default=0, help="only the first N videos")
    parser.add_argument(
        "--calls_per_video", type=_count, default=0,
        help="at most N questions to each head about one video, drawn by their name",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, help="videos at a time")
    parser.add_argument(
        "--evidence",
        choices=evidence.MODES,
        default="full",
        help="what the model may see; as it was trained",
    )
    parser.add_argument(
        "--frames", type=_count, default=0,
        help="frames of a video that are shown; 0: as many as the model was published with, else "
        "as it takes; 32 for the floors",
    )  # fmt: skip
    parser.add_argument(
        "--mask_frames",
        choices=all_frames.MASK_FRAMES,
        default="shown",
        help="frames that masks and tracks are made of and scored on: those that the language "
        "model is shown, or all that the folder stores (default: %(default)s)",
    )
    parser.add_argument(
        "--submission", default="", metavar="FOLDER",
        help="with --mask_frames=all: also write masks or boxes of every annotated frame, as the "
        "program of --benchmark reads them",
    )  # fmt: skip
    parser.add_argument(
        "--task_text",
        action="store_true",
        help="read places and times from the words of answers, as models of data.task_text give "
        "them, instead of calling heads",
    )


def _add_beside(parser: argparse.ArgumentParser) -> None:
    """The files that metrics are read against: floors, what those are made of, and labels."""
    parser.add_argument(
        "--floors", default="", metavar="FILE.json",
        help="what --floors_from wrote for this --data, to print beside the metrics",
    )  # fmt: skip
    parser.add_argument("--blind", default="", help="evaluation of a text-only model (floors)")
    parser.add_argument(
        "--middle_frame", default="", help="evaluation of a middle-frame model (floors)"
    )
    parser.add_argument("--annotations", default="", help="labels of a submission file")
    parser.add_argument(
        "--benchmark",
        choices=(*submissions.BENCHMARKS, *track_files.LAYOUTS),
        help=f"how --predictions are scored ({', '.join(submissions.BENCHMARKS)}), or --submission "
        f"is written ({', '.join(track_files.LAYOUTS)})",
    )
    parser.add_argument("--answers", default="", help="chosen options of a submission (nextgqa)")


def _check_options(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Refuses options that are missing, or that do not belong together."""
    needed = {"--data": flags.data, "--out": flags.outs}
    if flags.predictions:
        needed = {"--annotations": flags.annotations, "--benchmark": flags.benchmark}
    if missing := [name for name, given in needed.items() if not given]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    _check_mask_frames(parser, flags)
    files, expected = len(set(flags.outs)), max(1, len(flags.models))
    if flags.outs and (files != expected or files != len(flags.outs)):
        parser.error(
            f"--out: {files} different files for {len(flags.models)} models, expected {expected}; "
            "give each --model its own"
        )


def _check_mask_frames(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    """Refuses options that belong to a model's masks where there are none, and the reverse."""
    given = {"--mask_frames=all": flags.mask_frames == "all", "--submission": flags.submission}
    if stray := [name for name, there in given.items() if there and not flags.models]:
        parser.error(f"{stray[0]} belongs to --model; leave it out")
    if flags.submission and len(flags.models) > 1:
        parser.error(f"--submission: is of one model, got {len(flags.models)}; score one at a time")
    known = {
        "--predictions": (flags.predictions, submissions.BENCHMARKS),
        "--submission": (flags.submission, track_files.LAYOUTS),
    }
    for name, (there, benchmarks_of) in known.items():
        if there and flags.benchmark not in benchmarks_of:
            parser.error(
                f"--benchmark: {flags.benchmark} is not one that {name} is for; known: "
                f"{', '.join(benchmarks_of)}"
            )


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{count}: expected 0 (all) or more")
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    load_listed()
    flags = parse(arguments)
    try:
        if flags.predictions:
            score_submission(flags)
        elif flags.floors_from:
            compute_floors(flags)
        else:
            with Preemption() as preemption:
                evaluate(flags, preemption)
    except Preempted:
        print("stopped; the same command starts over", file=sys.stderr)
        return EXIT_STATUS
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
