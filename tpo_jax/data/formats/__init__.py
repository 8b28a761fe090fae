"""Readers of published annotation formats; one file each. A new one is a file and an entry here."""

from tpo_jax.data.formats import got10k, mevis, native, qvhighlights, refcoco, thumos, videochat2
from tpo_jax.data.formats.reading import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (native, videochat2, qvhighlights, refcoco, mevis, got10k, thumos)
}


def get(name: str) -> Format:
    """Raises ValueError for an unknown name."""
    if name not in FORMATS:
        raise ValueError(f"format: {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
