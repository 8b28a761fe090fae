"""What heads cost: the target at 7B, the record and its page, and a measurement at a tiny width."""

import json

import pytest

from experiments.task_preference import cost, page
from tpo_jax.models.presets import preset


def test_heads_cost_at_most_a_tenth_at_7b():
    found = cost.analytic()
    assert 0 < found["heads"]["over"] <= 0.10
    assert 0 < found["heads"]["over_one"] <= 0.10
    assert found["conversation"]["heads"] == found["conversation"]["over"] == 0
    for row in found.values():
        assert row["sum"] == pytest.approx(sum(row[part] for part in page.PARTS))


def test_the_record_says_what_was_measured_and_with_which_command(tmp_path, monkeypatch):
    row = dict.fromkeys((*page.PARTS, "sum", "over", "over_one"), 0.05)
    monkeypatch.setattr(cost, "analytic", lambda: {"heads": row})
    monkeypatch.setattr(cost, "measured", lambda width: {
        "device": "a CPU", "model": f"width {width}", "steps": 5,
        "rows": {"heads": {"seconds": 2.0, "over": 0.05, "over_one": 0.05}},
    })  # fmt: skip

    def run(*flags):
        cost.main([f"--results={tmp_path}", *flags])
        written = json.loads((tmp_path / "cost.json").read_text())
        return written["command"], (tmp_path / "README.md").read_text()

    plain = "python -m experiments.task_preference.cost"
    command, text = run()
    assert command == plain and f"\nNot measured: `{plain} --measure`.\n" in text
    measuring = f"{plain} --measure --width=64"
    for flags in (("--measure", "--width=64"), ()):  # what was measured stays
        command, text = run(*flags)
        assert command == measuring and f"`{measuring}`" in text
        assert "Measured on a CPU, width 64" in text and "Not measured" not in text


def test_a_narrow_model_has_the_shape_of_a_wide_one():
    wide, narrow = (cost._narrow(width, ("region",)).language for width in (512, 64))
    assert (wide.width, wide.heads, wide.kv_heads, wide.mlp_width) == (512, 8, 2, 1536)
    assert (narrow.width, narrow.heads, narrow.kv_heads, narrow.mlp_width) == (64, 1, 1, 192)
    assert wide.depth == narrow.depth == 4 and wide.head_dim == narrow.head_dim == 64


def test_steps_are_timed(monkeypatch):
    """A micro encoder, and of the variants those without heads: the others take minutes."""
    monkeypatch.setattr(cost, "STEPS", 1)
    monkeypatch.setattr(cost, "preset", lambda name, heads: preset("micro", heads))
    every = cost.variants

    def plain(heads, bucket):
        return {name: one for name, one in every(heads, bucket).items() if not one[0]}

    monkeypatch.setattr(cost, "variants", plain)
    found = cost.measured(64)
    assert found["steps"] == 1 and "width 64" in found["model"]
    rows = found["rows"]
    assert set(rows) == {"conversation", cost.ONE}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["conversation"]["over"] == rows[cost.ONE]["over_one"] == 0
