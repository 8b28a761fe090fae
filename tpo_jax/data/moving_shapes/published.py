"""A split's annotations in the formats in which data sets are published.

Every function is pure: annotations in, {path relative to the split folder: text} out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tpo_jax.data.moving_shapes.annotations import Annotations
from tpo_jax.data.moving_shapes.questions import Question
from tpo_jax.data.moving_shapes.world import ACTION_WEIGHTS, FORMS, WorldConfig

Files = dict[str, str]
LETTERS = "ABCD"
TASKS = {
    "videochat2": "conversation",
    "qvhighlights": "temporal",
    "refcoco": "region",
    "mevis": "mask",
    "got10k": "tracking",
    "thumos": "action",
}


def split_files(
    split: str,
    seed: int,
    config: WorldConfig,
    videos: Sequence[Annotations],
    images: Sequence[Annotations],
) -> Files:
    """All annotation files of a split, its manifest dataset.json last."""
    files: Files = {}
    listed: list[dict[str, str]] = []
    parts = (
        ("videochat2", conversations(videos, images), None),
        ("qvhighlights", temporal(videos), None),
        ("refcoco", regions(config, videos, images), None),
        ("mevis", masks(config, videos), "mevis"),
        ("got10k", tracks(config, videos), "tracking"),
        ("thumos", actions(split, config, videos), None),
    )
    for name, made, folder in parts:
        files |= made
        paths = [folder] if folder and made else sorted(made)
        listed += [{"format": name, "path": path} for path in paths]
    files["dataset.json"] = _dump(
        {
            "name": "moving_shapes",
            "seed": seed,
            "media": ".",
            "annotations": listed,
            "info": _info(split, config, videos, images),
        }
    )
    return files


def _info(
    split: str, config: WorldConfig, videos: Sequence[Annotations], images: Sequence[Annotations]
) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for question in (q for a in (*videos, *images) for q in a.questions):
        kinds[question.kind] = kinds.get(question.kind, 0) + 1
    return {
        "split": split,
        "videos": len(videos),
        "images": len(images),
        "tasks": TASKS,
        "questions": dict(sorted(kinds.items())),
        "world": {name: getattr(config, name) for name in config.__dataclass_fields__},
        "annotation_frames": config.annotation_frames,
        "annotation_frames_note": (
            "frame i of masks and tracks is mp4 frame annotation_frames[i], at i / annotation_fps s"
        ),
    }


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def turn(question: Question) -> dict[str, str]:
    """One question and answer as in VideoChat2-IT.

    Without an instruction: questions are short, and the reader puts it before each of them.
    """
    asked = {"i": "", "q": question.question, "a": question.answer, "kind": question.kind}
    if not question.options:
        return asked
    options = [f"({letter}) {o}" for letter, o in zip(LETTERS, question.options, strict=True)]
    return asked | {
        "q": "\n".join([question.question, "Options:", *options]),
        "a": options[question.options.index(question.answer)],
    }


def conversations(videos: Sequence[Annotations], images: Sequence[Annotations]) -> Files:
    """VideoChat2-IT: one file per kind of question, one record per video, kind and clip."""
    records: dict[str, list[dict[str, Any]]] = {}
    for media, folder, suffix, items in (
        ("video", "videos", "mp4", videos),
        ("image", "images", "png", images),
    ):
        for item in items:
            grouped: dict[tuple[str, Any], list[dict[str, str]]] = {}
            for question in item.questions:
                group = question.kind, question.clip
                grouped.setdefault(group, []).append(turn(question))
            for (kind, clip), turns in grouped.items():
                record = {media: f"{folder}/{item.name}.{suffix}", "QA": turns}
                if clip is not None:
                    record |= dict(zip(("start", "end"), clip, strict=True))
                records.setdefault(kind, []).append(record)
    return {f"conversation/{kind}.json": _dump(rows) for kind, rows in sorted(records.items())}


def temporal(videos: Sequence[Annotations]) -> Files:
    """QVHighlights: JSON lines with a running qid."""
    rows = [row for item in videos for row in item.queries]
    lines = [_dump({"qid": qid, **row}) for qid, row in enumerate(rows)]
    return {"temporal.jsonl": "".join(lines)} if lines else {}


def regions(
    config: WorldConfig, videos: Sequence[Annotations], images: Sequence[Annotations]
) -> Files:
    """RefCOCO as one JSON: COCO images and annotations, and refs; a frame of a video has a time."""
    data: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "refs": []}
    for folder, suffix, items in (("videos", "mp4", videos), ("images", "png", images)):
        for item in items:
            for frame in item.frames:
                image = {
                    "id": len(data["images"]),
                    "file_name": f"{folder}/{item.name}.{suffix}",
                    "width": config.size,
                    "height": config.size,
                }
                if suffix == "mp4":
                    image["time"] = frame["time"]
                data["images"].append(image)
                _add_frame(data, image["id"], frame)
    categories = [{"id": i, "name": form} for i, form in enumerate(FORMS, 1)]
    return {"region.json": _dump({"categories": categories, **data})} if data["refs"] else {}


def _add_frame(data: dict[str, list[dict[str, Any]]], image_id: int, frame: dict[str, Any]) -> None:
    ids = {}
    for item in frame["objects"]:
        ids[item["actor"]] = len(data["annotations"])
        data["annotations"].append(
            {
                "id": ids[item["actor"]],
                "image_id": image_id,
                "category_id": FORMS.index(item["form"]) + 1,
                "bbox": item["bbox"],
                "area": item["area"],
                "segmentation": item["segmentation"],
                "iscrowd": 0,
            }
        )
    for expression in frame["expressions"]:
        text = expression["text"]
        data["refs"].append(
            {
                "ref_id": len(data["refs"]),
                "ann_id": ids[expression["actor"]],
                "image_id": image_id,
                "sentences": [{"sent": text, "raw": text, "tokens": text.split()}],
            }
        )


def masks(config: WorldConfig, videos: Sequence[Annotations]) -> Files:
    """MeViS: expressions that point to the masks of one shape over time."""
    table: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for vid_id, item in enumerate(videos):
        ids = {}
        for actor, rles in item.masks.items():
            ids[actor] = len(table)
            table[str(ids[actor])] = rles
        entries[item.name] = {
            "vid_id": vid_id,
            "fps": config.annotation_fps,
            "frames": [f"{i:05d}" for i in range(len(config.annotation_frames))],
            "expressions": {
                str(i): {"exp": e.text, "obj_id": [e.actor], "anno_id": [ids[e.actor]]}
                for i, e in enumerate(item.expressions)
            },
        }
    if not entries:
        return {}
    return {
        "mevis/meta_expressions.json": _dump({"videos": entries}),
        "mevis/mask_dict.json": _dump(table),
    }


def tracks(config: WorldConfig, videos: Sequence[Annotations]) -> Files:
    """GOT-10k: a folder per track, named video#actor, and list.txt with all of them."""
    files: Files = {}
    names = []
    for item in videos:
        for track in item.tracks:
            names.append(f"{item.name}#{track['actor']}")
            folder = f"tracking/{names[-1]}"
            largest = max(track["pixels"])
            boxes = [box or [0, 0, 0, 0] for box in track["boxes"]]
            # As in the release: eighths of the object that are visible, 0 to 8.
            covers = [round(8 * pixels / largest) for pixels in track["pixels"]]
            files[f"{folder}/groundtruth.txt"] = _lines(",".join(map(str, box)) for box in boxes)
            files[f"{folder}/absence.label"] = _lines(str(int(b is None)) for b in track["boxes"])
            files[f"{folder}/cover.label"] = _lines(map(str, covers))
            files[f"{folder}/meta_info.ini"] = _lines(
                (
                    "[METAINFO]",
                    f"anno_fps: {config.annotation_fps}Hz",
                    f"object_class: {track['expression'].removeprefix('the ')}",
                    f"resolution: ({config.size}, {config.size})",
                )
            )
    if names:
        files["tracking/list.txt"] = _lines(names)
    return files


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


def actions(split: str, config: WorldConfig, videos: Sequence[Annotations]) -> Files:
    """THUMOS14 and ActivityNet: action segments per video."""
    database = {
        item.name: {
            "subset": split,
            "duration": config.seconds,
            "fps": config.fps,
            "annotations": item.segments,
        }
        for item in videos
    }
    taxonomy = [{"nodeId": i, "nodeName": name} for i, name in enumerate(ACTION_WEIGHTS)]
    content = {"version": "1", "taxonomy": taxonomy, "database": database}
    return {"actions.json": _dump(content)} if database else {}
