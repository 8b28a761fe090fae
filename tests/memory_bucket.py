"""gs:// in memory: what `etils.epath` reads and writes there, without a network."""

import importlib

from fsspec.implementations.memory import MemoryFileSystem


class MemoryBucket(MemoryFileSystem):
    """Google Cloud Storage as far as files go: a folder is the files whose names begin with it."""

    protocol = ("gcs", "gs", "memory")
    store: dict = {}
    pseudo_dirs = [""]

    def __init__(self, finalize_on_close=False, **options):
        del finalize_on_close  # of gcsfs
        super().__init__(**options)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://").removeprefix("gcs://"))

    def glob(self, path, **options):
        return [name.removeprefix("/") for name in super().glob(path, **options)]

    def _open(self, path, mode="rb", **options):
        if "a" in mode:
            raise NotImplementedError(f"{path}: a bucket cannot append")
        return super()._open(path, mode, **options)


def install(monkeypatch) -> None:
    """For one test, gs:// is an empty bucket in memory."""
    MemoryBucket.store.clear()
    MemoryBucket.pseudo_dirs[:] = [""]
    MemoryBucket.clear_instance_cache()
    registry = importlib.import_module("fsspec.registry")  # a name that `fsspec` gives to a dict
    for protocol in ("gcs", "gs"):
        monkeypatch.setitem(registry._registry, protocol, MemoryBucket)
