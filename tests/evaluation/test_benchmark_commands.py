"""`evaluate` on splits in the published layouts: its figures are those of the files it writes.

The model is the stand-in of test_all_frames: picture i is found, in its left half, where i is 1
modulo 3.
"""

import json

import numpy as np
import pytest
from PIL import Image
from test_all_frames import model, run  # noqa: F401

from experiments.benchmarks import metric_oracles
from tpo_jax import prepare
from tpo_jax.data.formats import masks
from tpo_jax.data.records import PreparedDataset
from tpo_jax.evaluation.metrics import mask

FRAMES, WIDTH, HEIGHT = 12, 64, 48
BOXES = [[1.0 + i, 2.0, 30.0, 40.0 - i] for i in range(FRAMES)]
ABSENT = [i in (3, 7, 8) for i in range(FRAMES)]


def pictures(folder, first=1, digits=8):
    folder.mkdir(parents=True)
    for i in range(FRAMES):
        name = f"{first + i:0{digits}d}.png"
        Image.new("RGB", (WIDTH, HEIGHT), (i, i, i)).save(folder / name)


def write_lasot(folder):
    pictures(folder / "shape/shape-1/img")
    sequence = folder / "shape/shape-1"
    sequence.joinpath("groundtruth.txt").write_text(lines(BOXES))
    sequence.joinpath("full_occlusion.txt").write_text(",".join(str(int(x)) for x in ABSENT))
    sequence.joinpath("out_of_view.txt").write_text(",".join("0" * FRAMES))
    return folder


def write_got10k(folder):
    pictures(folder / "v")
    (folder / "v/groundtruth.txt").write_text(lines(BOXES))
    (folder / "v/absence.label").write_text("\n".join(str(int(x)) for x in ABSENT))
    (folder / "v/meta_info.ini").write_text("[METAINFO]\nanno_fps: 10Hz\n")
    return folder


def label(i, number=1):
    """uint8[h, w]: an object that moves to the right and is away at last."""
    picture = np.zeros((HEIGHT, WIDTH), np.uint8)
    if i < FRAMES - 2:
        picture[4:, 2 * i : 2 * i + 24] = number
    return picture


def write_davis(folder):
    pictures(folder / "pictures/v", 0, 5)
    (folder / "masks/v").mkdir(parents=True)
    for i in range(FRAMES):
        Image.fromarray(label(i)).save(folder / f"masks/v/{i:05d}.png")
    return folder


def lines(boxes):
    return "".join(",".join(f"{side:g}" for side in box) + "\n" for box in boxes)


def evaluated(model, monkeypatch, folder, annotations, media, name, fps, *more):  # noqa: F811
    """The metrics of a split that is prepared anew, and the folder of its submission."""
    out = folder / "data"
    command = ["run", f"--media={media}", f"--format={name}", f"--annotations={annotations}",
               f"--out={out}", f"--fps={fps}", *more]  # fmt: skip
    assert prepare.main(command) == 0
    task = "mask" if name == "native" else "tracking"
    flags = [f"--tasks={task}", "--mask_frames=all"]
    if name != "native" and not more:
        flags += [f"--benchmark={name}", f"--submission={folder / 's'}"]
    status, record = run(model, monkeypatch, folder, PreparedDataset(out), *flags)
    assert status == 0
    return record["metrics"], folder / "s"


def test_lasot(model, monkeypatch, tmp_path, capsys):  # noqa: F811
    data = write_lasot(tmp_path / "a")
    found, submission = evaluated(model, monkeypatch, tmp_path, data, data, "lasot", 30)
    boxes = np.loadtxt(submission / "shape-1.txt", delimiter=",").tolist()
    expected = metric_oracles.lasot(boxes, BOXES, ABSENT)
    assert found["tracking/lasot_auc"] == pytest.approx(expected["success"], abs=1e-6)
    assert found["tracking/lasot_p"] == pytest.approx(expected["precision"], abs=1e-6)
    figure = pytest.approx(expected["normalised_precision"], abs=1e-6)
    assert found["tracking/lasot_p_norm"] == figure
    assert 0 < expected["normalised_precision"] < expected["precision"] < 1
    assert "say the size of their frames" not in capsys.readouterr().out
    # Frames that are stored smaller are still those of the video.
    small, _ = evaluated(
        model, monkeypatch, tmp_path / "small", data, data, "lasot", 30, "--size=32"
    )
    assert small == found


def test_got10k(model, monkeypatch, tmp_path):  # noqa: F811
    data = write_got10k(tmp_path / "a")
    found, submission = evaluated(model, monkeypatch, tmp_path, data, data, "got10k", 10)
    boxes = np.loadtxt(submission / "v/v_001.txt", delimiter=",").tolist()
    ious = []
    for (x, y, w, h), (u, v, a, b), gone in list(zip(boxes, BOXES, ABSENT, strict=True))[1:]:
        shared = max(min(x + w, u + a) - max(x, u), 0) * max(min(y + h, v + b) - max(y, v), 0)
        ious += [] if gone else [shared / (w * h + a * b - shared)]
    assert len(ious) == FRAMES - 4
    assert found["tracking/ao"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert found["tracking/sr@0.5"] == pytest.approx(np.mean(np.array(ious) > 0.5), abs=1e-6)
    assert found["tracking/sr@0.75"] == pytest.approx(np.mean(np.array(ious) > 0.75), abs=1e-6)
    assert found["tracking/sr@0.75"] < found["tracking/sr@0.5"] < 1


def test_davis(model, monkeypatch, tmp_path):  # noqa: F811
    data = write_davis(tmp_path / "a")
    found, submission = evaluated(
        model, monkeypatch, tmp_path, data / "masks", data / "pictures", "davis", 24
    )
    answers = np.stack([np.asarray(Image.open(submission / f"v/{i:05d}.png")) == 1
                        for i in range(FRAMES)])  # fmt: skip
    wanted = np.stack([label(i) == 1 for i in range(FRAMES)])
    j = mask.region_similarity(answers, wanted)[1:-1].mean()
    f = mask.boundary_accuracy(answers, wanted)[1:-1].mean()
    assert 0 < j < 1
    assert found["tracking/j"] == pytest.approx(j, abs=1e-6)
    assert found["tracking/f"] == pytest.approx(f, abs=1e-6)
    assert found["tracking/j&f"] == pytest.approx((j + f) / 2, abs=1e-6)


def test_masks_of_images(model, monkeypatch, tmp_path):  # noqa: F811
    """Two expressions about each of three images; of the last there is nothing to see."""
    media = tmp_path / "a"
    media.mkdir()
    parts, wholes, ious, records = 0, 0, [], []
    for i in range(3):
        Image.new("RGB", (WIDTH, HEIGHT), (i, i, i)).save(media / f"{i}.png")
        answer = np.broadcast_to((np.arange(WIDTH) < WIDTH / 2) & (i % 3 == 1), (HEIGHT, WIDTH))
        for number in range(2):
            wanted = np.zeros((HEIGHT, WIDTH), bool) if i == 2 else label(3 * number) == 1
            targets = {"times": [0], "rles": [masks.encode(wanted)]}
            turn = {"question": f"Where is thing {number}?", "answer": "It is at <mask>."}
            records.append({"image": f"{i}.png", "task": "mask", "turns": [turn],
                            "targets": targets})  # fmt: skip
            part, whole = (answer & wanted).sum(), (answer | wanted).sum()
            parts, wholes = parts + part, wholes + whole
            ious.append(part / whole if whole else 1.0)
    annotations = media / "masks.jsonl"
    annotations.write_text("".join(json.dumps(record) + "\n" for record in records))
    found, _ = evaluated(model, monkeypatch, tmp_path, annotations, media, "native", 1)
    assert found["mask/giou"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert found["mask/ciou"] == pytest.approx(parts / wholes, abs=1e-6)
    assert found["mask/giou"] == found["mask/j"] and 0 < found["mask/ciou"] < found["mask/giou"]
