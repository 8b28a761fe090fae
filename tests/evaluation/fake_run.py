"""A run folder as the commands leave it, from a prepared split and a noisy oracle as the model."""

import json
import pathlib

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data import sampling
from tpo_jax.data.records import PreparedDataset
from tpo_jax.evaluation import benchmarks, floors, results
from tpo_jax.evaluation.metrics import qa

# How far predictions are off (share of the frame or clip), and how often the head is called.
STAGES = {
    "base": (None, 0.70),
    "stage1": (0.20, 0.70),
    "stage2": (0.08, 0.72),
    "stage3": (0.03, 0.74),
    "dpo": (0.03, 0.73),
}
HEADS = {"temporal": "temporal", "region": "region", "mask": "mask", "tracking": "mask"}


def make_run(run_dir: pathlib.Path, data: pathlib.Path, frames: int = 32) -> None:
    """Writes eval/, pairs/, stage folders and steps.jsonl; `data` holds prepared train and test."""
    (run_dir / "data").symlink_to(data)
    dataset = PreparedDataset(run_dir / "data" / "test")
    for number, (stage, (noise, accuracy)) in enumerate(STAGES.items()):
        rng = np.random.default_rng(number)
        table, samples = benchmarks.Table(), []
        for video in dataset.videos:
            for example in dataset.examples(video):
                for turn in range(len(example.turns)):
                    answer(dataset, example, turn, noise, accuracy, rng, table, samples, frames)
        if stage in ("stage3", "dpo"):
            add_pairs(dataset, table, right=8 + number // 2)
        else:  # scored apart
            apart = benchmarks.Table()
            add_pairs(dataset, apart, right=6 + number)
            write_evaluation(run_dir / "eval" / f"{stage}_preference.json", dataset, apart)
        path = run_dir / "eval" / f"{stage}.json"
        write_evaluation(path, dataset, table)
        results.write_samples(path, samples)
        write_curves(run_dir / stage, rng)
    found = floors.constant_floors(PreparedDataset(run_dir / "data" / "train"), dataset, frames)
    results.write_json(run_dir / "eval" / "floors.json", results.floors_record(found))
    for evidence, best in (("blind", 50), ("middle_frame", 100)):
        write_floor(run_dir / f"floor_{evidence}", best)
    for split, written in (("train", 500), ("test", 150)):
        write(run_dir / "pairs" / split / "counts.json", {"generated": 900, "written": written})
    steps = [
        {"step": "render", "seconds": 61.5, "command": "python -m render --out=<videos>"},
        {"step": "train/stage1", "seconds": 212.0, "command": "python -m tpo_jax.train"},
    ]
    (run_dir / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def add_pairs(dataset, table, right):
    """12 pairs, `right` of them told apart with the video and 6 without."""
    for item in range(12):
        figures = {"preference/accuracy": item < right, "preference/accuracy_blind": item < 6}
        table.add(f"pair{item}", dataset.videos[item % len(dataset.videos)], figures)


def write_evaluation(path, dataset, table):
    about = {"data": str(dataset.path), "tasks": []}
    record = results.evaluation_record(table.item_scores(), routing={}, about=about)
    results.write_json(path, record)


def answer(dataset, example, turn, noise, accuracy, rng, table, samples, frames):
    asked = example.turns[turn]
    common = {
        "video": example.video_id,
        "example": example.example_id,
        "turn": turn,
        "question": asked.question,
    }
    if asked.options:
        logps = rng.normal(-3, 1, len(asked.options))
        right = asked.options.index(asked.answer)
        logps[right] = logps.max() + 0.5 if rng.random() < accuracy else logps.min() - 0.5
        value = float(np.argmax(logps) == right)
        scores = qa.scores(value, asked.kind, example.media)
        item = f"{example.example_id}/{turn}"
        table.add(item, example.video_id, scores)
        samples.append(
            {
                **common,
                "task": "qa",
                "item": item,
                "scores": scores,
                "option_logps": logps.round(3).tolist(),
                "chosen": int(np.argmax(logps)),
            }
        )
        return
    if noise is None or example.task not in HEADS:
        return
    timestamps = dataset.video_info(example.video_id).timestamps
    times = timestamps[np.unique(sampling.uniform(timestamps, frames, example.start, example.end))]
    for call in benchmarks.find_calls(example, turn):
        result = predict(call, times, noise, rng)
        called = rng.random() > noise
        scores = benchmarks.score_call(call, result if called else None, times)
        table.add(call.item, example.video_id, scores)
        table.add(
            call.item, example.video_id, benchmarks.score_call(call, result, times), "forced/"
        )
        events = [{"task": call.head, "slot": 3, "result": jsonable(result)}] if called else []
        samples.append(
            {
                **common,
                "task": example.task,
                "item": call.item,
                "scores": scores,
                "place": call.place,
                "occurrence": call.occurrence,
                "answer": {"text": "It is here.", "events": events},
            }
        )


def predict(call, times, noise, rng):
    """What a head would decode: the label, off by `noise`."""
    targets = call.example.targets
    if call.head == "region":
        return {"box": moved(targets["boxes"][call.occurrence], noise, rng)}
    if call.head == "temporal":
        length = call.example.end - call.example.start
        windows = [
            [s + rng.normal(0, noise * length), e + rng.normal(0, noise * length), 0.9]
            for s, e in targets["windows"]
        ]
        steps = (np.asarray(times) // targets["saliency_interval"]).astype(int)
        saliency = np.asarray(targets["saliency"])[np.minimum(steps, len(targets["saliency"]) - 1)]
        noisy = np.clip(saliency + rng.normal(0, noise * 2, len(steps)), 0, 1)
        return {
            "windows": [[min(s, e), max(s, e), p] for s, e, p in windows],
            "saliency": noisy.tolist(),
            "times": np.asarray(times).tolist(),
        }
    frames, labels = benchmarks.match_times(times, targets["times"])
    nearest = dict(zip(frames.tolist(), labels.tolist(), strict=True))
    if call.example.task == "tracking":
        boxes = [targets["boxes"][nearest[i]] for i in range(len(times))]
        moves = [None if box is None else moved(box, noise, rng) for box in boxes]
        return {"boxes": moves, "masks": [None] * len(times), "times": np.asarray(times).tolist()}
    masks = benchmarks.decode_rles(
        [targets["rles"][nearest[i]] for i in range(len(times))], (64, 64)
    )
    shift = np.rint(rng.normal(0, noise * masks.shape[1], 2)).astype(int)
    return {
        "masks": np.roll(masks, shift, (1, 2)),
        "boxes": [None] * len(times),
        "times": np.asarray(times).tolist(),
    }


def moved(box, noise, rng):
    shift = rng.normal(0, noise, 2)
    return np.clip(np.asarray(box) + np.tile(shift, 2), 0, 1).tolist()


def jsonable(result):
    if "masks" not in result or result["masks"][0] is None:
        return result
    encoded = [coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in result["masks"]]
    rles = [
        {"size": list(r["size"]), "counts": r["counts"].decode()} if m.any() else None
        for r, m in zip(encoded, result["masks"], strict=True)
    ]
    return {**result, "masks": rles}


def write_curves(folder: pathlib.Path, rng) -> None:
    lines = []
    for step in range(10, 401, 10):
        loss = 0.4 + 2.5 * np.exp(-step / 90) + rng.normal(0, 0.04)
        lines.append(
            {
                "step": step,
                "train/loss": loss,
                "train/region/l1": loss / 6,
                "train/temporal/window": loss / 3,
            }
        )
        if step % 100 == 0:
            lines.append({"step": step, "validation/loss": loss + 0.1})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_floor(folder: pathlib.Path, best: int) -> None:
    """A floor that was validated at steps 50 and 100, and was best at one of them."""
    records = []
    for step, loss, accuracy in ((50, 0.9, 0.25), (100, 0.8, 0.375)):
        records.append({"step": step, "train/loss": loss - 0.1})
        higher = 0.0 if step == best else 0.5
        records.append(
            {
                "step": step,
                "validation/loss": loss + higher,
                "validation/answer_accuracy": accuracy,
                "validation/token_accuracy": 0.6,
            }
        )
    records.insert(0, {"step": 10, "train/loss": 1.5})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write(folder / "ledger.json", {"step": 100, "best": {"step": best, "loss": 0.8}})


def write(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
