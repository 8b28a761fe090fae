"""Whole families from published folder to logits, every decoder layer and 64 greedy tokens.

Full: `transformers` loads what we export. Composed: towers and language models of `transformers`
with float64 NumPy between them, from the published tensors by name. `transformers` has neither
LanguageBind's attention over time nor UMT: those two towers are NumPy with the leaves that our
import made (test_check_family.py fills them by the published names).

    python -m tests.parity.test_whole_families     # writes tests/interop/families/whole_logits.npz
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.interop.families.configs import (
    CONFIGS,
    LLAVA_ONEVISION,
    LLAVA_ONEVISION_TIED,
    VIDEO_LLAVA,
)
from tests.interop.families.folders import (
    GOLDEN,
    GOLDEN_EVERY,
    VOCABULARY,
    forward,
    load,
    prompt,
    with_vocabulary,
    write_folder,
)
from tests.models.connectors.oracle import project, video_tokens
from tests.models.towers import oracle
from tests.parity.composed import channels_first, language_of, qformer, tower_of
from tests.parity.towers import difference
from tpo_jax.data.rows import stack_rows
from tpo_jax.generation.requests import Clip, make_request
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys
from tpo_jax.interop.families.folder import export_family, import_family
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.models.connectors.tiling import tiling_of
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.predict import Predictor
from tpo_jax.predict import _plan as plan_of

pytestmark = pytest.mark.parity
TOLERANCE, STEPS = 2e-4, 64
IMAGE_ID, VIDEO_ID = VOCABULARY - 2, VOCABULARY - 1
IDS = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID}
FULL = {
    "llava_onevision": LLAVA_ONEVISION | IDS,
    "llava_onevision_tied": LLAVA_ONEVISION_TIED | IDS,
    "video_llava": VIDEO_LLAVA | IDS,
}
COMPOSED = ("llava_video", "longva", "video_llava_original", "videochat")


class Imported:
    """Our model of a published folder, a prompt about a clip, and what the model makes of it."""

    def __init__(self, path, data, layers=False):
        write_folder(path / "source", data)
        import_family(path / "source", path / "model")
        self.path, self.data = path, with_vocabulary(data)
        self.model, self.params, self.codec = load(path / "model")
        self.batch, self.ids = prompt(self.model.config)
        run = jax.jit(lambda params, batch: forward(self.model, params, batch, layers))
        self.states, self.logits = run(self.params, self.batch)

    def pixels(self):
        """float64[F, S, S, 3], normalised."""
        vision = self.model.config.vision
        return (self.batch["frames"][0] / 255 - np.array(vision.mean)) / np.array(vision.std)


def load_whole(path):
    """The model of `transformers` that a folder holds, every tensor of it and no other."""
    import torch
    import transformers

    load = transformers.AutoModelForImageTextToText.from_pretrained
    model, found = load(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def inputs_of(pixels, ids):
    import torch

    clip = torch.from_numpy(np.moveaxis(pixels, -1, 1)[None].astype(np.float32))
    tokens = torch.from_numpy(np.where(ids < 0, VIDEO_ID, ids)[None])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens),
            "pixel_values_videos": clip}  # fmt: skip


@pytest.fixture(scope="module", params=FULL)
def full(request, tmp_path_factory):
    """Ours, and theirs of our export."""
    pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp(request.param)
    ours = Imported(path, FULL[request.param], layers=True)
    export_family(path / "model", path / "exported", path / "source")
    return ours, load_whole(path / "exported")


def test_states_of_every_decoder_layer_and_logits_of_the_exported_folder(full):
    import torch

    ours, theirs = full
    with torch.no_grad(), layer_outputs(theirs.model.language_model.layers) as states:
        out = theirs(**inputs_of(ours.pixels(), ours.ids), output_hidden_states=True)
    assert_same(ours, states, out)


@contextlib.contextmanager
def layer_outputs(layers):
    """A list that holds what each of the modules gave, [1, T, D]."""
    states = [None] * len(layers)

    def keep(number):
        def hook(module, inputs, output):
            states[number] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    yield states
    for hook in hooks:
        hook.remove()


def assert_same(ours, states, out):
    """Every decoder layer, the final norm and logits."""
    expected = [*states, out.hidden_states[-1]]
    for number, (found, wanted) in enumerate(zip(ours.states, expected, strict=True)):
        assert difference(found, wanted[0]) < TOLERANCE, number
    assert difference(ours.logits, out.logits[0]) < TOLERANCE
    assert float(np.std(ours.logits)) > 0.1


def rows_of_images(ours, folder, sizes):
    """Our model, and for images of (height, width) that `predict` reads from files: pixels, the
    batch of one row, its tokens int64[T] with the visual ones as -1, and logits float[T, V]."""
    config = dataclasses.replace(ours.model.config, visual_offset=ours.codec.template.visual_offset)
    predictor = Predictor(
        config, ours.params, ours.codec, prompt_tokens=24, batch_size=1, max_new=1
    )
    run = jax.jit(lambda params, batch: forward(FunctionalModel(config), params, batch, False)[1])
    rng, builder = np.random.default_rng(4), predictor.builder("image", 4)  # for all sizes
    for number, size in enumerate(sizes):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entry = {"id": "a", "video": f"{number}.png", "prompt": "what is it?"}
        request = make_request("test", entry, folder)
        clip = Clip.read(request, whole_images=predictor.tiled)
        assert predictor.shape_of(clip) == ("image", tiling_of(config).tiles(size))
        batch = stack_rows([builder.build(plan_of(request, clip), 0)])
        ids = np.concatenate([batch["prefix_tokens"][0], batch["branch_tokens"][0, 0]])
        ids[config.visual_offset :][: batch["tile_index"].shape[1]] = -1
        valid = np.concatenate([batch["prefix_segments"][0], batch["branch_segments"][0, 0]]) > 0
        yield pixels, ids[valid].astype(np.int64), run(ours.params, batch)[valid]


def published_tiles(ours, pixels):
    """float64[1 + n, S, S, 3], normalised, of the image processor of `transformers`."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    vision, grid = ours.model.config.vision, ours.model.config.connector.resolutions
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size}, do_pad=False,
        image_grid_pinpoints=[list(pair) for pair in grid], image_mean=list(vision.mean),
        image_std=list(vision.std),
    )  # fmt: skip
    tiles = processor(pixels, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(np.asarray(tiles, np.float64), 1, -1)


@pytest.mark.parametrize("full", ["llava_onevision"], indirect=True)
def test_images_in_tiles_from_files_to_logits(full, tmp_path):
    import torch

    ours, theirs = full
    lengths = []
    for pixels, ids, logits in rows_of_images(ours, tmp_path, [(12, 50), (44, 40)]):
        tiles = np.moveaxis(published_tiles(ours, pixels), -1, 1)[None].astype(np.float32)
        tokens = torch.from_numpy(np.where(ids < 0, IMAGE_ID, ids)[None])
        with torch.no_grad():
            expected = theirs(
                input_ids=tokens, attention_mask=torch.ones_like(tokens),
                pixel_values=torch.from_numpy(tiles), image_sizes=torch.tensor([pixels.shape[:2]]),
            ).logits[0]  # fmt: skip
        assert difference(logits, expected) < TOLERANCE
        lengths.append((tiles.shape[1], int((ids < 0).sum())))
    # 3 x 3 patches a tile. Of the first image one of three rows is no padding.
    assert lengths == [(3, 9 + 1 * 7), (5, 9 + 6 * 7)]


# A table for both ends changes nothing here.
@pytest.mark.parametrize("full", ["llava_onevision", "video_llava"], indirect=True)
def test_the_sampler_gives_the_same_64_tokens(full):
    ours, theirs = full
    found = sampled(ours.model, ours.codec, ours.params, ours.batch)
    assert int(found.lengths[0, 0]) == STEPS  # no <eos>
    tokens = found.tokens[0, 0].tolist()
    assert tokens == generated(ours, theirs, ours.codec, eos_token_id=None)
    assert len(set(tokens)) > 8  # not one token over and over


def sampled(model, codec, params, batch):
    """Our greedy answer to a `prompt`."""
    sampler = Sampler(model, codec, Sampling(max_new=STEPS))
    keys = branch_keys(0, np.zeros((1, 1), np.uint32))
    return sampler.generate(params, sampler.prefill(params, batch), batch, keys)


def generated(ours, theirs, codec, **options):
    """The greedy answer of `transformers` to the prompt of `ours`, without the tokens that our
    sampler bars: added ones that are no stops, and rows of no token."""
    barred = sorted(set(codec.special_ids.values()) - set(codec.stop_ids))
    inputs = inputs_of(ours.pixels(), ours.ids)
    out = theirs.generate(
        **inputs, do_sample=False, max_new_tokens=STEPS, pad_token_id=0,
        suppress_tokens=[*barred, *range(codec.vocab_size, VOCABULARY)], **options,
    )  # fmt: skip
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("full", ["llava_onevision"], indirect=True)
def test_both_stop_at_the_second_stop_of_generation_config(full, tmp_path):
    """As of Qwen2, where a model says <|endoftext|> instead of <|im_end|>. `transformers` takes the
    list from the folder that we export, the sampler from our model folder."""
    ours, theirs = full
    tokens = generated(ours, theirs, ours.codec, eos_token_id=None)
    at = next(i for i in range(8, STEPS) if tokens[i] not in tokens[:i])
    ids = [ours.codec.special_ids[name] for name in ("<|im_end|>", "<|endoftext|>")]
    source, model, out = (tmp_path / name for name in ("source", "model", "out"))
    shutil.copytree(ours.path / "source", source)
    weights = {key: np.array(value) for key, value in read_tensors(source).items()}
    (head,) = (value for key, value in weights.items() if key.endswith("lm_head.weight"))
    head[ids[1]] = 1.01 * head[tokens[at]]  # wherever that token was the best, this is better
    safetensors.numpy.save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    import_family(source, model)
    export_family(model, out, source)
    stopping, params, codec = load(model)
    found = sampled(stopping, codec, params, ours.batch)
    length = int(found.lengths[0, 0])
    answer = found.tokens[0, 0, :length].tolist()
    assert bool(found.finished[0, 0]) and answer[-1] == ids[1] and 1 < length <= at + 1 < STEPS
    assert answer == generated(ours, load_whole(out), codec)


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_family_from_frames_to_logits(name, tmp_path):
    """Of three frames of a clip and a question about it, every decoder layer; of LongVA also of
    images in tiles."""
    ours = Imported(tmp_path, CONFIGS[name], layers=True)
    tensors = {k: np.array(v) for k, v in read_tensors(tmp_path / "source").items()}
    visual = VISUAL[name](ours, tensors)
    language = language_of(name, ours.data, tensors)
    with layer_outputs(language.model.layers) as states:
        out = answered(language, ours.ids, visual)
    assert_same(ours, states, out)
    if name == "longva":  # UniRes: each tile by itself, like a frame, and not the whole image
        for pixels, ids, logits in rows_of_images(ours, tmp_path, [(20, 50), (24, 20)]):
            visual = llava_visual(ours, tensors, published_tiles(ours, pixels)[1:])
            assert len(visual) == len(published_tiles(ours, pixels)) - 1  # 3 x 3 patches, pooled
            out = answered(language, ids, visual)
            assert difference(logits, out.logits[0]) < TOLERANCE


def answered(language, ids, visual):
    """Output of a language model of `transformers` for ids int64[T], at the places of -1 float[V,
    D]."""
    import torch

    embeds = language.get_input_embeddings()(torch.from_numpy(np.maximum(ids, 0)))
    embeds = embeds.detach().numpy()
    assert (ids < 0).sum() == len(visual)
    embeds[ids < 0] = visual
    with torch.no_grad():
        return language(inputs_embeds=torch.from_numpy(embeds[None]), output_hidden_states=True)


def mlp_params(tensors):
    """What tests.models.connectors.oracle reads, of the published names."""
    params = {
        f"linear_{i}": {"kernel": tensors[f"model.mm_projector.{n}.weight"].T.astype(float),
                        "bias": tensors[f"model.mm_projector.{n}.bias"].astype(float)}
        for i, n in ((1, 0), (2, 2))
    }  # fmt: skip
    return params | {"image_newline": tensors.get("model.image_newline")}


def llava_visual(ours, tensors, pixels=None):
    """float64[V, D] of a clip float64[F, S, S, 3], normalised: the one of `ours` by default."""
    import torch

    pixels = ours.pixels() if pixels is None else pixels
    clip = ours.data["vision_config"]["model_type"] == "clip_vision_model"
    kind, layer = ("CLIP", -2) if clip else ("Siglip", -1)
    tower, frames = tower_of(kind, ours.data, tensors), torch.from_numpy(pixels).float()
    with torch.no_grad():
        states = tower(channels_first(frames), output_hidden_states=True).hidden_states[layer]
    states = states[:, int(clip) :].double().numpy()
    params = mlp_params(tensors)
    grids = project(params, states).reshape(len(states), 3, 3, -1)
    return np.stack(video_tokens(ours.model.config.connector, params, grids))


def languagebind_visual(ours, tensors):
    tower = jax.tree.map(lambda x: np.asarray(x, np.float64), ours.params["vision"]["video_tower"])
    states = oracle.languagebind(tower, ours.model.config.vision, ours.pixels(), [True] * 3)
    return project(mlp_params(tensors), states).reshape(-1, ours.model.config.language.width)


def videochat_visual(ours, tensors):
    import torch

    tower = jax.tree.map(lambda x: np.asarray(x, np.float64), ours.params["vision"])
    tokens = torch.from_numpy(oracle.umt(tower, ours.model.config.vision, ours.pixels(), 3))
    states = qformer(ours.data, tensors, tokens[None].float())[0].double().numpy()
    return states @ tensors["project_up.weight"].T + tensors["project_up.bias"]


VISUAL = {
    "llava_video": llava_visual, "longva": llava_visual,
    "video_llava_original": languagebind_visual, "videochat": videochat_visual,
}  # fmt: skip


def write_golden():
    """Logits of `transformers` of the full families, for the tests that run without torch."""
    import tempfile

    import torch

    golden = {}
    for name, data in FULL.items():
        with tempfile.TemporaryDirectory() as directory:
            ours = Imported(pathlib.Path(directory), data)
            theirs = load_whole(f"{directory}/source")
        with torch.no_grad():
            logits = theirs(**inputs_of(ours.pixels(), ours.ids)).logits[0]
        golden[name] = logits[:, ::GOLDEN_EVERY].numpy()
    np.savez_compressed(GOLDEN, **golden)


if __name__ == "__main__":
    write_golden()
