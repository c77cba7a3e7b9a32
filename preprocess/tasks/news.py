"""lra-news1: AG News descriptions as bytes; World (0), Sports (1), Business (2), Sci/Tech (3).

    python preprocess/create_agnews.py
    python preprocess/create_agnews.py --source ag_news_csv

The title is not used. Source: docs/data.md, "lra-news1".
"""

from preprocess import encode, sources
from preprocess.driver import Task

CLASSES = ("World", "Sports", "Business", "Sci/Tech")

TASK = Task(
    name="lra-news1",
    description=__doc__,
    classes=CLASSES,
    length=1024,
    any_length=True,
    counts={"train": 120_000, "test": 7_600},
    encoder=encode.text(max_ids=1000),
    sources=(
        sources.Parquet("text", CLASSES, about="title and description in one text"),
        sources.Csv(
            {"train": "train.csv", "test": "test.csv"},
            text=("description",),
            label=("class", "class index", "label"),
            labels=("1", "2", "3", "4"),
            columns=("class", "title", "description"),
            folder="ag_news_csv",
        ),
    ),
    tfds=sources.Tfds("ag_news_subset", "description", CLASSES),
    places=("ag_news_csv.tar.gz", "ag_news_csv"),
    fetch="ag_news_csv.tar.gz",
)
