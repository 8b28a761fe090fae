"""What the world is made of: colours, shapes, actions, and the records that describe one scene."""

from __future__ import annotations

import dataclasses

# RGB. Six colours that stay apart after 4:2:0 chroma subsampling; white is kept for blinking.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 245),
    "yellow": (240, 220, 50),
    "purple": (190, 60, 220),
    "cyan": (50, 220, 230),
}
FORMS: tuple[str, ...] = ("circle", "square", "triangle", "cross", "bar")
BLINK_COLOUR: tuple[int, int, int] = (255, 255, 255)

# Distance from the centre to the furthest point, in units of the radius, whatever the rotation.
EXTENT: dict[str, float] = {
    "circle": 1.0,
    "square": 1.25,
    "triangle": 1.25,
    "cross": 1.2,
    "bar": 1.4,
}
# Forms that look the same after turning cannot turn; forms with holes cannot hide anything.
TURNING_FORMS: tuple[str, ...] = ("square", "triangle", "cross", "bar")
COVERING_FORMS: tuple[str, ...] = ("circle", "square")

DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# How often each action is drawn beside the events of the counting theme, which are moves, turns and
# blinks; "move" stands for four directions.
ACTION_WEIGHTS: dict[str, float] = {
    "move": 0.22,
    "turn": 0.07,
    "grow": 0.16,
    "blink": 0.07,
    "hit": 0.12,
    "enter": 0.10,
    "leave": 0.10,
    "hide": 0.16,
}
# Actions that displace an actor although it is not said to "move".
TRANSLATIONS: tuple[str, ...] = ("hit", "enter", "leave", "hide")
COUNTED_ACTIONS: tuple[str, ...] = ("move", "turn", "blink")
GROWTH = 1.8


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What can be chosen about the world.

    size: frame height and width, pixels.
    fps: frames per second of the video file.
    seconds: length of a video, whole seconds.
    density: mean number of events per 10 s of video, as far as the cast can do that many different
      things; beyond about eight events a video is sparser.
    min_actors, max_actors: how many shapes a video has.
    annotation_fps: rate of masks and boxes; must divide fps. It is also the rate models should see.
    shared_colour: share of videos in which two shapes have one colour, so that the form matters.
    noise: standard deviation of the luminance noise, 8-bit levels.
    crf: quality of H.264 (lower is better).  gop: frames between key frames.
    """

    size: int = 64
    fps: int = 8
    seconds: int = 16
    density: float = 2.1
    min_actors: int = 2
    max_actors: int = 4
    annotation_fps: int = 2
    shared_colour: float = 0.15
    noise: float = 1.0
    crf: int = 15
    gop: int = 8

    def __post_init__(self) -> None:
        checks = {
            "size": (self.size >= 32 and self.size % 2 == 0, "an even number >= 32 (yuv420p)"),
            "fps": (self.fps >= 2, "at least 2"),
            "seconds": (self.seconds >= 8, "at least 8 (events need room)"),
            "density": (0.5 <= self.density <= 3.0, "between 0.5 and 3 events per 10 s"),
            "min_actors": (self.min_actors >= 2, "at least 2"),
            "max_actors": (self.min_actors <= self.max_actors <= 4, "min_actors..4"),
            "annotation_fps": (
                self.annotation_fps >= 1 and self.fps % self.annotation_fps == 0,
                f"a divisor of fps={self.fps}",
            ),
            "shared_colour": (0.0 <= self.shared_colour <= 1.0, "a probability"),
            "noise": (0.0 <= self.noise <= 20.0, "between 0 and 20"),
            "crf": (0 <= self.crf <= 40, "between 0 and 40"),
            "gop": (self.gop >= 1, "at least 1"),
        }
        for name, (ok, expected) in checks.items():
            if not ok:
                raise ValueError(
                    f"WorldConfig.{name}={getattr(self, name)!r}: expected {expected}."
                )

    @property
    def num_frames(self) -> int:
        return self.seconds * self.fps

    @property
    def annotation_frames(self) -> list[int]:
        """The mp4 frames that carry masks and boxes: number i is at i / annotation_fps seconds."""
        return list(range(0, self.num_frames, self.fps // self.annotation_fps))


@dataclasses.dataclass(frozen=True)
class Actor:
    """One shape. radius: pixels at the start; covering: drawn above the others."""

    index: int
    colour: str
    form: str
    radius: float = 8.0

    @property
    def name(self) -> str:
        return f"the {self.colour} {self.form}"


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that one actor does in [start, end) seconds.

    other: the actor that is hit or hidden behind.  direction: of a move, or the side of the frame.
    """

    action: str
    actor: int
    other: int | None = None
    direction: str | None = None
    start: float = 0.0
    end: float = 0.0


@dataclasses.dataclass(frozen=True)
class CountTheme:
    """The counting question that a video was planned around, so that its answers are uniform.

    scope "times": how many times does `actor` do `action`; "shapes": how many shapes do `action`.
    """

    scope: str
    action: str
    actor: int | None
    count: int
