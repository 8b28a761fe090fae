"""Runs a model over a prepared split: option likelihood, free generation, forced routing, pairs.

The buckets are as large as the longest question of the split needs, so evaluation has no length
settings. Every batch passes `apply_evidence`, which is how blind and middle-frame models are
scored.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from tpo_jax.data import evaluation_rows
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.evaluation_rows import examples_of, media_of
from tpo_jax.data.evidence import apply_evidence
from tpo_jax.data.pipeline import row_builder, shown_frames
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.rows import RowBuilder, RowPlan
from tpo_jax.data.target_parts import window_count
from tpo_jax.data.task_text import TextDataset
from tpo_jax.data.text import Branch, TextCodec, render_options
from tpo_jax.data.tiles import tiles_of
from tpo_jax.errors import UserError
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.all_frames import (
    Forced,
    Watched,
    by_frame,
    forced_over_films,
    stored_film,
)
from tpo_jax.evaluation.asked import clip_info, frames_asked, most_calls, sample, slots_of
from tpo_jax.evaluation.benchmarks import Call, Table
from tpo_jax.evaluation.metrics import preference, qa
from tpo_jax.generation.routing import RoutedAnswer, Router
from tpo_jax.generation.sampler import Context, Generation, Sampler, Sampling, branch_keys
from tpo_jax.generation.task_text import read_answer
from tpo_jax.generation.whole_video import StoredFilm
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import HEADS, ClipInfo, heads_of, task_tokens
from tpo_jax.models.video_language import FunctionalModel, Outputs

# What the answers of a task call: a task of a head; tracking is a question to the mask head.
_CALLED = {"temporal": "temporal", "region": "region", "mask": "mask", "tracking": "mask"}
SLOTS = 12  # of a head in a row, unless one question needs more
SPARE_TOKENS = 8  # that a free answer may be longer than the longest labelled one

Batches = Iterator[tuple[dict[str, Any], list[RowPlan]]]


def called_by_task() -> dict[str, str]:
    """{task of an example: task of the head that its answers call}; a model without such a head
    is not asked (its base has no task tokens)."""
    return _CALLED | {task: task for task in task_tokens()}


def evaluable_tasks() -> tuple[str, ...]:
    """Everything that can be evaluated."""
    return ("qa", *called_by_task(), "preference")


@dataclasses.dataclass
class Results:
    """What one evaluation found.

    Attributes:
      table: scores per item and metric.
      samples: one JSON-able record per head call and question, for the report.
      pairs: calls and generated events per answer, for the routing counts.
      frames: {task: counts of frames of masks and tracks}, over all calls; see `Watched.count`.
    """

    table: Table = dataclasses.field(default_factory=Table)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pairs: list[tuple[list[Call], list[tuple[str, Any]]]] = dataclasses.field(default_factory=list)
    frames: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to evaluate.

    Attributes:
      batch_size: rows of a batch.
      branches: most branches a row: options of questions, or questions to heads.
      evidence: "full", "blind" or "middle_frame"; see `data.evidence`. Without "full", questions
        are asked about a clip of the middle frame alone: the others would only be hidden.
      frames: of a video; 0: as many as `shown_frames` says.
      mask_frames: "shown", or "all": heads that answer frame by frame do so for every stored frame.
      progress: whether to show progress bars.
    """

    batch_size: int = 8
    branches: int = 24
    evidence: str = "full"
    frames: int = 0
    mask_frames: str = "shown"
    progress: bool = True


class Evaluator:
    """One model and the programs that score it.

    `poll` is called before every batch; what it raises ends the work.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        codec: TextCodec,
        settings: Settings,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.codec, self.settings = config, codec, settings
        self._poll = poll
        self.model = FunctionalModel(config)
        self.params = jax.tree.map(jax.numpy.asarray, params)
        self.results = Results()
        self._forced = jax.jit(self._forced_heads)
        # One sampler prefills for all passes, so that equal shapes compile once.
        self._scorer = Sampler(self.model, codec, Sampling(max_new=1))
        self._router = Router(self.model, codec)

    def with_params(self, params: Any) -> Evaluator:
        """For other weights of the same model, with these programs; nothing is scored yet."""
        other = copy.copy(self)
        other.params, other.results = jax.tree.map(jax.numpy.asarray, params), Results()
        return other

    def questions(self, dataset: PreparedDataset) -> None:
        """Multiple choice by option likelihood: see `qa.scores`."""
        for media in media_of(dataset):
            turns = [
                (turn, render_options(turn.question, turn.options), option)
                for example in examples_of(dataset, media)
                for turn in example.turns
                for option in turn.options
            ]
            if not turns:
                continue
            widest = max(len(turn.options) for turn, _, _ in turns)
            bucket = self._bucket(
                dataset,
                media,
                [self.codec.build_branch(question, option) for _, question, option in turns],
                branches=max(self.settings.branches, widest),
                frames=self._clip_frames(media) if self.settings.evidence == "full" else 1,
            )
            builder = row_builder(self.codec, self.config, bucket)
            rows = evaluation_rows.build_option_rows(dataset, builder)
            of_plan = {id(row.plan): row for row in rows}
            shape = max(len(row.questions) for row in rows), widest
            for batch, plans in self._batches(builder, [row.plan for row in rows], "options"):
                now = [of_plan[id(plan)] for plan in plans]
                sums = self._option_logps(batch, now, shape)
                for number, row in enumerate(now):
                    self._score_options(row.plan, row.branches, sums[number])

    def heads(self, dataset: PreparedDataset, tasks: Sequence[str]) -> None:
        """Head metrics of some tasks, from free generation and with forced routing."""
        for media in media_of(dataset):
            examples = [e for e in examples_of(dataset, media) if e.task in tasks]
            if examples:
                bucket = self._head_bucket(dataset, media, examples)
                builder = row_builder(self.codec, self.config, bucket)
                self._ask_heads(dataset, builder, tasks)

    def task_text(self, dataset: PreparedDataset, tasks: Sequence[str]) -> None:
        """The same metrics from the words of the answers; nothing is forced."""
        written = TextDataset(dataset)
        for media in media_of(dataset):
            if examples := [e for e in examples_of(written, media) if e.task in tasks]:
                bucket = self._head_bucket(dataset, media, examples)
                builder = row_builder(self.codec, self.config, bucket)
                self._read_answers(written, builder, tasks)

    def preferences(self, dataset: PreparedDataset) -> None:
        """preference/accuracy with the video, preference/accuracy_blind without it."""
        rows = evaluation_rows.build_pair_rows(dataset)
        if not rows:
            raise UserError(f"{dataset.path}: no preference pairs; give the folder of pairs")
        answers = [
            self.codec.build_branch(None, branch.answer) for row in rows for branch in row.branches
        ]
        question = max(
            len(self.codec.build_prefix(0, "video", row.question))
            - len(self.codec.build_prefix(0, "video"))
            for row in rows
        )
        most = max(len(row.branches) for row in rows)
        shape = {"branches": most, "frames": self._clip_frames("video"), "question": question}
        bucket = self._bucket(dataset, "video", answers, **shape)
        builder = row_builder(self.codec, self.config, bucket)
        for batch, plans in self._batches(builder, rows, "preference"):
            seen = self._answer_logps(batch)
            unseen = self._answer_logps(apply_evidence(batch, "blind"))
            for plan, *both in zip(plans, seen, unseen, strict=False):
                scores = {}
                for metric, logps in zip(("accuracy", "accuracy_blind"), both, strict=True):
                    chosen, *rejected = logps[: len(plan.branches)]
                    won = [preference.preference_correct(chosen, x) for x in rejected]
                    scores[f"preference/{metric}"] = float(np.mean(won))
                item = plan.branches[0].example.example_id
                self.results.table.add(item, plan.video_id, scores)

    # Programs.

    def _forced_heads(
        self, params: Any, context: Context, batch: Any
    ) -> tuple[dict[str, dict[str, jax.Array]], dict[str, jax.Array]]:
        """Head predictions at the slots of labelled answers, on videos that are encoded already,
        and {task: float32[B, S, D]}, those slots of the heads that answer frame by frame."""
        model = self.model.bind(params)
        hidden, _ = model.language.extend(
            model.embed_branches(batch["branch_tokens"], batch["slots"]),
            batch["branch_positions"],
            batch["branch_segments"],
            context.prefix,
            context.prefix_segments,
        )
        outputs = Outputs(hidden, hidden[:, 0], context.encoded)
        slots = {task: batch["slots"][task] for task in by_frame(self.config.heads)}
        states = {task: model.slot_states(outputs, slot) for task, slot in slots.items()}
        return model.run_heads(outputs, batch, for_losses=False), states

    def _answer_logps(self, batch: dict[str, Any]) -> np.ndarray:
        """float64[B, K]: summed log-probability of each branch's answer."""
        context = self._scorer.prefill(self.params, batch)
        logps = np.asarray(self._scorer.score(self.params, context, batch), np.float64)
        return (logps * batch["answer_weights"]).sum(axis=-1)

    def _option_logps(
        self,
        batch: dict[str, Any],
        rows: Sequence[evaluation_rows.OptionRow],
        shape: tuple[int, int],
    ) -> np.ndarray:
        """What `_answer_logps` gives, but a question runs once for all of its options."""
        prompts, answers, branch = evaluation_rows.share_prompts(batch, rows, shape)
        context = self._scorer.prefill(self.params, batch)
        logps = self._scorer.score_answers(self.params, context, prompts, answers["tokens"])
        sums = np.zeros(batch["branch_tokens"].shape[:2])
        row, question, option = np.nonzero(branch >= 0)
        totals = (np.asarray(logps, np.float64) * answers["weights"]).sum(axis=-1)
        sums[row, branch[row, question, option]] = totals[row, question, option]
        return sums

    # Passes over the data.

    def _score_options(self, plan: RowPlan, options: Sequence[Any], sums: np.ndarray) -> None:
        grouped: dict[tuple[str, int], list[tuple[Any, float]]] = defaultdict(list)
        for option, value in zip(options, sums, strict=False):
            grouped[option.example_id, option.turn].append((option, float(value)))
        for (example_id, turn), group in grouped.items():
            logps = np.array([value for _, value in group])
            correct = next(i for i, (option, _) in enumerate(group) if option.correct)
            value = qa.option_correct(logps, correct)
            item = f"{example_id}/{turn}"
            example = next(b.example for b in plan.branches if b.example.example_id == example_id)
            scores = qa.scores(value, group[0][0].kind, example.media)
            self.results.table.add(item, plan.video_id, scores)
            self.results.samples.append(
                sample("qa", item, plan, example, turn, scores)
                | {"option_logps": logps.round(4).tolist(), "chosen": int(np.argmax(logps))}
            )

    def _ask_heads(
        self, dataset: PreparedDataset, builder: RowBuilder, tasks: Sequence[str]
    ) -> None:
        """Every question answered freely, and teacher-forced where that is another answer."""
        asked, labelled = (
            evaluation_rows.build_question_rows(dataset, builder, tasks, with_answers=answers)
            for answers in (False, True)
        )
        sampler = self._sampler(builder, asked)
        both = zip(
            self._batches(builder, asked, "heads"),
            evaluation_rows.batches(builder, labelled),
            strict=True,
        )
        for (batch, rows), (labels, _) in both:
            context = self._scorer.prefill(self.params, batch)
            clips = [clip_info(dataset, plan, batch, row) for row, plan in enumerate(rows)]
            films = [self._film(builder, plan) for plan in rows]
            found = self._generate(sampler, context, batch)
            routed = self._router.route(
                self.params, context, batch, found, clips, frames_asked(rows, batch), films
            )
            tasks = by_frame(self.config.heads)
            watched = [Watched(c.times, f, tasks) for c, f in zip(clips, films, strict=True)]
            same: dict[str, dict[str, float]] = {}
            for plan, answers, seen in zip(rows, routed, watched, strict=True):
                for branch, answer in zip(plan.branches, answers, strict=False):
                    same |= self._score_answer(plan, branch.example, branch.turn, answer, seen)
            forced = None
            if any(call.item not in same for plan in rows for call, *_ in slots_of(plan)):
                here = list(zip(rows, clips, films, strict=True))
                forced = self._force(context, batch, found, labels, here, same)
            for row, plan in enumerate(rows):
                self._score_forced(plan, row, clips[row], watched[row], forced, same)

    def _film(self, builder: RowBuilder, plan: RowPlan) -> StoredFilm | None:
        return stored_film(builder, plan) if self.settings.mask_frames == "all" else None

    def _force(
        self,
        context: Context,
        batch: dict[str, Any],
        generation: Generation,
        labels: dict[str, Any],
        rows: Sequence[tuple[RowPlan, ClipInfo, StoredFilm | None]],
        same: Collection[str],
    ) -> Forced:
        """What heads say at the slots of labelled answers; `same` are items that need none."""
        predictions, states = jax.device_get(self._forced(self.params, context, labels))
        filmed = forced_over_films(
            self._router, self.params, batch, generation, rows, states, same
        )
        return Forced(labels, predictions, filmed)

    def _read_answers(
        self, dataset: TextDataset, builder: RowBuilder, tasks: Sequence[str]
    ) -> None:
        """Every question answered freely; the calls of its label say what to read in the words."""
        rows = evaluation_rows.build_question_rows(dataset, builder, tasks, with_answers=False)
        sampler = self._sampler(builder, rows)
        for batch, plans in self._batches(builder, rows, "answers"):
            context = self._scorer.prefill(self.params, batch)
            clips = [clip_info(dataset, plan, batch, row) for row, plan in enumerate(plans)]
            answers = self._answer(sampler, context, batch, clips)
            for plan, clip, given in zip(plans, clips, answers, strict=False):
                labelled = {e.example_id: e for e in dataset.labelled.examples(plan.video_id)}
                for branch, answer in zip(plan.branches, given, strict=False):
                    example = labelled[branch.example.example_id]
                    calls = benchmarks.find_calls(example, branch.turn)
                    answer = read_answer(answer, [call.head for call in calls], clip)
                    self._score_answer(plan, example, branch.turn, answer, Watched(clip.times))

    def _sampler(self, builder: RowBuilder, plans: Sequence[RowPlan]) -> Sampler:
        events = max(Sampling.events, most_calls(plans))
        sampling = Sampling(max_new=builder.bucket.answers + SPARE_TOKENS, events=events)
        return Sampler(self.model, self.codec, sampling)

    def _generate(self, sampler: Sampler, context: Context, batch: dict[str, Any]) -> Generation:
        """Greedy answers."""
        unused = branch_keys(0, np.zeros(batch["branch_tokens"].shape[:2], np.uint32))
        return sampler.generate(self.params, context, batch, unused)

    def _answer(
        self, sampler: Sampler, context: Context, batch: dict[str, Any], clips: Sequence[ClipInfo]
    ) -> list[list[RoutedAnswer | None]]:
        """[row][branch] greedy answers, heads called."""
        found = self._generate(sampler, context, batch)
        return self._router.route(self.params, context, batch, found, clips)

    def _score_answer(
        self,
        plan: RowPlan,
        example: Example,
        turn: int,
        answer: RoutedAnswer,
        watched: Watched,
    ) -> dict[str, dict[str, float]]:
        """Returns {item: scores} where forcing the labelled answer would show the head the same.

        That is an answer of one call, word for word as labelled; without labels nothing is shown.
        """
        calls = benchmarks.find_calls(example, turn)
        events = [(event.task, event.result) for event in answer.events]
        self.results.pairs.append((calls, [(task, None) for task, _ in events]))
        for call, result in zip(calls, benchmarks.match_events(calls, events), strict=True):
            scores = watched.score(call, result)
            watched.count(call, self.results.frames)
            self.results.table.add(call.item, plan.video_id, scores)
            self.results.samples.append(
                sample(example.task, call.item, plan, example, turn, scores)
                | {"place": call.place, "occurrence": call.occurrence, "answer": answer.to_json()}
            )
        same = not example.labelled or answer.marked == example.turns[turn].answer
        return {calls[0].item: scores} if len(calls) == 1 and same else {}

    def _score_forced(
        self,
        plan: RowPlan,
        row: int,
        clip: ClipInfo,
        watched: Watched,
        forced: Forced | None,
        same: dict[str, dict[str, float]],
    ) -> None:
        """The head read its slot in the labelled answer, whatever the model would have said.

        `forced` may be None where all calls of the batch are in `same`.
        """
        for call, _, slot in slots_of(plan):
            scores = same.get(call.item)
            if scores is None:
                result = self._forced_result(call, forced, row, slot, clip)
                scores = watched.score(call, result)
            self.results.table.add(call.item, plan.video_id, scores, prefix="forced/")

    def _forced_result(
        self, call: Call, forced: Forced, row: int, slot: int, clip: ClipInfo
    ) -> Mapping[str, Any]:
        if call.item in forced.filmed:
            return forced.filmed[call.item]
        name = heads_of(self.config.heads)[call.head]
        # What a head gives per row, without an axis of slots, its decode does not read.
        head = {key: value[row, slot] for key, value in forced.predictions[name].items()}
        if call.head == "region":
            frame = int(forced.labels["slots"]["region"]["frame"][row, slot])
            clip = dataclasses.replace(clip, frame=frame)
        return HEADS[name].decode(head, clip)

    def _batches(self, builder: RowBuilder, plans: Sequence[RowPlan], label: str) -> Batches:
        total = -(-len(plans) // builder.bucket.batch_size)
        every = evaluation_rows.batches(builder, plans)
        for batch, rows in tqdm.tqdm(
            every, total=total, desc=label, unit="batch", disable=not self.settings.progress
        ):
            self._poll()
            yield apply_evidence(batch, self.settings.evidence), rows

    # Shapes.

    def _clip_frames(self, media: str) -> int:
        if media == "image":
            return 1
        return shown_frames(self.codec, self.config, self.settings.frames)

    def _bucket(
        self,
        dataset: PreparedDataset,
        media: str,
        built: Sequence[Branch],
        *,
        branches: int,
        frames: int,
        windows: int = 1,
        **more: Any,
    ) -> Bucket:
        """Shapes that hold all of `built`, the branches that will be asked, and every image."""
        images = map(dataset.video_info, dataset.videos) if media == "image" else ()
        answers = max(len(branch.ids) - branch.answer for branch in built)
        return Bucket(
            name=f"evaluation_{media}",
            media=media,
            batch_size=self.settings.batch_size,
            frames=frames,
            branches=branches,
            branch_tokens=_round_up(max(len(branch.ids) for branch in built), 8),
            answers=answers,
            windows=windows,
            mask_size=self.config.mask_size,
            tiles=tiles_of(self.config, images),
            **more,
        )

    def _head_bucket(
        self, dataset: PreparedDataset, media: str, examples: Sequence[Example]
    ) -> Bucket:
        """Holds every question; all those about one video in one row, up to the limits."""
        built: list[Branch] = []
        calls: dict[str, Counter[str]] = defaultdict(Counter)  # video -> slots by head
        most: Counter[str] = Counter()  # of one question
        questions: Counter[str] = Counter()
        for example in examples:
            for turn in example.turns:
                branch = self.codec.build_branch(turn.question, turn.answer)
                slots = Counter(slot.head for slot in branch.slots)
                built.append(branch)
                calls[example.video_id].update(slots)
                questions[example.video_id] += 1
                most |= slots
        slots = {
            head: max(1, most[head], min(SLOTS, max(c[head] for c in calls.values())))
            for head in (*heads_of(self.config.heads), "box")
        }
        return self._bucket(
            dataset,
            media,
            built,
            branches=min(self.settings.branches, max(questions.values())),
            frames=self._clip_frames(media),
            slots=slots,
            windows=max(1, *map(window_count, examples)),
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
