"""Bytes of collectives in program text, against the formulas; and of a program for eight chips."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpo_jax.parallel.collectives import read_collectives
from tpo_jax.parallel.mesh import make_mesh

IOTA = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"%a = f32[8,4]{{1,0}} all-gather(%x), {IOTA}, dimensions={{0}}", "all-gather", 96),
        ("%a = bf16[64]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum",
         "all-reduce", 128),
        (f"%a = (f32[4], f32[4]) all-reduce-start(%x, %y), {IOTA}, to_apply=%s", "all-reduce", 48),
        ("%a = f32[8] all-gather(%x), replica_groups=mesh['x'=8,'y'=2] {'x':(2)2,'y'}, dimensions",
         "all-gather", 24),
        (f"%a = (f32[2], f32[8]) all-gather-start(%x), {IOTA}", "all-gather", 24),
        (f"ROOT %a = f32[2]{{0}} reduce-scatter(%x), {IOTA}", "reduce-scatter", 24),
        (f"%a = s8[8] all-to-all(%x), {IOTA}", "all-to-all", 6),
        ("%a = (u8[5], u8[5], u32[], u32[]) collective-permute-start(%x)", "collective-permute", 5),
    ],
)  # fmt: skip
def test_one_chip_sends_what_a_ring_needs(line, kind, sent):
    found = read_collectives(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n")
    assert {k: (c.count, c.bytes) for k, c in found.items()} == {kind: (1, sent)}


def test_a_loop_sends_as_often_as_it_runs():
    text = f"""HloModule m
%body (p: f32[8]) -> f32[8] {{
  %g = f32[8]{{0}} all-gather(%x), {IOTA}
  ROOT %d = f32[8] all-reduce-done(%g)
}}
%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {{
  %r = f32[8]{{0}} all-reduce(%p), {IOTA}, to_apply=%sum
  ROOT %s = f32[2]{{0}} dynamic-slice(%r)
}}
ENTRY %main (x: f32[8]) -> f32[8] {{
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"5"}}}}
  ROOT %f = f32[2]{{0}} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""  # noqa: E501
    found = read_collectives(text)
    assert (found["all-gather"].count, found["all-gather"].bytes) == (1, 5 * 24)
    assert (found["reduce-scatter"].count, found["reduce-scatter"].bytes) == (1, 24)


def test_a_real_program():
    """Kernels split over eight devices, gathered in each of three rounds."""
    mesh = make_mesh({"fsdp": 8}, jax.devices()[:8])
    rows, split = (NamedSharding(mesh, P(*axes)) for axes in (("fsdp",), (None, "fsdp")))

    def run(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0]

    shapes = (
        jax.ShapeDtypeStruct((16, 32), jnp.float32),
        jax.ShapeDtypeStruct((3, 32, 32), jnp.float32),
    )
    compiled = jax.jit(run, in_shardings=(rows, split), out_shardings=rows).lower(*shapes).compile()
    sent = sum(found.bytes for found in read_collectives(compiled.as_text()).values())
    assert sent == 3 * 32 * 32 * 4 * 7 / 8
