"""lra-pathx-<level>: lra-pathfinder with 128x128 pictures, 16,384 ids.

    python -m preprocess lra-pathx --source lra_release.gz

The reference has no configuration for it. Source: docs/data.md, "lra-pathfinder32".
"""

import dataclasses
import functools

from preprocess.tasks import pathfinder

TASK = dataclasses.replace(
    pathfinder.TASK,
    name="lra-pathx",
    description=__doc__,
    length=128 * 128,
    whole=functools.partial(pathfinder.is_whole, "pathfinder128"),
    generate=None,
    options=pathfinder.add_levels,
    stems=lambda options: tuple(
        f"lra-pathx-{level}" for level in options.level or pathfinder.LEVELS
    ),
)
