"""LoRA adapters against `peft`: theirs in, ours out, merged or apart."""

import dataclasses
import json

import gcs_server
import memory_bucket
import numpy as np
import pytest

from tests.interop.families.configs import LLAVA_ONEVISION
from tests.interop.families.published_folder import sized, write_published
from tests.interop.families.test_family_adapters import trained
from tests.interop.language_folders import write_folder
from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.interop import folder, huggingface, peft
from tpo_jax.interop.export import export_model, import_model, largest_difference
from tpo_jax.interop.families.folder import export_family
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten, unflatten

pytestmark = pytest.mark.parity
TARGETS = ["q_proj", "down_proj", "lm_head"]


def _logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_peft_merges_to_the_same_model(tmp_path, rslora, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    their_peft = pytest.importorskip("peft")
    write_folder(tmp_path / "source", "llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    lora = their_peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=TARGETS, use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = their_peft.get_peft_model(load(tmp_path / "source", dtype=torch.float32), lora).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, 331, (2, 9))
    want = _logits(model, tokens)

    import_model(tmp_path / "source", tmp_path / "model", adapter=tmp_path / "adapter")
    export_model(tmp_path / "model", tmp_path / "merged")
    np.testing.assert_allclose(_logits(load(tmp_path / "merged"), tokens), want, atol=2e-4)
    plain = _logits(load(tmp_path / "source"), tokens)
    assert np.abs(plain - want).max() > 0.1, "the adapter does nothing"
    write_folder(tmp_path / "other", "llama", seed=1)
    with pytest.raises(peft.AdapterError, match="another lm_head.weight"):
        import_model(tmp_path / "other", tmp_path / "back", adapter=tmp_path / "adapter")

    memory_bucket.install(monkeypatch)
    for name in ("source", "adapter"):
        gcs_server.put(tmp_path / name, f"gs://bucket/{name}")
    import_model("gs://bucket/source", "gs://bucket/model", adapter="gs://bucket/adapter")
    assert largest_difference(tmp_path / "model", "gs://bucket/model") == 0.0


def test_an_adapter_that_began_with_weights_of_its_base_is_read_once_it_is_plain(tmp_path):
    """PiSSA: A and B as they are saved go with what is left of the base, not with the source."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    their_peft = pytest.importorskip("peft")
    source, own, plain, start = (tmp_path / n for n in ("source", "own", "plain", "start"))
    write_folder(source, "llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    lora = their_peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=TARGETS[:2], init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = their_peft.get_peft_model(load(source, dtype=torch.float32), lora).eval()
    model.save_pretrained(start)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(own)
    tokens = np.random.default_rng(0).integers(0, 331, (2, 9))
    want = _logits(model, tokens)
    model.save_pretrained(plain, path_initial_model_for_weight_conversion=str(start))
    with pytest.raises(peft.AdapterError, match="init_lora_weights='pissa'"):
        import_model(source, tmp_path / "model", adapter=own)
    about = json.loads((own / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    (own / "adapter_config.json").write_text(json.dumps(about))
    for adapter, fits in ((own, False), (plain, True)):
        import_model(source, tmp_path / "model", adapter=adapter)
        export_model(tmp_path / "model", tmp_path / "merged")
        found = _logits(load(tmp_path / "merged"), tokens)
        assert (np.abs(found - want).max() < 2e-4) == fits, adapter


def test_an_adapter_of_ours_is_read_by_peft_and_comes_back_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    their_peft = pytest.importorskip("peft")
    codec = TextCodec(train_tokenizer(["a red circle"], 300))
    pattern = r"^language/(layers/.*(q_proj|down_proj)|lm_head)/kernel$"
    config = dataclasses.replace(preset("micro"), lora=LoraConfig(pattern, 3, 7.0, 0.05))
    random = np.random.default_rng(0)
    params = {
        path: (0.2 * random.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32)
        for path, leaf in flatten(FunctionalModel(config).abstract()).items()
    }
    folder.save_model(tmp_path / "model", config, unflatten(params), codec)
    export_model(tmp_path / "model", tmp_path / "apart", keep_adapters=True)
    export_model(tmp_path / "model", tmp_path / "merged")
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "apart/language_model", dtype=torch.float32)
    apart = their_peft.PeftModel.from_pretrained(base, tmp_path / "apart/adapter").eval()
    tokens = random.integers(0, 1024, (2, 9))
    want = _logits(load(tmp_path / "merged/language_model", dtype=torch.float32), tokens)
    np.testing.assert_allclose(_logits(apart, tokens), want, atol=2e-4)

    import_model(tmp_path / "apart", tmp_path / "back")
    assert largest_difference(tmp_path / "model", tmp_path / "back") == 0.0
    assert folder.load_config(tmp_path / "back") == config

    bare = {path: leaf for path, leaf in params.items() if "/lora_" not in path}
    without = dataclasses.replace(config, lora=None)
    folder.save_model(tmp_path / "bare", without, unflatten(bare), codec)
    export_model(tmp_path / "bare", tmp_path / "base")
    adapter = tmp_path / "apart/adapter"
    import_model(tmp_path / "base", tmp_path / "kept", adapter=adapter, keep_adapters=True)
    assert largest_difference(tmp_path / "model", tmp_path / "kept") == 0.0
    assert folder.load_config(tmp_path / "kept").lora.scale == config.lora.scale


def test_an_adapter_of_a_family_is_read_by_peft(tmp_path):
    """LLaVA-OneVision: on disk the names of transformers 4, in memory those of version 5."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    their_peft = pytest.importorskip("peft")
    source = tmp_path / "source"
    source.mkdir()
    write_published(source, sized(LLAVA_ONEVISION), np.float32, scale=0.2)
    trained(source, tmp_path, LoraConfig(r"^language/(layers/.*q_proj|lm_head)/kernel$", 3, 1.0))
    export_family(tmp_path / "model", tmp_path / "apart", source, keep_adapters=True)
    export_family(tmp_path / "model", tmp_path / "merged", source)
    load = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained
    merged, base = load(tmp_path / "merged"), load(tmp_path / "apart")
    tokens = np.random.default_rng(0).integers(0, 190, (2, 9))
    want, plain = _logits(merged, tokens), _logits(base, tokens)
    apart = their_peft.PeftModel.from_pretrained(base, tmp_path / "apart/adapter").eval()
    assert sum("lora_A" in name for name, _ in apart.named_parameters()) == 2 + 1
    np.testing.assert_allclose(_logits(apart, tokens), want, rtol=1e-4, atol=2e-4)
    assert np.abs(plain - want).max() > 0.1, "the adapter does nothing"


def test_what_peft_cannot_hold_and_what_ours_cannot_is_refused(tmp_path):
    rows = huggingface.language_rows(preset("micro").language, 1024)
    zeros = {
        f"vision/layers/mlp/fc1/lora_{side}": folder.lazy(np.zeros((1, 2, 2), np.float32))
        for side in "ab"
    }
    with pytest.raises(peft.AdapterError, match="vision/layers/mlp/fc1/kernel.*merged"):
        peft.write_adapter(folder.epath.Path(tmp_path), zeros, LoraConfig("x", 2, 2.0), rows)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "use_dora": true}')
    with pytest.raises(peft.AdapterError, match="use_dora=True.*merge_and_unload"):
        peft.read_adapter(tmp_path, rows, {})
