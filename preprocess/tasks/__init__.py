"""The tasks: a module with a record each."""

import importlib

SAME = ("image", "listops", "text", "retrieval", "pathfinder", "nature")
MODULES = {f"lra-{name}": name for name in SAME} | {
    "lra-news1": "news",
    "lra-yelp1": "yelp",
    "lra-pathx": "pathfinder.PATH_X",
    "planted": "planted",
}


def load(name: str):
    """The record of a task."""
    module, _, record = MODULES[name].partition(".")
    return getattr(importlib.import_module(f"preprocess.tasks.{module}"), record or "TASK")
