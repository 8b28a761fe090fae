"""Transfers between slices in the text of compiled programs."""

import pytest

from tpo_jax.parallel.transfers import Transfer, find_transfers

SEND = (
    "  %send.{n} = ({shape}{{1,0:T(8,128)}}, u32[], token[]) send(%x, %after-all), channel_id={n}, "
    'is_host_transfer=true, frontend_attributes={{_xla_megascale_target="{{1,2}}x{{0:3}}",'
    '_xla_megascale_transfer_type="{kind}"}}'
)
WHILE = (
    "  %while.1 = (s32[]) while(%t), condition=%cond.1, body=%body.1"
    ', backend_config={{"known_trip_count":{{"n":"{count}"}}}}'
)


def send(n, shape, kind="ALL_REDUCE"):
    return SEND.format(n=n, shape=shape, kind=kind)


def program(*, entry=(), body=()):
    lines = ["HloModule jit_step", "", "%cond.1 (p: (s32[])) -> pred[] {", "}", ""]
    lines += ["%inner (p: f32[8]) -> f32[8] {", *body, "}", ""]
    lines += ["%body.1 (p: (s32[])) -> (s32[]) {", "  %c = f32[8] fusion(%p), calls=%inner", "}"]
    return "\n".join([*lines, "", "ENTRY %main (p: f32[8]) -> f32[8] {", *entry, "}", ""])


def test_bytes_and_kinds_are_added_up():
    text = program(
        entry=[send(1, "f32[2,8,128]"), send(2, "bf16[8,128]"), send(3, "pred[5]", "ALL_GATHER")]
    )
    assert find_transfers(text) == [
        Transfer("ALL_REDUCE", 2, 2 * 8 * 128 * 4 + 8 * 128 * 2), Transfer("ALL_GATHER", 1, 5)
    ]  # fmt: skip


def test_a_loop_counts_as_often_as_it_runs():
    text = program(entry=[WHILE.format(count=12)], body=[send(1, "f32[8,128]")])
    assert find_transfers(text) == [Transfer("ALL_REDUCE", 12, 12 * 8 * 128 * 4)]


def test_a_loop_of_unknown_length_is_an_error():
    text = program(entry=[WHILE.format(count="?")], body=[send(1, "f32[8,128]")])
    with pytest.raises(ValueError, match="loop of main whose length"):
        find_transfers(text)


def test_sends_to_the_own_host_do_not_count():
    own = "  %send = (f32[8]{0}, u32[], token[]) send(%x, %t), is_host_transfer=true"
    assert find_transfers(program(entry=[own])) == []
