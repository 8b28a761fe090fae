"""Needles in a haystack: eight seconds in which everything happens, in a long video that is still.

The same needles are put at every depth (0: the start, 1: the end) of videos of one length, so that
nothing but the place of the evidence differs. Writes OUT/videos and OUT/needles.jsonl in the native
format; the kind of every question is its depth, "depth_0.25".

    python -m experiments.temporal_preference.needles --out runs/needles/64 --seconds 64
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from tpo_jax.data.moving_shapes import Scene, WorldConfig, render, simulate
from tpo_jax.data.moving_shapes.encode import encode_mp4
from tpo_jax.data.moving_shapes.questions import Question, video_questions

NEEDLE = WorldConfig(seconds=8, density=2.5)
SEED = 3000
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# What is asked has the same answer wherever the needle is.
KINDS = ("action", "attribute", "before_after", "counting", "direction", "existence", "order")


def place(needle: Scene, seconds: int, depth: float) -> Scene:
    """The needle in a longer video: as it begins until then, and as it ends from then on."""
    fps = needle.config.fps
    before = round(depth * (seconds - needle.config.seconds) * fps)
    after = seconds * fps - needle.config.num_frames - before
    held = {
        field.name: np.pad(
            getattr(needle.states, field.name), ((0, 0), (before, after)), mode="edge"
        )
        for field in dataclasses.fields(needle.states)
    }
    # Nobody blinks on, nor before a needle that begins with a blink.
    held["white"][:, :before] = held["white"][:, before + needle.config.num_frames :] = False
    return dataclasses.replace(
        needle,
        config=dataclasses.replace(needle.config, seconds=seconds),
        states=dataclasses.replace(needle.states, **held),
        events=tuple(
            dataclasses.replace(e, start=e.start + before / fps, end=e.end + before / fps)
            for e in needle.events
        ),
    )


def questions_of(needle: Scene) -> list[Question]:
    return [
        question
        for question in video_questions(needle)
        if question.kind in KINDS and question.options and question.clip is None
    ]


def write(out: pathlib.Path, seconds: int, needles: int, seed: int) -> int:
    """Returns the number of questions."""
    (out / "videos").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(needles):
        needle = simulate((seed, number), NEEDLE)
        asked = questions_of(needle)
        for depth in DEPTHS:
            scene = place(needle, seconds, depth)
            name = f"videos/needle{number:03d}_{depth:g}.mp4"
            (out / name).write_bytes(encode_mp4(render(scene).frames, scene.config))
            turns = [
                {
                    "question": question.question,
                    "answer": question.answer,
                    "options": question.options,
                    "kind": f"depth_{depth:g}",
                }
                for question in asked
            ]
            if turns:
                lines.append(json.dumps({"video": name, "turns": turns}))
    (out / "needles.jsonl").write_text("".join(line + "\n" for line in lines))
    return sum(len(json.loads(line)["turns"]) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.temporal_preference.needles", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=int, required=True, help="length of a video")
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--seed", type=int, default=SEED)
    flags = parser.parse_args()
    if flags.seconds < NEEDLE.seconds:
        parser.error(f"--seconds={flags.seconds}: the needle alone takes {NEEDLE.seconds}")
    count = write(flags.out, flags.seconds, flags.needles, flags.seed)
    print(f"{flags.out}: {flags.needles} needles at {len(DEPTHS)} depths, {count} questions")


if __name__ == "__main__":
    main()
