"""Every family of models in from its published layout, trained, and out again, by the commands.

A random published folder, `convert import`, two steps of the family's own config at its tiny size
on prepared clips, `convert export --like`, and in again: LLaVA-OneVision and Video-LLaVA into
`transformers`, whose logits have to be those of the trained model; the layouts that it does not
read by `convert import`, bit for bit. VideoChat-TPO is here with its region head, without SAM 2
(tests/interop/families/test_tpo_heads.py has both in and out). VideoChat2 is long: VideoChat-TPO
trains all that it has.
"""

import dataclasses
import functools
import re
import runpy
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from etils import epath

import tpo_jax.train
from tests.interop.families.configs import (
    LLAVA_ONEVISION,
    LLAVA_VIDEO,
    LONGVA,
    VIDEO_LLAVA,
    VIDEO_LLAVA_ORIGINAL,
    VIDEOCHAT,
)
from tests.interop.families.folders import forward, load, prompt, write_folder
from tests.parity.test_whole_families import IDS, inputs_of, load_whole
from tests.parity.towers import difference
from tpo_jax import convert
from tpo_jax.interop.folder import load_codec, load_config, open_leaves
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import validate
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.writers import read_scalars

RATE, TOLERANCE = 1e-2, 2e-4
# Rank 2 on every kernel of the language model and on its output table.
LORA = {"pattern": "language/.*kernel", "rank": 2, "alpha": 4.0}
# Trained with the rest of SigLIP and CLIP, whose states are read before it.
UNREAD = ("vision/post_layernorm/",)


@dataclasses.dataclass(frozen=True)
class Family:
    """data: config.json. config: file in configs/, and its arguments. whole: `transformers` has the
    layout. unread: starts of paths that are trained and have no part in an answer. lora: adapters
    are trained, in the place of what the config trains. heads: of the published folder."""

    data: dict[str, Any]
    config: str
    arguments: str = ""
    whole: bool = False
    unread: tuple[str, ...] = ()
    lora: bool = False
    heads: tuple[str, ...] = ()


FAMILIES = {
    "llava_onevision": Family(LLAVA_ONEVISION | IDS, "llava_onevision", whole=True, unread=UNREAD),
    "llava_video": Family(LLAVA_VIDEO, "llava_video", unread=UNREAD),
    "longva": Family(LONGVA, "longva", unread=UNREAD),
    "video_llava": Family(VIDEO_LLAVA | IDS, "video_llava", "stage=2", whole=True, lora=True),
    "video_llava_original": Family(VIDEO_LLAVA_ORIGINAL, "video_llava", "stage=2"),
    "videochat2": Family(VIDEOCHAT, "videochat2", "media=video"),
    "videochat_tpo": Family(VIDEOCHAT, "videochat2", "media=video,tpo", heads=("region_mlp",)),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    tiny_run.write_prepared(path / "train", 4, seed=0)
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(tpo_jax.train, "make_mesh", mesh)


def config_of(family, base, clips):
    """The family's own config, of clips alone, with rates that two steps show."""
    get_config = runpy.run_path(f"configs/{family.config}.py")["get_config"]
    config = get_config(f"init={base},data={clips},tiny,{family.arguments}")
    config.buckets = {"video": config.buckets.video}
    config.buckets.video.update(batch_size=2, branch_tokens=128, beside="")
    config.steps, config.optimizer.warmup = 2, 0.0
    config.trainable = [[pattern, RATE] for pattern, _ in config.trainable]
    if family.lora:
        config.lora.update(LORA)
        config.trainable = [[".*lora_", RATE]]
    if family.heads:
        leave_out_sam2(config)
    validate(config)
    return config


def leave_out_sam2(config):
    config.model.heads = ["region_mlp"]
    config.losses = {term: w for term, w in config.losses.items() if not term.startswith("sam2/")}
    config.data.train[0]["tasks"] = {"conversation": 1.0, "region": 1.0}
    config.buckets.video.slots, config.buckets.video.mask_size = {"region": 1}, 0
    # Nothing but tracking draws a box.
    config.trainable = [[p.replace("|box_encoder/", ""), rate] for p, rate in config.trainable]


def moved(base, trained):
    """Paths of parameters whose values `base` does not have; new ones are 0 there, as the second
    half of an adapter is."""
    before = {name: np.asarray(leaf) for name, leaf in open_leaves(base).items()}
    after = {name: np.asarray(leaf) for name, leaf in open_leaves(trained).items()}
    assert before.keys() <= after.keys()
    return {name for name, leaf in after.items() if (leaf != before.get(name, 0)).any()}


def assert_same_logits(source, trained, out):
    """Of `transformers` on what went out, for a clip and a text; on what came in they differ."""
    import torch

    model, params, _ = load(trained)
    batch, ids = prompt(model.config)
    _, logits = jax.jit(lambda params, batch: forward(model, params, batch, False))(params, batch)
    vision = model.config.vision
    pixels = (batch["frames"][0] / 255 - np.array(vision.mean)) / np.array(vision.std)
    with torch.no_grad():
        before, after = (load_whole(x)(**inputs_of(pixels, ids)).logits[0] for x in (source, out))
    assert difference(logits, after) < TOLERANCE < 0.1 < difference(logits, before)


def assert_same_model(left, right):
    """Bit for bit."""
    assert load_config(left) == load_config(right)
    codecs = [load_codec(path) for path in (left, right)]
    assert codecs[0].template == codecs[1].template
    assert codecs[0].tokenizer.to_str() == codecs[1].tokenizer.to_str()
    theirs = open_leaves(right)
    for name, leaf in open_leaves(left).items():
        ours, other = np.asarray(leaf), np.asarray(theirs.pop(name))
        assert ours.dtype == other.dtype and ours.tobytes() == other.tobytes(), name
    assert not theirs


@pytest.mark.parametrize("name", [
    pytest.param("llava_onevision", marks=pytest.mark.parity), "llava_video", "longva",
    pytest.param("video_llava", marks=pytest.mark.parity), "video_llava_original",
    pytest.param("videochat2", marks=pytest.mark.long), "videochat_tpo",
])  # fmt: skip
def test_in_from_pytorch_trained_and_out_again(name, clips, tmp_path):
    family = FAMILIES[name]
    if family.whole:
        pytest.importorskip("transformers")
    source, base, run, out = (tmp_path / part for part in ("source", "base", "run", "out"))
    write_folder(source, family.data, heads=family.heads)
    assert convert.main(["import", f"--source={source}", f"--out={base}"]) == 0

    config = config_of(family, base, clips)
    with Preemption() as preemption:
        assert tpo_jax.train.train(config, epath.Path(run), preemption, Ledger()) == 0
    losses = [record["train/loss"] for record in read_scalars(run / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained = run / "model"
    patterns = [re.compile(pattern) for pattern, _ in config.trainable]
    wanted = {path for path in open_leaves(trained) if any(p.match(path) for p in patterns)}
    assert moved(base, trained) == {path for path in wanted if not path.startswith(family.unread)}

    command = ["export", f"--model={trained}", f"--out={out}", f"--like={source}"]
    assert convert.main(command) == 0
    if family.whole:
        assert_same_logits(source, trained, out)
    else:
        assert convert.main(["import", f"--source={out}", f"--out={tmp_path / 'back'}"]) == 0
        assert_same_model(trained, tmp_path / "back")
