"""LoRA of multimodal families: merged or in PEFT's layout, on the way out and on the way in."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_ONEVISION, LONGVA, VIDEO_LLAVA, VIDEOCHAT
from tests.interop.families.published_folder import same_tensors, sized, write_published
from tests.interop.language_folders import write_folder
from tpo_jax import convert
from tpo_jax.interop import folder
from tpo_jax.interop.check_family import compare_family
from tpo_jax.interop.export import ExportFolderError, export_model, largest_difference
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.mapping import MappingError
from tpo_jax.interop.peft import AdapterError, read_adapter
from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten

PATTERN = r"^language/(layers/.*q_proj|lm_head)/kernel$|^connector/linear_1/kernel$"
LORA = LoraConfig(PATTERN, 3, 6.0)  # scale 2
# family -> config.json, the adapted q_proj of layer 1 on disk, its module in PyTorch's memory
FAMILIES = {
    "llava_onevision": (
        LLAVA_ONEVISION, "language_model.model.layers.1.self_attn.q_proj.weight",
        "model.language_model.layers.1.self_attn.q_proj",
    ),
    "video_llava": (
        VIDEO_LLAVA, "language_model.model.layers.1.self_attn.q_proj.weight",
        "model.language_model.layers.1.self_attn.q_proj",
    ),
    "longva": (
        LONGVA, "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj",
    ),
}  # fmt: skip


def trained(source, path, lora):
    """The model of a published folder after training of adapters; returns their leaves."""
    import_family(source, path / "base")
    config, leaves = folder.load_config(path / "base"), folder.open_leaves(path / "base")
    config = dataclasses.replace(config, lora=lora)
    rng, adapters = np.random.default_rng(1), {}
    for name, leaf in flatten(FunctionalModel(config).abstract()).items():
        if name.endswith(("/lora_a", "/lora_b")):
            adapters[name] = rng.normal(size=leaf.shape).astype(np.float32)
    adapters["language/lm_head/lora_b"][:, 320:] = 0
    lazily = {name: lazy(adapter) for name, adapter in adapters.items()}
    folder.write_model(path / "model", config.to_dict(), {**leaves, **lazily},
                       folder.load_codec(path / "base"))  # fmt: skip
    return adapters


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    (path / "source").mkdir()
    data, key, module = FAMILIES[request.param]
    write_published(path / "source", sized(data), np.float32)
    return path, trained(path / "source", path, LORA), key, module


def test_adapters_are_merged_into_the_published_layout(published):
    path, adapters, key, _ = published
    export_family(path / "model", path / "merged", path / "source")
    theirs, ours = read_tensors(path / "source"), read_tensors(path / "merged")
    assert theirs.keys() == ours.keys()
    low, high = (adapters[f"language/layers/self_attn/q_proj/lora_{side}"][1] for side in "ab")
    want = np.asarray(theirs[key]) + 2 * (low @ high).T
    np.testing.assert_allclose(np.asarray(ours[key]), want, atol=1e-5)
    changed = {n for n in theirs if np.any(np.asarray(theirs[n]) != np.asarray(ours[n]))}
    wanted = r".*(q_proj|lm_head|linear_1|mm_projector\.0)\.weight"
    assert key in changed and len(changed) == 2 + 2  # of two layers, the table, the connector
    assert all(re.fullmatch(wanted, name) for name in changed)


def test_adapters_that_are_kept_come_back_merged_where_they_are_named(published):
    path, adapters, key, module = published
    files = export_family(path / "model", path / "apart", path / "source", keep_adapters=True)
    assert {"adapter", "config.json"} <= set(files)
    theirs, ours = read_tensors(path / "source"), read_tensors(path / "apart")
    assert all(np.asarray(theirs[n]).tobytes() == np.asarray(ours[n]).tobytes() for n in theirs)
    about = json.loads((path / "apart/adapter/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (3, 6.0)
    assert re.fullmatch(about["target_modules"], module)
    assert re.fullmatch(about["target_modules"], "lm_head")
    assert not re.fullmatch(about["target_modules"], f"model.vision_tower.{module}")
    import_family(path / "source", path / "again", adapter=path / "apart/adapter")
    export_family(path / "model", path / "merged", path / "source")
    import_family(path / "merged", path / "want")
    assert largest_difference(path / "again", path / "want") == 0.0
    assert largest_difference(path / "again", path / "base") > 1.0
    assert folder.load_config(path / "again").lora is None


def test_adapters_that_are_kept_come_back_bit_for_bit(published, tmp_path, capsys):
    """From the folder that they lie in, named with the published base, and where training starts
    from the exported folder."""
    path, adapters, *_ = published
    export_family(path / "model", tmp_path / "apart", path / "source", keep_adapters=True)
    named = [f"--adapter={tmp_path / 'apart/adapter'}", "--keep_adapters"]
    for source, more in ((tmp_path / "apart", []), (path / "source", named)):
        command = ["import", f"--source={source}", f"--out={tmp_path / 'back'}", *more]
        assert convert.main(command) == 0
        assert "adapters: rank 3, alpha 6" in capsys.readouterr().out
        assert largest_difference(path / "model", tmp_path / "back") == 0.0
        lora = folder.load_config(tmp_path / "back").lora
        assert (lora.rank, lora.scale) == (LORA.rank, LORA.scale)
        export_family(tmp_path / "back", tmp_path / "again", path / "source", keep_adapters=True)
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (
                tmp_path / "apart" / file).read_bytes()  # fmt: skip
    assert folder.load_config(tmp_path / "apart").lora.rank == 3
    leaves = folder.open_leaves(tmp_path / "apart")
    assert all(np.array_equal(np.asarray(leaves[name]), a) for name, a in adapters.items())
    with pytest.raises(FamilyError, match="apart: has adapters apart.*without --keep_adapters"):
        compare_family(path / "model", tmp_path / "apart", {})


def test_an_adapter_is_not_kept_where_it_has_no_place(published, tmp_path, capsys):
    path = published[0]
    write_folder(tmp_path / "language", "qwen2")
    for source, more, message in (
        (path / "source", [], "--keep_adapters: has no meaning for an import without --adapter"),
        (tmp_path / "language", ["--adapter=x"], "a language model alone has no place for adapte"),
    ):
        command = ["import", f"--source={source}", f"--out={tmp_path / 'out'}", "--keep_adapters"]
        assert convert.main([*command, *more]) == 2
        assert message in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(published, tmp_path):
    path = published[0]
    (tmp_path / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 3}')
    with pytest.raises(AdapterError, match="adapter_model.safetensors: missing"):
        import_family(path / "source", tmp_path / "model", adapter=tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(AdapterError, match=r"(?s)weights_only=True.*/adapter_model.safetensors'"):
        import_family(path / "source", tmp_path / "model", adapter=tmp_path)
    name = "base_model.model.model.layers.9.mlp.other.lora_A.weight"
    tensors = {name: lazy(np.ones((3, 2), np.float32))}
    write_file(tmp_path / "adapter_model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(MappingError, match="mlp.other"):
        import_family(path / "source", tmp_path / "model", adapter=tmp_path)
    (tmp_path / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="non_lora_trainables.bin: holds weights"):
        import_family(path / "source", tmp_path / "model", adapter=tmp_path)


PLAIN, UNMERGED = "merge_and_unload", "PEFT does not merge such an adapter"


@pytest.mark.parametrize("option, value, fix", [
    ("layer_replication", [[0, 2], [1, 3]], PLAIN), ("lora_bias", True, PLAIN),
    ("kasa_config", {"beta": 1e-4}, PLAIN), ("use_bdlora", {"nblocks": 2}, PLAIN),
    ("alora_invocation_tokens", [5, 6], UNMERGED), ("use_qalora", True, UNMERGED),
    ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "pissa_niter_4", "where it was trained, merge it"),
    ("init_lora_weights", "olora", ""), ("init_lora_weights", "corda", ""),
    ("init_lora_weights", "lora_ga", ""), ("init_lora_weights", "loftq", ""),
])  # fmt: skip
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, option, value, fix):
    about = {"r": 3, "lora_alpha": 3, option: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    wanted = re.escape(f"adapter_config.json: {option}={value!r}: ") + f".*{fix}"
    with pytest.raises(AdapterError, match=wanted):
        read_adapter(tmp_path, [], {})


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_that_left_its_base_alone_is_read(tmp_path, start):
    about = {"r": 3, "lora_alpha": 3, "init_lora_weights": start}
    about |= {"alora_invocation_tokens": None, "use_qalora": False, "layer_replication": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    write_file(tmp_path / "adapter_model.safetensors", {}, {"format": "pt"})
    assert read_adapter(tmp_path, [], {})[1].rank == 3


def test_a_model_that_the_pytorch_file_does_not_run_is_exported_like_its_source(published):
    path = published[0]
    with pytest.raises(ExportFolderError, match="vision.kind='(siglip|clip|languagebind)'.*--like"):
        export_model(path / "model", path / "whole")
    assert not (path / "whole").exists()


def test_the_adapters_of_videochat_keep_their_place(tmp_path):
    """Its layout holds them, with the rank and scale of its config.json."""
    source = tmp_path / "source"
    source.mkdir()
    write_published(source, sized(VIDEOCHAT), np.float32)
    import_family(source, tmp_path / "model")
    export_family(tmp_path / "model", tmp_path / "out", source, keep_adapters=True)
    same_tensors(source, tmp_path / "out")
    config, leaves = folder.load_config(tmp_path / "model"), folder.open_leaves(tmp_path / "model")
    louder = dataclasses.replace(config, lora=dataclasses.replace(config.lora, alpha=8.0))
    folder.write_model(tmp_path / "louder", louder.to_dict(), leaves,
                       folder.load_codec(tmp_path / "model"))  # fmt: skip
    with pytest.raises(FamilyError, match="lora is .*alpha=8.0.*alpha=4.0"):
        export_family(tmp_path / "louder", tmp_path / "out", source)
    weights = (source / "model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(AdapterError, match="adapters of its own"):
        import_family(source, tmp_path / "model", adapter=tmp_path)


def test_an_option_that_would_be_ignored_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    command = ["import", f"--source={tmp_path}", f"--out={tmp_path / 'out'}", "--set", "a=1"]
    monkeypatch.setattr(sys, "argv", ["convert", *command])
    assert convert.main() == 2
    assert "--set: has no meaning for a source that is no multimodal" in capsys.readouterr().err
