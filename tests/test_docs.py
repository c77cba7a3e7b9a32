"""Every fenced command of the pages is executed, as a reader would paste it.

A page marks each ```sh block in its source, in the line before the fence:

    <!-- test: run -->          executed in a copy of the checkout, training at a small size
    <!-- test: slow -->         executed as it is, in make test-slow
    <!-- test: not WHY -->      not executed: needs a GPU, a network, another machine ...

"A small size" adds `--batch_size 8 --train_steps 6 --max_dense_steps 3` where a training command
does not say otherwise; lra-image has a few random pictures. Blocks of one page run in one copy,
in their order.
"""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from checkout import copy_checkout

import main_inference
import main_learnable_skewness
from config import Config
from sparsity import criteria, patterns

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"])
FENCE = re.compile(r"(?:<!-- test: (?P<mark>[^\n]*?) -->\n)?```sh\n(?P<body>.*?)```", re.S)
SMALL = ["--batch_size", "8", "--train_steps", "6", "--max_dense_steps", "3"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(mark, commands) of each ```sh block; an unmarked one has mark ""."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(match["mark"] or "", match["body"]) for match in found]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


CASES = [
    pytest.param(page, kind, id=f"{name(page)}-{kind}", marks=marks)
    for page in PAGES
    for kind, marks in (("run", []), ("slow", [pytest.mark.slow]))
    if any(mark == kind for mark, _ in blocks(page))
]


def test_every_block_says_whether_it_runs():
    for page in PAGES:
        for mark, body in blocks(page):
            assert mark in ("run", "slow") or mark.startswith("not "), f"{name(page)}:\n{body}"
        # a command outside of a fence would escape
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert not re.search(r"^ {4,}(python|sh|make|pip) ", text, flags=re.M), name(page)


def test_most_pages_have_something_that_runs():
    assert len(CASES) >= 5


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path / "checkout")


def write_pictures(folder: Path) -> None:
    """lra-image with a few random pictures."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("dev", 16), ("test", 16)):
        items = [
            {"input_ids_0": random.integers(1, 256, 1024, np.int32), "label": np.int32(i % 10)}
            for i in range(count)
        ]
        (folder / f"lra-image.{split}.pickle").write_bytes(pickle.dumps(items, protocol=4))


def small(line: str) -> str:
    """A training command at a small size."""
    if "main_learnable_skewness.py" in line and "--mode eval" not in line:
        code, hash_, remark = line.partition(" #")
        options = [o for o in zip(SMALL[::2], SMALL[1::2], strict=True) if o[0] not in code]
        return " ".join([code, *(f"{key} {value}" for key, value in options)]) + hash_ + remark
    return line


@pytest.mark.parametrize("page, kind", CASES)
def test_commands_of_a_page(page, kind, checkout, tmp_path):
    write_pictures(checkout / "data" / "lra_processed")
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("python", "python3"):
        (programs / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (programs / program).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "2",
    }
    ran = 0
    for mark, body in blocks(page):
        if mark != kind:
            continue
        lines = body.replace("\\\n", " ").splitlines()
        script = "\n".join(["set -eu", *(map(small, lines) if kind == "run" else lines)])
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{name(page)}:\n{script}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran


# ---- the tables of parameters ------------------------------------------------------

TABLES = [ROOT / "docs" / "parameters.md", ROOT / "README.zh.md"]
ROW = re.compile(r"^\| `(--[a-z_]+|(?:dataset|model|training)\.[a-z_]+)` \|(.*)\|$", re.M)
COLUMNS = ["lra-image", "lra-listops", "lra-text", "lra-retrieval", "lra-nature", "lra-news1"]
COLUMNS += ["lra-yelp1", "lra-pathfinder32-curv_contour_length_14", "planted"]


def options(parse) -> dict[str, object]:
    """--flag -> default of a command's parser."""
    return {f"--{name}": value for name, value in vars(parse([])).items()}


@pytest.mark.parametrize("page", TABLES, ids=name)
def test_every_flag_and_no_other_is_explained(page):
    both = options(main_inference.parse_arguments)
    both.update(options(main_learnable_skewness.parse_arguments))
    rows = ROW.findall(page.read_text(encoding="utf-8"))
    explained = {flag: cells for flag, cells in rows if flag.startswith("--")}
    assert explained.keys() == both.keys()
    for flag, cells in explained.items():
        default, meaning = (cell.strip() for cell in cells.split("|"))
        assert meaning
        value = both[flag]
        if isinstance(value, str):
            assert default == value, flag


@pytest.mark.parametrize("page", TABLES, ids=name)
def test_every_field_with_its_value_in_every_task(page):
    rows = ROW.findall(page.read_text(encoding="utf-8"))
    cells = {}
    for field, text in rows:
        values = [cell.strip() for cell in text.split("|")]
        if not field.startswith("--"):
            cells.setdefault(field, []).append(values)
    there = {
        f"{section}.{field}"
        for task in Config.values()
        for section, fields in task.items()
        for field in fields
        if field != "create"
    }
    new = {"training.statistics_groups", "training.save_seconds"}  # defaults of the dataclass
    assert cells.keys() == there | new
    for field in there:
        section, _, key = field.partition(".")
        values = [str(Config[task][section].get(key, "-")) for task in COLUMNS]
        if len(set(values)) == 1:
            assert cells[field][0][0] == values[0], field
        else:
            assert cells[field][1] == values, field


# ---- examples of code --------------------------------------------------------------


def test_the_pattern_and_the_criterion_of_the_page_for_contributors(tmp_path, monkeypatch, capsys):
    """Each python block stands in a file of sparsity/, as the page says; a run takes both."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    columns, heavy = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for module, table, key, body in (
        (patterns, "PATTERNS", "columns", columns),
        (criteria, "CRITERIA", "heavy", heavy),
    ):
        added = {**vars(module), table: {}}
        exec(body, added)
        monkeypatch.setitem(getattr(module, table), key, added[table][key])
    tiny.write_data(tmp_path / "data")
    given = ["--pattern", "columns", "--transition_when", "heavy", "--max_dense_steps", "20"]
    assert tiny.train(tmp_path, *given) == 0
    said = capsys.readouterr().out
    assert "blocks: columns (columns that receive most attention), 4 of 16 a layer" in said
    assert "transition to sparse attention after step" in said
