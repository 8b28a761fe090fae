"""Scores files in the formats that benchmarks publish, without a model.

    python -m tpo_jax.evaluate --predictions=preds.jsonl --benchmark=qvhighlights \\
        --annotations=highlight_val_release.jsonl

Each reader turns a submission and its annotations into arrays for `evaluation.metrics`; a record
that the official program would stop at is refused by name. Scoring the arrays takes about as long
as reading the records, so a field is read from all records at once, by iterators that run in C.
"""

import itertools
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import files
from tpo_jax.errors import UserError
from tpo_jax.evaluation.metrics import detection, grounded_qa, qvhighlights, temporal

Record = Mapping[str, Any]


def score_files(
    benchmark: str, predictions: str, annotations: str, answers: str = ""
) -> dict[str, Any]:
    """The benchmark's table, in percent, by the names of its official program.

    Args:
      benchmark: name in `BENCHMARKS`.
      predictions: submission file.
      annotations: file with the labels.
      answers: NExT-GQA only, the file with the chosen options.
    """
    if benchmark not in BENCHMARKS:
        raise UserError(f"--benchmark: {benchmark!r} is not known; known: {', '.join(BENCHMARKS)}")
    if bool(answers) != (benchmark == "nextgqa"):
        raise UserError("--answers: nextgqa needs the file with the chosen options, others do not")
    files = [read_json(path) for path in (predictions, annotations, answers) if path]
    try:
        return BENCHMARKS[benchmark](*files)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{benchmark}: a file is not in its format: {error!r}") from error


def score_qvhighlights(submission: Sequence[Record], labels: Sequence[Record]) -> dict[str, dict]:
    """QVHighlights; also Charades-STA and TACoS in its format, which have no saliency.

    Args:
      submission: {"qid", "pred_relevant_windows", "pred_saliency_scores"}, either of the last two.
      labels: {"qid", "duration", "relevant_windows", "relevant_clip_ids", "saliency_scores"}.
    """
    predicted, labelled = _by_id(submission, "predictions"), _by_id(labels, "annotations")
    if different := sorted(map(str, predicted.keys() ^ labelled.keys())):
        raise UserError(
            f"qid: predictions and annotations must have the same; {len(different)} are in one "
            f"file only, the first: {', '.join(different[:5])}"
        )
    pairs = [(predicted[qid], labelled[qid]) for qid in labelled]
    found: dict[str, dict] = {}
    if "pred_relevant_windows" in submission[0]:
        found |= qvhighlights.moment_report(*moment_arrays(pairs))
    if "pred_saliency_scores" in submission[0]:
        found |= qvhighlights.highlight_report(*highlight_arrays(pairs))
    if not found:
        raise UserError("predictions: no record has pred_relevant_windows or pred_saliency_scores")
    return qvhighlights.with_brief(found)


def score_detection(submission: Record, labels: Record, name: str) -> dict[str, float]:
    """mAP@tIoU by a protocol of `detection.PROTOCOLS`.

    Args:
      submission: {"results": {video: [{"label", "score", "segment": [start, end]}]}}, seconds.
      labels: {"database": {video: {"subset", "annotations": [{"label", "segment"}]}}}.
      name: of the protocol.
    """
    protocol = detection.PROTOCOLS[name]
    labelled = {
        video: entry["annotations"]
        for video, entry in _field(labels, "database", "annotations").items()
        if entry["subset"] == protocol.subset and video not in protocol.left_out
    }
    labelled = {video: rows for video, rows in labelled.items() if rows}
    if not labelled or protocol.num_videos not in (0, len(labelled)):
        raise UserError(
            f"annotations: {name} expects {protocol.num_videos or 'some'} labelled videos of "
            f"subset {protocol.subset!r}, found {len(labelled)}"
        )
    results = _field(submission, "results", "predictions")
    videos = {video: index for index, video in enumerate(dict.fromkeys((*labelled, *results)))}
    target_labels, targets = _columns(labelled.values(), "label", "segment")
    classes = {label: index for index, label in enumerate(dict.fromkeys(target_labels))}
    names, segments, scores = _columns(results.values(), "label", "segment", "score")
    segments, targets = _array(segments, 2, "segment"), _array(targets, 2, "segment")
    guess_videos, target_videos = (
        np.repeat(_looked_up(videos, rows), _lengths(rows.values())) for rows in (results, labelled)
    )
    if unknown := set(names) - classes.keys():
        row = next(row for row, label in enumerate(names) if label in unknown)
        video = list(videos)[guess_videos[row]]
        raise UserError(f"results[{video!r}]: label {names[row]!r} has no annotation")
    if protocol.rounded:
        segments = segments * detection.SNIPPETS_PER_SECOND
        targets = detection.round_to_snippets(targets)
    precision = detection.average_precision(
        segments,
        np.fromiter(scores, np.float64, len(scores)),
        _looked_up(classes, names),
        guess_videos,
        targets,
        _looked_up(classes, target_labels),
        target_videos,
        protocol.thresholds,
    )
    return detection.report(precision, protocol)


def score_nextgqa(submission: Record, labels: Record, answers: Record) -> dict[str, float]:
    """NExT-GQA; a question without a predicted span is left out, as the official program does.

    Args:
      submission: {"<video>_<question>": [start, end]} in seconds.
      labels: {video: {"location": {question: [[start, end], ...]}}}.
      answers: {"<video>_<question>": {"prediction", "answer"}}.
    """
    names: list[str] = []
    windows: list[Sequence[Sequence[float]]] = []
    for video, entry in labels.items():
        names += [f"{video}_{question}" for question in entry["location"]]
        windows += entry["location"].values()
    asked, predicted = len(names), list(map(submission.__contains__, names))
    names = list(itertools.compress(names, predicted))
    windows = list(itertools.compress(windows, predicted))
    if not names:
        raise UserError("predictions: no key <video>_<question> is in the annotations")
    if missing := [name for name in names if name not in answers]:
        raise UserError(f"answers: {missing[0]!r} and {len(missing) - 1} more have none")
    iop, iou = grounded_qa.overlaps(
        _array(map(submission.__getitem__, names), 2, "span"),
        _array(itertools.chain.from_iterable(windows), 2, "location"),
        np.repeat(np.arange(len(names)), _lengths(windows)),
    )
    chosen = [answers[name] for name in names]
    prediction, answer = (map(operator.itemgetter(f), chosen) for f in ("prediction", "answer"))
    correct = np.fromiter(map(operator.eq, prediction, answer), bool)
    counts = {"questions": len(names), "without prediction": asked - len(names)}
    return grounded_qa.report(iop, iou, correct) | counts


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "qvhighlights": score_qvhighlights,
    "nextgqa": score_nextgqa,
} | {
    name: lambda submission, labels, name=name: score_detection(submission, labels, name)
    for name in detection.PROTOCOLS
}


def read_json(path: str) -> Any:
    """A JSON file, or a list of the lines of a .jsonl file."""
    text = files.read_text(path, "submission")
    try:
        if str(path).endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def format_report(report: Record) -> str:
    """The values that a paper's table shows, one a line."""
    rows = report.get("brief", report)
    width = max(map(len, rows))
    return "\n".join(
        f"{name:{width}}  {value:6.2f}" if isinstance(value, float) else f"{name:{width}}  {value}"
        for name, value in rows.items()
    )


def _by_id(records: Sequence[Record], source: str) -> dict[Any, Record]:
    found: dict[Any, Record] = {}
    for record in records:
        if record["qid"] in found:
            raise UserError(f"{source}: qid {record['qid']} has more than one record")
        found[record["qid"]] = record
    if not found:
        raise UserError(f"{source}: the file has no record")
    return found


def moment_arrays(pairs: Sequence[tuple[Record, Record]]) -> tuple[np.ndarray, ...]:
    """What `qvhighlights.moment_report` takes, n windows predicted and m labelled for all queries.

    Returns: windows float64[n, 2] seconds, scores float64[n], query int[n] (position in `pairs`),
      targets float64[m, 2] seconds, target_query int[m].
    """
    guesses, labels = zip(*pairs, strict=True)
    windows = [guess["pred_relevant_windows"][: temporal.MAX_WINDOWS] for guess in guesses]
    targets = list(map(operator.itemgetter("relevant_windows"), labels))
    if not all(targets):
        qid = guesses[next(i for i, windows in enumerate(targets) if not windows)]["qid"]
        raise UserError(f"annotations: qid {qid}: relevant_windows is empty")
    numbers = np.arange(len(pairs))
    rows = _array(itertools.chain.from_iterable(windows), 3, "pred_relevant_windows")
    return (
        rows[:, :2],
        rows[:, 2],
        np.repeat(numbers, _lengths(windows)),
        _array(itertools.chain.from_iterable(targets), 2, "relevant_windows"),
        np.repeat(numbers, _lengths(targets)),
    )


def highlight_arrays(
    pairs: Sequence[tuple[Record, Record]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What `qvhighlights.highlight_report` takes, for n queries and clips of 2 seconds.

    Returns: saliency float64[n, width], best int[n], clips int[n], ratings float64[n, width,
      raters].
    """
    clips = np.array([int(label["duration"] / 2) for _, label in pairs])
    guesses = [guess["pred_saliency_scores"] for guess, _ in pairs]
    length = np.array([len(g) for g in guesses])
    if not length.all() or not clips.all():
        qid = pairs[int(np.argmin(np.minimum(length, clips)))][0]["qid"]
        raise UserError(f"qid {qid}: a saliency score and a clip of 2 seconds are needed")
    width = max(length.max(), clips.max())
    saliency = np.full((len(pairs), width), -np.inf)
    saliency[np.arange(width) < length[:, None]] = _numbers(
        itertools.chain(*guesses), "pred_saliency_scores"
    )
    best = saliency.argmax(axis=1)
    saliency[np.arange(width) >= length[:, None]] = 0.0
    ids = [label["relevant_clip_ids"] for _, label in pairs]
    for clip_ids, (_, label) in zip(ids, pairs, strict=True):
        if len(clip_ids) != len(label["saliency_scores"]):
            raise UserError(
                f"annotations: qid {label['qid']}: {len(label['saliency_scores'])} saliency_scores "
                f"for {len(clip_ids)} relevant_clip_ids"
            )
    query = np.repeat(np.arange(len(pairs)), [len(i) for i in ids])
    clip = np.fromiter(itertools.chain(*ids), np.int64, len(query))
    if outside := np.flatnonzero((clip < 0) | (clip >= clips[query])).tolist():
        row = outside[0]
        raise UserError(
            f"annotations: qid {pairs[query[row]][0]['qid']}: relevant_clip_ids has {clip[row]}, "
            f"the video has {clips[query[row]]} clips"
        )
    rated = list(itertools.chain(*(label["saliency_scores"] for _, label in pairs)))
    raters = len(rated[0]) if rated else 1
    ratings = np.zeros((len(pairs), width, raters))
    ratings[query, clip] = _array(rated, raters, "saliency_scores")
    return saliency, best, clips, ratings


def _columns(entries: Iterable[Sequence[Record]], *fields: str) -> list[list[Any]]:
    """[n] values of each field, of the records of all entries in turn."""
    columns: list[list[Any]] = [[] for _ in fields]
    getters = list(map(operator.itemgetter, fields))
    for entry in entries:  # one after the other, whose records lie together in memory
        for column, getter in zip(columns, getters, strict=True):
            column += map(getter, entry)
    return columns


def _looked_up(table: Mapping[Any, int], keys: Iterable[Any]) -> np.ndarray:
    """int64[n]."""
    return np.fromiter(map(table.__getitem__, keys), np.int64)


def _lengths(lists: Iterable[Sequence[Any]]) -> np.ndarray:
    """int64[n]."""
    return np.fromiter(map(len, lists), np.int64)


def _array(rows: Any, columns: int, field: str) -> np.ndarray:
    """float64[n, columns] of lists of numbers (or of their text, in THUMOS14's labels)."""
    rows = rows if isinstance(rows, list) else list(rows)
    if wrong := set(map(len, rows)) - {columns}:
        row = next(row for row in rows if len(row) in wrong)
        raise UserError(f"{field}: expected {columns} numbers, got {row}")
    return _numbers(itertools.chain(*rows), field).reshape(-1, columns)


def _numbers(values: Iterable[Any], field: str) -> np.ndarray:
    """float64[n] of numbers or their text."""
    numbers = np.fromiter(values, np.float64)
    if not np.isfinite(numbers).all():
        raise UserError(f"{field}: a number is not finite")
    return numbers


def _field(record: Record, name: str, source: str) -> Mapping[str, Any]:
    if name not in record:
        raise UserError(f"{source}: no field {name!r}; found {', '.join(record)}")
    return record[name]
