"""What the tests of rows, mixtures and pipelines share: buckets, tasks, a pipeline in memory."""

from fake_dataset import fake_dataset

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline

HEADS = ("region", "temporal", "mask")
TASKS = {"conversation": 2.0, "temporal": 1.0, "region": 1.0, "mask": 1.0, "tracking": 1.0,
         "preference": 1.0}
VIDEO = Bucket("video", "video", 4, frames=8, branches=4, branch_tokens=56, answers=40,
               slots={"region": 3, "temporal": 2, "mask": 1}, windows=2, mask_size=16, weight=3.0)
IMAGE = Bucket("image", "image", 4, frames=1, branches=2, branch_tokens=56, answers=40, windows=1,
               mask_size=16)
PAIR = Bucket("pair", "video", 4, frames=8, branches=2, branch_tokens=40, answers=36, question=16,
              windows=1, mask_size=16)


def make(codec, model, dataset=None, buckets=(VIDEO, IMAGE, PAIR), seed=0, **kwargs) -> Pipeline:
    source = Source(dataset or fake_dataset(), 1.0, TASKS)
    return Pipeline([source], codec, model, HEADS, buckets, seed, **kwargs)
