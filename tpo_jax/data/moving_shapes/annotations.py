"""Annotations of one scene as plain JSON data; identifiers are given when a split is written."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.moving_shapes import phrases
from tpo_jax.data.moving_shapes.expressions import (
    Expression,
    frame_expressions,
    scene_expressions,
)
from tpo_jax.data.moving_shapes.image_questions import image_questions
from tpo_jax.data.moving_shapes.questions import Question, video_questions
from tpo_jax.data.moving_shapes.render import Rendered
from tpo_jax.data.moving_shapes.scene import Scene
from tpo_jax.data.moving_shapes.world import Event

LABELS = 3  # purpose of the random stream, see Scene.rng
CLIP_SECONDS = 2  # of QVHighlights
MIN_VISIBLE = 12 / 64**2  # share of the frame below which an actor counts as absent
REGION_FRAMES = 6
MASK_EXPRESSIONS = 4
TRACKS = 2
MAX_STILL = 0.5  # share of frames in which the first box, held still, may overlap by half
QUERIES = 4
MAX_WINDOWS = 2


@dataclasses.dataclass(frozen=True)
class Annotations:
    """All labels of one video or image.

    queries: QVHighlights rows.  frames: what RefCOCO needs per frame.  masks: per actor, one RLE or
    None per annotated frame.  expressions: for the masks.  tracks: GOT-10k sequences.
    segments: actions.
    """

    name: str
    questions: list[Question]
    queries: list[dict[str, Any]]
    frames: list[dict[str, Any]]
    masks: dict[int, list[dict[str, Any] | None]]
    expressions: list[Expression]
    tracks: list[dict[str, Any]]
    segments: list[dict[str, Any]]


def annotate_video(scene: Scene, rendered: Rendered, name: str) -> Annotations:
    """Labels of a video; its frames are annotated at `config.annotation_fps`."""
    rng = scene.rng(LABELS)
    indices = scene.config.annotation_frames
    visible = drop_slivers(rendered.visible[:, indices])
    expressions = _mask_expressions(rng, scene, visible)
    return Annotations(
        name=name,
        questions=video_questions(scene),
        queries=_queries(rng, scene, name),
        frames=[
            _frame(rng, scene, visible[:, i], indices[i])
            for i in np.sort(rng.permutation(len(indices))[:REGION_FRAMES])
        ],
        masks={i: encode_masks(visible[i]) for i in sorted({e.actor for e in expressions})},
        expressions=expressions,
        tracks=_tracks(rng, scene, visible),
        segments=[{"segment": [e.start, e.end], "label": e.action} for e in scene.events],
    )


def annotate_image(scene: Scene, rendered: Rendered, name: str) -> Annotations:
    """Labels of a still image."""
    frame = _frame(scene.rng(LABELS), scene, drop_slivers(rendered.visible)[:, 0], 0)
    return Annotations(name, image_questions(scene), [], [frame], {}, [], [], [])


def drop_slivers(visible: np.ndarray) -> np.ndarray:
    """bool[N, F, H, W] without the masks that are too small to be seen."""
    pixels = visible.sum(axis=(2, 3), keepdims=True)
    return visible & (pixels >= MIN_VISIBLE * visible.shape[2] * visible.shape[3])


def encode_masks(masks: np.ndarray) -> list[dict[str, Any] | None]:
    """bool[F, H, W] to COCO compressed RLE per frame; None where there is nothing."""
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    present = masks.any(axis=(1, 2))
    return [
        {"size": [int(v) for v in rle["size"]], "counts": rle["counts"].decode("ascii")}
        if there
        else None
        for rle, there in zip(encoded, present, strict=True)
    ]


def bounding_box(mask: np.ndarray) -> list[int] | None:
    """[x, y, width, height] in pixels of bool[H, W]; None when empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def _queries(rng: np.random.Generator, scene: Scene, name: str) -> list[dict[str, Any]]:
    """One row per different event; an event that happens twice has two windows.

    Events that happen more often are left out: a constant guess is right too easily about them.
    """
    windows: dict[str, list[Event]] = {}
    for event in scene.events:
        windows.setdefault(phrases.sentence(event, scene.actors), []).append(event)
    windows = {q: events for q, events in windows.items() if len(events) <= MAX_WINDOWS}
    chosen = [list(windows)[i] for i in rng.permutation(len(windows))[:QUERIES]]
    return [
        {
            "query": query,
            "duration": scene.config.seconds,
            "vid": name,
            "relevant_windows": [[e.start, e.end] for e in windows[query]],
            **_saliency(rng, windows[query], scene.config.seconds),
        }
        for query in chosen
    ]


def _saliency(rng: np.random.Generator, events: list[Event], seconds: int) -> dict[str, Any]:
    """Whole clips that the windows touch, and three ratings: 4 for the best covered one, or one
    less."""
    starts = np.arange(0, seconds - CLIP_SECONDS + 1, CLIP_SECONDS)
    covered = sum(
        np.clip(np.minimum(starts + CLIP_SECONDS, e.end) - np.maximum(starts, e.start), 0, None)
        for e in events
    )
    clips = np.flatnonzero(covered > 0)
    scores = np.rint(4 * covered[clips] / covered.max()).astype(int)
    strict = rng.random((len(clips), 3)) < 0.15
    ratings = np.clip(scores[:, None] - strict, 0, 4)
    return {
        "relevant_clip_ids": [int(c) for c in clips],
        "saliency_scores": [[int(r) for r in row] for row in ratings],
    }


def _frame(
    rng: np.random.Generator, scene: Scene, visible: np.ndarray, index: int
) -> dict[str, Any]:
    """Boxes of who is seen in one frame (visible: bool[N, H, W]) and texts for some of them."""
    seen = [a.index for a in scene.actors if visible[a.index].any()]
    texts = [e for e in scene_expressions(scene) if e.actor in seen]
    relations = frame_expressions(scene, index, seen)
    picked: list[Expression] = []
    for kinds in (("name",), ("action", "relation"), ("attribute", "relation")):
        options = [e for e in (*texts, *relations) if e.kind in kinds and e not in picked]
        if options:
            picked.append(options[int(rng.integers(len(options)))])
    return {
        "frame": index,
        "time": index / scene.config.fps,
        "objects": [
            {
                "actor": i,
                "form": scene.actors[i].form,
                "bbox": bounding_box(visible[i]),
                "area": int(visible[i].sum()),
                "segmentation": encode_masks(visible[i][None])[0],
            }
            for i in seen
        ],
        "expressions": [dataclasses.asdict(e) for e in picked],
    }


def _mask_expressions(
    rng: np.random.Generator, scene: Scene, visible: np.ndarray
) -> list[Expression]:
    """Texts whose actor is seen in some frame: half of them by action where possible."""
    texts = [e for e in scene_expressions(scene) if visible[e.actor].any()]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    actions = [e for e in texts if e.kind == "action"][: MASK_EXPRESSIONS // 2]
    others = [e for e in texts if e.kind != "action"]
    return actions + others[: MASK_EXPRESSIONS - len(actions)]


def _tracks(rng: np.random.Generator, scene: Scene, visible: np.ndarray) -> list[dict[str, Any]]:
    """Boxes over time of actors that are seen in the first annotated frame.

    As in GOT-10k only what goes somewhere is tracked: a box that is held still, where the actor was
    first, must be wrong about at least half of the frames.
    """
    tracks = []
    for actor in (scene.actors[i] for i in rng.permutation(len(scene.actors))):
        boxes = [bounding_box(mask) for mask in visible[actor.index]]
        if boxes[0] is None or _share_still(boxes) > MAX_STILL:
            continue
        pixels = [int(mask.sum()) for mask in visible[actor.index]]
        track = {"actor": actor.index, "expression": actor.name, "boxes": boxes, "pixels": pixels}
        tracks.append(track)
    return tracks[:TRACKS]


def _share_still(boxes: list[list[int] | None]) -> float:
    """Share of the boxes that are there and overlap the first by an IoU of 0.5 or more."""
    there = [box for box in boxes if box is not None]
    overlaps = coco_mask.iou(there, boxes[:1], [0])
    return float(np.mean(overlaps >= 0.5))
