"""The training pipeline: (config, seed, step) -> one global batch, of which a host builds its rows.

    step -> bucket and its occurrence -> B consecutive rows of the bucket's mixture -> arrays

Nothing depends on what was drawn before, so the state of an iterator is its next step and the table
of its sources (`data.shares`), and a run may continue on another number of hosts with the same
batches, or with other sources from some step on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain

from tpo_jax.data.buckets import Bucket, BucketSchedule, fitted, scheduled
from tpo_jax.data.clip_features import RowFeatures
from tpo_jax.data.evidence import apply_evidence
from tpo_jax.data.mixture import Drawn, Mixture, Parts, Source, count_unseen, find_entries
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.preprocess import resize_of
from tpo_jax.data.row_texts import RowTexts
from tpo_jax.data.rows import Reference, RowBuilder, RowPlan, row_id, stack_rows
from tpo_jax.data.shares import SourceTable, change, number_sources
from tpo_jax.data.task_text import TextDataset
from tpo_jax.data.text import TextCodec
from tpo_jax.data.tiles import RowTiles
from tpo_jax.data.workers import end_with_parent
from tpo_jax.errors import UserError
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.tiling import tiling_of, visual_frames
from tpo_jax.models.heads import HEADS, heads_of
from tpo_jax.models.heads.listed import load_listed

Batch = dict[str, Any]


def read_buckets(config: Mapping[str, Any], codec: TextCodec) -> tuple[Bucket, ...]:
    """The buckets of a training config, {name: {media, batch_size, ...}}, sorted by name."""
    return tuple(fitted(Bucket.from_config(name, config[name]), codec) for name in sorted(config))


def shown_frames(codec: TextCodec, model_config: ModelConfig, asked: int = 0) -> int:
    """Frames of a video that a command shows a model: `asked` of them, else those that it was
    published with, else the most that it takes.

    Raises:
      UserError: it does not take so many.
    """
    most = model_config.vision.max_frames
    frames = asked or codec.template.frames or most
    if frames > most:
        raise UserError(f"--frames={frames}: the model takes at most {most}")
    return frames


def row_builder(codec: TextCodec, model_config: ModelConfig, bucket: Bucket,
                reference: Reference | None = None, contrast: bool = False) -> RowBuilder:
    """The builder of a bucket for a model; refuses a tokenizer or bucket of another model."""
    if codec.template.visual_offset != model_config.visual_offset:
        raise UserError(
            f"template.visual_offset: {codec.template.visual_offset}, but the model has "
            f"{model_config.visual_offset}.")
    if codec.vocab_size > model_config.language.num_tokens:
        raise UserError(
            f"tokenizer: {codec.vocab_size} ids, but the model has language.num_tokens = "
            f"{model_config.language.num_tokens}.")
    for token, index in model_config.tokens.items():
        if codec.task_tokens.get(token) != index:
            raise UserError(
                f"tokenizer: {token!r} is {codec.task_tokens.get(token)}, but the model has "
                f"tokens[{token!r}] = {index}. Use the tokenizer of the model folder.")
    tasks = heads_of(model_config.heads)
    if "mask" in tasks and bucket.mask_size != model_config.mask_size:
        raise UserError(
            f"buckets.{bucket.name}.mask_size: {bucket.mask_size}, but the mask head answers at "
            f"{model_config.mask_size}; set it to that.")
    if "temporal" in tasks and not bucket.windows:
        raise UserError(
            f"buckets.{bucket.name}.windows: 0, but the model has a temporal head; set at least 1.")
    if bucket.frames > model_config.vision.max_frames:
        raise UserError(
            f"buckets.{bucket.name}.frames: {bucket.frames}, but the model has vision.max_frames "
            f"= {model_config.vision.max_frames}; set it to that, or less.")
    features = texts = None
    if model_config.clip_features is not None:
        readers = {task for task, name in tasks.items() if HEADS[name].reads_clip_features}
        features = RowFeatures(model_config.clip_features, frozenset(readers))
    if model_config.text_features is not None:
        readers = {task for task, name in tasks.items() if HEADS[name].reads_text_features}
        texts = RowTexts(model_config.text_features, frozenset(readers))
    frames = visual_frames(model_config, bucket.frames, bucket.tiles)
    tiling = bucket.tiles and tiling_of(model_config)
    vision = model_config.vision
    resize = resize_of(vision.resize, bucket.media, vision.mean)
    return RowBuilder(codec, bucket, tuple(tasks), vision.image_size, frames, reference, resize,
                      contrast, features, texts,
                      RowTiles(tiling, bucket.tiles) if tiling else None)


def blank_batch(builder: RowBuilder, rows: int | None = None) -> Batch:
    """A batch of the right shapes that counts for nothing (for compiling ahead)."""
    batch = stack_rows([builder.blank()] * (rows or builder.bucket.batch_size))
    if builder.beside is not None:
        batch["beside"] = blank_batch(builder.beside)
    return batch


class Pipeline:
    """Random access to global batches.

    Args:
      config_data: `data.train` or `data.validation` of a config: a list of {path, weight, tasks,
        pairs}, or of `Source`.
      codec: tokenizer and template.
      model_config: decides image size, visual tokens and heads.
      heads: heads of the model, as in `model_config`.
      buckets: `buckets` of a config, or a list of `Bucket`.
      seed: decides every draw.
      process_index: this host.
      process_count: number of hosts; must divide every batch size.
      reference: reference log-probabilities of preference pairs; None leaves them out.
      evidence: what the model may see, one of `data.evidence.MODES`.
      task_text: whether targets of heads stand in the text of answers.
      table: of the checkpoint that is continued, `self.table.to_json()` then; None: a new run.
      start_step: step of that checkpoint. Sources that differ from the table's count from here.
      contrast: whether preference pairs bring their manipulated frames as well.

    Raises:
      RowError: naming every example that does not fit its bucket.
      UserError: naming a source of which no bucket shows anything, or what does not go together.
    """

    def __init__(self, config_data: Sequence[Any], codec: TextCodec, model_config: ModelConfig,
                 heads: Sequence[str], buckets: Mapping[str, Any] | Sequence[Bucket], seed: int,
                 process_index: int = 0, process_count: int = 1,
                 reference: Reference | None = None, evidence: str = "full",
                 task_text: bool = False, contrast: bool = False,
                 table: Mapping[str, Any] | None = None, start_step: int = 0):
        if set(heads) != set(model_config.heads):
            raise UserError(f"heads: {list(heads)}, but the model has {list(model_config.heads)}.")
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index: {process_index}, expected 0..{process_count - 1}.")
        buckets = read_buckets(buckets, codec) if isinstance(buckets, Mapping) else tuple(buckets)
        for bucket in buckets:
            if bucket.batch_size % process_count:
                raise UserError(
                    f"buckets.{bucket.name}.batch_size: {bucket.batch_size} rows do not divide "
                    f"over {process_count} hosts; use a multiple of {process_count}.")
        sources = [entry if isinstance(entry, Source) else Source.from_config(entry)
                   for entry in config_data]
        if task_text:
            sources = [dataclasses.replace(source, dataset=TextDataset(source.dataset))
                       for source in sources]
        self._sources = sources
        if any(source.tasks.get("preference") for source in sources) and not any(
                bucket.kind == "preference" for bucket in buckets):
            raise UserError("data: task 'preference' has a weight, but no bucket "
                            "has question > 0.")
        self.schedule = BucketSchedule(scheduled(buckets))
        self.process_index, self.process_count = process_index, process_count
        self.evidence = evidence
        self.skipped: frozenset[str] = frozenset()
        self.row_builders = {
            bucket.name: row_builder(codec, model_config, bucket, reference, contrast)
            for bucket in buckets}
        for builder in self.row_builders.values():
            builder.beside = self.row_builders.get(builder.bucket.beside)
        # Those that are compiled: a bucket beside another is part of the other's batch.
        self.builders = {
            bucket.name: self.row_builders[bucket.name] for bucket in self.schedule.buckets}
        old = SourceTable.from_json(table) if table else None
        described = [source.described for source in sources]
        numbered = dict(zip(number_sources(described, old.sources if old else ()), sources,
                            strict=True))
        parts: dict[str, Parts] = {}
        for media, kind in dict.fromkeys((bucket.media, bucket.kind) for bucket in buckets):
            parts |= find_entries(self._group(media, kind), numbered)
        shown = {(bucket.media, bucket.kind) for bucket in buckets}
        self._unseen = {number: count_unseen(source, shown) for number, source in numbered.items()}
        for number, source in numbered.items():
            if self._unseen[number] and not any(number in part for part in parts.values()):
                raise UserError(
                    f"data source {source.dataset.path}: no bucket shows anything of it, which is "
                    f"{_in_words(self._unseen[number])}. Add a bucket of that media and kind, or "
                    "remove the source.")
        weights = {name: {number: source.weight for number, (source, _) in part.items()}
                   for name, part in parts.items()}
        self.table = change(old, start_step, described, weights, self._rows_before(start_step))
        self.mixtures: dict[str, Mixture] = {
            bucket.name: Mixture(bucket, parts[bucket.name], self.table.buckets[bucket.name], seed)
            for bucket in buckets}

    def _group(self, media: str, kind: str) -> list[RowBuilder]:
        """Builders of the buckets of one media and kind, the smallest first.

        Pairs go by the frames of their clip, conversations by the length of their branches and,
        where these are equal, the tiles of their image.

        Raises:
          ValueError: two of them are as large, so that neither goes first.
        """
        fields, what = ((("frames",), "pair") if kind == "preference" else
                        (("branch_tokens", "tiles"), "question"))

        def room(bucket: Bucket) -> tuple[int, ...]:
            return tuple(getattr(bucket, field) for field in fields)

        group = sorted(
            (builder for builder in self.row_builders.values()
             if (builder.bucket.media, builder.bucket.kind) == (media, kind)),
            key=lambda builder: room(builder.bucket))
        for one, other in itertools.pairwise(builder.bucket for builder in group):
            if room(one) == room(other):
                field, size = fields[0], room(one)[0]
                raise UserError(
                    f"buckets.{one.name} and buckets.{other.name}: both {one.media} with "
                    f"{field} {size}; a {what} goes to the smallest that it "
                    "fits, so give them different ones or merge them.")
        return group

    def _rows_before(self, step: int) -> dict[str, int]:
        """Rows that each bucket gave in the steps before `step`."""
        rows = {}
        for bucket in self.schedule.buckets:
            occurrences = self.schedule.occurrences(bucket, step)
            for part in self._parts(bucket):
                rows[part.name] = occurrences * part.batch_size
        return rows

    def _parts(self, bucket: Bucket) -> list[Bucket]:
        """The bucket, and the one beside it."""
        return [bucket, self.row_builders[bucket.beside].bucket] if bucket.beside else [bucket]

    def plans(self, step: int) -> tuple[str, range, list[Any]]:
        """Bucket name, numbers and plans of this host's rows of a step."""
        bucket, occurrence = self.schedule(step)
        return bucket.name, *self._plans(bucket, occurrence)

    def _plans(self, bucket: Bucket, occurrence: int) -> tuple[range, list[Any]]:
        local = bucket.batch_size // self.process_count
        first = occurrence * bucket.batch_size + self.process_index * local
        rows = range(first, first + local)
        return rows, [self.mixtures[bucket.name](row) for row in rows]

    def batch(self, step: int) -> tuple[str, Batch]:
        """Bucket name and this host's rows [i * B / n, (i + 1) * B / n) of a step's batch.

        The rows of a bucket beside it are the batch's entry "beside".
        """
        bucket, occurrence = self.schedule(step)
        batch = self._rows(self.builders[bucket.name], occurrence)
        if bucket.beside:
            batch["beside"] = self._rows(self.row_builders[bucket.beside], occurrence)
        return bucket.name, batch

    def _rows(self, builder: RowBuilder, occurrence: int) -> Batch:
        name = builder.bucket.name
        rows, plans = self._plans(builder.bucket, occurrence)
        batch = stack_rows([
            builder.blank() if self.skipped & _ids(plan) else builder.build(plan, row_id(name, row))
            for row, plan in zip(rows, plans, strict=True)])
        return apply_evidence(batch, self.evidence)

    def rows(self, step: int) -> list[tuple[str, RowPlan, Batch]]:
        """(bucket name, plan, arrays) of every row of `batch(step)`, those beside last."""
        bucket, occurrence = self.schedule(step)
        _, batch = self.batch(step)
        parts = {bucket.name: batch, bucket.beside: batch.pop("beside", {})}
        return [
            (part.name, plan, _row(parts[part.name], i))
            for part in self._parts(bucket)
            for i, plan in enumerate(self._plans(part, occurrence)[1])]

    def skip(self, example_ids: Iterable[str]) -> None:
        """Rows that hold one of these examples count for nothing from now on.

        Every other row stays as it is. Batches that an iterator has read ahead are not changed.
        """
        self.skipped |= frozenset(example_ids)

    def describe_batch(self, step: int) -> tuple[str, list[dict[str, Any]]]:
        """Bucket name, and video and examples of every row of a step's global batch."""
        bucket, occurrence = self.schedule(step)
        plans: list[RowPlan] = []
        for part in self._parts(bucket):
            first = occurrence * part.batch_size
            plans += map(self.mixtures[part.name], range(first, first + part.batch_size))
        return bucket.name, [
            {"video": plan.video_id, "examples": sorted(_ids(plan))} for plan in plans]

    def describe_mixture(self, steps: int) -> str:
        """The weights of the mixture as shares, for the log: steps of a bucket, rows of a source in
        it, what it has there and how often a run of so many steps shows that, and what a draw of it
        asks for as long as its video has all of its tasks."""
        rows = self._rows_before(steps)
        lines = [f"mixture: share of steps; of rows by source, and its epochs in {steps:,} steps; "
                 "of draws by task"]
        for bucket in self.schedule.buckets:
            for part in self._parts(bucket):
                share = self.schedule.share(bucket)
                beside = f" beside {bucket.name}" if part is not bucket else ""
                lines.append(f"  {part.name}{beside}: {share:.1%} of steps, {part.batch_size} rows")
                for drawn in self.mixtures[part.name].drawn_before(rows[part.name]):
                    tasks = {t: weight for t, weight in drawn.source.tasks.items() if weight}
                    whole = sum(tasks.values())
                    asked = ", ".join(f"{t} {w / whole:.1%}" for t, w in sorted(tasks.items()))
                    lines.append(f"    {drawn.share:.1%} {drawn.source.dataset.path}: "
                                 f"{_counted(part, drawn)}, {drawn.epochs:.1f} epochs; {asked}")
        return "\n".join(lines)

    def describe_repeats(self, steps: int, epochs: float) -> str:
        """What a run of so many steps shows more often than the asked number of epochs, a line for
        each source of a bucket; "" if nothing, or `epochs` is 0. Steps are counted for the number
        of pairs that a config was told, which the manifest need not hold.

        Not told: a batch more, as whole batches make, and a twentieth, by which the rounded weights
        of buckets may miss their share of the steps.
        """
        rows = self._rows_before(steps)
        return "\n".join(
            f"WARNING: {steps:,} steps make {drawn.epochs:.1f} epochs of the "
            f"{_counted(mixture.bucket, drawn)} of {drawn.source.dataset.path} in bucket {name}, "
            f"but data.epochs={epochs:g}. Tell the config how many there are, set steps, or set "
            "data.epochs=0."
            for name, mixture in self.mixtures.items()
            for drawn in mixture.drawn_before(rows[name])
            if epochs and drawn.rows - mixture.bucket.batch_size >= 1.05 * epochs * drawn.entries)

    def describe_unseen(self) -> str:
        """What is never drawn because no bucket shows its media, a line for each source; "" if
        nothing. Steps that were counted with it are too many for what is left."""
        return "\n".join(
            f"{source.dataset.path}: no bucket shows {_in_words(unseen)}, of "
            f"{len(source.dataset.videos)} videos and images"
            for source, unseen in zip(self._sources, self._unseen.values(), strict=True) if unseen)

    def describe_kinds(self, reported: Sequence[str]) -> str:
        """Which pairs have no metrics of their kind, where `reported` kinds have them; "" if none.
        A kind that is spelled otherwise than in the config would be missed without a word."""
        datasets = [source.dataset for source in self._sources]
        kinds = {kind for dataset in datasets if isinstance(dataset, PairedDataset)
                 for kind in dataset.kinds}
        if not reported or kinds <= set(reported):
            return ""
        return (f"WARNING: pairs of the kinds {sorted(kinds - set(reported))} have no metrics of "
                f"their own: preference.kinds={list(reported)}. Add them there.")

    def iterator(self, start_step: int = 0, threads: int = 2, prefetch: int = 4,
                 workers: int = 0) -> grain.DatasetIterator:
        """(bucket name, batch) from `start_step` on, read ahead.

        The iterator's state, {"next_index": next step}, is valid on any number of hosts.

        Args:
          start_step: first step.
          threads: batches that are built at the same time.
          prefetch: batches that are kept ready.
          workers: processes that build them; 0 builds in this process.
        """
        steps = _WorkerSteps(self, workers) if workers else _Steps(self)
        options = grain.ReadOptions(max(threads, workers), prefetch)
        iterator = iter(grain.MapDataset.source(steps).to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        return iterator


def _counted(bucket: Bucket, drawn: Drawn) -> str:
    """What a source has for a bucket: "1,600 pairs"."""
    unit = "pair" if bucket.kind == "preference" else bucket.media
    return f"{drawn.entries:,} {unit}{'s' * (drawn.entries != 1)}"


def _in_words(unseen: Mapping[tuple[str, str], int]) -> str:
    return ", ".join(f"{count} {media}{'s' * (count != 1)} with a {kind} example"
                     for (media, kind), count in unseen.items())


def _row(batch: Batch, i: int) -> Batch:
    """The arrays of row i, without the leading B."""
    return {name: _row(value, i) if isinstance(value, Mapping) else value[i]
            for name, value in batch.items()}


def _ids(plan: RowPlan) -> frozenset[str]:
    return frozenset(branch.example.example_id for branch in plan.branches)


class _Steps:
    """A pipeline as a random-access data source without end."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[str, Batch]:
        return self._pipeline.batch(step)


class _WorkerSteps(_Steps):
    """The same, built in other processes.

    Grain's own worker processes keep one state each, which would tie a checkpoint to their number.
    """

    def __init__(self, pipeline: Pipeline, workers: int):
        super().__init__(pipeline)
        self._pool = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _install, (pipeline,))

    def __getitem__(self, step: int) -> tuple[str, Batch]:
        return self._pool.submit(_build, step).result()


_installed: list[Pipeline] = []  # the pipeline of a worker process


def _install(pipeline: Pipeline) -> None:
    end_with_parent()
    load_listed()
    _installed[:] = [pipeline]


def _build(step: int) -> tuple[str, Batch]:
    return _installed[0].batch(step)
