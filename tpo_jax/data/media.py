"""The folder of media that annotations refer to: names to files, never outside the folder.

A folder of numbered pictures is a video too (see `video.pictures`); it is found by its path, its
name, or the name of its parent where it is called "img".
"""

from __future__ import annotations

import collections
import difflib
import os
import pathlib
from collections.abc import Iterator

from tpo_jax.data import video
from tpo_jax.data.problems import Invalid
from tpo_jax.errors import MissingFile

# Looking for the closest of very many names takes longer than all else.
MOST_HINTS = 20_000
SUFFIXES = video.VIDEO_SUFFIXES + video.IMAGE_SUFFIXES
STILL = (".jpg", ".jpeg", ".png", ".bmp")  # suffixes of what is never a video


def without_suffix(name: str) -> str:
    """The name of a media file without its suffix; dots that belong to the name stay."""
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


class MediaFolder:
    """Looks up media below `root` by relative path, or by name without folder and suffix.

    Raises:
      FileNotFoundError: `root` is not a folder.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = pathlib.Path(root)
        if not self.root.is_dir():
            raise MissingFile(f"the media folder {self.root} does not exist")
        self._real_root = self.root.resolve()
        self._probes: dict[str, video.Probe] = {}
        self._files = sorted(_media_below(self.root))
        self._by_name = collections.defaultdict(set)
        for name in self._files:
            path = pathlib.PurePosixPath(name)
            self._by_name[path.name].add(name)
            self._by_name[path.stem].add(name)
            self._by_name[str(path.with_suffix(""))].add(name)
        self._known = set(self._files)
        self._folders = collections.defaultdict(set)
        for folder in {n.rpartition("/")[0] for n in self._files if _is_picture(n)} - {""}:
            *_, parent, last = "", *folder.split("/")
            for key in (folder, last, parent if last == "img" else last):
                self._folders[key].add(folder)
        self._frame_rates: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._files)

    def find(self, name: str, field: str) -> str:
        """The path below `root` that `name` means; raises Invalid for none, several or outside."""
        name = safe_name(name, field)
        found = {name} if name in self._known else self._by_name.get(name, set())
        found = found or self._folders.get(name, set())
        if not found:
            few = len(self._by_name) <= MOST_HINTS
            close = difflib.get_close_matches(name, self._by_name, 1) if few else []
            hint = f" (the closest is {close[0]!r})" if close else ""
            raise Invalid(
                field,
                name,
                f"unknown video or image: no such file below {self.root}{hint}",
                "add the file, correct the name, or remove the record",
            )
        if len(found) > 1:
            raise Invalid(
                field,
                name,
                f"ambiguous: it may mean {' or '.join(sorted(found)[:3])}",
                "give the path relative to the media folder, with its suffix",
            )
        (path,) = found
        if not self._is_inside(self.root / path):
            raise Invalid(
                field,
                name,
                f"it is a link that leads out of {self.root}",
                "copy the file into the media folder, or make its folder the media folder",
            )
        return path

    def path(self, name: str) -> pathlib.Path:
        """The file of a name that `find` returned."""
        return self.root / name

    def _is_inside(self, path: pathlib.Path) -> bool:
        """Whether a file, or a folder with all that is right in it, is below the root."""
        files = os.scandir(path) if path.is_dir() else ()
        found = [path, *(pathlib.Path(file.path) for file in files if file.is_symlink())]
        return all(file.resolve().is_relative_to(self._real_root) for file in found)

    def videos(self) -> list[str]:
        """The names of its video files, those of animated pictures among them."""
        files = (name for name in self._files if not name.lower().endswith(STILL))
        return [name for name in files if video.media_kind(self.root / name) == "video"]

    def has(self, name: str) -> bool:
        """Whether `find` would look at any file for this name."""
        return name in self._known or bool(self._by_name.get(name) or self._folders.get(name))

    def set_frame_rate(self, name: str, rate: float | None, field: str) -> None:
        """Says how many pictures a second a folder that `find` returned has."""
        if not self.path(name).is_dir():
            return
        if not rate:
            raise Invalid(
                field,
                name,
                "it is a folder of pictures whose frame rate the annotations do not say",
                "say --frame_rate",
            )
        if self._frame_rates.setdefault(name, rate) != rate:
            raise Invalid(
                field,
                name,
                f"its pictures are said to be {rate:g} a second, by another record "
                f"{self._frame_rates[name]:g}",
                "correct one of them",
            )

    def frame_rate(self, name: str) -> float | None:
        """What `set_frame_rate` was told; None for a file."""
        return self._frame_rates.get(name)

    def picture_numbers(self, name: str, field: str) -> list[int]:
        """Numbers of the pictures of a folder that `find` returned; raises Invalid for a file."""
        if not self.path(name).is_dir():
            raise Invalid(
                field, name, "expected a folder of pictures, whose frames can be counted",
                "extract the frames",
            )  # fmt: skip
        try:
            return [number for number, _ in video.pictures(self.path(name))]
        except video.VideoError as error:
            raise Invalid(field, name, error.reason, error.fix) from error

    def probe(self, name: str, field: str) -> video.Probe:
        """The header of a file that `find` returned; raises Invalid when it cannot be read."""
        if name not in self._probes:
            try:
                self._probes[name] = video.probe(self.root / name)
            except video.VideoError as error:
                raise Invalid(field, name, error.reason, error.fix) from error
        return self._probes[name]


def safe_name(name: str, field: str) -> str:
    """A relative path in normal form; raises Invalid for what could lead out of a folder."""
    if not isinstance(name, str) or not name.strip():
        raise Invalid(field, name, "expected the name of a media file", "name the file")
    parts = pathlib.PurePosixPath(name.replace("\\", "/")).parts
    windows = pathlib.PureWindowsPath(name)
    if name.startswith("/") or windows.drive or windows.root or ".." in parts or "\0" in name:
        raise Invalid(
            field,
            name,
            "the path leaves the media folder",
            "use a path relative to the media folder, without '..'",
        )
    return str(pathlib.PurePosixPath(*parts))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(video.IMAGE_SUFFIXES)


def _media_below(root: pathlib.Path) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=False):
        relative = pathlib.Path(folder).relative_to(root)
        for name in names:
            if name.lower().endswith(SUFFIXES):
                yield (relative / name).as_posix()
