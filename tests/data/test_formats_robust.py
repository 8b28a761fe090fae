"""What every reader does with damaged files: a problem that names the field, never a crash."""

import configparser
import copy
import csv
import json
import pathlib
import re
import shutil

import pytest
import yaml
from format_samples import FILES, SAMPLES, read
from media_samples import write_published_media

from tpo_jax.data import formats
from tpo_jax.data.formats.reading import Format
from tpo_jax.data.media import MediaFolder

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published_media(tmp_path_factory.mktemp("robust"))


def put(data, where, value):
    """A copy of `data` with `value` at a path of keys."""
    data = copy.deepcopy(data)
    target = data
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    return data


# (format, file of its sample, where, what is put there, the field named, a word of the reason)
BAD = [
    ("llava", "llava.json", (0, "image"), "/etc/x.png", "image", "leaves"),
    ("llava", "llava.json", (0, "conversations", 0, "form"), "x", "conversations[0].form", "unk"),
    ("sharegpt4v", "sharegpt4v.json", (0, "video"), "x.mp4", "video", "unknown key"),
    ("activitynet_captions", "", ("clip_a", "sentences"), ["one"], "timestamps", "as many"),
    ("activitynet_captions", "", ("clip_a", "duration"), "4", "duration", "number"),
    ("activitynet_captions", "", ("clip_a", "timestamps", 0), [1, 9], "timestamps[0]", "beyond"),
    ("activitynet_captions", "", ("clip_b", "sentences", 0), " ", "sentences[0]", "not empty"),
    ("tacos", "", ("clip_a.avi", "fps"), 0, "fps", "number"),
    ("tacos", "", ("clip_a.avi", "timestamps", 0), [8, 90], "timestamps[0]", "beyond"),
    ("didemo", "", (0, "times", 0), [2, 1], "times[0]", "pieces 0..5"),
    ("didemo", "", (1, "times", 0), [0, 5], "times[0]", "pieces 0..4"),
    ("didemo", "", (0, "times"), [], "times", "nobody"),
    ("didemo", "", (0, "num_segments"), 9, "num_segments", "from 1 to 6"),
    ("hirest", "", ("Tie a bow", "clip_a.mp4", "bounds"), [3, 9], "bounds", "beyond"),
    ("hirest", "", ("Tie a bow", "clip_a.mp4", "clip"), 1, "clip", "true or false"),
    ("hirest", "", ("Tie a bow", "clip_a.mp4", "steps", 0, "heading"), "", "query", "not empty"),
    ("nlq", "", ("videos", 0, "clips", 0, "clip_uid"), "zz", "clip_uid", "unknown video"),
    (
        *("nlq", "", ("videos", 0, "clips", 0, "annotations", 0, "language_queries", 0, "query")),
        *(None, "query", "not empty"),
    ),
    ("nextgqa", "nextgqa/gsub_val.json", ("clip_a", "location", "1"), [[3, 9]], "1[0]", "beyond"),
    ("refcoco_mdetr", "", ("images", 0, "caption"), "", "images.caption", "not empty"),
    ("refcoco_mdetr", "", ("annotations", 0, "image_id"), 1, "images.id", "boxes, expected one"),
    ("refcoco_mdetr", "", ("annotations", 0, "bbox"), [30, 5, 20, 10], "bbox", "outside"),
    ("refcoco_mdetr", "", ("categories",), [{"id": 1, "nam": "x"}], "categories[0].nam", "unknown"),
    ("refcoco_mdetr", "", ("categories",), {"id": 1}, "categories", "expected a list"),
    ("mevis", "mevis/meta_expressions.json", ("info",), {"version": "1", "yr": 1}, "info.yr", "un"),
    (
        *("visual_genome", "visual_genome/region_descriptions.json"),
        *((0, "regions", 0, "width"), 60, "region.x, y, width, height", "outside"),
    ),
    (
        *("visual_genome", "visual_genome/image_data.json"),
        *((0, "width"), "wide", "image_data.json[0].width", "number"),
    ),
    ("as_v2", "", (0, "conversations", 1, "value"), "<box>[[1]]</box>", "value", "[x1, y1"),
    ("as_v2", "", (0, "conversations", 1, "value"), "<box>[[1,2,3,4]]", "value", "match"),
    ("as_v2", "", (0, "conversations", 1, "value"), "<box>here</box>", "value", "list of boxes"),
    (
        *("as_v2", "", (0, "conversations", 1, "value")),
        *("<box>[[9, 9, 1005, 99]]</box>", "value", "from 0 to 1000"),
    ),
    (
        *("ref_youtube_vos", FILES["ref_youtube_vos"], ("videos", "fifth", "frames")),
        *(["00000", "00007"], "masks", "there is no"),
    ),
    (
        *("ref_youtube_vos", FILES["ref_youtube_vos"]),
        *(("videos", "fifth", "expressions", "0", "obj_id"), "7", "obj_id", "no mask"),
    ),
    (
        *("ref_youtube_vos", FILES["ref_youtube_vos"], ("videos", "fifth", "frames")),
        *(["../../../../00000"], "frames", "leaves"),
    ),
    ("sa_v", "sa_v/clip_a_manual.json", ("masklet_id",), [0], "masklet[0]", "one RLE for each"),
    ("sa_v", "sa_v/clip_a_manual.json", ("video_frame_count",), 7, "masklet", "every 4 frames"),
    ("sa_v", "sa_v/clip_a_manual.json", ("masklet", 0, 0, "counts"), "o1", "counts", "the size"),
    ("sa_v", "sa_v/clip_a_manual.json", ("video_id",), "../clip_a", "video_id", "leaves"),
]


@pytest.mark.parametrize(("name", "file", "where", "value", "field", "reason"), BAD)
def test_bad_json(name, file, where, value, field, reason, folder, tmp_path):
    shutil.copytree(SAMPLES, tmp_path / "samples")
    changed = tmp_path / "samples" / (file or FILES[name])
    changed.write_text(json.dumps(put(json.loads(changed.read_text()), where, value)))
    path = changed if name == "llava" else tmp_path / "samples" / FILES[name]
    _, problems = read(name, path, MediaFolder(folder))
    assert problems, "nothing was reported"
    assert problems[0].field.endswith(field) and reason in problems[0].reason
    assert problems[0].fix and str(problems[0])


TEXTS = [
    ("charades_sta", "charades_sta.txt", "clip_a 1.0##x", "", "VIDEO START END##SENTENCE"),
    ("charades_sta", "charades_sta.txt", "clip_a 3.0 1.0##x", "window", "start < end"),
    ("charades_sta", "charades_sta.txt", "clip_a 1.0 2.0##", "sentence", "not empty"),
    ("charades_sta", "charades_sta.txt", "clip_z 1.0 2.0##x", "video", "unknown video"),
    ("nextgqa", "nextgqa/val.csv", "video_id,question\nclip_a,why", "answer", "missing"),
    ("lasot", "lasot/shape/shape-1/out_of_view.txt", "0,0,1", "out_of_view.txt", "4 frames"),
    ("lasot", "lasot/shape/shape-1/out_of_view.txt", "0,0,1,2", "out_of_view.txt", "0 or 1"),
    ("lasot", "lasot/shape/shape-1/groundtruth.txt", "0,0,x,1", "line 1", "x,y,w,h"),
    ("lasot", "lasot/shape/shape-1/out_of_view.txt", "0,0,0,0", "line 3", "empty"),
    ("got10k", "got10k/clip_a/meta_info.ini", "[METAINFO]\ncolour: red", "ini.colour", "unknown"),
    ("davis", "davis/Annotations/480p/strip/00001.png", "no picture", "masks", "cannot be read"),
    ("llava", "llava.yaml", "datasets: [", "", "not YAML"),
    ("llava", "llava.yaml", "sets: []", "datasets", "missing"),
    ("llava", "llava.yaml", "datasets: []\nseed: 1.5", "seed", "whole number"),
]


@pytest.mark.parametrize(("name", "file", "text", "field", "reason"), TEXTS)
def test_bad_text(name, file, text, field, reason, folder, tmp_path):
    shutil.copytree(SAMPLES, tmp_path / "samples")
    (tmp_path / "samples" / file).write_text(text)
    _, problems = read(name, tmp_path / "samples" / FILES[name], MediaFolder(folder))
    assert problems[0].field.endswith(field) and reason in problems[0].reason
    assert problems[0].fix


def nodes(data, where=()):
    """(path of keys, value) of everything below `data`."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*where, key), value
        if isinstance(value, dict | list):
            yield from nodes(value, (*where, key))


WRONG = (None, "zz", [[5]], {"zz": 1}, 10**400)
JSON_SAMPLES = [
    *((name, FILES[name]) for name in FILES if FILES[name].endswith(".json")),
    ("llava", "llava.json"),
    ("nextgqa", "nextgqa/gsub_val.json"),
    ("refcoco_release", "refcoco_release/instances.json"),
    ("refcoco_release", "refcoco_release/refs(unc).json"),
    ("visual_genome", "visual_genome/region_descriptions.json"),
    ("visual_genome", "visual_genome/image_data.json"),
    ("mevis", "mevis/meta_expressions.json"),
    ("mevis", "mevis/mask_dict.json"),
    ("sa_v", "sa_v/clip_a_manual.json"),
]


@pytest.mark.parametrize("values", [1, pytest.param(len(WRONG), marks=pytest.mark.long)])
@pytest.mark.parametrize(("name", "file"), JSON_SAMPLES)
def test_any_value_anywhere_is_read_or_reported(name, file, values, folder, tmp_path):
    """And a key that nobody knows is reported wherever the keys are fields, not names."""
    shutil.copytree(SAMPLES / file.split("/")[0], tmp_path / "s") if "/" in file else None
    changed = tmp_path / "s" / "/".join(file.split("/")[1:]) if "/" in file else tmp_path / file
    path = {
        "nextgqa": tmp_path / "s" / "val.csv",
        **dict.fromkeys(("refcoco_release", "visual_genome", "mevis", "sa_v"), tmp_path / "s"),
    }.get(name, changed)
    name = name.replace("_release", "")
    media = MediaFolder(folder)
    good = json.loads((SAMPLES / file).read_text())

    def problems_of(data):
        changed.write_text(json.dumps(data))
        return read(name, path, media)[1]

    assert problems_of(good) == []
    everything = list(nodes(good))
    for i, (where, _) in enumerate(everything):
        for k in range(values):
            value = WRONG[(i + k) % len(WRONG)]
            for problem in problems_of(put(good, where, value)):
                assert problem.reason and problem.fix and str(problem)
    names = {"gsub_val.json", "location", "mask_dict.json"}
    for where, value in [((file.split("/")[-1],), good), *everything]:
        if isinstance(value, dict) and not names & {*map(str, where[-1:]), *map(str, where[:1])}:
            key = where if value is not good else ()
            data = copy.deepcopy(good)
            target = data
            for step in key:
                target = target[step]
            target["zz_unknown"] = 1
            assert problems_of(data), f"an unknown key at {where} is not reported"


def documents(path):
    """What a sample says, as JSON would: rows of a CSV and sections of an INI file are objects."""
    text = path.read_text("utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".ini":
        parser = configparser.ConfigParser()
        parser.read_string(text)
        return [dict(parser[section]) for section in parser.sections()]
    return [yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)]


def test_every_key_of_every_sample_is_documented():
    """docs/formats.md names each format, and in backticks each key of its samples; those of the
    native one are in docs/own_data.md."""
    page = (DOCS / "formats.md").read_text("utf-8")
    assert "from memory" not in page
    rows = {}
    for line in page.splitlines():
        if match := re.match(r"\| `(\w+)` \|", line):
            rows[match[1]] = rows.get(match[1], "") + line
    assert set(rows) == set(formats.FORMATS) == set(FILES)
    # Of each sample, keys that are names (of videos, of queries, ...) are not fields.
    maps = {"clip_a", "clip_b", "clip_a.avi", "clip_a.mp4", "clip_b.mp4", "fifth", "Tie a bow"}
    rows["native"] += (DOCS / "own_data.md").read_text("utf-8").replace('"', "`")
    kinds = (".json", ".jsonl", ".yaml", ".csv", ".ini")
    read = set()
    for path in (path for path in SAMPLES.rglob("*") if path.suffix in kinds):
        top = path.relative_to(SAMPLES).parts[0].split(".")[0]
        name = max((name for name in formats.FORMATS if top.startswith(name)), key=len)
        keys = {
            key
            for where, _ in nodes(documents(path))
            for key in where
            if isinstance(key, str) and not key.isdigit() and key not in maps
        }
        missing = {key for key in keys if f"`{key}`" not in rows[name]}
        assert not missing, f"docs/formats.md: the row of {name} lacks {sorted(missing)}"
        read |= {(name, path.suffix)} if keys else set()
    assert {suffix for _, suffix in read} == set(kinds)
    without = {"charades_sta", "davis", "lasot"}  # lines of text, and masks
    assert {name for name, _ in read} == set(formats.FORMATS) - without


def test_the_page_shows_a_reader_that_works(folder, tmp_path, monkeypatch):
    page = (DOCS / "formats.md").read_text("utf-8")
    code, line = re.findall(r"```(?:python|text)\n(.*?)```", page.split("## A new reader")[1], re.S)
    module = {"__name__": "counting"}
    exec(compile(code, "formats.md", "exec"), module)
    assert isinstance(module["FORMAT"], Format)
    monkeypatch.setitem(formats.FORMATS, module["FORMAT"].name, module["FORMAT"])
    (tmp_path / "a.txt").write_text(f"{line.strip()}\nclip_a.mp4\n")
    examples, problems = read(module["FORMAT"].name, tmp_path / "a.txt", MediaFolder(folder))
    assert [e.video_id for e in examples] == ["clip_a.mp4"]
    assert [p.record for p in problems] == ["line 2"] and problems[0].fix
