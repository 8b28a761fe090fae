"""Chunked log-probabilities and KL divergences against the plain softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tpo_jax.objectives.logps import gather_positions, token_logps, token_scores
from tpo_jax.parallel.mesh import AXES
from tpo_jax.training.flops import sub_programs

V, D = 24, 8


def draw(shape, seed=0, vocab=V):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*shape, D)).astype(np.float32)
    table = rng.normal(size=(V, D)).astype(np.float32)
    return hidden, table, rng.integers(0, vocab, shape).astype(np.int32)


def plain(hidden, table, targets, vocab=V):
    logits = (hidden @ table.T)[..., :vocab]
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]


# chunks of one, that divide, that leave a rest, that hold everything
@pytest.mark.parametrize(
    ("shape", "chunk"), [((2, 3), 1), ((2, 2, 3), 4), ((3, 2, 5), 12), ((1, 1, 1), 512)]
)
@pytest.mark.parametrize("vocab", [V - 3, V])
def test_equals_log_softmax_for_any_chunk(shape, chunk, vocab):
    hidden, table, targets = draw(shape, vocab=vocab)
    got = token_logps(hidden, table, targets, vocab_size=vocab, chunk=chunk)
    np.testing.assert_allclose(got, plain(hidden, table, targets, vocab), rtol=1e-5, atol=1e-5)


def test_gradients_equal_log_softmax():
    hidden, table, targets = draw((2, 7))
    weights = jnp.arange(14, dtype=jnp.float32).reshape(2, 7)

    def loss(function):
        return jax.grad(lambda h, t: (function(h, t, targets) * weights).sum(), (0, 1))

    chunked = loss(lambda h, t, y: token_logps(h, t, y, chunk=3))(hidden, table)
    for got, want in zip(chunked, loss(plain)(hidden, table), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_padded_rows_of_the_table_get_no_probability_and_no_gradient():
    hidden, table, targets = draw((2, 5), vocab=20)
    table[20:] = 100.0  # would win everywhere
    scores = token_scores(hidden, table, targets, vocab_size=20)
    np.testing.assert_allclose(scores.logp, plain(hidden, table, targets, 20), rtol=1e-4)
    gradient = jax.grad(lambda t: token_logps(hidden, t, targets, vocab_size=20).sum())(table)
    assert np.all(np.asarray(gradient)[20:] == 0) and np.any(np.asarray(gradient)[:20] != 0)


def test_correct_marks_the_arg_max():
    hidden, table, targets = draw((3, 4))
    best = np.argmax(hidden @ table.T, -1)
    targets[:, :2] = best[:, :2]
    np.testing.assert_array_equal(token_scores(hidden, table, targets).correct, best == targets)


def two_models(shape, vocab=V):
    """hidden, table and targets of a model; hidden and table of its reference."""
    return draw(shape, vocab=vocab), draw(shape, seed=1, vocab=vocab)[:2]


def dense_kl(hidden, table, reference, vocab=V):
    """float64[...], of NumPy alone."""

    def logps(hidden, table):
        logits = (np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T)[..., :vocab]
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    there, here = logps(*reference), logps(hidden, table)
    return (np.exp(there) * (there - here)).sum(-1)


@pytest.mark.parametrize(
    ("shape", "chunk"), [((2, 3), 1), ((2, 2, 3), 8), ((3, 2, 5), 24), ((1, 1, 1), 512)]
)
@pytest.mark.parametrize("vocab", [V - 3, V])
def test_kl_is_the_sum_over_the_vocabulary_for_any_chunk(shape, chunk, vocab):
    (hidden, table, targets), reference = two_models(shape, vocab)
    options = {"vocab_size": vocab, "chunk": chunk}
    got = token_scores(hidden, table, targets, reference=reference, **options)
    want = dense_kl(hidden, table, reference, vocab)
    assert want.min() > 0.01
    np.testing.assert_allclose(got.kl, want, rtol=1e-5, atol=1e-6)
    for logps, model in ((got.logp, (hidden, table)), (got.reference_logp, reference)):
        np.testing.assert_allclose(logps, plain(*model, targets, vocab), rtol=1e-5, atol=1e-5)
    same = token_scores(hidden, table, targets, reference=(hidden, table), **options)
    np.testing.assert_allclose(same.kl, 0.0, atol=1e-6)
    assert token_scores(hidden, table, targets).kl is None


def test_gradients_of_kl_equal_the_dense_ones_and_leave_the_reference():
    (hidden, table, targets), reference = two_models((2, 7), vocab=20)
    weights = jnp.arange(14, dtype=jnp.float32).reshape(2, 7)

    def chunked(model, reference):
        scores = token_scores(*model, targets, vocab_size=20, chunk=6, reference=reference)
        return (scores.kl * weights).sum()

    def dense(model, reference):
        here, there = (jax.nn.log_softmax((h @ t.T)[..., :20]) for h, t in (model, reference))
        return ((jnp.exp(there) * (there - here)).sum(-1) * weights).sum()

    got, fixed = jax.grad(chunked, (0, 1))((hidden, table), reference)
    want = jax.grad(dense)((hidden, table), reference)
    for mine, theirs in zip(got, want, strict=True):
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not any(np.any(x) for x in fixed)
    assert not np.any(got[0][0, 0])  # of weight 0, as padding is


def test_kl_where_the_reference_rules_a_token_out_is_finite():
    """exp of a hundred and more nats is 0 in float32; what is left is the log of the others."""
    hidden = np.float32([[[1.0]], [[-1.0]]])
    table = np.float32([[200.0], [0.0], [1e-3]])
    scores = token_scores(hidden, table, np.zeros((2, 1), np.int32), reference=(-hidden, table))
    want = dense_kl(hidden, table, (-hidden, table))
    np.testing.assert_allclose(scores.kl, want, rtol=1e-5)


@pytest.mark.parametrize("models", [1, 2])
def test_nothing_of_the_size_of_all_logits_is_made(models):
    """The largest array of forward and backward is a chunk of logits: half a one of each model
    where there are two."""
    rows, answers, vocab = 2, 256, 512
    hidden = jax.ShapeDtypeStruct((rows, answers, D), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, answers), jnp.int32)

    def loss(h, t, y):
        reference = (2 * h, 2 * t) if models == 2 else None
        scores = token_scores(h, t, y, chunk=32, reference=reference)
        return (scores.logp if reference is None else scores.logp + scores.kl).sum()

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, table, targets).jaxpr
    assert max(sizes(jaxpr)) == 32 // models * vocab < rows * answers * vocab


@pytest.mark.parametrize(("sizes", "chunks"), [({}, 8), ({"data": 2, "fsdp": 4}, 1)])
def test_chunks_are_as_few_as_one_device_allows(sizes, chunks):
    """On a mesh 32 positions are those of a device, which has two of the rows and keeps them."""
    rows, answers = 16, 16
    hidden, table, targets = draw((rows, answers))
    mesh = AbstractMesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * 4
    )
    with jax.sharding.use_abstract_mesh(mesh):
        trace = jax.make_jaxpr(functools.partial(token_logps, chunk=32))(hidden, table, targets)
    (scan,) = [equation for equation in trace.eqns if equation.primitive.name == "scan"]
    assert scan.params["length"] == chunks
    (logits,) = [
        equation.params["sharding"].spec for equation in equations_of(scan)
        if equation.primitive.name == "sharding_constraint"
        and equation.outvars[0].aval.shape == (rows, answers // chunks, V)
    ]  # fmt: skip
    assert logits[0] == ("data", "fsdp")


def equations_of(equation):
    for inner in sub_programs(equation):
        for each in inner.eqns:
            yield each
            yield from equations_of(each)


def test_low_precision_inputs_accumulate_in_float32():
    hidden, table, targets = draw((2, 5))
    low = hidden.astype(jnp.bfloat16)
    got = token_logps(low, table, targets)
    assert got.dtype == jnp.float32
    want = plain(low.astype(jnp.float32), table.astype(jnp.bfloat16).astype(jnp.float32), targets)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_collision_is_the_log_of_the_sum_of_squared_probabilities():
    hidden, table, targets = draw((2, 5), vocab=20)
    p = jax.nn.softmax((hidden @ table.T)[..., :20])
    scores = token_scores(hidden, table, targets, vocab_size=20, chunk=3, collision=True)
    np.testing.assert_allclose(scores.log_collision, jnp.log((p**2).sum(-1)), rtol=1e-4, atol=1e-5)
    assert token_scores(hidden, table, targets).log_collision is None

    def total(h):
        return token_scores(h, table, targets, collision=True).log_collision.sum()

    assert not np.any(jax.grad(total)(hidden))


def test_vocab_size_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="vocab_size 25 is outside 1..24"):
        token_logps(*draw((1, 2)), vocab_size=25)


def test_gather_positions_reads_the_position_before_each_answer_token():
    hidden = jnp.arange(2 * 1 * 4 * 1).reshape(2, 1, 4, 1)
    got = gather_positions(hidden, jnp.array([[[0, 2, 2]], [[3, 1, 0]]]))
    np.testing.assert_array_equal(got[..., 0], [[[0, 2, 2]], [[7, 5, 4]]])
