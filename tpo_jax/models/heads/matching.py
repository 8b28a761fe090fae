"""Exact assignment on the device: which query answers for which window.

The shortest-augmenting-path algorithm (Jonker and Volgenant 1987; rectangular form of Crouse 2016,
"On implementing 2D rectangular assignment algorithms"), one row after the other. Equal costs are
resolved in the order of `scipy.optimize.linear_sum_assignment`, so that both give one answer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Sums of costs within it are finite; what is beyond it counts as that.
_LARGEST = 1e30


class _State(NamedTuple):
    """Dual variables float32[rows], float32[columns] and the partners found so far, -1 for none."""

    row_dual: jax.Array
    column_dual: jax.Array
    column_of: jax.Array
    row_of: jax.Array


class _Search(NamedTuple):
    """A shortest path from one free row through the columns.

    left: int32[columns], columns not yet reached, in the order that decides ties; the first `count`
    count. Negative `sink`: no free column reached yet.
    """

    row: jax.Array
    distance: jax.Array
    through: jax.Array
    shortest: jax.Array
    left: jax.Array
    count: jax.Array
    sink: jax.Array
    rows_seen: jax.Array
    columns_seen: jax.Array


def match(cost: jax.Array, valid: jax.Array) -> jax.Array:
    """Assignment of least total cost of the valid rows to different columns.

    Args:
      cost: float32[..., rows, columns]; rows <= columns. NaN counts as 0: the search would not
        end with it, and a loss that is NaN is told where losses are.
      valid: bool[..., rows]; the others are padding.

    Returns: int32[..., rows], the column of each row, -1 on padding. It has no gradient.
    """
    rows, columns = cost.shape[-2:]
    if rows > columns:
        raise ValueError(
            f"matching: {rows} rows for {columns} columns; each row needs a column of its own, so "
            "give at most as many windows (buckets.*.windows) as the head has queries"
        )
    flat_cost = jax.lax.stop_gradient(cost).astype(jnp.float32).reshape(-1, rows, columns)
    flat_valid = jnp.broadcast_to(valid, cost.shape[:-1]).reshape(-1, rows)
    found = jax.vmap(_match_one)(flat_cost, flat_valid)
    return found.reshape(cost.shape[:-1])


def _match_one(cost: jax.Array, valid: jax.Array) -> jax.Array:
    rows, columns = cost.shape
    cost = jnp.where(valid[:, None] & ~jnp.isnan(cost), cost, 0.0)
    cost = jnp.clip(cost, -_LARGEST, _LARGEST)
    start = _State(
        jnp.zeros(rows, cost.dtype), jnp.zeros(columns, cost.dtype),
        jnp.full(rows, -1, jnp.int32), jnp.full(columns, -1, jnp.int32),
    )  # fmt: skip

    def add(row: jax.Array, state: _State) -> _State:
        grown = _augment(cost, row, state)
        return jax.tree.map(lambda new, old: jnp.where(valid[row], new, old), grown, state)

    return jax.lax.fori_loop(0, rows, add, start).column_of


def _augment(cost: jax.Array, row: jax.Array, state: _State) -> _State:
    """Gives `row` a column, moving other rows along the shortest path."""
    rows, columns = cost.shape
    search = _Search(
        row=row, distance=jnp.zeros((), cost.dtype),
        through=jnp.full(columns, -1, jnp.int32),
        shortest=jnp.full(columns, jnp.inf, cost.dtype),
        left=jnp.arange(columns - 1, -1, -1, dtype=jnp.int32), count=jnp.int32(columns),
        sink=jnp.int32(-1), rows_seen=jnp.zeros(rows, bool), columns_seen=jnp.zeros(columns, bool),
    )  # fmt: skip
    found = jax.lax.while_loop(
        lambda s: (s.sink < 0) & (s.count > 0), lambda s: _step(cost, state, s), search
    )
    # Shortest paths of the columns that are already taken, seen from their rows.
    taken = jnp.where(state.column_of >= 0, found.shortest[state.column_of], 0.0)
    gain = jnp.where(found.rows_seen, found.distance - taken, 0.0)
    gain = gain.at[row].set(found.distance)
    drop = jnp.where(found.columns_seen, found.distance - found.shortest, 0.0)
    column_of, row_of = _flip(found, row, state)
    return _State(state.row_dual + gain, state.column_dual - drop, column_of, row_of)


def _step(cost: jax.Array, state: _State, s: _Search) -> _Search:
    """Reaches the nearest column that is left."""
    reduced = s.distance + cost[s.row] - state.row_dual[s.row] - state.column_dual
    nearer = (reduced < s.shortest) & ~s.columns_seen
    through = jnp.where(nearer, s.row, s.through)
    shortest = jnp.where(nearer, reduced, s.shortest)
    places = jnp.arange(s.left.size)
    ordered = jnp.where(places < s.count, shortest[s.left], jnp.inf)
    nearest = ordered == jnp.min(ordered)
    free = nearest & (state.row_of[s.left] < 0)
    # Among the nearest, the last free one ends the search; without any, the first goes on.
    last_free = s.left.size - 1 - jnp.argmax(free[::-1])
    place = jnp.where(jnp.any(free), last_free, jnp.argmax(nearest))
    column = s.left[place]
    owner = state.row_of[column]
    return _Search(
        row=jnp.where(owner < 0, s.row, owner), distance=ordered[place], through=through,
        shortest=shortest, left=s.left.at[place].set(s.left[s.count - 1]), count=s.count - 1,
        sink=jnp.where(owner < 0, column, s.sink), rows_seen=s.rows_seen.at[s.row].set(True),
        columns_seen=s.columns_seen.at[column].set(True),
    )  # fmt: skip


def _flip(found: _Search, row: jax.Array, state: _State) -> tuple[jax.Array, jax.Array]:
    """Takes the path back from its sink: every row on it moves one column on."""

    def move(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        column, column_of, row_of, _ = carry
        owner = found.through[column]
        before = column_of[owner]
        return before, column_of.at[owner].set(column), row_of.at[column].set(owner), owner == row

    carry = (found.sink, state.column_of, state.row_of, jnp.zeros((), bool))
    _, column_of, row_of, _ = jax.lax.while_loop(lambda c: ~c[3], move, carry)
    return column_of, row_of
