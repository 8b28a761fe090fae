"""Buckets: the fixed shapes that batches have, and which step draws which bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpo_jax.data.text import TASK_TOKENS, TextCodec
from tpo_jax.errors import UserError

PERIOD = 64  # steps after which the pattern of buckets repeats, unless there is one bucket
# A TPU lays arrays out in tiles of 128; a long row of another length is copied from one layout into
# another again and again, in programs that take minutes more to compile.
TILE, LONG = 128, 2048


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One set of static shapes; training compiles one step per bucket.

    Attributes:
      name: key in the config.
      media: "video" or "image".
      batch_size: B, rows over all hosts.
      frames: F.
      tiles: T, tiles of an image beside the whole one, for a family that publishes them; an image
        of more goes to another bucket. 0: images are one view.
      branches: K.
      branch_tokens: R, question and answer of one branch.
      answers: A, answer tokens of one branch with the end token.
      question: tokens of the question in the prefix. Not 0 makes this a bucket of preference pairs,
        which holds nothing else.
      slots: task -> S. A task of the heads of the model that is not named here has one slot.
      idle: tasks that this bucket does not ask, whose heads do not run in its steps: they have no
        slot. A large head then costs nothing where nobody calls it.
      windows: W, windows per temporal slot; 0 if the model has no temporal head.
      mask_size: height and width of mask targets in cells; 0 if the model has no mask head.
      weight: share of steps.
      beside: another bucket, a batch of which is drawn in every step of this one: one step then
        trains on images and videos. That bucket has no steps of its own.
      after_visual: tokens of the prefix behind the visual ones and before the question, such as
        </video> and the sentence about times. No config says it: see `fitted`.
    """

    name: str
    media: str
    batch_size: int
    frames: int
    branches: int
    branch_tokens: int
    answers: int
    question: int = 0
    slots: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    windows: int = 0
    mask_size: int = 0
    weight: float = 1.0
    beside: str = ""
    idle: tuple[str, ...] = ()
    tiles: int = 0
    after_visual: int = 1

    def __post_init__(self) -> None:
        where = f"buckets.{self.name}"
        if self.media not in ("video", "image"):
            raise UserError(f"{where}.media: {self.media!r}, expected 'video' or 'image'.")
        least = {"batch_size": 1, "frames": 1, "branches": 1, "branch_tokens": 1, "answers": 1,
                 "windows": 0, "mask_size": 0, "tiles": 0}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise UserError(
                    f"{where}.{field}: {getattr(self, field)}, expected at least {bound}.")
        if self.answers >= self.branch_tokens:
            raise UserError(
                f"{where}.answers: {self.answers}, expected less than branch_tokens "
                f"{self.branch_tokens}: at least one token comes before an answer.")
        if self.question < 0 or (self.question and self.branches < 2):
            raise UserError(
                f"{where}: question {self.question} and branches {self.branches}, expected "
                "question 0, or at least 2 branches (chosen, rejected, ...) with question > 0.")
        if self.tiles and (self.media, self.frames, self.kind) != ("image", 1, "conversation"):
            raise UserError(
                f"{where}.tiles: {self.tiles} with media {self.media!r}, frames {self.frames}, "
                f"question {self.question}, expected images of one frame and no pairs.")
        if not self.weight > 0:
            raise UserError(f"{where}.weight: {self.weight}, expected > 0. Remove the bucket.")
        if unknown := set(self.slots) - set(TASK_TOKENS):
            raise UserError(
                f"{where}.slots: unknown {sorted(unknown)}, expected {sorted(TASK_TOKENS)}.")
        for task in self.idle:
            if task not in TASK_TOKENS or task in self.slots:
                raise UserError(
                    f"{where}.idle: {task!r}, expected tasks of heads, {sorted(TASK_TOKENS)}, that "
                    "slots does not name.")
        for head, capacity in self.slots.items():
            if capacity < 1:
                raise UserError(
                    f"{where}.slots.{head}: {capacity}, expected at least 1 (every slot array is "
                    "always present, so that one program serves any mixture).")

    @property
    def kind(self) -> str:
        """'preference' or 'conversation'."""
        return "preference" if self.question else "conversation"

    def capacity(self, head: str) -> int:
        """S of one head."""
        return 0 if head in self.idle else self.slots.get(head, 1)

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Bucket:
        """Reads `buckets.<name>` of a training config; an unknown key is an error."""
        fields = {field.name for field in dataclasses.fields(cls)} - {"name", "after_visual"}
        if unknown := set(config) - fields:
            raise UserError(
                f"buckets.{name}: unknown keys {sorted(unknown)}, expected {sorted(fields)}.")
        values = dict(config)
        values["slots"] = dict(values.get("slots", {}))
        values["idle"] = tuple(values.get("idle", ()))
        return cls(name=name, **values)


def fitted(bucket: Bucket, codec: TextCodec) -> Bucket:
    """The bucket with the room that the template of `codec` needs behind the visual tokens."""
    room = codec.time_room(bucket.frames) if bucket.media == "video" else 0
    return dataclasses.replace(bucket, after_visual=codec.after_visual + room)


def prefix_positions(tokens: int) -> int:
    """P, positions of a prefix of at most `tokens`: whole tiles where it is long."""
    return tokens if tokens < LONG else -(-tokens // TILE) * TILE


def scheduled(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets that have steps of their own.

    Raises:
      ValueError: a bucket stands beside one that is not there, that stands beside another, that
        has one beside it already, or in which other heads run.
    """
    beside = [bucket.beside for bucket in buckets if bucket.beside]
    kinds = {bucket.name: bucket.kind for bucket in buckets}
    idle = {bucket.name: set(bucket.idle) for bucket in buckets}
    for bucket in buckets:
        if bucket.beside and (
                kinds.get(bucket.beside) != bucket.kind or bucket.name in beside
                or beside.count(bucket.beside) > 1):
            raise UserError(
                f"buckets.{bucket.name}.beside: {bucket.beside!r}, expected another bucket of kind "
                f"{bucket.kind!r} that has none beside it and stands beside no other.")
        if bucket.beside and idle[bucket.name] != idle[bucket.beside]:
            raise UserError(
                f"buckets.{bucket.name}.idle: {sorted(idle[bucket.name])}, but "
                f"buckets.{bucket.beside} beside it has {sorted(idle[bucket.beside])}: a step has "
                "the losses of both; give equal ones.")
    return tuple(bucket for bucket in buckets if bucket.name not in beside)


class BucketSchedule:
    """Periodic pattern of buckets by weight: step -> (bucket, how often it came before).

    The counts per period are the weights rounded by largest remainder (at least one each); a bucket
    is spread evenly over the period.
    """

    def __init__(self, buckets: Sequence[Bucket]):
        if not buckets:
            raise UserError("buckets: none, expected at least one.")
        if len(buckets) > PERIOD:
            raise UserError(f"buckets: {len(buckets)}, expected at most {PERIOD}.")
        self.buckets = tuple(buckets)
        period = 1 if len(buckets) == 1 else PERIOD
        counts = _apportion([bucket.weight for bucket in buckets], period)
        # Occurrence j of a bucket with count c wants to be at (j + 1/2) * period / c.
        wishes = sorted(
            ((j + 0.5) / count, i) for i, count in enumerate(counts) for j in range(count))
        self.pattern = tuple(i for _, i in wishes)
        self.counts = tuple(counts)

    def __call__(self, step: int) -> tuple[Bucket, int]:
        if step < 0:
            raise UserError(f"step: {step}, expected >= 0.")
        periods, phase = divmod(step, len(self.pattern))
        index = self.pattern[phase]
        before = self.pattern[:phase].count(index)
        return self.buckets[index], periods * self.counts[index] + before

    def share(self, bucket: Bucket) -> float:
        """Share of steps that are of `bucket`."""
        return self.counts[self.buckets.index(bucket)] / len(self.pattern)

    def occurrences(self, bucket: Bucket, step: int) -> int:
        """How often `bucket` comes before `step`."""
        index = self.buckets.index(bucket)
        periods, phase = divmod(step, len(self.pattern))
        return periods * self.counts[index] + self.pattern[:phase].count(index)


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """Integers >= 1 that sum to `total`, in proportion to `weights`."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        # The share that is furthest below (above) its exact value moves; ties go to the first.
        shortage = [step * (share - count) for share, count in zip(exact, counts, strict=True)]
        movable = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(movable, key=lambda i: shortage[i])] += step
    return counts
