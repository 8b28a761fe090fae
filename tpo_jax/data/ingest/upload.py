"""A prepared folder to a bucket: whole there, or not there for any reader."""

from __future__ import annotations

import json
import pathlib
import shutil

import tqdm
from etils import epath

from tpo_jax.data import files
from tpo_jax.data.ingest.plan import PrepareError

MARKER = "prepared.json"  # what readers look for: the last file to arrive
UPLOADING = "uploading.json"
BLOCK_BYTES = 2**24


def upload(folder: pathlib.Path, out: epath.Path) -> None:
    """Copies a prepared folder; one that is there already is not copied again.

    An upload that was cut off goes on with the same call: a file of the right size is whole.

    Raises:
      PrepareError: `out` holds something else.
    """
    fingerprint = json.loads((folder / MARKER).read_text("utf-8"))["fingerprint"]
    if _holds(out, MARKER, fingerprint):
        return
    if not _holds(out, UPLOADING, fingerprint):
        if out.exists() and any(out.iterdir()):
            raise PrepareError(f"{out} exists and is not a prepared folder; choose another --out")
        files.write(out / UPLOADING, json.dumps({"fingerprint": fingerprint}))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in tqdm.tqdm(sorted(set(names) - {MARKER}), desc="upload", unit="file"):
        source, target = folder / name, out / name
        if target.exists() and target.stat().length == source.stat().st_size:
            continue
        with source.open("rb") as read, target.open("wb") as written:
            shutil.copyfileobj(read, written, BLOCK_BYTES)
    (out / MARKER).write_bytes((folder / MARKER).read_bytes())
    (out / UPLOADING).unlink()


def _holds(out: epath.Path, name: str, fingerprint: str) -> bool:
    """Whether the file is there; raises PrepareError where it is of another preparation."""
    if not (out / name).exists():
        return False
    if json.loads((out / name).read_text())["fingerprint"] != fingerprint:
        raise PrepareError(
            f"{out} was prepared from other media, annotations or settings; remove it or choose "
            "another --out"
        )
    return True
