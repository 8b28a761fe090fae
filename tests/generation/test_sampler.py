import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro_model import QUESTIONS, MemoryDataset, conversation, that_says

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Turn
from tpo_jax.data.rows import BranchPlan, RowPlan, stack_rows
from tpo_jax.data.text import TextCodec
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys, keep_top_p, with_answers
from tpo_jax.parallel import rules
from tpo_jax.parallel.mesh import make_mesh

BUCKET = Bucket("prompts", "video", batch_size=3, frames=4, branches=2, branch_tokens=40,
                answers=20, windows=1, mask_size=16)
GREEDY = Sampling(max_new=12, events=2)


def batch_of(model, codec, bucket=BUCKET, questions=QUESTIONS, answers=None):
    """Rows with 2, 1 and 2 questions of different lengths; prompts unless answers are given."""
    dataset, builder = MemoryDataset(), row_builder(codec, model.config, bucket)
    rows, number = [], 0
    for video, count in zip(dataset.videos, (2, 1, 2), strict=True):
        example = conversation(video, [Turn("", "", (), "")])
        branches = []
        for _ in range(count):
            question = questions[number % len(questions)][: 18 + 4 * number]
            branches.append(BranchPlan(example, 0, question, answers[number] if answers else None))
            number += 1
        rows.append(builder.build(RowPlan(dataset, video, 0.0, 12.0, tuple(branches)), number))
    return stack_rows(rows)


def keys_of(batch, seed=0):
    return branch_keys(seed, np.arange(batch["branch_tokens"][..., 0].size, dtype=np.uint32)
                       .reshape(batch["branch_tokens"].shape[:2]))


def full_forward_greedy(model, codec, params, batch, sampler, first=None):
    """The oracle: no cache; the whole training forward again for every token, constrained alike."""
    forward = jax.jit(lambda p, b: _forward_logits(model, p, b))
    slot_after, free = sampler._vocabulary.slot_after, sampler._vocabulary.free
    routing = sampler._vocabulary.routing
    B, K, R = batch["branch_tokens"].shape
    N = sampler.sampling.max_new
    batch = {name: batch[name] for name in (
        "frames", "frame_valid", "frame_times",
        "prefix_tokens", "prefix_positions", "prefix_segments",
        "branch_tokens", "branch_positions", "branch_segments", "slots")}
    for name in ("branch_tokens", "branch_positions", "branch_segments"):
        batch[name] = np.pad(batch[name], ((0, 0), (0, 0), (0, N + 2)))
    lengths = (batch["branch_segments"] > 0).sum(-1)
    answers, events = {}, {}
    for row in range(B):
        for k in range(K):
            if lengths[row, k]:
                answers[row, k], events[row, k] = [], []
    forced = {place: -1 if first is None else int(first[place]) for place in answers}
    done = set()
    for _ in range(N):
        logits, hidden = forward(params, batch)
        for place in answers:
            if place in done:
                continue
            position = lengths[place]
            allowed = free & ~(routing & (len(events[place]) >= sampler.sampling.events))
            token = forced[place]
            if token < 0:
                token = int(np.argmax(np.where(allowed, logits[place][position - 1], -1e30)))
            answers[place].append(token)
            batch["branch_tokens"][place][position] = token
            batch["branch_segments"][place][position] = 1
            batch["branch_positions"][place][position] = (
                batch["branch_positions"][place][position - 1] + 1)
            lengths[place] += 1
            if sampler._vocabulary.head_of[token] >= 0:
                events[place].append((len(answers[place]) - 1, position, token))
            if token == codec.eos_id:
                done.add(place)
            forced[place] = int(slot_after[token])
    _, hidden = forward(params, batch)
    states = {place: [(index, token, np.asarray(hidden[place][position]))
                      for index, position, token in found] for place, found in events.items()}
    return answers, states


def _forward_logits(model, params, batch):
    bound = model.bind(params)
    hidden = bound(batch).branch_hidden
    logits = jnp.einsum("bkrd,vd->bkrv", hidden, bound.language.table)
    real = jnp.arange(logits.shape[-1]) < model.config.language.num_tokens
    return jnp.where(real, logits, -1e30), hidden


@pytest.fixture(scope="module")
def greedy(model, codec):
    return Sampler(model, codec, GREEDY)


@pytest.fixture(scope="module")
def prompts(model, codec):
    return batch_of(model, codec)


def check_against_oracle(model, codec, params, batch, sampler, first=None):
    context = sampler.prefill(params, batch)
    out = jax.device_get(sampler.generate(params, context, batch, keys_of(batch), first))
    answers, states = full_forward_greedy(model, codec, params, batch, sampler, first)
    for place, tokens in answers.items():
        assert out.tokens[place][: out.lengths[place]].tolist() == tokens, place
        assert out.finished[place] == (tokens[-1] == codec.eos_id)
        found = [(int(p), sampler.heads[h]) for p, h in zip(
            out.event_positions[place], out.event_heads[place], strict=True) if h >= 0]
        assert [p for p, _ in found] == [index for index, _, _ in states[place]]
        for number, (_, token, state) in enumerate(states[place]):
            assert sampler._vocabulary.head_of[token] == out.event_heads[place][number]
            np.testing.assert_allclose(out.event_states[place][number], state, atol=2e-5)
    return out


def test_greedy_equals_the_step_by_step_full_forward(model, codec, params, prompts, greedy):
    out = check_against_oracle(model, codec, params, prompts, greedy)
    assert out.lengths[1, 1] == 0 and not out.finished[1, 1]  # the unused branch
    assert len({tuple(t) for t in out.tokens.reshape(-1, GREEDY.max_new)}) > 2


def test_forced_routing_and_slots_equal_the_full_forward(model, codec, params, prompts, greedy):
    heads = ("<box_begin>", "<time_begin>", "<track_begin>")
    first = np.full((3, 2), -1, np.int32)
    first[0, 0], first[0, 1], first[2, 1] = (codec.special_ids[t] for t in heads)
    out = check_against_oracle(model, codec, params, prompts, greedy, first)
    assert out.event_heads[0, 0, 0] == 0 and out.event_positions[0, 0, 0] == 1
    assert out.event_heads[0, 1, 0] == 1 and out.event_heads[2, 1, 0] == 2
    assert out.tokens[0, 0, 1] == codec.special_ids["<boxes>"]
    assert (out.logps[..., :2][first >= 0] == 0).all()


def test_several_head_calls_in_one_answer_are_collected_and_capped(
        model, codec, params, prompts):
    """A model that wants to call two heads in turn for ever."""
    sampler = Sampler(model, codec, Sampling(max_new=12, events=3))
    calls = ("<box_begin>", "<boxes>", "<time_begin>", "<temp>", "<box_begin>")
    eager = that_says(params, codec, *(codec.special_ids[token] for token in calls))
    out = check_against_oracle(model, codec, eager, prompts, sampler)
    used = out.lengths > 0
    assert (out.event_heads[used] == [0, 1, 0]).all()  # no more than E, in order
    assert (out.event_positions[used] == [1, 3, 5]).all()
    assert (out.event_heads[~used] == -1).all()
    calls = (out.event_heads >= 0).sum(-1)
    slots = np.isin(out.tokens, [codec.special_ids[t] for t in ("<boxes>", "<temp>")])
    routed = np.isin(out.tokens, [codec.special_ids[t] for t in ("<box_begin>", "<time_begin>")])
    assert (slots.sum(-1) == calls).all()
    assert (slots[..., 1:] == routed[..., :-1]).all()  # every routing token has its slot


def test_an_answer_stops_at_any_of_the_stops_of_the_template(model, codec, params, prompts):
    """<bos> is barred where it is no stop, and the model would go on without it."""
    first, second = codec.encode("it")[0], codec.encode("moves")[0]
    bos = codec.special_ids["<bos>"]
    says = that_says(params, codec, first, bos, second, codec.eos_id)
    stopping = TextCodec(codec.tokenizer, dataclasses.replace(codec.template, stops=("<bos>",)))
    sampler = Sampler(model, stopping, Sampling(max_new=4))
    out = sampler.generate(says, sampler.prefill(says, prompts), prompts, keys_of(prompts))
    used = np.asarray(out.lengths) > 0
    assert used.sum() == 5 and np.asarray(out.finished)[used].all()
    assert (np.asarray(out.tokens)[used] == [first, bos, codec.pad_id, codec.pad_id]).all()
    assert (np.asarray(out.lengths)[used] == 2).all()
    assert stopping.decode([first, bos]) == codec.decode([first])
    assert not Sampler(model, codec, GREEDY)._vocabulary.free[bos]


@pytest.fixture(scope="module")
def whole(params, prompts, greedy):
    """Greedy answers on one device."""
    context = greedy.prefill(params, prompts)
    return jax.device_get(greedy.generate(params, context, prompts, keys_of(prompts)))


def test_eight_devices_answer_as_one(model, codec, params, prompts, whole):
    """Rows over four devices, the weights and the prefix over two each."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2}, jax.devices()[:8])
    sharded = Sampler(model, codec, GREEDY, mesh)
    placed = rules.place(params, rules.param_shardings(params, mesh))
    four = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), prompts)
    context = sharded.prefill(placed, four)
    keys = context.prefix.k
    assert keys.sharding.shard_shape(keys.shape)[1:3] == (1, keys.shape[2] // 2)
    kernel = placed["language"]["layers"]["mlp"]["gate_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2
    out = sharded.generate(placed, context, four, keys_of(four))
    assert out.tokens.is_fully_replicated
    np.testing.assert_array_equal(out.tokens, whole.tokens[[0, 1, 2, 0]])
    np.testing.assert_allclose(out.logps, whole.logps[[0, 1, 2, 0]], atol=2e-4)


def test_answers_do_not_depend_on_neighbours_or_padding(
        model, codec, params, prompts, greedy, whole):
    order = [2, 0, 1]
    moved = jax.tree.map(lambda x: x[order], prompts)
    wider = batch_of(model, codec, dataclasses.replace(BUCKET, branch_tokens=48))
    wider = jax.tree.map(lambda x: x[order], wider)
    for batch in (moved, wider):
        again = greedy.generate(params, greedy.prefill(params, batch), batch, keys_of(batch))
        np.testing.assert_array_equal(again.tokens, whole.tokens[order])


def test_sampling_is_a_function_of_the_key_and_respects_top_p(model, codec, params, prompts):
    sampler = Sampler(model, codec, Sampling(max_new=8, temperature=1.0))
    context = sampler.prefill(params, prompts)
    first = sampler.generate(params, context, prompts, keys_of(prompts, 0))
    again = sampler.generate(params, context, prompts, keys_of(prompts, 0))
    other = sampler.generate(params, context, prompts, keys_of(prompts, 1))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (np.asarray(first.tokens) != np.asarray(other.tokens)).any()
    # A tiny nucleus is greedy, whatever the temperature and key.
    nucleus = Sampler(model, codec, Sampling(max_new=8, temperature=2.0, top_p=1e-6))
    hard = Sampler(model, codec, Sampling(max_new=8))
    np.testing.assert_array_equal(
        nucleus.generate(params, context, prompts, keys_of(prompts, 3)).tokens,
        hard.generate(params, context, prompts, keys_of(prompts, 0)).tokens)


def test_keys_follow_the_question_not_its_place():
    keys = branch_keys(5, np.array([[3, 9]], np.uint32), 1)
    swapped = branch_keys(5, np.array([[9], [3]], np.uint32), 1)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(keys)[0, 0], data(swapped)[1, 0])
    assert (data(keys) != data(branch_keys(5, np.array([[3, 9]], np.uint32), 2))).any()


def test_keep_top_p_keeps_the_smallest_sufficient_set():
    logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    kept = [np.asarray(keep_top_p(logits, p)) > -1e29 for p in (0.4, 0.5001, 0.76, 1.0)]
    assert [k.tolist() for k in kept] == [
        [False, True, False, False], [False, True, False, True],
        [False, True, True, True], [True, True, True, True]]


def test_keep_top_p_keeps_no_tie_beyond_the_set():
    logits = jnp.log(jnp.array([[0.15, 0.4, 0.15, 0.15, 0.15], [0.2] * 5]))
    kept = np.asarray(keep_top_p(logits, 0.65)) > -1e29
    assert kept.tolist() == [[True, True, True, False, False], [True, True, True, True, False]]


def test_score_equals_the_log_probabilities_of_the_sampler(model, codec, params, prompts):
    sampler = Sampler(model, codec, Sampling(max_new=10, temperature=1.0))
    context = sampler.prefill(params, prompts)
    out = jax.device_get(sampler.generate(params, context, prompts, keys_of(prompts)))
    batch = with_answers(prompts, out.tokens, out.lengths)
    scored = np.asarray(sampler.score(params, context, batch))
    slots = sampler._vocabulary.head_of[out.tokens] >= 0
    real = (np.arange(10) < out.lengths[..., None]) & ~slots
    np.testing.assert_allclose(scored[real], out.logps[real], atol=2e-4)


@pytest.mark.parametrize("field, value", [
    ("max_new", 0), ("events", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.5)])
def test_bad_sampling_is_named(field, value):
    with pytest.raises(ValueError, match=rf"sampling\.{field}: {value}"):
        Sampling(**{field: value})
