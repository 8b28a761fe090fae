"""The shipped base: small enough to ship, and still the numbers that it was shipped with.

    python tests/interop/test_tiny_base.py   # writes the golden logits of the shipped folder anew
"""

import json
import pathlib
import sys

import jax
import numpy as np

import tpo_jax
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.interop.folder import load_model
from tpo_jax.models.video_language import FunctionalModel

FOLDER = pathlib.Path(tpo_jax.__file__).parent / "assets" / "tiny_base"
GOLDEN = pathlib.Path(__file__).parent / "tiny_base_logits.json"
QUESTIONS = ("What happens in the video?", "Which way does the red circle move?")
TOKENS = 24
EVERY = 16  # one logit in so many is kept


def logits(folder: pathlib.Path) -> np.ndarray:
    """float32[K, R, V / EVERY] of two questions about a clip of stripes that drift."""
    config, params, codec = load_model(folder)
    bucket = Bucket(
        name="video", media="video", batch_size=1, frames=8, branches=len(QUESTIONS),
        branch_tokens=TOKENS, answers=8,
    )  # fmt: skip
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_spec(bucket, config))
    f, y, x, c = np.indices(batch["frames"].shape[1:])
    batch["frames"][0] = (x - 3 * f) // 8 % 2 * (90 + 50 * c) + y
    batch["frame_valid"][:] = True
    batch["frame_times"][0] = np.arange(bucket.frames) / 2
    ids = codec.build_prefix(config.num_visual_tokens(bucket.frames))
    batch["prefix_tokens"][0] = ids
    batch["prefix_positions"][0] = np.arange(len(ids))
    batch["prefix_segments"][:] = 1
    for k, question in enumerate(QUESTIONS):
        ids = codec.build_branch(question, "the red circle moves right").ids
        batch["branch_tokens"][0, k, : len(ids)] = ids
        batch["branch_segments"][0, k, : len(ids)] = 1
    batch["branch_positions"][:] = batch["prefix_tokens"].shape[1] + np.arange(TOKENS)

    def forward(params, batch):
        model = FunctionalModel(config).bind(params)
        hidden = model(batch).branch_hidden[0]
        return jax.numpy.matmul(hidden, model.language.table.T, precision="highest")

    return np.asarray(jax.jit(forward)(params, batch))[..., ::EVERY]


def test_it_is_small_enough_to_ship():
    shards = list(FOLDER.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in shards]
    assert shards and max(sizes) <= 15 * 2**20 and sum(sizes) <= 25e6


def test_it_has_no_heads_and_no_task_tokens():
    config, params, codec = load_model(FOLDER)
    assert config.heads == () and codec.heads == ()
    assert set(params) == {"vision", "connector", "language"}


def test_its_logits_are_those_that_were_shipped():
    golden = json.loads(GOLDEN.read_text())
    assert golden["questions"] == list(QUESTIONS)
    np.testing.assert_allclose(logits(FOLDER), golden["logits"], rtol=0, atol=1e-3)


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    rounded = np.round(logits(source).astype(np.float64), 4).tolist()
    GOLDEN.write_text(json.dumps({"questions": QUESTIONS, "logits": rounded}) + "\n")
    print(f"wrote {GOLDEN}")
