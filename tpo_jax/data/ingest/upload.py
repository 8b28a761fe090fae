"""A prepared folder to a bucket: whole there, or not there for any reader."""

from __future__ import annotations

import json
import pathlib

import tqdm
from etils import epath

from tpo_jax.data import files
from tpo_jax.data.ingest.plan import PrepareError

MARKER = "prepared.json"  # what readers look for: the last file to arrive
UPLOADING = "uploading.json"


def upload(folder: pathlib.Path, out: epath.Path) -> None:
    """Copies a prepared folder; one that is there already is not copied again.

    An upload that was cut off goes on with the same call: files of the right size are whole, since
    a bucket shows no parts of them.

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
        data, target = (folder / name).read_bytes(), out / name
        if not target.exists() or target.stat().length != len(data):
            target.write_bytes(data)
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
