"""Inspection of one training row."""

import json
import re

import pytest
from fake_dataset import fake_dataset
from PIL import Image

from tpo_jax import prepare
from tpo_jax.data import inspect
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.evaluation_rows import build_pair_rows, build_question_rows
from tpo_jax.data.evidence import apply_evidence
from tpo_jax.data.inspect import Span
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.text import TextCodec, train_tokenizer

BUCKET = Bucket("video", "video", 1, frames=8, branches=8, branch_tokens=56, answers=40,
                slots={"region": 3, "mask": 2}, windows=2, mask_size=16)


HIDDEN = ("frames", "frame_valid", "prefix_tokens", "prefix_segments")  # by data.evidence


@pytest.fixture(scope="module")
def built(codec, model):
    """The row of every task about one video, and its plan."""
    builder = row_builder(codec, model, BUCKET)
    tasks = ("conversation", "temporal", "region", "mask", "tracking")
    plan, = build_question_rows(fake_dataset(1, 0), builder, tasks, with_answers=True)
    return builder.build(plan, 0), plan


def spans(lines, style):
    return [span.text for line in lines for span in line if span.style == style]


def test_the_row_in_words(codec, built):
    row, plan = built
    lines = inspect.describe_row(row, codec, plan)
    texts = ["".join(span.text for span in line) for line in lines]
    assert "video v0, 0 to 8 s, 8 of 8 frames" in texts[0]
    assert "<bos><video> [8 visual tokens] </video>" in texts
    assert any("It grows at <time_begin><temp>.<eos>" in text for text in texts)
    assert any(re.search(r"slot temporal 0: .*windows \[\[0.25.*saliency on 6 frames", t)
               for t in texts)
    assert any(re.search(r"slot mask 0: .*masks of \d+ frames, present in \d+", t) for t in texts)
    assert any("slot box 0" in text and "box [0.0, 0.0, 0.5, 0.5]" in text for text in texts)
    # What is trained is exactly the weighted tokens of the batch.
    assert len(spans(lines, "trained")) == row["answer_weights"].sum()
    assert {"<user>", "<assistant>"} <= set(spans(lines, "given"))
    assert "<boxes>" in spans(lines, "slot") and "<track_box>" in spans(lines, "slot")


def test_page_is_self_contained_and_picture_is_a_picture(codec, built, tmp_path):
    page = inspect.render(*_arguments(codec, built), ".html").decode()
    assert "data:image/png;base64," in page and '<span class="trained">&lt;eos&gt;</span>' in page
    assert "http" not in page
    (tmp_path / "row.png").write_bytes(inspect.render(*_arguments(codec, built), ".png"))
    assert Image.open(tmp_path / "row.png").width == 1100
    with pytest.raises(ValueError, match="suffix '.pdf'"):
        inspect.render(*_arguments(codec, built), ".pdf")


def _arguments(codec, built):
    return built[0], codec, built[1]


def test_frames_carry_their_slots(built):
    figure = inspect.draw_frames(built[0])
    frames = figure.axes[:8]
    assert [axes.get_title()[:2] for axes in frames] == [f"{i}:" for i in range(8)]
    boxes = [len(axes.lines) for axes in frames]
    assert boxes[0] == 2 and sum(boxes) == 3  # user box and a region at frame 0, one at frame 6
    assert frames[0].collections and len(figure.axes) == 9  # masks; the timeline


def test_a_preference_row_is_drawn(codec, model):
    bucket = Bucket("pair", "video", 1, frames=8, branches=2, branch_tokens=40, answers=36,
                    question=16, windows=1, mask_size=16)
    builder = row_builder(codec, model, bucket)
    plan, = build_pair_rows(fake_dataset(1, 0))
    lines = inspect.describe_row(builder.build(plan, 0), codec, plan)
    assert "preference pair" in "".join(spans(lines, "note"))
    assert "".join(spans(lines, "given")).count("What happens first?") == 1


def test_wrap_keeps_text_and_style():
    line = [Span("ab cd", "given"), Span("e" * 25, "slot")]
    wrapped = inspect.wrap([line], 10)
    assert all(sum(len(span.text) for span in one) <= 10 for one in wrapped)
    assert "".join(span.text for one in wrapped for span in one) == "ab cd" + "e" * 25


CONFIG = """
from tpo_jax.training.config import bucket_config, default_config, source_config

def get_config(data):
    config = default_config()
    config.steps, config.eval_every = 8, 0
    config.losses = {"language": 1.0, "region/l1": 1.0}
    config.trainable = [[".*", 1e-3]]
    config.model.update(preset="micro", heads=["region"])
    config.tokenizer = f"{data}/tokenizer.json"
    config.data.train = [source_config(f"{data}/prepared", tasks={"region": 1.0})]
    config.buckets = {"still": bucket_config(
        media="image", batch_size=3, frames=1, branches=1, branch_tokens=32, answers=16,
        windows=1, mask_size=16)}
    return config
"""


def test_hidden_frames_are_not_drawn(built):
    """The middle one of eight is left, with the region that is asked for at another one."""
    row, plan = built
    batch = apply_evidence({name: row[name][None] for name in HIDDEN}, "middle_frame")
    seen = row | {name: batch[name][0] for name in HIDDEN}
    frame, timeline = inspect.draw_frames(seen).axes
    assert frame.get_title() == "4: 4.50 s" and timeline.lines[0].get_xdata().max() < 1
    blind = {name: row[name][None] for name in HIDDEN}
    blind = row | {k: v[0] for k, v in apply_evidence(blind, "blind").items()}
    (timeline,) = inspect.draw_frames(blind).axes


def test_command_on_a_prepared_folder(tmp_path, capsys):
    media = tmp_path / "media"
    media.mkdir()
    lines = []
    for i in range(3):
        Image.new("RGB", (64, 64), (40 * i, 80, 120)).save(media / f"{i}.png")
        lines.append({"image": f"{i}.png", "task": "region",
                      "turns": [{"question": "Where is it?", "answer": "At <region>"}],
                      "targets": {"boxes": [[0.1, 0.1, 0.6, 0.7]], "times": [0.0]}})
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("\n".join(map(json.dumps, lines)))
    assert prepare.main(["run", "--media", str(media), "--format", "native", "--annotations",
                         str(annotations), "--out", str(tmp_path / "prepared")]) == 0
    out = tmp_path / "pages" / "row.html"
    assert prepare.main(["inspect", "--data", str(tmp_path / "prepared"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "bucket image_conversation" in printed and "At <box_begin><boxes><eos>" in printed
    assert [path.name for path in out.parent.iterdir()] == ["row.html"]
    TextCodec(train_tokenizer(["Where is it?", "At"])).save(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG)
    arguments = ["inspect", f"--config={tmp_path / 'config.py'}:{tmp_path}", "--row", "2",
                 "--config.seed=3", "--step", "4", "--out", str(out)]
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step 4, bucket still, row 2" in printed
    assert "image " in printed and "[1 visual tokens]" in printed and "hidden" not in printed
    # What `train` would be given, whatever the config says.
    assert prepare.main([*arguments, "--config.data.evidence=blind"]) == 0
    printed = capsys.readouterr().out
    assert ", hidden" in printed and "[0 visual tokens]" in printed
    assert prepare.main([*arguments, "--config.data.evidence=deaf"]) == 2
    assert "data.evidence = 'deaf': unknown" in capsys.readouterr().err
    assert prepare.main(["inspect", "--data", str(tmp_path / "prepared"), "--row", "5"]) == 2
    assert "--row 5: the batch of step 0 has 1 rows" in capsys.readouterr().err
