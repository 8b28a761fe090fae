"""Where a folder of weights goes: never in the place of what somebody else keeps there.

A folder is written beside its final name and renamed. What has that name already is replaced only
where its files say that this program wrote a folder of the same kind: a model folder in place of a
model folder, an export in place of an export. The mark is in the header of the safetensors files.
"""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from tpo_jax.errors import UserError
from tpo_jax.interop.tensors import TensorFileError, read_metadata

MODEL, EXPORT = "model folder", "export"
MODEL_METADATA = {"format": "tpo_jax"}
# transformers refuses a file without this format, and reads no other entry.
EXPORT_METADATA = {"format": "pt", "written_by": "tpo_jax"}
_METADATA = {MODEL: MODEL_METADATA, EXPORT: EXPORT_METADATA}
# Names beside the folder that nobody else gives: what has one of them is left over and removed.
_TEMPORARY, _OLD = ".tpo_tmp", ".tpo_old"


class OutputError(UserError):
    """A folder cannot be written where it should go; the message names what is there."""


def check(out: epath.PathLike, kind: str, *reads: epath.PathLike | None) -> epath.Path:
    """The path to write to, absolute where it is of this machine.

    Args:
      kind: MODEL or EXPORT.
      reads: folders that are read while this one is written.

    Raises:
      OutputError: something else is there, or one of the folders that are read is, holds it or is
        in it.
    """
    final = _absolute(out)
    for path in filter(None, reads):
        other = _absolute(path)
        if final == other or final in other.parents or other in final.parents:
            raise OutputError(
                f"{out}: is, holds or lies in {path}, which is read for it; write the {kind} to a "
                "folder of its own"
            )
    if final.exists() and not final.is_dir():
        raise OutputError(f"{out}: a file; the {kind} is a folder, give it another name")
    if final.exists() and any(final.iterdir()) and not _is_ours(final, kind):
        raise OutputError(
            f"{out}: holds files and is no {kind} that this program wrote, so it is not replaced; "
            "choose another folder, or remove this one"
        )
    return final


@contextlib.contextmanager
def replacing(
    out: epath.PathLike, kind: str, *reads: epath.PathLike | None
) -> Iterator[epath.Path]:
    """An empty folder that takes the place of `out` at the end of the block, or vanishes with an
    exception. What a kill leaves, the next call removes.

    Args, Raises: as `check` has them.
    """
    final = check(out, kind, *reads)
    temporary, old = (final.with_name(final.name + suffix) for suffix in (_TEMPORARY, _OLD))
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _remove(old)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
    except BaseException:
        _remove(temporary)
        raise
    _remove(old)


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()


def _is_ours(folder: epath.Path, kind: str) -> bool:
    if kind == EXPORT and (folder / "tpo_config.json").exists():
        return True
    wanted = _METADATA[kind].items()
    return any(wanted <= _metadata(file).items() for file in folder.glob("*.safetensors"))


def _metadata(file: epath.Path) -> dict[str, str]:
    try:
        return read_metadata(file)
    except TensorFileError:
        return {}


def _absolute(path: epath.PathLike) -> epath.Path:
    """A folder's one name: without "..", and without links, which are not renamed themselves."""
    text = str(epath.Path(path))
    return epath.Path(text if "://" in text else os.path.realpath(text))
