"""The tasks: one module with a record TASK each."""

import importlib

MODULES = {
    "lra-image": "image",
    "lra-listops": "listops",
    "lra-text": "text",
    "lra-retrieval": "retrieval",
    "lra-pathfinder": "pathfinder",
    "lra-pathx": "pathx",
    "lra-news1": "news",
    "lra-yelp1": "yelp",
    "lra-nature": "nature",
    "planted": "planted",
}


def load(name: str):
    """The record of a task."""
    return importlib.import_module(f"preprocess.tasks.{MODULES[name]}").TASK
