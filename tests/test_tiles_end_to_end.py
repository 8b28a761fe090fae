"""Images of odd sizes in tiles through the commands: import, prepare, train, evaluate, predict."""

import json

import numpy as np
import pytest
from PIL import Image
from processes import QUICK, finish, start

from tests.interop.families.configs import LLAVA_ONEVISION
from tests.interop.families.folders import write_folder
from tpo_jax import convert, evaluate, predict, prepare
from tpo_jax.interop.folder import open_leaves
from tpo_jax.training.writers import read_scalars

# The published config at its tiny size, of images alone: its bucket of videos would find none.
CONFIG = """
import runpy


def get_config(arg=None):
    config = runpy.run_path("configs/llava_onevision.py")["get_config"](arg)
    del config.buckets["video"]
    config.buckets.image.batch_size = 2
    config.steps = 2
    return config
"""
# (height, width); of tiles of 24 pixels these are 48 x 48, four tiles, and 48 x 24, two.
SIZES = {"wide": (31, 47), "tall": (50, 21)}
COLOURS = {"wide": "red", "tall": "blue"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A published folder and two pictures with a question each."""
    path = tmp_path_factory.mktemp("tiles")
    write_folder(path / "published", LLAVA_ONEVISION)
    (path / "media").mkdir()
    rng, lines = np.random.default_rng(0), []
    for name, size in SIZES.items():
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(path / "media" / f"{name}.png")
        turn = {"question": "Which?", "answer": COLOURS[name], "options": ["red", "blue"]}
        lines.append({"image": f"{name}.png", "turns": [turn]})
    (path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.py").write_text(CONFIG)
    return path


@pytest.mark.long
def test_import_prepare_train_evaluate_and_predict(world, tmp_path):
    published, model, data = world / "published", tmp_path / "model", tmp_path / "data"
    assert convert.main(["import", f"--source={published}", f"--out={model}"]) == 0
    native = ["--format=native", f"--annotations={world / 'asked.jsonl'}"]
    media = f"--media={world / 'media'}"
    assert prepare.main(["run", media, *native, f"--out={data / 'train'}"]) == 0

    config = f"{world / 'config.py'}:init={model},data={data},tiny,tiles=4"
    run = tmp_path / "run"
    (ended,) = finish(
        [start("-m", "tpo_jax.train", f"--config={config}", f"--workdir={run}", flags=QUICK)]
    )
    assert ended.status == 0
    losses = [record["train/loss"] for record in read_scalars(run / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    before, after = open_leaves(model), open_leaves(run / "model")
    assert before.keys() == after.keys()
    for name in ("vision/patch_embedding/kernel", "connector/image_newline"):
        assert (np.asarray(before[name]) != np.asarray(after[name])).any(), name

    trained, out = f"--model={run / 'model'}", tmp_path / "scores.json"
    command = [trained, f"--data={data / 'train'}", "--batch_size=2", f"--out={out}"]
    assert evaluate.main(command) == 0
    scores = json.loads(out.read_text())
    assert scores["counts"]["qa/accuracy"] == {"items": 2, "videos": 2}

    for name, size in SIZES.items():
        command = [trained, f"--video={world / 'media' / name}.png", "--prompt=Which?",
                   "--max_new=4", f"--out={tmp_path / 'predicted'}"]  # fmt: skip
        assert predict.main(command) == 0
        record = json.loads((tmp_path / "predicted" / f"{name}.json").read_text())
        assert record["media"] == "image" and record["annotated"] == f"{name}.png"
        with Image.open(tmp_path / "predicted" / record["annotated"]) as page:
            assert page.width >= size[1] and page.height > size[0]
