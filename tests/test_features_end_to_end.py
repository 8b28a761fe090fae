"""From videos to a head that reads their features, and those of the questions: extract, prepare,
batch, train, evaluate."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import micro_model
import numpy as np
import pytest
from etils import epath
from flax import nnx

import tpo_jax.train
from tpo_jax import evaluate, predict, prepare
from tpo_jax.data.clip_features import FeatureStore
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import PreparedDataset
from tpo_jax.generation import draw
from tpo_jax.interop.folder import load_config, load_model, save_model
from tpo_jax.models.config import TextFeaturesConfig
from tpo_jax.models.heads import HeadInputs, cg_detr
from tpo_jax.models.layers import Rngs
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training import config as training_config
from tpo_jax.training.config import bucket_config, default_config, source_config
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.start import make_model_config

HEADS = ("cg_detr",)
VIDEOS = 3  # of 24 frames, 4 a second
QUESTION = "What does the red circle do?"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos that turn dark for a while, features of a model's own encoder, and both prepared.

    The model answers every question with a call of the head that reads the features.
    """
    path = tmp_path_factory.mktemp("world")
    (path / "media").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(VIDEOS):
        frames = rng.integers(100, 255, (24, 48, 64, 3), np.uint8)
        frames[4 * i + 4 : 4 * i + 12] //= 8
        draw.write_mp4(path / f"media/v{i}.mp4", list(frames), 4.0)
        turn = {"question": QUESTION, "answer": "it <temporal>"}
        lines.append({
            "video": f"v{i}.mp4", "task": "temporal", "turns": [turn],
            "targets": {"windows": [[i + 1.0, i + 3.0]]},
        })  # fmt: skip
    (path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    codec = micro_model.make_codec(("region", *HEADS, "mask"))
    blind = micro_model.make_model(codec, ())
    params = micro_model.make_params(blind)
    save_model(path / "base", blind.config, params, codec)
    media, out = [f"--media={path / 'media'}"], [f"--out={path / 'features'}"]
    assert prepare.main(["features", f"--model={path / 'base'}", *media, *out]) == 0
    store = FeatureStore(path / "features")
    store = FeatureStore.create(store.path, store.about, TextFeaturesConfig(
        blind.config.language.width, 6, "by hand"))  # fmt: skip
    store.write_text(QUESTION, rng.normal(size=(4, blind.config.language.width)))
    native = ["--format=native", f"--annotations={path / 'a.jsonl'}", "--size=32"]
    features, out = f"--features={path / 'features'}", f"--out={path / 'prepared'}"
    assert prepare.main(["run", *media, *native, features, out]) == 0

    dataset = PreparedDataset(path / "prepared")
    model = micro_model.make_model(codec, HEADS)
    model = FunctionalModel(dataclasses.replace(
        model.config, clip_features=dataset.clip_features_config, text_features=dataset.texts.about
    ))  # fmt: skip
    params = micro_model.make_params(model) | {"vision": params["vision"]}
    said = [codec.encode("it")[0], *(codec.special_ids[t] for t in ("<time_begin>", "<temp>"))]
    params = micro_model.that_says(params, codec, *said, codec.eos_id)
    save_model(path / "model", model.config, params, codec)
    return path


def make_config(world, **changes):
    config = default_config()
    config.steps = 2
    config.init_from = str(world / "model")
    config.model.update(preset="", heads=list(HEADS))
    config.data.train = [source_config(str(world / "prepared"), tasks={"temporal": 1.0})]
    config.buckets = {"video": bucket_config(
        media="video", batch_size=2, frames=6, branches=1, branch_tokens=48, answers=8, windows=1,
    )}  # fmt: skip
    config.losses = {"language": 1.0} | cg_detr.published_weights()
    config.trainable = [["heads/", 1e-3]]
    config.eval_every = 0
    config.update(changes)
    return config


def test_a_batch_has_what_was_extracted_and_the_head_learns_from_it(world):
    config, _, codec = load_model(world / "model")
    dataset = PreparedDataset(world / "prepared")
    shapes = training_config.to_dict(make_config(world))["buckets"]
    source = Source(dataset, 1.0, {"temporal": 1.0})
    _, batch = Pipeline([source], codec, config, HEADS, shapes, seed=0).batch(0)
    given = batch["clip_features"]
    assert given.shape == (2, 6, config.vision.width) and given.dtype == np.float32
    stored = [np.load(world / f"features/v{i}.npz")["features"] for i in range(VIDEOS)]
    assert all(features.shape == (3, config.vision.width) for features in stored)  # of 2 s
    for row in given:  # of 1 s
        assert any(np.array_equal(row, np.repeat(features, 2, axis=0)) for features in stored)
    (text,) = (world / "features/text").iterdir()
    for row, valid in zip(batch["text_features"][:, 0], batch["text_valid"][:, 0], strict=True):
        np.testing.assert_array_equal(row[:4], np.load(text)["txt"])
        assert valid.tolist() == [True] * 4 + [False] * 2

    def head():
        return cg_detr.CgDetrHead(config, rngs=Rngs(0))

    structure = nnx.graphdef(nnx.eval_shape(head))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(head())))()
    rng = np.random.default_rng(0)
    states, prompt = (rng.normal(size=(2, 1, *n, config.language.width)).astype(np.float32)
                      for n in ((), (4,)))  # fmt: skip
    said = np.ones(prompt.shape[:3], bool)

    @jax.jit
    def run(params, given):
        module = nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, params)))
        found = module(HeadInputs(states, None, None, batch["frame_valid"], None, prompt=prompt,
                                  prompt_valid=said, clip_features=given))  # fmt: skip
        size = sum(jnp.sum(jnp.square(found[k])) for k in ("logits", "spans", "saliency"))
        return size, found

    (_, found), (of_params, of_features) = jax.value_and_grad(run, (0, 1), has_aux=True)(
        params, given
    )
    assert found["saliency"].shape == (2, 1, 6)
    assert np.abs(of_features).max(axis=(1, 2)).min() > 0  # of both rows
    leaves = flatten(of_params)
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves.values())
    assert np.abs(leaves["clip_proj/linear1/kernel"]).max(axis=1).min() > 0  # from every feature


def test_a_config_asks_for_the_features_of_its_data(world):
    dataset = PreparedDataset(world / "prepared")
    about = dataset.clip_features_config
    start = {"init_from": str(world / "base"), "init_missing": ["heads/", "task_tokens/"]}
    config = make_config(world, clip_features=True, **start)
    training_config.validate(config)
    made = make_model_config(config)[0]
    assert made.clip_features == about and made.text_features is None
    config = make_config(world, text_features=True, **start)
    training_config.validate(config)
    made = make_model_config(config)[0]
    assert made.clip_features is None and made.text_features == dataset.texts.about
    # Of the model that it starts from, unless no head is left to read them.
    config = make_config(world)
    made = make_model_config(config)[0]
    assert made.clip_features == about and made.text_features == dataset.texts.about
    config.model.heads = []
    made = make_model_config(config)[0]
    assert made.clip_features is None and made.text_features is None
    for kind in ("clip_features", "text_features"):
        config = make_config(world, **{kind: True})
        config.model.heads, config.losses = ["temporal"], {"language": 1.0}
        with pytest.raises(training_config.ConfigError, match=f"{kind} = True: no head of model"):
            training_config.validate(config)


@pytest.mark.long
def test_train_evaluate_and_predict_with_them(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        tpo_jax.train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1])
    )
    workdir = epath.Path(tmp_path / "run")
    with Preemption() as preemption:
        assert tpo_jax.train.train(make_config(world), workdir, preemption, Ledger()) == 0
    (_, before, _), (config, after, _) = load_model(world / "model"), load_model(workdir / "model")
    assert config.clip_features == load_config(world / "model").clip_features
    assert config.text_features == load_config(world / "model").text_features is not None
    for path in ("clip_proj/linear1/kernel", "text_proj/linear1/kernel"):
        one, other = (flatten(params["heads"]["cg_detr"])[path] for params in (before, after))
        assert (one != other).all()

    model = f"--model={workdir / 'model'}"
    command = [model, f"--data={world / 'prepared'}", "--tasks=temporal", "--batch_size=2"]
    assert evaluate.main([*command, f"--out={tmp_path / 'scores.json'}"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["metrics"]
    assert scores["temporal/miou"] == pytest.approx(scores["forced/temporal/miou"], abs=1e-4)
    # Frames without features are refused, and so are those of another encoder.
    native = ["--format=native", f"--annotations={world / 'a.jsonl'}", "--size=32"]
    media, out = f"--media={world / 'media'}", f"--out={tmp_path / 'plain'}"
    assert prepare.main(["run", media, *native, out]) == 0
    command[1] = f"--data={tmp_path / 'plain'}"
    capsys.readouterr()
    assert evaluate.main([*command, f"--out={tmp_path / 'none.json'}"]) == 2
    assert "the folder has none, but a head of the model reads" in capsys.readouterr().err

    asked = [model, f"--video={world / 'media/v1.mp4'}", f"--prompt={QUESTION}", "--max_new=8",
             f"--out={tmp_path / 'predictions'}"]  # fmt: skip
    assert predict.main([*asked, f"--features={world / 'features'}"]) == 0
    record = json.loads((tmp_path / "predictions/v1.json").read_text())
    assert record["marked"] == "it<temporal>" and record["events"][0]["result"]["windows"]
    capsys.readouterr()
    unknown = [*asked, "--prompt=What does the green circle do?"]
    assert predict.main([*unknown, f"--features={world / 'features'}"]) == 1
    assert "no text features of 'What does the green circle do?'" in capsys.readouterr().err
    assert predict.main(asked) == 2
    assert "--features is missing: a head of the model reads" in capsys.readouterr().err
    other = tmp_path / "other"
    assert prepare.main(["features", model, media, f"--out={other}", "--frames=2"]) == 0
    assert predict.main([*asked, f"--features={other}"]) == 2
    assert "encoder: 'tpo_jax vision" in capsys.readouterr().err
