"""A prepared data set in memory, with the methods of PreparedDataset that the pipeline uses."""

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.records import Example, Turn, VideoInfo

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "circle", "triangle", "star")


class FakeDataset:
    """Videos whose frame i is filled with the value i (modulo 256).

    Args:
      path: shown in errors.
      examples: examples of each video; the videos are the keys.
      infos: video id -> VideoInfo.
    """

    def __init__(self, path: str, examples: dict[str, list[Example]],
                 infos: dict[str, VideoInfo]):
        self.path = path
        self._examples, self._infos = examples, infos

    @property
    def videos(self) -> list[str]:
        return list(self._infos)

    def video_info(self, video_id: str) -> VideoInfo:
        return self._infos[video_id]

    def examples(self, video_id: str) -> list[Example]:
        return self._examples[video_id]

    def frames(self, video_id: str, indices: np.ndarray) -> np.ndarray:
        info = self._infos[video_id]
        frames = np.zeros((len(indices), info.height, info.width, 3), np.uint8)
        return frames + (np.asarray(indices) % 256).astype(np.uint8)[:, None, None, None]


def video_info(frames: int = 64, fps: float = 8.0, size: int = 32) -> VideoInfo:
    times = (np.arange(frames) / fps).astype(np.float32)
    return VideoInfo("video", frames / fps, frames, times, size, size)


def image_info(size: int = 32) -> VideoInfo:
    return VideoInfo("image", 0.0, 1, np.zeros(1, np.float32), size, size)


def example(example_id: str, video_id: str, task: str, turns, targets=None, media="video",
            start=0.0, end=8.0) -> Example:
    return Example(example_id, video_id, media, task, "fake", start, end, tuple(turns),
                   targets or {})


def square_rle(size: int = 32, first: int = 8, last: int = 24) -> dict:
    """COCO RLE of a filled square."""
    mask = np.zeros((size, size), np.uint8)
    mask[first:last, first:last] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [size, size], "counts": rle["counts"].decode()}


def all_tasks(video_id: str) -> list[Example]:
    """One example of every task about one video of 8 seconds."""
    times = [0.0, 2.0, 4.0, 6.0]
    options = ("a red square", "a blue star", "a green circle", "a yellow triangle")
    pair = {"chosen": "The red square moves left.", "rejected": "The blue star grows.",
            "manipulation": "localized", "frame_indices": [0, 8, 16, 24],
            "manipulated_indices": [32, 40]}
    return [
        example(f"{video_id}/chat", video_id, "conversation", [
            Turn("What moves first?", options[0], options, "order"),
            Turn("What happens?", "The red square moves left, then the blue star grows.", (),
                 "caption"),
            Turn("How many shapes are there?", "2", (), "count"),
        ]),
        example(f"{video_id}/when", video_id, "temporal",
                [Turn("When does the star grow?", "It grows at <temporal>.")],
                {"windows": [[2.0, 4.0], [6.0, 7.0]], "saliency": [0.0, 1.0, 0.5],
                 "saliency_interval": 2.0}),
        example(f"{video_id}/where", video_id, "region",
                [Turn("Where are they?", "One is <region> and one is <region>.")],
                {"boxes": [[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 0.9, 0.8]], "times": [1.0, 7.0]}),
        example(f"{video_id}/mask", video_id, "mask",
                [Turn("Mask the square.", "Here it is: <mask>")],
                {"times": times, "rles": [square_rle(), square_rle(), None, square_rle()]}),
        example(f"{video_id}/track", video_id, "tracking",
                [Turn("Follow <box> please.", "Here it is: <mask>")],
                {"times": times, "boxes": [[0.0, 0.0, 0.5, 0.5], None, [0.5, 0.5, 1.0, 1.0],
                                           [0.25, 0.25, 0.75, 0.75]],
                 "input_box": [0.0, 0.0, 0.5, 0.5]}),
        example(f"{video_id}/pair", video_id, "preference",
                [Turn("What happens first?", "The red square moves left.")], pair),
    ]


def fake_dataset(videos: int = 5, images: int = 2, path: str = "fake/train") -> FakeDataset:
    """Videos with every task, images with a question and a box."""
    examples, infos = {}, {}
    for i in range(videos):
        infos[f"v{i}"], examples[f"v{i}"] = video_info(), all_tasks(f"v{i}")
    for i in range(images):
        name = f"i{i}"
        infos[name] = image_info()
        examples[name] = [
            example(f"{name}/chat", name, "conversation", [Turn("What is it?", "a red square")],
                    media="image", end=0.0),
            example(f"{name}/where", name, "region", [Turn("Where?", "At <region>")],
                    {"boxes": [[0.1, 0.2, 0.5, 0.6]], "times": [0.0]}, media="image", end=0.0),
        ]
    return FakeDataset(path, examples, infos)
