"""Batched, KV-cached generation: one prefill per video, K questions against it, static shapes.

    sampler = Sampler(functional_model, codec, Sampling(max_new=32))
    context = sampler.prefill(params, batch)              # encodes each video once
    answers = sampler.generate(params, context, batch, keys)
    logps = sampler.score(params, context, answered)      # of given answers, same context

Batches are those of `data.rows`; a prompt is a branch that was built without an answer.

Decoding is constrained as in training: after a routing token its slot token follows, the slot's
input is the task vector, and its keys and values stay in the cache. The hidden state at the slot is
what the head will read; up to E of them are collected per answer.

With a mesh, rows are split over it as in training: `params` are placed by `param_shardings`,
batches hold this process's rows (`parallel.mesh.reader_shard`), results are whole everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tpo_jax.data.text import TextCodec
from tpo_jax.models.heads import HEADS
from tpo_jax.models.language import KVCache
from tpo_jax.models.layers import fold_rows
from tpo_jax.models.video_language import Encoded, FunctionalModel
from tpo_jax.objectives.logps import MASKED_LOGIT, gather_positions, token_logps
from tpo_jax.parallel.mesh import global_batch, on_mesh, replicated
from tpo_jax.parallel.rules import constrain_cache, constrain_rows

Arrays = dict[str, Any]
PREFIX_ARRAYS = (
    "frames", "frame_valid", "frame_times", "prefix_tokens", "prefix_positions", "prefix_segments",
)  # fmt: skip
TILE_ARRAYS = ("tiles", "tile_index", "tile_weight")  # of images in tiles
BRANCH_ARRAYS = ("branch_tokens", "branch_positions", "branch_segments", "slots")
ANSWER_ARRAYS = ("answer_positions", "answer_tokens")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn; part of the compiled program.

    Attributes:
      max_new: answer tokens at most, the stop included.
      events: E, head calls per answer; once an answer has made E calls, routing tokens are barred.
      temperature: 0 is greedy.
      top_p: the smallest set of tokens with at least this probability is drawn from.
    """

    max_new: int = 32
    events: int = 2
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("max_new", self.max_new >= 1, "at least 1"),
            ("events", self.events >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
        ):
            if not good:
                raise ValueError(f"sampling.{name}: {getattr(self, name)}, expected {expected}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Encoded videos with their prefixes in the cache.

    Attributes:
      encoded: of the vision encoder; heads read its features, which a model without heads has not.
      prefix: keys and values of the prefix.
      prefix_segments: int32[B, P].
    """

    encoded: Encoded
    prefix: KVCache
    prefix_segments: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """Answers and the head calls in them.

    Attributes:
      tokens: int32[B, K, N]; the stop (<eos>, or another of `TextCodec.stop_ids`) included, <pad>
        after it.
      lengths: int32[B, K]; the stop included; 0 for an unused branch.
      finished: bool[B, K], whether a stop was drawn.
      logps: float32[B, K, N] log-probabilities at temperature 1; 0 for forced tokens and padding.
      event_states: float32[B, K, E, D] hidden states at slots.
      event_heads: int32[B, K, E], index into the model's heads, -1 for no event.
      event_positions: int32[B, K, E], index of the slot token in `tokens`.
      prompt_states: float[B, K, R, D] hidden states of the prompts and prompt_valid bool[B, K, R],
        if a head of the model reads them, else None.
    """

    tokens: jax.Array
    lengths: jax.Array
    finished: jax.Array
    logps: jax.Array
    event_states: jax.Array
    event_heads: jax.Array
    event_positions: jax.Array
    prompt_states: jax.Array | None = None
    prompt_valid: jax.Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Vocabulary:
    """Constant tables over token ids.

    Attributes:
      free: bool[V], tokens that may be drawn: text, stops, routing tokens of the model's heads.
      stops: bool[V], tokens at which an answer stops.
      routing: bool[V].
      slot_after: int32[V], slot token forced after a routing token, -1 elsewhere.
      head_of: int32[V], head index of a slot token, -1 elsewhere.
    """

    free: np.ndarray
    stops: np.ndarray
    routing: np.ndarray
    slot_after: np.ndarray
    head_of: np.ndarray

    @classmethod
    def build(cls, codec: TextCodec, heads: tuple[str, ...], size: int) -> _Vocabulary:
        free = np.arange(size) < codec.vocab_size
        free[list(codec.special_ids.values())] = False
        stops = np.isin(np.arange(size), codec.stop_ids)
        free |= stops
        slot_after, head_of = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        for index, head in enumerate(heads):
            tokens = (HEADS[head].routing_token, HEADS[head].slot_token)
            routing_id, slot_id = (codec.special_ids[token] for token in tokens)
            free[routing_id] = True
            slot_after[routing_id] = slot_id
            head_of[slot_id] = index
        return cls(free, stops, slot_after >= 0, slot_after, head_of)


class Sampler:
    """Jitted generation and scoring for one model and one way of sampling.

    Every distinct shape of the inputs compiles once; callers keep to declared batch shapes.

    Args:
      mesh: over which rows, weights and prefixes are split; None: the default device alone.
    """

    def __init__(self, model: FunctionalModel, codec: TextCodec, sampling: Sampling,
                 mesh: Mesh | None = None):
        self.model, self.mesh = model, mesh
        self.codec = codec
        self.sampling = sampling
        self.heads = tuple(model.config.heads)
        self._vocabulary = _Vocabulary.build(codec, self.heads, model.config.language.vocab_size)
        whole = None if mesh is None else replicated(mesh)
        self._prefill = self._program(self._prefill_rows)
        self._generate = self._program(self._generate_rows, whole)
        self._score = self._program(self._score_rows, whole)
        self._score_answers = self._program(self._score_answers_rows, whole)

    def _program(self, function: Callable[..., Any], out: NamedSharding | None = None
                 ) -> jax.stages.Wrapped:
        """Inputs stay where they are placed: weights by the caller, rows by `_rows`."""
        if self.mesh is None:
            return jax.jit(function)
        return jax.jit(on_mesh(function, self.mesh), out_shardings=out)

    def _rows(self, batch: Any) -> Any:
        """Rows of this process as global arrays."""
        return batch if self.mesh is None else global_batch(batch, self.mesh)

    def prefill(self, params: Any, batch: Arrays) -> Context:
        """Encodes the videos of a batch and runs their prefixes.

        Args:
          params: nested dict of arrays.
          batch: as `data.rows` builds it; the entries of `PREFIX_ARRAYS` are read, and those
            of `TILE_ARRAYS` if it has them.
        """
        names = PREFIX_ARRAYS + (TILE_ARRAYS if "tiles" in batch else ())
        return self._prefill(params, self._rows({name: batch[name] for name in names}))

    def generate(self, params: Any, context: Context, batch: Arrays, keys: jax.Array,
                 first: np.ndarray | None = None) -> Generation:
        """Continues every branch of a batch whose branches are prompts (built without answer).

        Args:
          context: of `prefill` on the same rows.
          batch: the entries of `BRANCH_ARRAYS` are read. A branch of segment 0 stays unused.
          keys: key array [B, K], see `branch_keys`; not used when greedy.
          first: int32[B, K] token that the answer must begin with, -1 for none. A routing token
            here is forced routing.
        """
        if first is None:
            first = np.full(batch["branch_tokens"].shape[:2], -1, np.int32)
        rows = self._rows({"prompts": {name: batch[name] for name in BRANCH_ARRAYS},
                           "keys": jax.random.key_data(keys), "first": first})
        return self._generate(params, context, **rows)

    def score(self, params: Any, context: Context, batch: Arrays) -> jax.Array:
        """float32[B, K, A] log-probabilities of the answers in a batch.

        Args:
          context: of `prefill` on the same rows.
          batch: the entries of `BRANCH_ARRAYS` and `ANSWER_ARRAYS` are read.
        """
        rows = self._rows({name: batch[name] for name in BRANCH_ARRAYS + ANSWER_ARRAYS})
        return self._score(params, context, rows)

    def score_answers(self, params: Any, context: Context, prompts: Arrays, answers: np.ndarray
                      ) -> jax.Array:
        """float32[B, K, O, A] log-probabilities of O answers to each prompt, which runs once.

        Args:
          context: of `prefill` on the same rows.
          prompts: the entries of `BRANCH_ARRAYS`, branches without an answer.
          answers: int32[B, K, O, A]; what stands behind the end of an answer does not matter to it.
        """
        rows = self._rows({"prompts": {name: prompts[name] for name in BRANCH_ARRAYS},
                           "answers": answers})
        return self._score_answers(params, context, **rows)

    def _prefill_rows(self, params: Any, batch: Arrays) -> Context:
        model = self.model.bind(params)
        encoded = model.encode_batch(batch)
        embeds = model.embed_prefix(batch["prefix_tokens"], encoded.visual)
        segments = batch["prefix_segments"]
        _, cache = model.language.prefill(embeds, batch["prefix_positions"], segments)
        cache = dataclasses.replace(cache, k=constrain_cache(cache.k), v=constrain_cache(cache.v))
        return Context(jax.tree.map(constrain_rows, encoded), cache, segments)

    def _score_rows(self, params: Any, context: Context, batch: Arrays) -> jax.Array:
        model = self.model.bind(params)
        embeds = model.embed_branches(batch["branch_tokens"], batch["slots"])
        hidden, _ = model.language.extend(
            embeds, batch["branch_positions"], batch["branch_segments"], context.prefix,
            context.prefix_segments)
        return token_logps(
            gather_positions(hidden, batch["answer_positions"]), model.language.table,
            batch["answer_tokens"], vocab_size=model.config.language.num_tokens)

    def _score_answers_rows(self, params: Any, context: Context, prompts: Arrays,
                            answers: jax.Array) -> jax.Array:
        model = self.model.bind(params)
        B, K, count, A = answers.shape
        _, last, cache, position = self._run_prompts(model, context, prompts, A)

        def spread(x: jax.Array, axis: int = 1) -> jax.Array:
            return jnp.repeat(x, count, axis=axis)

        cache = dataclasses.replace(
            cache, k=spread(cache.k, 2), v=spread(cache.v, 2),
            **{name: None if getattr(cache, name) is None else spread(getattr(cache, name))
               for name in ("segments", "positions")})
        tokens = answers.reshape(B, K * count, A)
        hidden, _ = model.language.extend(
            model.embed_tokens(tokens), spread(position)[..., None] + jnp.arange(A),
            jnp.ones_like(tokens), context.prefix, context.prefix_segments, cache,
            prompts["branch_tokens"].shape[-1])
        before = jnp.concatenate([spread(last)[:, :, None], hidden[:, :, :-1]], axis=2)
        logps = token_logps(
            before, model.language.table, tokens, vocab_size=model.config.language.num_tokens)
        return logps.reshape(answers.shape)

    def _generate_rows(self, params: Any, context: Context, prompts: Arrays, keys: jax.Array,
                       first: jax.Array) -> Generation:
        model = self.model.bind(params)
        prompted, hidden, cache, position = self._run_prompts(
            model, context, prompts, self.sampling.max_new)
        B, K, D = hidden.shape
        state = {
            "step": jnp.int32(0), "hidden": hidden, "cache": cache, "forced": first,
            "done": prompts["branch_segments"][..., 0] == 0, "count": jnp.zeros((B, K), jnp.int32),
            "generation": self._empty_generation(B, K, D),
        }
        step = functools.partial(
            self._step, model, context, position, jax.random.wrap_key_data(keys))
        state = jax.lax.while_loop(
            lambda s: (s["step"] < self.sampling.max_new) & ~jnp.all(s["done"]), step, state)
        if not any(HEADS[head].reads_prompt for head in self.heads):
            return state["generation"]
        valid = prompts["branch_segments"] > 0
        return dataclasses.replace(
            state["generation"], prompt_states=prompted, prompt_valid=valid)

    def _run_prompts(self, model: Any, context: Context, prompts: Arrays, room: int
                     ) -> tuple[jax.Array, jax.Array, KVCache, jax.Array]:
        """Hidden states float[B, K, R, D] of the prompts and float[B, K, D] at their last tokens,
        caches with room for so many tokens of an answer, and int32[B, K] positions of its first."""
        segments, positions = prompts["branch_segments"], prompts["branch_positions"]
        B, K, R = segments.shape
        embeds = model.embed_branches(prompts["branch_tokens"], prompts["slots"])
        cache = model.language.empty_cache(B, K, R + room, embeds.dtype)
        hidden, cache = model.language.extend(
            embeds, positions, segments, context.prefix, context.prefix_segments, cache, 0)
        # Padding lies at the end with segment 0: later tokens do not see its keys.
        last = jnp.maximum(jnp.sum(segments > 0, axis=-1, keepdims=True) - 1, 0)
        position = jnp.take_along_axis(positions, last, axis=-1)[..., 0] + 1
        return hidden, gather_positions(hidden, last)[..., 0, :], cache, position

    def _empty_generation(self, B: int, K: int, D: int) -> Generation:
        N, E = self.sampling.max_new, self.sampling.events
        return Generation(
            tokens=jnp.full((B, K, N), self.codec.pad_id, jnp.int32),
            lengths=jnp.zeros((B, K), jnp.int32), finished=jnp.zeros((B, K), bool),
            logps=jnp.zeros((B, K, N), jnp.float32),
            event_states=jnp.zeros((B, K, E, D), jnp.float32),
            event_heads=jnp.full((B, K, E), -1, jnp.int32),
            event_positions=jnp.zeros((B, K, E), jnp.int32))

    def _step(self, model: Any, context: Context, position: jax.Array, keys: jax.Array,
              state: dict[str, Any]) -> dict[str, Any]:
        """Chooses one token per branch and runs it."""
        tables = jax.tree.map(jnp.asarray, dataclasses.asdict(self._vocabulary))
        index, done, forced, count = (state[k] for k in ("step", "done", "forced", "count"))
        logits = _logits(model, state["hidden"])
        drawn = self._draw(logits, count, fold_rows(keys, index))
        token = jnp.where(forced >= 0, forced, drawn)
        token = jnp.where(done, self.codec.pad_id, token)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], -1)[..., 0]
        logp = jnp.where(done | (forced >= 0), 0.0, logp)

        head = jnp.where(done, -1, tables["head_of"][token])
        embeds = model.embed_tokens(token[..., None])  # a slot token gives its task vector
        free = state["cache"].segments.shape[-1] - self.sampling.max_new
        hidden, cache = model.language.extend(
            embeds, (position + index)[..., None], (~done).astype(jnp.int32)[..., None],
            context.prefix, context.prefix_segments, state["cache"], free + index)
        hidden = hidden[..., 0, :]
        ends = tables["stops"][token]
        generation = _record(state["generation"], index, done, token, logp, ends)
        generation = _record_event(generation, index, head, count, hidden)
        return {
            "step": index + 1, "hidden": hidden, "cache": cache,
            "forced": jnp.where(done, -1, tables["slot_after"][token]),
            "done": done | ends,
            "count": count + (head >= 0), "generation": generation,
        }

    def _draw(self, logits: jax.Array, count: jax.Array, keys: jax.Array) -> jax.Array:
        """int32[B, K] from float32[B, K, V]: greedy, or by temperature and top-p."""
        logits = self._warp(logits, count)
        if self.sampling.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draw = jax.vmap(jax.vmap(jax.random.categorical))
        return draw(keys, logits).astype(jnp.int32)

    def _warp(self, logits: jax.Array, count: jax.Array) -> jax.Array:
        """float32[B, K, V] whose softmax tokens are drawn from, of the model's float32[B, K, V]."""
        vocabulary = self._vocabulary
        allowed = vocabulary.free & ~(
            vocabulary.routing & (count >= self.sampling.events)[..., None])
        logits = jnp.where(allowed, logits, MASKED_LOGIT)
        if self.sampling.temperature == 0:
            return logits
        logits = logits / self.sampling.temperature
        return keep_top_p(logits, self.sampling.top_p) if self.sampling.top_p < 1 else logits


def branch_keys(seed: int, ids: np.ndarray, sample: int = 0) -> jax.Array:
    """Key array [B, K] from uint32[B, K] ids of questions: the draw of a question depends on the
    seed, its id and the number of the sample, not on its place in the batch."""
    base = jax.random.fold_in(jax.random.key(seed), sample)
    return fold_rows(jnp.broadcast_to(base, ids.shape), ids)


def with_answers(prompts: Arrays, tokens: np.ndarray, lengths: np.ndarray) -> Arrays:
    """The branch and answer arrays of prompts continued by answers, for `Sampler.score`.

    Args:
      prompts: the entries of `BRANCH_ARRAYS`, numpy.
      tokens: int32[B, K, A] answers.
      lengths: int32[B, K] tokens of each answer; 0 for none.
    """
    A = tokens.shape[-1]
    batch = {name: np.pad(prompts[name], ((0, 0), (0, 0), (0, A))) for name in BRANCH_ARRAYS[:3]}
    before = (prompts["branch_segments"] > 0).sum(-1, keepdims=True)
    first = np.take_along_axis(prompts["branch_positions"], np.maximum(before - 1, 0), -1) + 1
    number = np.arange(A, dtype=np.int32)
    real = number < lengths[..., None]
    for name, values in (("branch_tokens", np.where(real, tokens, 0)),
                         ("branch_positions", np.where(real, first + number, 0)),
                         ("branch_segments", real.astype(np.int32))):
        np.put_along_axis(batch[name], before + number, values, -1)
    return batch | {
        "slots": prompts["slots"],
        "answer_positions": np.where(real, before + number - 1, 0).astype(np.int32),
        "answer_tokens": np.where(real, tokens, 0).astype(np.int32),
    }


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """float[..., V] with everything outside the smallest set of probability >= top_p masked.

    Of equally likely tokens at its edge those of the lowest ids are in it.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # A token stays if what is before it does not reach top_p yet, so the first always stays.
    stays = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    count = jnp.sum(stays, axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(descending, count - 1, axis=-1)
    above, ties = logits > smallest, logits == smallest
    room = count - jnp.sum(above, axis=-1, keepdims=True)
    kept = above | (ties & (jnp.cumsum(ties, axis=-1) <= room))
    return jnp.where(kept, logits, MASKED_LOGIT)


def _logits(model: Any, hidden: jax.Array) -> jax.Array:
    """float32[B, K, V] of float[B, K, D]; padded vocabulary rows are masked."""
    table = model.language.table.astype(hidden.dtype)
    logits = jnp.einsum("bkd,vd->bkv", hidden, table, preferred_element_type=jnp.float32)
    real = jnp.arange(table.shape[0]) < model.config.language.num_tokens
    return jnp.where(real, logits, MASKED_LOGIT)


def _record(generation: Generation, index: jax.Array, done: jax.Array, token: jax.Array,
            logp: jax.Array, ends: jax.Array) -> Generation:
    return dataclasses.replace(
        generation,
        tokens=generation.tokens.at[..., index].set(token),
        logps=generation.logps.at[..., index].set(logp),
        lengths=generation.lengths + ~done,
        finished=generation.finished | (ends & ~done))


def _record_event(generation: Generation, index: jax.Array, head: jax.Array, count: jax.Array,
                  hidden: jax.Array) -> Generation:
    """Stores the hidden state of branches whose token is a slot, as event number `count`."""
    E = generation.event_heads.shape[-1]
    here = (jnp.arange(E) == count[..., None]) & (head >= 0)[..., None]
    states = hidden.astype(jnp.float32)[..., None, :]
    return dataclasses.replace(
        generation,
        event_states=jnp.where(here[..., None], states, generation.event_states),
        event_heads=jnp.where(here, head[..., None], generation.event_heads),
        event_positions=jnp.where(here, index, generation.event_positions))
