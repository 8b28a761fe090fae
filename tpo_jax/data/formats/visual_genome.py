"""Visual Genome: region_descriptions.json, a phrase per box; image_data.json beside it.

[{"id": image, "regions": [{"region_id", "image_id", "phrase", "x", "y", "width", "height"}]}] with
boxes in pixels. image_data.json, [{"image_id", "width", "height", "url", "coco_id", "flickr_id"}],
gives the sizes of the images; without it they are read from the files <image>.jpg.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking
from tpo_jax.data.formats.reading import Context, Format, Record, expand, load_json, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

REGIONS, IMAGES = "region_descriptions.json", "image_data.json"
BOX = ("x", "y", "width", "height")


def records(context: Context) -> Iterator[Record]:
    """One record per region; the file is the folder, or region_descriptions.json in it."""
    path = context.file / REGIONS if context.file.is_dir() else context.file
    sizes: dict[str, tuple[float, float]] = {}
    yield from _sizes(context, path.with_name(IMAGES), sizes)

    def regions(label: str, image: Any) -> Iterator[Record]:
        context.keys(image, ("id", "regions"))
        for i, region in enumerate(validation.check_list("regions", image["regions"])):
            yield f"image {image['id']} region {i}", (image["id"], region, sizes)

    images = load_json(path, list)
    yield from expand(((f"record {i}", image) for i, image in enumerate(images)), regions)


def _sizes(
    context: Context, path: pathlib.Path, sizes: dict[str, tuple[float, float]]
) -> Iterator[Record]:
    """Fills `sizes`, (width, height) in pixels by image; yields what it refuses."""

    def add(field: str, image: Any) -> Iterator[Record]:
        context.keys(image, ("image_id", "width", "height"), ("url", "coco_id", "flickr_id"), field)
        width, height = (
            validation.check_number(f"{field}.{key}", image[key], 1, 1e6, "pixels")
            for key in ("width", "height")
        )
        sizes[str(image["image_id"])] = width, height
        yield from ()

    images = load_json(path, list) if path.is_file() else []
    yield from expand(((f"{IMAGES}[{i}]", image) for i, image in enumerate(images)), add)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    image, region, sizes = record
    context.keys(region, ("region_id", "phrase", *BOX), ("image_id",), "region")
    if region.get("image_id", image) != image:
        raise Invalid("region.image_id", region["image_id"], f"expected {image}", "correct it")
    name = context.find(str(image), "id")
    width, height = sizes.get(str(image)) or context.frame_size(name, "width")
    box = pixel_box("region.x, y, width, height", [region[k] for k in BOX], width, height)
    turn = asking.region(validation.check_text("region.phrase", region["phrase"]))
    targets = {"boxes": [box], "times": [0]}
    key = f"region{region['region_id']}"
    media = context.kind(name, "image")
    return [context.example(name, key, "region", [turn], targets, media=media)]


FORMAT = Format("visual_genome", "Visual Genome region descriptions", records, parse)
