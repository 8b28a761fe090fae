"""Where the annotations are: a data set's own manifest, or a config.

A manifest is `dataset.json` in the folder of the data set:

    {"name": "...", "media": "media", "annotations": [{"format": "native", "path": "a.jsonl"}]}

Paths are relative to the folder and stay inside it. An entry may have a `frame_rate`, of folders of
pictures whose annotations do not say it, `"unlabelled": true` of a split that is published without
labels, and a `split`, the one to be read of annotations that hold several.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from tpo_jax.data import formats, validation
from tpo_jax.data.files import local_path
from tpo_jax.data.ingest.plan import PrepareError, Settings, Source
from tpo_jax.data.media import safe_name
from tpo_jax.data.problems import Invalid

MANIFEST = "dataset.json"
SETTING_KEYS = ("fps", "size", "encoding", "processes")
SOURCE_KEYS = ("media", "format", "annotations", "name", "ignore_keys")
OPTIONAL_KEYS = ("frame_rate", "unlabelled", "split")


def from_manifest(folder: pathlib.Path, ignore_keys: frozenset[str] = frozenset()) -> list[Source]:
    """The sources that FOLDER/dataset.json lists. Raises PrepareError."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise PrepareError(
            f"{manifest} does not exist; name the files by --media, --format and --annotations"
        )
    try:
        data = json.loads(manifest.read_text("utf-8"))
        validation.check_keys(data, ("info", "seed"), ("name", "media", "annotations"))
        return [
            _manifest_source(folder, data, entry, f"annotations[{i}]", ignore_keys)
            for i, entry in enumerate(validation.check_list("annotations", data["annotations"]))
        ]
    except (Invalid, json.JSONDecodeError) as error:
        raise PrepareError(f"{manifest}: {error}") from error


def _manifest_source(
    folder: pathlib.Path, data: dict[str, Any], entry: Any, field: str, ignore_keys: frozenset[str]
) -> Source:
    validation.check_keys(entry, OPTIONAL_KEYS, ("format", "path"), field)
    _check_format(f"{field}.format", entry["format"])
    _check_rate(f"{field}.frame_rate", entry.get("frame_rate"))
    _check_switch(f"{field}.unlabelled", entry.get("unlabelled", False))
    _check_split(f"{field}.split", entry.get("split"))
    return Source(
        folder / safe_name(data["media"], "media"),
        entry["format"],
        folder / safe_name(entry["path"], f"{field}.path"),
        f"{data['name']}/{entry['format']}",
        ignore_keys,
        entry.get("frame_rate"),
        entry.get("unlabelled", False),
        entry.get("split"),
    )


def check_config(config: ConfigDict) -> None:
    """Raises PrepareError with the option, its value and the fix."""
    try:
        data = config.to_dict()
        validation.check_keys(data, ("manifest", "sources"), SETTING_KEYS)
        if not data.get("manifest") and not data.get("sources"):
            raise Invalid("sources", [], "the config names no data", "set manifest or sources")
        for i, source in enumerate(data.get("sources", ())):
            validation.check_keys(source, OPTIONAL_KEYS, SOURCE_KEYS, f"sources[{i}]")
            _check_format(f"sources[{i}].format", source["format"])
            _check_rate(f"sources[{i}].frame_rate", source.get("frame_rate"))
            _check_switch(f"sources[{i}].unlabelled", source.get("unlabelled", False))
            _check_split(f"sources[{i}].split", source.get("split"))
    except Invalid as error:
        raise PrepareError(f"config.{error}") from error


def from_config(config: ConfigDict) -> tuple[list[Source], Settings, int]:
    """(sources, settings, processes) of a checked config."""
    sources = [
        Source(
            _local(f"sources[{i}].media", source["media"]),
            source["format"],
            _local(f"sources[{i}].annotations", source["annotations"]),
            source["name"],
            frozenset(source["ignore_keys"]),
            source.get("frame_rate"),
            source.get("unlabelled", False),
            source.get("split"),
        )
        for i, source in enumerate(config.to_dict().get("sources", ()))
    ]
    if config.manifest:
        sources += from_manifest(_local("manifest", config.manifest))
    return sources, Settings(config.fps, config.size or None, config.encoding), config.processes


def _local(field: str, path: str) -> pathlib.Path:
    try:
        return local_path(path)
    except argparse.ArgumentTypeError as error:
        raise PrepareError(f"config.{field}: {error}") from error


def _check_format(field: str, name: Any) -> None:
    if name not in formats.FORMATS:
        raise Invalid(
            field, name, f"expected one of {', '.join(formats.FORMATS)}", "correct the format"
        )


def _check_rate(field: str, rate: Any) -> None:
    if rate is not None:
        validation.check_number(field, rate, 1e-6, float("inf"), "pictures a second")


def _check_switch(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise Invalid(field, value, "expected true or false", "correct it")


def _check_split(field: str, value: Any) -> None:
    if value is not None:
        validation.check_text(field, value)
