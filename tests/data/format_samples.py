"""The sample of every format, and how tests read one."""

import pathlib

from tpo_jax.data import formats
from tpo_jax.data.formats.reading import Context
from tpo_jax.data.formats.splits import WrongSplit

SAMPLES = pathlib.Path(__file__).parent / "samples"
FILES = {
    "native": "native.jsonl",
    "videochat2": "videochat2.json",
    "llava": "llava.yaml",
    "sharegpt4v": "sharegpt4v.json",
    "qvhighlights": "qvhighlights.jsonl",
    "charades_sta": "charades_sta.txt",
    "activitynet_captions": "activitynet_captions.json",
    "tacos": "tacos.json",
    "didemo": "didemo.json",
    "hirest": "hirest.json",
    "nlq": "nlq.json",
    "nextgqa": "nextgqa/val.csv",
    "refcoco": "refcoco.json",
    "refcoco_mdetr": "refcoco_mdetr.json",
    "refcoco_shikra": "refcoco_shikra.jsonl",
    "visual_genome": "visual_genome",
    "as_v2": "as_v2.json",
    "mevis": "mevis",
    "ref_youtube_vos": "ref_youtube_vos/meta_expressions/train/meta_expressions.json",
    "sa_v": "sa_v",
    "davis": "davis",
    "got10k": "got10k",
    "lasot": "lasot",
    "thumos": "thumos.json",
}
# Splits that are published without labels.
UNLABELLED = {
    "mevis": "mevis_valid",
    "ref_youtube_vos": "ref_youtube_vos/meta_expressions/valid/meta_expressions.json",
    "davis": "davis_test_dev/ImageSets/2017/test-dev.txt",
    "got10k": "got10k_test",
}


# Files that hold several splits, and the number of records of each.
SPLITS = {
    "refcoco": ("refcoco_splits.json", {"testA": 1, "train": 2, "val": 1}),
    "thumos": ("thumos_splits.json", {"training": 1, "validation": 1}),
}


def read(name, path, media, ignore=(), frame_rate=None, unlabelled=False, split=None):
    """(examples, problems) of a file; of one that is refused the problem says why."""
    context = Context(path, "test", media, frozenset(ignore), frame_rate, unlabelled, split)
    try:
        drafts, problems = formats.get(name).read(context)
    except WrongSplit as wrong:
        return [], [wrong.at(str(path), "")]
    return [draft.example for draft in drafts], problems


def read_sample(name, media, file=None):
    """The examples of a sample, which has no problem."""
    examples, problems = read(name, SAMPLES / (file or FILES[name]), media)
    assert problems == []
    ids = [example.example_id for example in examples]
    assert len(set(ids)) == len(ids)
    return examples
