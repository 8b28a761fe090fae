"""A procedural world of moving shapes with exact labels, rendered to real video files.

`simulate` draws a scene (cast, events, motion) from a seed, `render` turns it into frames and
visible masks, `build` writes whole data sets with annotations in published formats.
"""

from tpo_jax.data.moving_shapes.build import SPLITS, Job, build
from tpo_jax.data.moving_shapes.render import Rendered, render
from tpo_jax.data.moving_shapes.scene import Scene, simulate, simulate_image
from tpo_jax.data.moving_shapes.world import Actor, CountTheme, Event, WorldConfig

__all__ = [
    "SPLITS",
    "Actor",
    "CountTheme",
    "Event",
    "Job",
    "Rendered",
    "Scene",
    "WorldConfig",
    "build",
    "render",
    "simulate",
    "simulate_image",
]
