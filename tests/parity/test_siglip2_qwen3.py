"""SigLIP 2 and Qwen3 joined, from frames to logits: towers and language model of `transformers`.

Each is loaded by `transformers` from what `convert export --like` writes, and the connector, which
no published file holds, is PyTorch's linear layers and pooling on the exported tensors.
"""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from tests.interop import language_folders
from tests.interop.families.folders import forward, load, prompt
from tests.parity.towers import difference, randomise
from tpo_jax import convert
from tpo_jax.interop import folder, siglip
from tpo_jax.interop.export import import_model
from tpo_jax.interop.tensors import lazy
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 36}  # fmt: skip
# 5 x 5 patches: an odd row and column that pooling leaves out.
VISION = SIZES | {"patch_size": 8, "num_patches": 25}


def write_qwen3(path):
    """Qwen3 with positions as published: the tiny folder's grow with the length of a row."""
    language_folders.write_folder(path, "qwen3")
    about = json.loads((path / "config.json").read_text())
    del about["rope_scaling"]
    (path / "config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The folder of a whole model with a random connector, and its export."""
    pytest.importorskip("transformers")
    from transformers import Siglip2Config, Siglip2Model

    path = tmp_path_factory.mktemp("joined")
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    text = SIZES | ends | {"vocab_size": 40, "projection_size": 24}
    whole = randomise(Siglip2Model(Siglip2Config(vision_config=VISION, text_config=text)))
    whole.save_pretrained(path / "siglip2")
    write_qwen3(path / "published")
    import_model(path / "published", path / "qwen3")
    siglip.add_to_language(path / "siglip2", path / "qwen3", path / "parts")
    config, codec = folder.load_config(path / "parts"), folder.load_codec(path / "parts")
    rng = np.random.default_rng(0)
    connector = {
        name: lazy(rng.normal(size=leaf.shape).astype(np.float32) * leaf.shape[0] ** -0.5)
        for name, leaf in flatten(FunctionalModel(config).abstract()).items()
        if name.startswith("connector/")
    }
    folder.write_model(
        path / "model", config.to_dict(), dict(folder.open_leaves(path / "parts")) | connector,
        codec, preprocessor=folder.preprocessor(config),
    )  # fmt: skip
    siglip.export_parts(path / "model", path / "exported", path / "siglip2")
    return path


def visual_tokens(path, pixels):
    """float32[F * 4, D] of PyTorch, of pixels float32[F, 40, 40, 3], normalised."""
    import torch
    from transformers import Siglip2VisionModel

    tower = Siglip2VisionModel.from_pretrained(path / "vision", dtype=torch.float32).eval()
    frames = len(pixels)
    patches = pixels.reshape(frames, 5, 8, 5, 8, 3).swapaxes(2, 3).reshape(frames, 25, -1)
    with torch.no_grad():
        states = tower(
            torch.from_numpy(patches), pixel_attention_mask=torch.ones(frames, 25),
            spatial_shapes=torch.tensor([[5, 5]] * frames), output_hidden_states=True,
        ).hidden_states[-2]  # fmt: skip
    tensors = safetensors.numpy.load_file(path / "connector.safetensors")
    kernels = [
        (torch.from_numpy(tensors[f"connector/linear_{i}/kernel"].T.copy()),
         torch.from_numpy(tensors[f"connector/linear_{i}/bias"]))
        for i in (1, 2)
    ]  # fmt: skip
    linear, functional = torch.nn.functional.linear, torch.nn.functional
    x = linear(functional.gelu(linear(states, *kernels[0])), *kernels[1])
    grid = x.reshape(frames, 5, 5, -1).permute(0, 3, 1, 2)
    pooled = functional.avg_pool2d(grid, 2)  # leaves the fifth row and column out
    return pooled.permute(0, 2, 3, 1).reshape(frames * 4, -1)


def test_frames_to_logits(joined):
    import jax
    import torch
    from transformers import AutoModelForCausalLM

    model, params, _ = load(joined / "model")
    batch, ids = prompt(model.config)
    states, logits = jax.jit(lambda params, batch: forward(model, params, batch))(params, batch)

    visual = visual_tokens(joined / "exported", batch["frames"][0].astype(np.float32) / 127.5 - 1)
    language = AutoModelForCausalLM.from_pretrained(
        joined / "exported" / "language_model", dtype=torch.float32
    ).eval()
    embeds = language.get_input_embeddings()(torch.from_numpy(np.maximum(ids, 0))).detach()
    assert (ids < 0).sum() == len(visual) == 3 * 4
    embeds[torch.from_numpy(ids < 0)] = visual
    with torch.no_grad():
        out = language(inputs_embeds=embeds[None], output_hidden_states=True)
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
