"""A training run that takes seconds: a prepared folder of coloured squares, and its config.

Run as a config file: --config=tests/tiny_run.py:data=DIR,heads=True
"""

import json
import pathlib

import numpy as np

from tpo_jax.data import tables
from tpo_jax.data.records import FORMAT_VERSION, Clip, Example, IndexEntry, Turn, VideoInfo
from tpo_jax.data.text import TextCodec, train_tokenizer
from tpo_jax.training.config import bucket_config, default_config, parse_arg, source_config

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
SIZE, FRAMES = 32, 8
QUESTION, WHERE, WHEN = "What colour is the square?", "Where is it?", "When is it there?"


def write_data(folder: pathlib.Path, videos: int = 6) -> pathlib.Path:
    """folder/{train,validation} (prepared folders) and folder/tokenizer.json."""
    write_prepared(folder / "train", videos, seed=0)
    write_prepared(folder / "validation", 3, seed=1)
    texts = [QUESTION, WHERE, WHEN, "It is", *(f"It is {colour}." for colour in COLOURS)]
    TextCodec(train_tokenizer(texts, 300)).save(folder)
    return folder


def write_prepared(folder: pathlib.Path, videos: int, seed: int) -> None:
    """A prepared folder of `videos` still squares, each with a conversation, a box and a window."""
    random = np.random.default_rng([seed, videos])
    times = np.arange(FRAMES, dtype=np.float32) / 2
    info = VideoInfo("video", FRAMES / 2, FRAMES, times, SIZE, SIZE)
    records: dict[str, list[bytes]] = {"clips": [], "examples": []}
    index = []
    for i in range(videos):
        name, colour = f"seed{seed}/video{i}", list(COLOURS)[i % 3]
        frames = random.integers(0, 40, (FRAMES, SIZE, SIZE, 3), np.uint8)
        x, y = random.integers(2, 14, 2)
        frames[:, y : y + 16, x : x + 16] = COLOURS[colour]
        box = [float(v) / SIZE for v in (x, y, x + 16, y + 16)]
        clip = Clip(f"{name}#0", name, "video", 0, times, frames, "raw")
        options = tuple(f"It is {other}." for other in COLOURS)
        listed = Turn(QUESTION, f"It is {colour}.", options, "colour")
        open_ended = Turn(QUESTION, f"It is {colour}.", (), "colour")  # fits the short bucket
        examples = [
            _example(name, "conversation", (listed, open_ended), {}),
            _example(name, "region", (Turn(WHERE, "It is <region>."),), {
                "boxes": [box], "times": [1.0]}),
            _example(name, "temporal", (Turn(WHEN, "It is <temporal>."),), {
                "windows": [[0.0, 2.0]], "saliency": [1.0, 0.0], "saliency_interval": 2.0}),
        ]  # fmt: skip
        rows = (len(records["clips"]), 1), (len(records["examples"]), len(examples))
        index.append(IndexEntry(name, info, *rows).to_json())
        records["clips"].append(clip.to_record())
        records["examples"] += [example.to_record(times) for example in examples]
    for table, rows in records.items():
        path = folder / table / tables.TABLE_VERSION
        path.mkdir(parents=True)
        writer = tables.writer(path / tables.shard_name(table, 0, 1), table)
        for row in rows:
            writer.write(row)
        writer.close()
        tables.write_metadata(path, table, "raw", [len(rows)])
    (folder / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in index))
    settings = {"format_version": FORMAT_VERSION, "encoding": "raw"}
    (folder / "prepared.json").write_text(json.dumps(settings))


def _example(video: str, task: str, turns: tuple[Turn, ...], targets: dict) -> Example:
    return Example(f"{video}/{task}", video, "video", task, "test", 0.0, 4.0, turns, targets)


def get_config(arg: str | None = None):
    """The micro model on the data in `data`; with `heads` the region and temporal head as well."""
    arg = parse_arg(arg, data="", heads=False, steps=12, init_from="", buckets=2)
    config = default_config()
    config.steps = arg.steps
    config.model.update(preset="micro", heads=["region", "temporal"] if arg.heads else [])
    config.init_from = arg.init_from
    config.tokenizer = "" if arg.init_from else f"{arg.data}/tokenizer.json"
    tasks = {"conversation": 1.0} | ({"region": 1.0, "temporal": 1.0} if arg.heads else {})
    config.data.train = [source_config(f"{arg.data}/train", tasks=tasks)]
    config.data.validation = [source_config(f"{arg.data}/validation", tasks=tasks)]
    shape = {"media": "video", "batch_size": 4, "frames": 4, "branches": 2, "answers": 16,
             "windows": 1 if arg.heads else 0}  # fmt: skip
    config.buckets = {
        "long": bucket_config(branch_tokens=64, **shape),
        "short": bucket_config(branch_tokens=32, weight=0.5, **shape),
    }
    if arg.buckets == 1:  # half the compile time
        del config.buckets["short"]
    if arg.heads:
        config.losses = {"language": 1.0, "region/l1": 1.0, "region/giou": 1.0, "region/cells": 1.0,
                         "temporal/foreground": 1.0, "temporal/l1": 1.0, "temporal/giou": 1.0,
                         "temporal/saliency": 1.0}  # fmt: skip
    config.trainable = [[".*", 3e-3]]
    config.checkpoint.update({"every": 5, "keep": 2})
    config.log_every = 2
    config.eval_every = 6
    config.eval_batches = 2
    config.dropout = 0.1
    return config
