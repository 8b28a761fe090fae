"""What the model is given: one training row drawn as a page (.html) or a picture (.png).

Shown are the frames with the boxes and masks of their slots, the windows and the saliency on a
timeline, and every token of the prefix and the branches: given, trained on, or a slot.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.mixture import Source, kind_of
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import PreparedDataset, known_tasks
from tpo_jax.data.row_plans import preference_plan
from tpo_jax.data.rows import RowPlan
from tpo_jax.data.target_parts import window_count
from tpo_jax.data.text import TASK_TOKENS, TextCodec, add_task_tokens, texts_of, train_tokenizer
from tpo_jax.errors import UserError
from tpo_jax.models.heads import HEADS
from tpo_jax.models.presets import PRESETS

COLOURS = {"given": "#777777", "trained": "#00794c", "slot": "#c0392b", "note": "#2c3e8f"}
SLOT_COLOURS = ("#e6194b", "#f58231", "#4363d8", "#911eb4", "#008080")
COLUMNS = 140  # characters per line of text
FRAMES_PER_LINE = 8


class Span(NamedTuple):
    """A piece of a line; `style` is a key of COLOURS."""

    text: str
    style: str


Line = list[Span]


def describe_row(row: Mapping[str, Any], codec: TextCodec, plan: RowPlan) -> list[Line]:
    """The row in words: prefix, branches token by token, slots with their targets.

    Args:
      row: arrays of `RowBuilder.build`.
      codec: that they were built with.
      plan: that they were built from.
    """
    shown = int(row["frame_valid"].sum())
    what = f"image {plan.video_id}" + ("" if shown else ", hidden")
    if plan.branches[0].example.media == "video":
        what = (f"video {plan.video_id}, {plan.start:g} to {plan.end:g} s, {shown} of "
                f"{len(row['frame_valid'])} frames")
    lines = [[Span(what, "note")]]
    if "pair_valid" in row:
        lines[0].append(Span(", preference pair: branch 0 chosen, the others rejected", "note"))
    lines += _prefix_lines(row, codec)
    for k, branch in enumerate(plan.branches):
        n = int(row["branch_segments"][k].sum())
        weights = _token_weights(row, k)
        first = int(row["branch_positions"][k, 0])
        lines.append([Span(
            f"branch {k}: {branch.example.task} {branch.example.example_id}, turn {branch.turn}, "
            f"{n} tokens at positions {first}..{first + n - 1}, {weights.sum():g} trained",
            "note")])
        names = codec.token_texts(row["branch_tokens"][k, :n])
        slots = {slot for _, slot in TASK_TOKENS.values()}
        lines.append([
            Span(name, "slot" if name in slots else "trained" if weight else "given")
            for name, weight in zip(names, weights, strict=False)])
    lines += [[Span(text, "slot")] for text in _slot_texts(row)]
    lines += [[Span(text, "note")] for text in _extra_texts(row)]
    return lines


def _prefix_lines(row: Mapping[str, Any], codec: TextCodec) -> list[Line]:
    """The prefix with its run of visual tokens as one piece."""
    valid = row["prefix_segments"] > 0
    pads = row["prefix_tokens"] == codec.pad_id
    names = codec.token_texts(row["prefix_tokens"][valid & ~pads])
    offset = codec.template.visual_offset
    names.insert(offset, f" [{int((valid & pads).sum())} visual tokens] ")
    count = int(valid.sum())
    return [[Span(f"prefix: {count} of {len(valid)} tokens", "note")],
            [Span(name, "given") for name in names]]


def _token_weights(row: Mapping[str, Any], k: int) -> np.ndarray:
    """float32[R]: the weight with which each token of a branch is trained."""
    weights = np.zeros(row["branch_tokens"].shape[1], np.float32)
    for position, weight in zip(row["answer_positions"][k], row["answer_weights"][k], strict=True):
        if weight:
            weights[position + 1] = weight
    return weights


def _valid_slots(row: Mapping[str, Any]) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """(head, s, arrays of the slot) of every slot in use."""
    for head, arrays in row["slots"].items():
        for s in np.flatnonzero(arrays["valid"]):
            yield head, int(s), {name: array[s] for name, array in arrays.items()}


def _slot_texts(row: Mapping[str, Any]) -> Iterator[str]:
    for head, s, slot in _valid_slots(row):
        text = f"slot {head} {s}: branch {slot['branch']}, token {slot['index']}"
        if "boxes" in slot:
            text += f", box {_numbers(slot['boxes'])}"
        if "frame" in slot:
            text += f", frame {slot['frame']}"
        if "windows" in slot:
            text += f", windows {_numbers(slot['windows'][slot['window_valid']])}"
            text += f", saliency on {(slot['saliency'] >= 0).sum()} frames"
        if "masks" in slot:
            text += (f", masks of {slot['labelled'].sum()} frames, present in "
                     f"{slot['masks'].any((1, 2)).sum()}")
        yield text


def _extra_texts(row: Mapping[str, Any]) -> Iterator[str]:
    """What only some configs bring: features, manipulated frames, reference log-probabilities."""
    if "clip_features" in row:
        given = int(row["clip_features"].any(1).sum())
        yield f"clip features: {given} frames, {row['clip_features'].shape[1]} numbers each"
    if "text_features" in row:
        tokens = row["text_valid"].sum(1).tolist()
        yield f"text features: tokens by branch {tokens}, {row['text_features'].shape[2]} numbers"
    if "contrast_frames" in row:
        times = row["contrast_frame_times"][row["contrast_frame_valid"]]
        yield f"manipulated frames: at {_numbers(times)} s"
    if "reference_logps" in row:
        yield f"reference log-probabilities: {_numbers(row['reference_logps'].sum(1))}"
    if "reference_contrast_logps" in row:
        summed = _numbers(row["reference_contrast_logps"].sum())
        yield f"reference log-probability, manipulated frames: {summed}"


def _numbers(array: np.ndarray) -> str:
    return str(np.round(array.astype(np.float64), 3).tolist())


def wrap(lines: Sequence[Line], columns: int = COLUMNS) -> list[Line]:
    """Lines of at most `columns` characters; control characters become visible."""
    wrapped: list[Line] = []
    for line in lines:
        current: Line = []
        width = 0
        for span in line:
            text = span.text.replace("\n", "⏎")
            for piece in textwrap.wrap(text, columns, drop_whitespace=False) or [""]:
                if width + len(piece) > columns:
                    wrapped.append(current)
                    current, width = [], 0
                current.append(Span(piece, span.style))
                width += len(piece)
        wrapped.append(current)
    return wrapped


# --- drawing ---


def draw_frames(row: Mapping[str, Any], lines: Sequence[Line] = ()) -> Figure:
    """The frames that the model sees with boxes and masks, the timeline, and `lines` under them."""
    frames = np.flatnonzero(row["frame_valid"])
    tall = -(-len(frames) // FRAMES_PER_LINE)
    temporal = [slot for head, _, slot in _valid_slots(row) if head == "temporal"]
    heights = [1.35] * tall + [1.2] * bool(temporal) + [0.17 * len(lines)] * bool(lines)
    heights = heights or [0.1]  # nothing is seen and nothing is asked of a head
    figure = Figure(figsize=(11, sum(heights) + 0.4), dpi=100, layout="constrained")
    grid = figure.add_gridspec(len(heights), FRAMES_PER_LINE, height_ratios=heights)
    for place, f in enumerate(frames):
        axes = figure.add_subplot(grid[place // FRAMES_PER_LINE, place % FRAMES_PER_LINE])
        _draw_frame(axes, row, int(f))
    if temporal:
        _draw_timeline(figure.add_subplot(grid[tall, :]), row, temporal)
    if lines:
        _draw_lines(figure.add_subplot(grid[len(heights) - 1, :]), lines)
    return figure


def _draw_frame(axes: Any, row: Mapping[str, Any], f: int) -> None:
    image = row["frames"][f]
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set_title(f"{f}: {row['frame_times'][f]:.2f} s", fontsize=7, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for number, (head, _, slot) in enumerate(_valid_slots(row)):
        colour = SLOT_COLOURS[number % len(SLOT_COLOURS)]
        if "boxes" in slot and f == int(slot["frame"]):
            x1, y1, x2, y2 = slot["boxes"] * (width, height, width, height)
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, linewidth=1.5,
                      linestyle="--" if head == "box" else "-")
        if "masks" in slot and slot["labelled"][f] and slot["masks"][f].any():
            # Contour points are pixel centres; a border of zeros closes masks at the edge.
            mask = np.pad(slot["masks"][f], 1)
            centres_y = (np.arange(mask.shape[0]) - 0.5) * height / (mask.shape[0] - 2)
            centres_x = (np.arange(mask.shape[1]) - 0.5) * width / (mask.shape[1] - 2)
            axes.contour(centres_x, centres_y, mask, [0.5], colors=colour, linewidths=1)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _draw_timeline(axes: Any, row: Mapping[str, Any], slots: Sequence[Mapping[str, Any]]) -> None:
    """Windows as bars and saliency as a curve over the clip, normalised to [0, 1]."""
    for number, slot in enumerate(slots):
        colour = SLOT_COLOURS[number % len(SLOT_COLOURS)]
        for start, end in slot["windows"][slot["window_valid"]]:
            axes.axvspan(start, end, color=colour, alpha=0.25)
        labelled = np.flatnonzero(slot["saliency"] >= 0)
        # Labels are there for frames that evidence hides as well.
        frames = max([0, *np.flatnonzero(row["frame_valid"]), *labelled]) + 1
        axes.step(labelled / frames, slot["saliency"][labelled], where="post", color=colour)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xlabel("share of the clip; bars: windows, line: saliency", fontsize=7)
    axes.tick_params(labelsize=7)


def _draw_lines(axes: Any, lines: Sequence[Line]) -> None:
    axes.axis("off")
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    for y, line in enumerate(lines):
        x = 0
        for span in line:
            axes.text(x, y + 0.5, span.text.replace("$", r"\$"), color=COLOURS[span.style],
                      family="monospace", fontsize=8.9, va="center")
            x += len(span.text)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def render(row: Mapping[str, Any], codec: TextCodec, plan: RowPlan, suffix: str) -> bytes:
    """The row as a self-contained page (".html") or a picture (".png")."""
    lines = describe_row(row, codec, plan)
    if suffix == ".png":
        return _png(draw_frames(row, wrap(lines)))
    if suffix != ".html":
        raise UserError(f"--out: suffix {suffix!r}, expected .html or .png.")
    picture = base64.b64encode(_png(draw_frames(row))).decode()
    styles = "\n".join(f".{name} {{ color: {colour} }}" for name, colour in COLOURS.items())
    body = "\n".join(
        "<p>" + "".join(f'<span class="{span.style}">{html.escape(span.text)}</span>'
                        for span in line) + "</p>" for line in lines)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>One training row</title><style>
body {{ font-family: sans-serif; max-width: 1100px; margin: 1em auto }}
p {{ font-family: monospace; white-space: pre-wrap; margin: 0.3em 0 }}
span.trained, span.slot {{ border-bottom: 1px solid; margin-right: 1px }}
{styles}
</style></head><body>
<p><span class="given">given</span> <span class="trained">trained on</span>
<span class="slot">slot</span></p>
<img alt="frames, boxes, masks and windows" src="data:image/png;base64,{picture}">
{body}
</body></html>
""".encode()


# --- a folder without a config ---


def pipeline_of_folder(path: str, model: str | None) -> tuple[Pipeline, TextCodec]:
    """Rows of one prepared folder with every task that is in it, in buckets that hold them all."""
    dataset = PreparedDataset(path)
    if model is None:
        tokenizer = train_tokenizer(texts_of(dataset))
        add_task_tokens(tokenizer, tuple(HEADS))
        codec = TextCodec(tokenizer)
    else:
        codec = TextCodec.load(model)
    heads = {head.task: name for name, head in reversed(HEADS.items()) if head.task in codec.heads}
    config = PRESETS["tiny"](tuple(heads.values()), tokens=codec.task_tokens)
    examples = [example for video in dataset.videos for example in dataset.examples(video)]
    tasks = {task: 1.0 for task in known_tasks() if any(e.task == task for e in examples)}
    found = {(example.media, kind_of(example)) for example in examples}
    windows = max([1, *map(window_count, examples)])
    longest = max(len(codec.encode(text)) for text in texts_of(dataset))
    size = 4 * longest + 64  # a question with four options of this length and its answer
    most = max([2, *(len(preference_plan(dataset, example).branches) for example in examples
                     if kind_of(example) == "preference")])
    buckets = [
        Bucket(f"{media}_{kind}", media, 1, config.vision.max_frames if media == "video" else 1,
               branches=most if kind == "preference" else 6, branch_tokens=2 * size, answers=size,
               question=size if kind == "preference" else 0,
               slots=dict.fromkeys((*codec.heads, "box"), 6), windows=windows,
               mask_size=config.mask_size)
        for media, kind in sorted(found)]
    return Pipeline([Source(dataset, 1.0, tasks)], codec, config, config.heads, buckets, 0), codec
