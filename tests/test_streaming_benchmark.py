"""How the streaming benchmark generates, measures and judges; its figures need gigabytes."""

import json
import subprocess
import sys

import pytest

from experiments.benchmarks import streaming
from tests.interop.families.configs import SIGLIP
from tests.processes import ROOT
from tpo_jax import convert

TEXT = streaming.QWEN2_7B | {
    "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48,
}  # fmt: skip


def in_process(monkeypatch):
    """`run` of a conversion in this process, which would be no measurement."""

    def run(command):
        monkeypatch.setattr("sys.argv", command[2:])
        assert convert.main() == 0
        return {"peak": 3 * streaming.GIB, "seconds": 1.0, "cpu": 1.0}

    return run


@pytest.mark.parametrize("layout, more", [
    ("qwen2", {}), ("llava_qwen", {"vision_config": SIGLIP}),
])  # fmt: skip
def test_a_generated_folder_goes_in_and_out(layout, more, tmp_path, monkeypatch):
    about = streaming.generate(tmp_path / "source", layout, 200_000, TEXT, **more)
    # A layer of this size has 15,616 bytes: two tables of 320 x 32 and layers below 200 kB.
    assert 184_000 < about["bytes"] <= 200_000 and about["largest"] == 2 * 320 * 32
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert config["num_hidden_layers"] == about["layers"] > 4
    row = streaming.run_layout(layout, tmp_path, about, in_process(monkeypatch))
    assert row["limit"] == 20_480 + 2 * streaming.GIB and not row["met"]
    assert "MISSED" in streaming.page({layout: row}, "command")
    assert streaming.differing(tmp_path / "source", tmp_path / "exported") == []
    file = tmp_path / "exported" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len(streaming.differing(tmp_path / "source", tmp_path / "exported")) == 1


def test_the_peak_is_that_of_the_process():
    """Measured, as in the benchmark, from a process that has imported nothing large."""
    large = "x = bytearray(b'1') * (300 * 2**20); del x"
    program = (
        "import sys; from experiments.benchmarks.streaming import measure\n"
        "for code in sys.argv[1:]: print(measure([sys.executable, '-I', '-S', '-c', code])['peak'])"
    )
    out = subprocess.check_output([sys.executable, "-c", program, large, "pass"], cwd=ROOT)
    peak, nothing = map(int, out.split())
    assert 300 * 2**20 < peak < 350 * 2**20 and nothing < 50 * 2**20
    with pytest.raises(RuntimeError, match="exit status 3"):
        streaming.measure([sys.executable, "-I", "-S", "-c", "raise SystemExit(3)"])
