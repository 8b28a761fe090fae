"""Readers of published annotation formats; one file each. A new one is a file and an entry here."""

from tpo_jax.data.formats import (
    activitynet_captions,
    as_v2,
    charades_sta,
    davis,
    didemo,
    got10k,
    hirest,
    lasot,
    llava,
    mevis,
    native,
    nextgqa,
    nlq,
    qvhighlights,
    ref_youtube_vos,
    refcoco,
    refcoco_mdetr,
    refcoco_shikra,
    sa_v,
    sharegpt4v,
    tacos,
    thumos,
    videochat2,
    visual_genome,
)
from tpo_jax.data.formats.reading import Format

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        *(native, videochat2, llava, sharegpt4v),
        *(qvhighlights, charades_sta, activitynet_captions, tacos, didemo, hirest, nlq, nextgqa),
        *(refcoco, refcoco_mdetr, refcoco_shikra, visual_genome, as_v2),
        *(mevis, ref_youtube_vos, sa_v, davis),
        *(got10k, lasot, thumos),
    )
}


def get(name: str) -> Format:
    """Raises ValueError for an unknown name."""
    if name not in FORMATS:
        raise ValueError(f"format: {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
