"""SigLIP 2 and Qwen3 joined, from frames to logits: towers and language model of `transformers`.

Each is loaded by `transformers` from what `convert export --like` writes, and the connector, which
no published file holds, is PyTorch's linear layers and pooling on the exported tensors.
"""

import shutil

import numpy as np
import pytest
import safetensors.numpy

from tests.interop.families.folders import forward, load, prompt
from tests.parity.composed import compose_siglip2_qwen3
from tests.parity.joined import write_joined
from tests.parity.towers import difference
from tpo_jax import convert

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The folder of a whole model with a random connector, and its export."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("joined")
    write_joined(path)
    return path


def test_frames_to_logits(joined):
    import jax
    import torch

    model, params, _ = load(joined / "model")
    batch, ids = prompt(model.config)
    states, logits = jax.jit(lambda params, batch: forward(model, params, batch))(params, batch)

    theirs = compose_siglip2_qwen3(joined / "exported", "float32")
    visual = theirs.see(torch.from_numpy(batch["frames"][0].astype(np.float32) / 127.5 - 1))
    assert len(visual) == 3 * 4
    with torch.no_grad():
        embeds = theirs.embeds(ids, visual)[None]
        out = theirs.language(inputs_embeds=embeds, output_hidden_states=True)
    for number, wanted in enumerate(out.hidden_states[1:-1]):
        assert difference(states[number], wanted[0]) < TOLERANCE, number
    assert difference(states[-1], out.hidden_states[-1][0]) < TOLERANCE
    # Rows behind the vocabulary fill the table up.
    assert difference(logits, out.logits[0][:, : logits.shape[1]]) < TOLERANCE
    assert float(np.std(logits)) > 0.1


def test_check_compares_the_parts_and_says_what_not(joined, tmp_path, capsys):
    exported = tmp_path / "exported"
    shutil.copytree(joined / "exported", exported)
    command = ["check", f"--model={joined / 'model'}", f"--exported={exported}"]
    assert convert.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"vision/vision_tower/layer 2", "connector/linear_2", "language/layer 2",
            "language/logits"} <= {line.rpartition(" ")[0].strip() for line in lines}  # fmt: skip
    assert "compared: vision, with Siglip2VisionModel of transformers" in lines
    assert lines[-1].startswith("not compared (glue): sampling and resizing of frames; ")
    for file, key, part in (
        ("connector.safetensors", "connector/linear_2/bias", "connector/linear_2"),
        ("vision/model.safetensors", "vision_model.encoder.layers.1.mlp.fc1.weight",
         "vision/vision_tower/layer 1"),
    ):  # fmt: skip
        tensors = safetensors.numpy.load_file(exported / file)
        tensors[key] = np.flip(tensors[key]).copy()
        safetensors.numpy.save_file(tensors, exported / file, metadata={"format": "pt"})
        assert convert.main(command) == 1
        assert f"first difference above 0.0002: {part}\n" in capsys.readouterr().err
