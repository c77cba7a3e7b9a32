"""The manifest of a data set, `<task>.json` beside its three pickles.

The create scripts write it last: with it the set is complete. It says what the pickles are made
from and what they must be, so that a mixture of two sets is found before anybody trains on it.
Pickles without a manifest (the original's) are taken as they are.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.recording.files import write_file

FORMAT = 1
SPLITS = ("train", "dev", "test")


def path_of(folder, stem: str) -> Path:
    return Path(folder) / f"{stem}.json"


def write(folder, stem: str, facts: dict[str, Any]) -> None:
    """Replaces the manifest at once. {"replacing": True}: the pickles are changing places."""
    path = path_of(folder, stem)
    write_file(path, json.dumps({"format": FORMAT, **facts}, indent=1).encode())


def read(folder, stem: str) -> dict[str, Any] | None:
    """The manifest; None if there is none. Raises UserError if it is no manifest, OSError."""
    path = path_of(folder, stem)
    try:
        facts = json.loads(path.read_bytes())
        if facts["format"] != FORMAT:
            raise UserError(f"format {facts['format']}, known is {FORMAT}")
        if not facts.get("replacing"):
            for split in SPLITS:
                fact = facts["splits"][split]
                fact["size"], fact["examples"], fact["sha256"]
            facts["trial"], facts["about"], facts["warnings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no manifest of a data set ({error}): make the set again, or delete this "
            "file to use the pickles as they are"
        ) from None
    return facts


def is_whole(folder, stem: str) -> bool:
    """Whether a set is there that a trial must not replace; pickles of unknown origin are one."""
    pickles = [Path(folder) / f"{stem}.{split}.pickle" for split in SPLITS]
    if not all(path.exists() for path in pickles):
        return False
    facts = read(folder, stem)
    return facts is None or not (facts.get("replacing") or facts["trial"])


def check(folder, stem: str) -> dict[str, Any] | None:
    """The manifest of the set that is there, its sizes compared; None without a manifest, or with
    one that describes other files altogether (the original's pickles copied over ours).

    Raises: UserError if the three pickles do not belong together.
    """
    facts = read(folder, stem)
    if facts is None:
        return None
    if facts.get("replacing"):
        raise UserError(
            f"{path_of(folder, stem)}: a create script was stopped while it replaced the pickles "
            f"of {stem}, which may not belong together: run it again"
        )
    sizes = {}
    for split in SPLITS:
        with contextlib.suppress(FileNotFoundError):
            sizes[split] = os.stat(Path(folder) / f"{stem}.{split}.pickle").st_size
    wrong = [split for split, size in sizes.items() if size != facts["splits"][split]["size"]]
    if wrong and len(wrong) == len(sizes):
        return None
    if wrong:
        raise mixture(Path(folder) / f"{stem}.{wrong[0]}.pickle")
    return facts


def expected_sha256(pickle: Path) -> str | None:
    """What the manifest beside a pickle says its SHA-256 is; None if it says nothing of it.

    Raises: UserError as `check` does.
    """
    stem, _, split = pickle.name.removesuffix(".pickle").rpartition(".")
    facts = check(pickle.parent, stem) if split in SPLITS and stem else None
    return None if facts is None else facts["splits"][split]["sha256"]


def mixture(pickle: Path) -> UserError:
    """For a pickle that is not the one its manifest describes."""
    name = pickle.name.removesuffix(".pickle").rpartition(".")[0] + ".json"
    return UserError(
        f"{pickle} is not of the set that {name} describes: the pickles do not belong together; "
        f"make the set again with its create script, or delete {name} if they are meant"
    )


def describe(folder, stem: str) -> list[str]:
    """What a model is trained on, for people, one line each; nothing without a manifest."""
    facts = check(folder, stem)
    if facts is None:
        path = path_of(folder, stem)
        return [f"{path} is stale, it describes other pickles: ignored"] if path.exists() else []
    counts = " / ".join(f"{facts['splits'][split]['examples']:,}" for split in SPLITS)
    lines = [", ".join([f"data of {stem}: {counts} examples", *facts["about"]])]
    if facts["trial"]:
        lines.append(f"this is a trial set, not the whole data of {stem}: {facts['trial']}")
    return lines + [
        text for text in facts["warnings"] if facts["trial"] not in text or not facts["trial"]
    ]
