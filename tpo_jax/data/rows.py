"""One row of a batch: a video and up to K branches about it, as fixed-shape arrays.

A RowPlan (`row_plans`) says what a row holds; RowBuilder turns plans into the arrays of one bucket.
Drawing plans for training is in `mixture`, planning them for evaluation in `evaluation_rows`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.buckets import Bucket, fitted, prefix_positions
from tpo_jax.data.clip_features import RowFeatures
from tpo_jax.data.media import without_suffix
from tpo_jax.data.preprocess import Resize, area
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, task_number
from tpo_jax.data.row_plans import BranchPlan, RowError, RowPlan, clip_frames
from tpo_jax.data.row_texts import RowTexts
from tpo_jax.data.targets import TARGETS, TargetError, View, slot_target
from tpo_jax.data.text import LONGEST_SECONDS, Branch, TextCodec
from tpo_jax.data.tiles import RowTiles

# (pair id, `shown_frames`, `VideoInfo.stored`, prefix tokens int32[P], branch tokens int32[n, R])
# -> float32[n, A] of the n answers that the pair has. What follows the id lets the sidecar refuse a
# pair that changed. With contrast [n + 1, A]: last is the chosen answer under manipulated frames.
Reference = Callable[[str, np.ndarray, str, np.ndarray, np.ndarray], np.ndarray]

CLIP_FIELDS = ("frames", "frame_valid", "frame_times")
# What a row has twice where a loss scores the manipulated clip: the prefix may tell its times.
CONTRAST_FIELDS = (*CLIP_FIELDS, "prefix_tokens", "prefix_positions", "prefix_segments")
_PART_OF_VIDEO = re.compile(r"_\d+(\.\d+)?_\d+(\.\d+)?$")  # QVHighlights and its relatives


def marker_count(example: Example, head: str, turns: int | None = None) -> int:
    """Markers of a head in the first `turns` turns (all by default)."""
    marker = f"<{head}>"
    if head == "box":
        return sum(turn.question.count(marker) for turn in example.turns[:turns])
    return sum(turn.answer.count(marker) for turn in example.turns[:turns])


def row_id(bucket: str, row: int) -> int:
    """uint32 of a row by its place in the stream of its bucket; the same on any host."""
    return _hash32(f"{bucket}:{row}")


def video_number(video_id: str) -> int:
    """uint32, equal for parts of one video: files <video>_<start>_<end> of one folder.

    The suffixes of the files do not matter. It tells which rows are no negatives of each other, so
    an equality too many does little harm.
    """
    return _hash32(_PART_OF_VIDEO.sub("", without_suffix(video_id)))


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


def kind_id(kind: str) -> int:
    """uint32 that stands for a kind of question in a batch: strings do not go on devices."""
    return zlib.crc32(kind.encode())


def choose_builder(group: Sequence[RowBuilder], plan: RowPlan) -> RowBuilder:
    """The first that the row fits; what fits none goes to the last.

    That one samples fewer frames of a clip that is too long, and says what else does not fit.
    """
    return next((builder for builder in group if builder.fits(plan)), group[-1])


class RowBuilder:
    """Builds the rows of one bucket.

    Args:
      codec: tokenizer and template.
      bucket: the shapes.
      tasks: that the model's heads answer; they and the user box get slot arrays.
      image_size: height and width that the vision encoder expects, in pixels.
      visual_frames: int[V], the frame that must be there for each visual token to be there, of
        `bucket.frames` frames.
      resize: how frames of another size become image_size.
      reference: reference log-probabilities of pairs; None leaves them out (scoring).
      contrast: whether pairs bring their manipulated frames as well.
      tiles: how images are cut into tiles; None: one view, or videos.
      clip_features, text_features: what a head of the model reads of the videos, and of the
        questions; None: nothing.
    """

    def __init__(self, codec: TextCodec, bucket: Bucket, tasks: Sequence[str], image_size: int,
                 visual_frames: np.ndarray, reference: Reference | None = None,
                 resize: Resize = area, contrast: bool = False,
                 clip_features: RowFeatures | None = None,
                 text_features: RowTexts | None = None, tiles: RowTiles | None = None):
        self.contrast = contrast and bucket.kind == "preference"
        self.clip_features, self.text_features = clip_features, text_features
        self.tiles = tiles
        if missing := set(tasks) - set(codec.heads):
            raise ValueError(
                f"heads: {sorted(missing)} have no tokens in the tokenizer (it has "
                f"{list(codec.heads)}); use add_task_tokens.")
        bucket = fitted(bucket, codec)
        self.codec, self.bucket, self.image_size = codec, bucket, image_size
        self.visual_frames, self.visual_tokens = visual_frames, len(visual_frames)
        self.reference, self.resize = reference, resize
        self.beside: RowBuilder | None = None  # of the bucket whose rows go into the same step
        self.slot_heads = (*(task for task in TARGETS if task in tasks),
                           *(("box",) if tasks else ()))
        self.prefix_tokens = (
            codec.template.visual_offset + self.visual_tokens + bucket.after_visual
            + bucket.question)
        self.time_room = bucket.after_visual - codec.after_visual  # for the sentence about times

    def frame_indices(self, plan: RowPlan) -> np.ndarray:
        """int64[n], n <= F: the frames of a row, as the template samples them; see
        `sampling.shown`."""
        timestamps = plan.dataset.video_info(plan.video_id).timestamps
        if plan.frame_indices is not None:
            indices = np.asarray(plan.frame_indices, np.int64)
            if len(indices) > self.bucket.frames or not (
                    0 <= indices.min() <= indices.max() < len(timestamps)):
                raise RowError(
                    f"{self.where(plan, plan.branches[0])}: targets.frame_indices: "
                    f"{indices.tolist()}, expected at most {self.bucket.frames} (frames of the "
                    f"bucket) below {len(timestamps)} (frames of the video).")
            return indices
        return sampling.shown(self.codec.template.sampling, timestamps, self.bucket.frames,
                              plan.start, plan.end)

    def tokens(self, plan: RowPlan) -> tuple[np.ndarray, list[Branch]]:
        """Prefix ids int32[n] and branches, refused by name where they exceed the bucket."""
        bucket = self.bucket
        prefix = self._prefix(plan)
        if len(plan.branches) > bucket.branches:
            raise RowError(f"{self._where_of(plan)}: {len(plan.branches)} branches, but the bucket "
                           f"has branches = {bucket.branches}.")
        branches = [self.branch(branch, self.where(plan, branch)) for branch in plan.branches]
        return prefix, branches

    def _prefix(self, plan: RowPlan) -> np.ndarray:
        """int32[n]"""
        bucket, where = self.bucket, self._where_of(plan)
        prefix = self.codec.build_prefix(
            self.visual_tokens, bucket.media, plan.question, f"{where}: question",
            self._time_ids(plan, where))
        if len(prefix) > self.prefix_tokens:
            raise RowError(
                f"{where}: the question has {len(prefix) - self.prefix_tokens + bucket.question} "
                f"tokens, but the bucket has question = {bucket.question}: {plan.question!r}. "
                f"Raise buckets.{bucket.name}.question or remove the example.")
        return prefix

    def _time_ids(self, plan: RowPlan, where: str) -> list[int]:
        """The sentence about the times of the frames that are shown, if the template has one."""
        if not self.time_room:
            return []
        times = plan.dataset.video_info(plan.video_id).timestamps[self.frame_indices(plan)]
        start = plan.start or 0.0
        ids = self.codec.time_ids((times - start).tolist(), plan.end - start)
        if len(ids) > self.time_room:
            raise RowError(
                f"{where}: the times of {len(times)} frames take {len(ids)} tokens, expected at "
                f"most {self.time_room}: the clip has {plan.end - start:.0f} s, more than "
                f"{LONGEST_SECONDS:.0f}. Give the example a part of its video.")
        return ids

    def branch(self, plan: BranchPlan, where: str) -> Branch:
        """Tokens of one branch, refused by name where they exceed the bucket."""
        branch = self.codec.build_branch(plan.question, plan.answer, where)
        bucket = self.bucket
        for what, value, field in (
                ("the answer", len(branch.ids) - branch.answer, "answers"),
                ("question and answer", len(branch.ids), "branch_tokens")):
            if value > getattr(bucket, field):
                raise RowError(
                    f"{where}: {what} has {value} tokens, but the bucket has {field} = "
                    f"{getattr(bucket, field)}: {plan.question!r} -> {plan.answer!r}. Raise "
                    f"buckets.{bucket.name}.{field} or remove the example.")
        return branch

    def fits(self, plan: RowPlan) -> bool:
        """Whether the clip of a pair, or every branch of a conversation, is short enough, and an
        image has no more tiles."""
        if self.bucket.kind == "preference":
            return clip_frames(plan) <= self.bucket.frames
        if self.tiles is not None and not self.tiles.fits(plan.dataset.video_info(plan.video_id)):
            return False
        built = [self.codec.build_branch(b.question, b.answer, self.where(plan, b))
                 for b in plan.branches]
        return all(len(b.ids) <= self.bucket.branch_tokens
                   and len(b.ids) - b.answer <= self.bucket.answers for b in built)

    def check(self, plan: RowPlan) -> None:
        """Raises the error that `build` would raise for this plan, without reading frames."""
        prefix, branches = self.tokens(plan)
        indices = self.frame_indices(plan)
        view = self._view(plan, indices)
        used = dict.fromkeys(self.slot_heads, 0)
        for planned, branch in zip(plan.branches, branches, strict=True):
            where = self.where(plan, planned)
            for slot in branch.slots:
                if slot.head not in used:
                    raise RowError(
                        f"{where}: marker <{slot.head}>, but model.heads has no {slot.head!r}. Add "
                        "the head or leave the task out of the data weights.")
                used[slot.head] += 1
                count = marker_count(planned.example, slot.head)
                try:
                    target = slot_target(slot.head, planned.example.task)
                    target.check(planned.example.targets, count, view, self.bucket)
                except TargetError as error:
                    raise RowError(f"{where}: {error}") from error
        for head, count in used.items():
            if count > self.bucket.capacity(head):
                raise RowError(
                    f"{self.where(plan, plan.branches[0])}: {count} <{head}> slots, but the "
                    f"bucket has {self.bucket.capacity(head)}. "
                    + (f"Take {head!r} out of buckets.{self.bucket.name}.idle."
                       if head in self.bucket.idle
                       else f"Raise buckets.{self.bucket.name}.slots.{head}."))
        self._has_given(plan)
        if plan.question is not None and self.contrast:
            self._prefix(self._contrast(plan))
        if plan.question is not None and self.reference is not None:
            self._reference_logps(plan, prefix, branches)

    def build(self, plan: RowPlan, example_id: int, read_frames: bool = True) -> dict[str, Any]:
        """The arrays of one row: those of the batch without the leading B.

        With `read_frames` off the frames stay black: what is said about a clip that is encoded.
        """
        row = self.blank()
        row["example_ids"][...] = example_id
        row["video_ids"][...] = video_number(plan.video_id)
        indices = self.frame_indices(plan)
        prefix, branches = self.tokens(plan)
        view, given = self._view(plan, indices), self._has_given(plan)
        if read_frames:
            self._fill_frames(row, plan, indices, view)
        if given:
            row["clip_features"][: len(indices)] = self.clip_features.of_row(plan, len(indices))
        if self.text_features is not None:
            self.text_features.fill(row, plan)
        there = self.visual_frames < len(indices)
        if self.tiles is not None:
            there = np.arange(self.visual_tokens) < self.tiles.fill(
                row, plan.dataset.video_info(plan.video_id))
        length = self._fill_prefix(row, prefix, there)
        for k, branch in enumerate(branches):
            self._fill_branch(row, k, branch, length)
        asked = plan.branches if plan.question is None else plan.branches[:1]  # one pair
        row["branch_tasks"][: len(asked)] = [task_number(b.example.task) for b in asked]
        self._fill_slots(row, plan, branches, view)
        if plan.question is not None:
            self._fill_pair(row, plan)
            if self.reference is not None:
                logps = self._reference_logps(plan, prefix, branches)
                row["reference_logps"][: len(branches)] = logps[: len(branches)]
                if self.contrast:
                    row["reference_contrast_logps"][:] = logps[-1]
        return row

    def blank(self) -> dict[str, Any]:
        """The arrays of a row that counts for nothing (padding of an evaluation batch)."""
        b, p, f = self.bucket, prefix_positions(self.prefix_tokens), self.bucket.frames
        row: dict[str, Any] = {
            "example_ids": np.zeros((), np.uint32),
            "video_ids": np.zeros((), np.uint32),
            "frames": np.zeros((f, self.image_size, self.image_size, 3), np.uint8),
            "frame_times": np.zeros(f, np.float32),
            "frame_valid": np.zeros(f, bool),
            "prefix_tokens": np.full(p, self.codec.pad_id, np.int32),
            "prefix_positions": np.zeros(p, np.int32),
            "prefix_segments": np.zeros(p, np.int32),
            "branch_tokens": np.full((b.branches, b.branch_tokens), self.codec.pad_id, np.int32),
            "branch_positions": np.zeros((b.branches, b.branch_tokens), np.int32),
            "branch_segments": np.zeros((b.branches, b.branch_tokens), np.int32),
            "branch_tasks": np.zeros(b.branches, np.int32),
            "answer_positions": np.zeros((b.branches, b.answers), np.int32),
            "answer_tokens": np.full((b.branches, b.answers), self.codec.pad_id, np.int32),
            "answer_weights": np.zeros((b.branches, b.answers), np.float32),
            "slots": {head: self._blank_slots(head) for head in self.slot_heads},
        }
        if self.tiles is not None:
            row |= self.tiles.blank()
        if self.clip_features is not None:
            row["clip_features"] = np.zeros((f, self.clip_features.about.width), np.float32)
        if self.text_features is not None:
            row |= self.text_features.blank(b.branches)
        if b.kind == "preference":
            row["pair_valid"] = np.zeros((), bool)
            row["pair_kind"] = np.zeros((), np.uint32)
            row["pair_duration"] = np.zeros((), np.float32)
            if self.reference is not None:
                row["reference_logps"] = np.zeros((b.branches, b.answers), np.float32)
            if self.contrast:
                row |= {f"contrast_{name}": row[name].copy() for name in CONTRAST_FIELDS}
                if self.reference is not None:
                    row["reference_contrast_logps"] = np.zeros(b.answers, np.float32)
        return row

    def _blank_slots(self, head: str) -> dict[str, np.ndarray]:
        count = self.bucket.capacity(head)
        arrays = {"branch": np.zeros(count, np.int32), "index": np.zeros(count, np.int32),
                  "valid": np.zeros(count, bool)}
        for name, array in TARGETS[head].blank(self.bucket).items():
            arrays[name] = np.repeat(array[None], count, axis=0)
        return arrays

    def where(self, plan: RowPlan, branch: BranchPlan) -> str:
        """Folder, example, turn and bucket, for error messages."""
        return (f"{plan.dataset.path}: example {branch.example.example_id!r}, turn {branch.turn}, "
                f"bucket {self.bucket.name!r}")

    def _where_of(self, plan: RowPlan) -> str:
        return self.where(plan, plan.branches[0]) if plan.branches else self.bucket.name

    def _view(self, plan: RowPlan, indices: np.ndarray) -> View:
        times = plan.dataset.video_info(plan.video_id).timestamps[indices]
        return View(plan.start, plan.end, times.astype(np.float64))

    def _fill_frames(self, row: dict[str, Any], plan: RowPlan, indices: np.ndarray,
                     view: View) -> None:
        n = len(indices)
        row["frame_times"][:n] = view.times
        frames = plan.dataset.frames(plan.video_id, indices)
        if self.tiles is not None:
            frames = self.tiles.fill_pixels(row, frames)
        row["frames"][:n] = self.prepare(frames)
        row["frame_valid"][:n] = True

    def prepare(self, frames: np.ndarray) -> np.ndarray:
        """uint8[n, h, w, 3] -> uint8[n, S, S, 3], as the vision encoder is shown them."""
        size = self.image_size
        # Boxes and windows are normalised, so they survive the change of aspect ratio.
        return frames if frames.shape[1:3] == (size, size) else self.resize(frames, size)

    def _has_given(self, plan: RowPlan) -> bool:
        """Whether the row brings clip features; they, and text features, are refused by name where
        they are missing, and an image where it has too many tiles."""
        try:
            if self.tiles is not None:
                self.tiles.check(plan.dataset.video_info(plan.video_id))
            given = self.clip_features is not None and self.clip_features.check(plan)
            if self.text_features is not None:
                self.text_features.check(plan)
            return given
        except Invalid as invalid:
            raise RowError(f"{self.where(plan, plan.branches[0])}: {invalid}") from invalid

    def _fill_prefix(self, row: dict[str, Any], prefix: np.ndarray, there: np.ndarray) -> int:
        """Fills the prefix and returns its length without padding and absent visual tokens.

        Args:
          there: bool[V], the visual tokens that are there.
        """
        offset = self.codec.template.visual_offset
        valid = np.ones(len(prefix), bool)
        valid[offset : offset + self.visual_tokens] = there
        n = len(prefix)
        row["prefix_tokens"][:n] = prefix
        row["prefix_segments"][:n] = valid
        row["prefix_positions"][:n] = np.where(valid, np.cumsum(valid) - 1, 0)
        return int(valid.sum())

    def _fill_branch(self, row: dict[str, Any], k: int, branch: Branch, prefix: int) -> None:
        n = len(branch.ids)
        row["branch_tokens"][k, :n] = branch.ids
        row["branch_positions"][k, :n] = prefix + np.arange(n)
        row["branch_segments"][k, :n] = 1
        answers = n - branch.answer
        row["answer_positions"][k, :answers] = np.arange(branch.answer, n) - 1
        row["answer_tokens"][k, :answers] = branch.ids[branch.answer :]
        row["answer_weights"][k, :answers] = branch.weights[branch.answer :]

    def _fill_slots(self, row: dict[str, Any], plan: RowPlan, branches: list[Branch],
                    view: View) -> None:
        used = dict.fromkeys(self.slot_heads, 0)
        for k, (planned, branch) in enumerate(zip(plan.branches, branches, strict=True)):
            here = dict.fromkeys(self.slot_heads, 0)
            for slot in branch.slots:
                s, arrays = used[slot.head], row["slots"][slot.head]
                arrays["branch"][s], arrays["index"][s] = k, slot.index
                arrays["valid"][s] = True
                occurrence = marker_count(planned.example, slot.head, planned.turn)
                try:
                    target = slot_target(slot.head, planned.example.task).fill(
                        planned.example.targets, occurrence + here[slot.head], view, self.bucket)
                except TargetError as error:
                    raise RowError(f"{self.where(plan, planned)}: {error}") from error
                for name, value in target.items():
                    arrays[name][s] = value
                used[slot.head] += 1
                here[slot.head] += 1

    def _fill_pair(self, row: dict[str, Any], plan: RowPlan) -> None:
        """What is known of a pair beside its tokens; its manipulated clip where asked for."""
        branch = plan.branches[0]
        row["pair_valid"][...] = True
        row["pair_kind"][...] = kind_id(branch.example.turns[branch.turn].kind)
        row["pair_duration"][...] = plan.dataset.video_info(plan.video_id).duration
        if self.contrast:
            other, indices = self._contrast(plan), self.manipulated_indices(plan)
            contrast = {name: row[f"contrast_{name}"] for name in CONTRAST_FIELDS}
            self._fill_frames(contrast, other, indices, self._view(other, indices))
            self._fill_prefix(
                contrast, self._prefix(other), self.visual_frames < len(indices))

    def _contrast(self, plan: RowPlan) -> RowPlan:
        """The same question about the manipulated frames."""
        return dataclasses.replace(plan, frame_indices=tuple(self.manipulated_indices(plan)))

    def manipulated_indices(self, plan: RowPlan) -> np.ndarray:
        """int64[n]: the frames of a pair that its chosen answer is not about, as many as it shows:
        the number of frames shall not tell the clips apart."""
        indices = plan.branches[0].example.targets.get("manipulated_indices")
        shown = len(self.frame_indices(plan))
        frames = len(plan.dataset.video_info(plan.video_id).timestamps)
        if not indices or len(indices) != shown or not 0 <= min(indices) <= max(indices) < frames:
            raise RowError(
                f"{self.where(plan, plan.branches[0])}: targets.manipulated_indices: {indices}, "
                f"expected {shown} frames (as many as the pair shows) below {frames}. Generate the "
                "pairs with `python -m tpo_jax.preferences generate`, or use a loss without "
                "'conditional'.")
        return np.asarray(indices, np.int64)

    def shown_frames(self, plan: RowPlan) -> np.ndarray:
        """float64[n, 2]: index and seconds of all frames that a pair shows the model; -1 and the
        time of the last before the manipulated frames."""
        times = plan.dataset.video_info(plan.video_id).timestamps
        indices = self.frame_indices(plan)
        if self.contrast:
            indices = np.concatenate([indices, [-1], self.manipulated_indices(plan)])
        return np.stack([indices, times[indices]], axis=1).astype(np.float64)

    def _reference_logps(self, plan: RowPlan, prefix: np.ndarray,
                         branches: list[Branch]) -> np.ndarray:
        """`Reference` of the pair, by the frames and tokens that it must belong to."""
        assert self.reference is not None
        padded = np.full(self.prefix_tokens, self.codec.pad_id, np.int32)
        padded[: len(prefix)] = prefix
        tokens = np.full((len(branches), self.bucket.branch_tokens), self.codec.pad_id, np.int32)
        for k, branch in enumerate(branches):
            tokens[k, : len(branch.ids)] = branch.ids
        pair = plan.branches[0].example.example_id
        stored = plan.dataset.video_info(plan.video_id).stored
        logps = np.float32(self.reference(pair, self.shown_frames(plan), stored, padded, tokens))
        expected = (len(branches) + self.contrast, self.bucket.answers)
        if logps.shape != expected:
            raise RowError(
                f"{self.where(plan, plan.branches[0])}: reference_logps of shape {logps.shape}, "
                f"expected {expected}. Score the pairs with this bucket.")
        return logps


def stack_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of rows: every array gets a leading axis, nested dicts stay."""
    return {
        key: stack_rows([row[key] for row in rows]) if isinstance(value, Mapping)
        else np.stack([row[key] for row in rows])
        for key, value in rows[0].items()
    }
