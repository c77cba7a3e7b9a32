"""Fetch the raw data of a task, whole or not at all, and unpack only what the task needs.

    python preprocess/download.py                       # the LRA release, all its tasks unpacked
    python preprocess/download.py --task lra-retrieval  # only tsv_data unpacked
    python preprocess/download.py --task lra-text       # an archive, read as it is

A cut download continues where it stopped (HTTP Range, guarded by the server's ETag, so that two
versions of a file are never glued together); what arrives is checked for size and SHA-256 before
it gets its name. pathfinder_tfds.gz of the LRA publishers is not needed by anything here.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess.sources import archive_members

CHECKSUMS = Path(__file__).with_name("checksums.txt")
CHUNK = 1 << 20
# a read waits until this much has come: what a stalled connection had sent of it is lost
NETWORK_CHUNK = 16 << 10
# kept free beside what is written: a full disk harms everything else that runs
DISK_MARGIN = 256 << 20
OFFLINE = " (without a network, fetch the file elsewhere and name it with --source)"
LRA_RELEASE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"


@dataclass(frozen=True)
class Download:
    """Where a task's raw data is published.

    Attributes:
        url: address of the archive.
        name: file name below --output_dir.
        folder: folder of the archive to unpack; None: create_*.py reads the archive as it is.
        last_files: names that end the unpacking early once all were seen; empty: read to the end.
    """

    url: str
    name: str
    folder: str | None = None
    last_files: tuple[str, ...] = ()


DOWNLOADS = {
    "lra-image": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz"
    ),
    "lra-listops": Download(
        LRA_RELEASE,
        "lra_release.gz",
        "listops-1000",
        ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"),
    ),
    "lra-retrieval": Download(
        LRA_RELEASE,
        "lra_release.gz",
        "tsv_data",
        ("new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv", "new_aan_pairs.test.tsv"),
    ),
    "lra-pathfinder": Download(LRA_RELEASE, "lra_release.gz", "pathfinder32"),
    "lra-text": Download(
        "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz", "aclImdb_v1.tar.gz"
    ),
    "lra-news1": Download(
        "https://drive.google.com/uc?export=download&id=0Bz8a_Dbh9QhbUDNpeUdjb0wxRms",
        "ag_news_csv.tar.gz",
    ),
    "lra-yelp1": Download(
        "https://s3.amazonaws.com/fast-ai-nlp/yelp_review_polarity_csv.tgz",
        "yelp_review_polarity_csv.tgz",
    ),
}


class _Retry(Exception):
    """A fault that may pass: the message says what happened."""


class _NoConnection(_Retry):
    """The server could not be reached at all."""


def read_checksums(path: Path) -> dict[str, tuple[str, int]]:
    """URL -> (SHA-256 in lower case, size in bytes); # starts a comment line."""
    known = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 3 or not _is_sha256(fields[0]) or not fields[1].isdecimal():
            raise ValueError(f"{path} line {number}: expected SHA-256, size in bytes and URL")
        known[fields[2]] = (fields[0].lower(), int(fields[1]))
    return known


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{64}", text) is not None


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    retries: int = 5,
    backoff: float = 1.0,
    notify: Callable[[str], None] = print,
) -> str:
    """Fetch `url` into `path`; a part from an earlier call is continued.

    Args:
        url: http or https; redirects are followed.
        path: where the complete and checked file goes; `path`.part holds an incomplete one.
        sha256: expected digest in hex; None: not checked.
        size: expected bytes; None: only the server's own word is checked.
        timeout: seconds without a byte that count as a stall; at most 10 without a connection.
        retries: attempts in a row without a new byte before giving up; at most one if the server
            was never reached in this call, as without a network nothing passes by waiting.
        backoff: seconds before the first of those attempts, doubled each time, at most 60.
    Returns: SHA-256 of the file.
    Raises: ValueError or OSError with one sentence on what is wrong and what to do; the part that
        has arrived stays for the next call.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another download is writing {part}: wait for it") from None
        fruitless, reached = 0, False
        while True:
            before = file.tell()
            try:
                _fetch(url, file, part, size, timeout, notify)
                break
            except _Retry as fault:
                fruitless = 0 if file.tell() > before else fruitless + 1
                reached = reached or not isinstance(fault, _NoConnection)
                if fruitless > (retries if reached else min(retries, 1)):
                    elsewhere = "" if reached else OFFLINE
                    raise ValueError(
                        f"giving up on {url} after {fruitless} attempts: {fault}; "
                        f"{_bytes(file.tell())} are kept, the same command continues there"
                        f"{elsewhere}"
                    ) from None
                wait = min(60.0, backoff * 2 ** max(0, fruitless - 1))
                notify(f"{fault}; trying again in {wait:g} s ({_bytes(file.tell())} so far)")
                time.sleep(wait)
        file.flush()
        os.fsync(file.fileno())
        digest = _digest(part)
        wrong = None
        if size is not None and file.tell() != size:
            wrong = f"has {file.tell():,} bytes, expected {size:,}"
        elif sha256 is not None and digest != sha256.lower():
            wrong = f"has SHA-256 {digest}, expected {sha256.lower()}"
        _info_path(part).unlink(missing_ok=True)
        if wrong:
            unverified = path.with_name(path.name + ".unverified")
            os.replace(part, unverified)
            raise ValueError(
                f"what came from {url} {wrong}; it is kept as {unverified} for you to look at"
            )
        os.replace(part, path)
    return digest


def _fetch(url, file, part, size, timeout, notify) -> None:
    """One request: append what is missing. Raises _Retry, or ValueError for what won't pass."""
    have = file.tell()
    info = _read_info(part, url)
    headers = {"Accept-Encoding": "identity"}
    if have and info:
        headers["Range"] = f"bytes={have}-"
        if info["validator"]:
            headers["If-Range"] = info["validator"]
    try:
        limits = (min(timeout, 10), timeout)
        response = requests.get(url, headers=headers, stream=True, timeout=limits)
    except requests.TooManyRedirects:
        raise ValueError(f"{url} redirects in circles") from None
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise ValueError(f"{url} is not a usable address: {error}") from None
    except requests.exceptions.InvalidSchema:
        raise ValueError(f"{url} is not a usable address: http or https is needed") from None
    except requests.ConnectTimeout:
        raise _NoConnection(f"no connection to {_host(url)} within {limits[0]:g} s") from None
    except requests.Timeout:
        raise _Retry(f"no answer from {_host(url)} within {timeout:g} s") from None
    except requests.exceptions.SSLError as error:
        raise ValueError(f"the certificate of {_host(url)} is not accepted: {error}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _NoConnection(f"no connection to {_host(url)} ({_cause(error)})") from None

    with response:
        status = response.status_code
        start, total = _content_range(response)
        if status == 416 and have:
            if total == have:
                return
            _restart(file, part)
            raise _Retry("the part on disk does not fit the server's file: starting again")
        if status in (408, 425, 429) or status >= 500:
            raise _Retry(f"{_host(url)} answered {status} {response.reason}")
        if status not in (200, 206):
            raise ValueError(
                f"{response.url} answered {status} {response.reason}: give a working address "
                "with --url, or fetch the file by other means and use it with --source"
            )
        if status == 206 and (start != have or (info and info["total"] not in (None, total))):
            _restart(file, part)
            raise _Retry("the server's answer does not continue the part on disk: starting again")
        if status == 200:
            if have:
                notify(f"{_host(url)} cannot continue a download: starting from the first byte")
            _restart(file, part)
            have = 0
            total = _content_length(response)
        if total is not None and size is not None and total != size:
            raise ValueError(f"{url} offers {total:,} bytes, expected {size:,}: not the same file")
        _check_disk(part.parent, (total or size or have) - have)
        _write_info(part, url, response, total)
        with tqdm(
            total=total,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.stem,
            disable=None,
        ) as bar:
            _copy(response, file, bar, timeout, url)
    if total is not None and file.tell() < total:
        raise _Retry(f"the connection ended at {file.tell():,} of {total:,} bytes")
    if total is not None and file.tell() > total:
        _restart(file, part)
        raise _Retry(f"{_host(url)} sent more than the {total:,} bytes it had announced")


def _copy(response, file, bar, timeout, url) -> None:
    """Body to file. `raw`: requests itself would unpack a .gz sent with Content-Encoding."""
    try:
        while chunk := response.raw.read(NETWORK_CHUNK, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
        raise _Retry(f"{_host(url)} sent nothing for {timeout:g} s") from None
    except (urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise _Retry(f"the connection to {_host(url)} broke ({_cause(error)})") from None
    finally:
        # what has arrived survives a kill from here on
        file.flush()


def _restart(file, part: Path) -> None:
    file.seek(0)
    file.truncate()
    _info_path(part).unlink(missing_ok=True)


def _info_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_info(part: Path, url: str) -> dict | None:
    """What the first answer said about the file; None if unknown or about another address."""
    try:
        info = json.loads(_info_path(part).read_text())
        return info if info["url"] == url and {"validator", "total"} <= info.keys() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_info(part: Path, url: str, response, total: int | None) -> None:
    etag = response.headers.get("ETag", "")
    # If-Range allows strong validators only
    strong = etag if etag.startswith('"') else None
    validator = strong or response.headers.get("Last-Modified")
    temporary = _info_path(part).with_suffix(".tmp")
    temporary.write_text(json.dumps({"url": url, "validator": validator, "total": total}))
    os.replace(temporary, _info_path(part))


def _content_range(response) -> tuple[int | None, int | None]:
    """(first byte, total bytes) of a Content-Range header; None where it does not say."""
    match = re.fullmatch(
        r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if not match:
        return None, None
    start, total = match.groups()
    return (
        int(start) if start is not None else None,
        int(total) if total != "*" else None,
    )


def _content_length(response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + DISK_MARGIN > free:
        raise ValueError(
            f"{folder} has {_bytes(free)} free, {_bytes(needed + DISK_MARGIN)} are needed: "
            "make room or choose another --output_dir"
        )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _cause(error: BaseException) -> str:
    """The innermost reason in a chain of network errors, short."""
    while True:
        inner = next((a for a in error.args if isinstance(a, BaseException)), None)
        inner = inner or getattr(error, "reason", None)
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    return str(error).split(">: ")[-1][:200]


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def unpack(
    archive: Path, wanted: dict[str, tuple[str, ...]], output_dir: Path, notify=print
) -> int:
    """Unpack the folders of a task from the LRA release below output_dir/lra_release/lra_release.

    Args:
        archive: tar or tar.gz.
        wanted: folder name -> names that complete it; an empty tuple: everything in it.
    Returns: number of files now there. Files of the right size are kept, so a killed call can be
        repeated; every other file gets its name once it is complete.
    Raises: ValueError if the archive is damaged, holds none of a folder, or has a path that would
        leave output_dir; OSError.
    """
    base = output_dir / "lra_release" / "lra_release"
    count, found = 0, dict.fromkeys(wanted, 0)
    open_names = {(folder, name) for folder, names in wanted.items() for name in names}
    endless = any(not names for names in wanted.values())
    with tqdm(unit=" files", desc="unpacking", disable=None) as bar:
        for name, size, file in archive_members(archive):
            parts = PurePosixPath(name).parts
            folder = next((part for part in parts[:-1] if part in wanted), None)
            if folder is None:
                continue
            inner = parts[parts.index(folder) :]
            if ".." in inner:
                raise ValueError(f"{archive} holds the unsafe path {name}: not unpacked")
            target = base.joinpath(*inner)
            found[folder] += 1
            if not (target.is_file() and target.stat().st_size == size):
                target.parent.mkdir(parents=True, exist_ok=True)
                if size >= CHUNK:
                    _check_disk(target.parent, size)
                temporary = target.with_name(target.name + ".part")
                with open(temporary, "wb") as out:
                    shutil.copyfileobj(file, out, CHUNK)
                os.replace(temporary, target)
            count += 1
            bar.update()
            open_names.discard((folder, target.name))
            if not endless and not open_names:
                break
    absent = [folder for folder, number in found.items() if not number]
    absent += [f"{folder}/{name}" for folder, name in sorted(open_names) if folder not in absent]
    if absent:
        raise ValueError(f"{archive} holds no {', no '.join(absent)}")
    notify(f"{count:,} files are in {base}")
    return count


def main(argv: list[str] | None = None) -> int:
    lra = [task for task, source in DOWNLOADS.items() if source.folder]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=list(DOWNLOADS),
        help=f"what to fetch, repeatable (default: {', '.join(lra)})",
    )
    parser.add_argument("--url", help="fetch the archive from here instead")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="(default: data)")
    parser.add_argument("--sha256", help="digest that the archive must have, in hex")
    parser.add_argument(
        "--checksums", type=Path, default=CHECKSUMS, help="file of known digests, yours to extend"
    )
    parser.add_argument(
        "--timeout", type=float, default=30, help="seconds without a byte that count as a stall"
    )
    parser.add_argument(
        "--retries", type=int, default=5, help="attempts in a row without a new byte"
    )
    args = parser.parse_args(argv)
    try:
        _run(args, args.task or lra)
    except KeyboardInterrupt:
        print("stopped: the same command continues here", file=sys.stderr)
        return 130
    except OSError as error:
        hint = ": make room, then repeat the command" if error.errno == errno.ENOSPC else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, tasks: list[str]) -> None:
    if args.sha256 is not None and not _is_sha256(args.sha256):
        raise ValueError("--sha256 takes 64 hexadecimal digits")
    if not args.timeout > 0 or args.retries < 0:
        raise ValueError("--timeout must be above 0 seconds and --retries at least 0")
    names = {DOWNLOADS[task].name for task in tasks}
    if len(names) > 1 and (args.url or args.sha256):
        raise ValueError(f"--url and --sha256 are for one archive, not for {', '.join(names)}")
    known = read_checksums(args.checksums)
    for name in sorted(names):
        sources = [DOWNLOADS[task] for task in tasks if DOWNLOADS[task].name == name]
        url = args.url or sources[0].url
        sha256, size = known.get(url, (None, None))
        if args.sha256:
            sha256, size = args.sha256.lower(), None
        archive = args.output_dir / name
        if archive.exists():
            print(f"{archive} is there already", flush=True)
            if sha256 and _digest(archive) != sha256:
                raise ValueError(
                    f"{archive} does not have SHA-256 {sha256}: remove it to fetch it"
                )
        else:
            print(f"fetching {url} to {archive}", flush=True)
            digest = download(
                url,
                archive,
                sha256=sha256,
                size=size,
                timeout=args.timeout,
                retries=args.retries,
            )
            if sha256 is None:
                print(
                    f"not verified, no digest is known; to check later copies add to "
                    f"{args.checksums}:\n{digest}  {archive.stat().st_size}  {url}"
                )
        wanted = {source.folder: source.last_files for source in sources if source.folder}
        if wanted:
            unpack(archive, wanted, args.output_dir)
            print(f"{archive} may be deleted now")
        else:
            print(f"no need to unpack it: give it to the create script with --source {archive}")


if __name__ == "__main__":
    sys.exit(main())
