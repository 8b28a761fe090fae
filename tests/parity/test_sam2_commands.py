"""SAM 2 through the commands: import into a model, train, predict on a file, export, import."""

import json

import av
import micro_model
import numpy as np
import pytest
from processes import QUICK, finish, start
from pycocotools import mask as coco_mask

from tests.parity.test_sam2_network import pair
from tpo_jax import convert, predict, prepare
from tpo_jax.generation import draw
from tpo_jax.interop.export import largest_difference
from tpo_jax.interop.folder import load_config, open_leaves, save_model
from tpo_jax.interop.huggingface import read_tensors
from tpo_jax.interop.sam2 import PREFIX
from tpo_jax.training.writers import read_scalars

pytestmark = [pytest.mark.parity, pytest.mark.long]
FRAMES, RATE, SIZE = 16, 4, (64, 96)
# What `import --into` says to train with, and losses of the head.
CONFIG = """
from tpo_jax.models.heads import sam2
from tpo_jax.training.config import bucket_config, default_config, parse_arg, source_config


def get_config(arg=None):
    arg = parse_arg(arg, init="", data="")
    config = default_config()
    config.init_from, config.init_missing = arg.init, ["heads/sam2/(?!network)"]
    config.model.update(preset="", heads=["sam2"])
    config.data.train = [source_config(arg.data, tasks={"mask": 1.0})]
    config.buckets = {"video": bucket_config(
        media="video", batch_size=1, frames=2, branches=1, branch_tokens=32, answers=8,
        slots={"mask": 1}, mask_size=16,
    )}
    config.losses = {"language": 1.0} | sam2.published_weights()
    config.trainable = [["heads/sam2/(?!network)", 1e-3], ["task_tokens/mask", 1e-4]]
    config.steps, config.log_every, config.eval_every = 2, 1, 0
    return config
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """SAM 2 as `transformers` saves it; a model with the light mask head, which answers every
    question with "it <mask>"; a video of a square on its way, with its masks."""
    path = tmp_path_factory.mktemp("sam2")
    pair()[0].save_pretrained(path / "published")
    codec = micro_model.make_codec()
    model = micro_model.make_model(codec, ("mask",))
    ids = codec.special_ids
    said = [codec.encode("it")[0], ids["<track_begin>"], ids["<tracking>"], codec.eos_id]
    params = micro_model.that_says(micro_model.make_params(model), codec, *said)
    save_model(path / "base", model.config, params, codec)

    (path / "media").mkdir()
    frames = np.random.default_rng(0).integers(0, 60, (FRAMES, *SIZE, 3), np.uint8)
    masks = np.zeros((FRAMES, *SIZE), np.uint8)
    for i in range(FRAMES):
        masks[i, 20:44, 3 * i : 3 * i + 24] = 1
    frames[masks > 0] = (220, 40, 40)
    draw.write_mp4(path / "media/clip.mp4", list(frames), RATE)
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    rles = [rle | {"counts": rle["counts"].decode()} for rle in rles]
    targets = {"times": [i / RATE for i in range(FRAMES)], "rles": rles}
    turn = {"question": "Where is it?", "answer": "it <mask>"}
    line = {"video": "clip.mp4", "task": "mask", "turns": [turn], "targets": targets}
    (path / "asked.jsonl").write_text(json.dumps(line) + "\n")
    (path / "config.py").write_text(CONFIG)
    return path


def predicted(world, model, out, *asked):
    """The result of the one call of an answer about the file."""
    command = [f"--model={model}", f"--video={world / 'media/clip.mp4'}", "--max_new=8", *asked]
    assert predict.main([*command, f"--out={out}"]) == 0
    record = json.loads((out / "clip.json").read_text())
    assert record["marked"] == "it<mask>" and record["finished"]
    (event,) = record["events"]
    with av.open(str(out / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == FRAMES
    return event["result"]


def test_import_train_predict_export_and_import(world, tmp_path, capsys):
    start_folder, data, run = (tmp_path / name for name in ("start", "data", "run"))
    published = world / "published"
    into = [f"--source={published}", f"--into={world / 'base'}", f"--out={start_folder}"]
    assert convert.main(["import", *into]) == 0
    printed = capsys.readouterr().out
    assert "left out: head mask, whose task sam2 answers" in printed
    missing = '["heads/sam2/adapter", "heads/sam2/box_readout"]'
    assert f'model.heads=["sam2"] and init_missing={missing}' in printed
    native = ["--format=native", f"--annotations={world / 'asked.jsonl'}", "--size=32"]
    media = f"--media={world / 'media'}"
    assert prepare.main(["run", media, *native, f"--out={data}"]) == 0

    config = f"--config={world / 'config.py'}:init={start_folder},data={data}"
    (ended,) = finish([start("-m", "tpo_jax.train", config, f"--workdir={run}", flags=QUICK)])
    assert ended.status == 0
    records = read_scalars(run / "metrics.jsonl")
    assert len(records) == 2
    assert all(np.isfinite(record["train/sam2/prompt"]) for record in records)
    model = run / "model"
    assert load_config(model).heads == ("sam2",)
    network = {path: np.asarray(x) for path, x in open_leaves(model).items() if PREFIX in path}
    for path, leaf in open_leaves(start_folder).items():
        if path.startswith(PREFIX):  # frozen
            np.testing.assert_array_equal(network[path], leaf, err_msg=path)

    followed = [
        predicted(world, model, tmp_path / "box", "--prompt=Where is <box>?",
                  "--box=0.05,0.3,0.35,0.7", "--box_time=1"),
        predicted(world, model, tmp_path / "points", "--prompt=Where is it?",
                  "--point=0.2,0.5", "--point=0.9,0.1,0", "--point_time=2"),
    ]  # fmt: skip
    for result in followed:
        np.testing.assert_allclose(result["times"], np.arange(FRAMES) / RATE, atol=1e-6)
        assert [len(result[name]) for name in ("masks", "boxes", "presence")] == [FRAMES] * 3
        seen = [rle for rle in result["masks"] if rle]
        assert all(tuple(rle["size"]) == SIZE for rle in seen)
    assert not np.allclose(*(result["presence"] for result in followed), atol=1e-3)

    exported, back = tmp_path / "exported", tmp_path / "back"
    out = [f"--model={model}", f"--out={exported}", f"--like={published}"]
    assert convert.main(["export", *out]) == 0
    theirs, ours = read_tensors(published), read_tensors(exported / "sam2")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert np.asarray(theirs[name]).tobytes() == np.asarray(ours[name]).tobytes(), name
    # Its base has no head that PyTorch runs: encoder and language model are compared.
    capsys.readouterr()
    assert convert.main(["check", f"--model={model}", f"--exported={exported}"]) == 0
    printed = capsys.readouterr().out
    assert "not compared: head sam2, which tpo_torch.py does not run" in printed
    assert "language/hidden" in printed
    assert convert.main(["import", f"--source={exported}", f"--out={back}"]) == 0
    assert largest_difference(model, back) == 0.0
    assert load_config(back) == load_config(model)
