"""`convert check` of imported families: parts in PyTorch, and the layer that differs is named."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.interop.families.configs import (
    LLAVA_ONEVISION,
    LONGVA,
    VIDEO_LLAVA,
    VIDEO_LLAVA_ORIGINAL,
    VIDEOCHAT,
)
from tests.interop.families.folders import VOCABULARY, write_folder
from tpo_jax import convert

pytestmark = pytest.mark.parity
IDS = {"image_token_index": VOCABULARY - 2, "video_token_index": VOCABULARY - 1}


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    return convert.main()


def with_adapters(data, alpha):
    """Of less weight: random ones of weight 2 make attention so sharp that float32 shows."""
    model = data["model_config"]
    return data | {"model_config": model | {"llm": model["llm"] | {"lora_alpha": alpha}}}


# What is changed in the published folder, the first layer of each part that differs then, and what
# stood on the other side of the vision.
CASES = {
    "llava_onevision": (
        LLAVA_ONEVISION | IDS, ["vision_tower.*layers.1.mlp.fc1.weight"],
        ["vision/vision_tower/layer 1", "whole/embed"], "SiglipVisionModel of transformers",
    ),
    "longva": (
        LONGVA, ["model.mm_projector.2.weight"], ["connector/linear_2"],
        "CLIPVisionModel of transformers",
    ),
    "video_llava_original": (
        VIDEO_LLAVA_ORIGINAL,
        ["image_tower.*layers.1.self_attn.q_proj.weight",
         "video_tower.*layers.2.temporal_attn.v_proj.weight"],
        ["vision/image_tower/layer 1", "vision/video_tower/layer 2"],
        "CLIPVisionModel of transformers; its attention over time is written with PyTorch's "
        "functions",
    ),
    "videochat": (
        with_adapters(VIDEOCHAT, 1),
        ["blocks.1.attn.v_bias", "layer.2.crossattention.self.key.weight",
         "lm_head.lora_A.default.weight"],
        ["vision/vision_encoder/layer 1", "connector/layer 2", "language/logits"],
        "UMT, written with PyTorch's functions (transformers has no such class)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_layer_of_each_part_that_differs(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    data, changed, named, vision = CASES[name]
    source, model = tmp_path / "source", tmp_path / "model"
    write_folder(source, data)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    check = ("check", f"--model={model}", f"--exported={source}")
    assert run(monkeypatch, *check) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert f"compared: vision, with {vision}" in lines
    assert lines[-1].startswith("not compared (glue): sampling and resizing of frames; ")
    assert {"language/layer 1", "language/logits", *named} <= set(differences_of(lines))

    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for pattern in changed:
        key = min(key for key in tensors if all(part in key for part in pattern.split("*")))
        tensors[key] = np.flip(tensors[key]).copy()
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    assert run(monkeypatch, *check) == 1
    printed = capsys.readouterr()
    assert f"first difference above 0.0002: {named[0]}\n" in printed.err
    first = {}
    for part, difference in differences_of(printed.out.splitlines()).items():
        if difference > 2e-4:
            first.setdefault(part.rpartition("/")[0], part)
    assert list(first.values()) == named


# What is between the parts: no part differs, the whole does.
GLUE = {
    "llava_onevision": (LLAVA_ONEVISION | IDS, {}, "LlavaOnevisionForConditionalGeneration"),
    "video_llava": (VIDEO_LLAVA | IDS, {"vision_feature_layer": -1},
                    "VideoLlavaForConditionalGeneration"),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_a_family_with_a_class_in_transformers_is_run_as_a_whole(
    name, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("transformers")
    data, options, theirs = GLUE[name]
    source, model = tmp_path / "source", tmp_path / "model"
    write_folder(source, data)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    check = ("check", f"--model={model}", f"--exported={source}")
    assert run(monkeypatch, *check) == 0, capsys.readouterr()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"compared: whole, with {theirs} of transformers, on a clip of 2 frames between words",
        "not compared (glue): sampling and resizing of frames; the template; "
        "images and their tiles",
    ]
    found = [part for part in differences_of(lines) if part.startswith("whole/")]
    assert found == ["whole/embed", "whole/layer 0", "whole/layer 1", "whole/logits"]

    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    for key in tensors:
        if key.endswith("image_newline"):  # of LLaVA-OneVision: behind a clip
            tensors[key] = -tensors[key]
    safetensors.numpy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    about = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(about | options))
    assert run(monkeypatch, *check) == 1
    assert "first difference above 0.0002: whole/embed\n" in capsys.readouterr().err


def test_a_tensor_that_only_the_whole_class_misses_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    source, model = tmp_path / "source", tmp_path / "model"
    write_folder(source, LLAVA_ONEVISION | IDS)
    assert run(monkeypatch, "import", f"--source={source}", f"--out={model}") == 0
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    newline = next(key for key in tensors if key.endswith("image_newline"))
    del tensors[newline]
    safetensors.numpy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert run(monkeypatch, "check", f"--model={model}", f"--exported={source}") == 2
    assert "finds 1 of its tensors missing or of another shape, such as model.image_newline" in (
        capsys.readouterr().err)


def differences_of(lines):
    """{part: difference} of what was printed."""
    found = (line.rsplit(maxsplit=1) for line in lines if not line.startswith(("comp", "not ")))
    return {part.strip(): float(value) for part, value in found if "/" in part and ":" not in part}
