"""Fetches the published archives, whole or not at all.

    python preprocess/download.py --task lra-text   # without converting, for a node with a network

The create scripts call `fetch` themselves. A cut download continues where it stopped. What a
server sends is compared with what is there already before anything is written, and nothing that
has arrived is given up before its replacement is known to be the archive. Proxies are taken from
http_proxy, https_proxy, all_proxy and no_proxy, as everywhere.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.errors import UserError
from training.recording import files

CHUNK = 1 << 20
# a read waits until this much has come: what a stalled connection had sent of it is lost
NETWORK_CHUNK = 16 << 10
# asked for once more when a download goes on, to see that the server has the same file
OVERLAP = 64 << 10
# kept free beside what is written: a full disk harms everything else that runs
DISK_MARGIN = 256 << 20
CONNECT = 5.0  # seconds for a name and a connection together
STALL = 30.0  # seconds without a byte
RETRIES = 5  # attempts in a row without a new byte
BACKOFF = 1.0  # seconds before the first of those, doubled each time, at most 60


@dataclass(frozen=True)
class Archive:
    """A published archive, a tar or tar.gz.

    Attributes:
        what: its name for people.
        tasks: who reads it.
        url: the publishers' address.
        size: bytes; if no digest is published only about.
        sha256: as TensorFlow Datasets publishes it; None: nobody does.
    """

    what: str
    tasks: tuple[str, ...]
    url: str
    size: int
    sha256: str | None = None


ARCHIVES = {
    "cifar-10-binary.tar.gz": Archive(
        "CIFAR-10",
        ("lra-image",),
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    "lra_release.gz": Archive(
        "the Long Range Arena release",
        ("lra-listops", "lra-retrieval", "lra-pathfinder"),
        "https://storage.googleapis.com/long-range-arena/lra_release.gz",
        7_700_000_000,
    ),
    "aclImdb_v1.tar.gz": Archive(
        "the IMDb reviews",
        ("lra-text",),
        "http://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        84_125_825,
        "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    ),
    "ag_news_csv.tar.gz": Archive(
        "AG News",
        ("lra-news1",),
        "https://drive.google.com/uc?export=download&id=0Bz8a_Dbh9QhbUDNpeUdjb0wxRms",
        11_784_327,
        "4e2fc37d369e6e317a8b62d0d2f11d379f8c3dde60c07c35a46b069a246498ad",
    ),
    "yelp_review_polarity_csv.tgz": Archive(
        "the Yelp reviews",
        ("lra-yelp1",),
        "https://s3.amazonaws.com/fast-ai-nlp/yelp_review_polarity_csv.tgz",
        166_373_201,
        "528f22e286cad085948acbc3bea7e58188416546b0e364d0ae4ca0ce666abe35",
    ),
}


class _Retry(Exception):
    """A fault that may pass: the message says what happened."""


class _NoConnection(_Retry):
    """Neither the server nor the proxy could be reached."""


class _Mismatch(_Retry):
    """The answer does not continue what is on disk: the whole file is asked for next."""


def fetch(
    name: str,
    folder: str | os.PathLike,
    *,
    mirror: str | None = None,
    sha256: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """The archive `name` in `folder`, fetched if it is not there; `folder`/`name`.part holds what
    has arrived of it.

    Args:
        name: a key of ARCHIVES.
        mirror: address of a folder that has the archive under this very name. Its digest is said,
            not compared: that of the publishers binds their own address.
        sha256: digest that the file must have, in hex, wherever it is from.
        notify: gets a line before it starts (what, how large, from where, where to), a line for
            each fault that may pass, and one with the digest at the end.
    Returns: the path.
    Raises: UserError or OSError with one sentence on what is wrong and what to do.
    """
    archive, path = ARCHIVES[name], Path(folder) / name
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError("--sha256 takes 64 hexadecimal digits")
    if path.exists():
        _check_present(path, archive, sha256, notify)
        return path
    url = archive.url if mirror is None else f"{mirror.rstrip('/')}/{name}"
    size = None
    if mirror is None and sha256 is None and archive.sha256 is not None:
        sha256, size = archive.sha256, archive.size
    about = _bytes(archive.size) if size else f"about {_bytes(archive.size)}"
    notify(f"fetching {archive.what} ({about}) from {_shown(url)} to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_Transfer(url, path, archive, size, notify)) as transfer:
        if path.exists():  # another process has just finished it
            return path
        _check_disk(path.parent, (size or (archive.size if mirror is None else 0)) - transfer.have)
        _persist(transfer, notify)
        files.sync(transfer.file, transfer.part)
        digest = _digest(transfer.part)
        received = transfer.have
        wrong = None
        if size is not None and received != size:
            wrong = f"has {received:,} bytes, expected {size:,}"
        elif sha256 is not None and digest != sha256.lower():
            wrong = f"has SHA-256 {digest}, expected {sha256.lower()}"
        transfer.info.unlink(missing_ok=True)
        if wrong:
            unverified = path.with_name(name + ".unverified")
            os.replace(transfer.part, unverified)
            raise UserError(
                f"what came from {_shown(url)} {wrong}; it is kept as {unverified} for you to "
                "look at"
            )
        os.replace(transfer.part, path)
        files.sync_folder(path.parent)
    verified = "as expected" if sha256 else "not verified: no digest is known for this address"
    notify(f"{path}: {received:,} bytes, sha256 {digest} ({verified})")
    return path


def _check_present(path: Path, archive: Archive, sha256: str | None, notify) -> None:
    """Whether a file under the final name can be the archive. Raises UserError if not."""
    if path.is_dir():
        raise UserError(f"{path} is a folder where {archive.what} should be: move it away")
    with open(path, "rb") as file:
        wrong = _not_an_archive(file.read(NETWORK_CHUNK))
    if not wrong and sha256 is not None and _digest(path) != sha256.lower():
        wrong = f"a file without SHA-256 {sha256.lower()}"
    if wrong:
        raise UserError(f"{path} is {wrong}, not {archive.what}: delete it to fetch it again")
    size = path.stat().st_size
    if archive.sha256 is not None and size != archive.size:
        notify(
            f"{path} is there already, with {size:,} bytes instead of the {archive.size:,} that "
            "are published: delete it to fetch it again"
        )


def _persist(transfer: "_Transfer", notify: Callable[[str], None]) -> None:
    """Attempts until the part is whole. Raises UserError for what does not pass by waiting."""
    fruitless, reached, begin = 0, False, time.monotonic()
    while True:
        before = transfer.have
        try:
            transfer.attempt()
            return
        except _Retry as fault:
            fruitless = 0 if transfer.have > before else fruitless + 1
            reached = reached or not isinstance(fault, _NoConnection)
            kept = f"{_bytes(transfer.have)} are kept"
            if not reached and (fruitless > 1 or time.monotonic() - begin > CONNECT / 2):
                raise UserError(
                    f"{fault}; without a network, fetch {_shown(transfer.url)} elsewhere and put "
                    f"it at {transfer.path}"
                ) from None
            if fruitless > RETRIES:
                raise UserError(
                    f"giving up on {_shown(transfer.url)} after {fruitless} attempts: {fault}; "
                    f"{kept}, the same command continues there"
                ) from None
            wait = min(60.0, BACKOFF * 2 ** max(0, fruitless - 1))
            notify(f"{fault}; trying again in {wait:g} s ({_bytes(transfer.have)} so far)")
            time.sleep(wait)
        except KeyboardInterrupt:
            notify(
                f"{_bytes(transfer.have)} are kept in {transfer.part}: the same command goes on"
            )
            raise


class _Transfer:
    """The requests that fill one part.

    Beside the part lies what is known of it (`info`): address, validator and total. A whole file
    that turns out to differ from the part is written beside it too (`fresh`) and takes its place
    once it is the longer one.
    """

    def __init__(self, url: str, path: Path, archive: Archive, size: int | None, notify):
        self.url, self.path = url, path
        self.part = _beside(path, ".part")
        self.info = _beside(path, ".part.json")
        self.fresh = _beside(path, ".new")
        self.what, self.size, self.notify = archive.what, size, notify
        self.whole = False  # ask for all of it: a range did not fit
        self.otherwise = f"--mirror names another address, or put the file at {path}"
        try:
            self.file = files.open_locked(self.part, buffering=0)
        except BlockingIOError:
            raise UserError(f"another download is writing {self.part}: wait for it") from None

    def close(self) -> None:
        self.file.close()

    @property
    def have(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def attempt(self) -> None:
        """One request. Raises _Retry, or UserError for what does not pass by waiting."""
        known = None if self.whole else self._known()
        headers = {"Accept-Encoding": "identity"}
        first = 0
        if self.have and known:
            first = max(0, self.have - OVERLAP)
            headers["Range"] = f"bytes={first}-"
            if known["validator"] and known["url"] == _shown(self.url):
                headers["If-Range"] = known["validator"]
        with _get(self.url, headers) as response:
            start, total = self._placed(response, known)
            chunk = _read(response, self.url)
            wrong = _not_an_archive(chunk) if start == 0 else None
            if wrong is None and self.size is not None and total not in (None, self.size):
                wrong = f"a file of {total:,} bytes ({self.size:,} are published)"
            if wrong is not None:
                raise UserError(
                    f"{_shown(response.url)} is {wrong}, not {self.what}: {self.otherwise}"
                )
            _check_disk(self.path.parent, (total or self.have) - self.have)
            self._receive(response, chunk, start, total)

    def _placed(self, response, known: dict | None) -> tuple[int, int | None]:
        """(first byte, total) of the body, whatever was asked for.

        Raises: as `attempt`, if it is not the file, or not a place that can be continued.
        """
        status, host = response.status_code, _host(self.url)
        if status in (408, 425, 429) or (status >= 500 and status != 511):
            raise _Retry(f"{host} answered {status} {response.reason}")
        if status == 416 and not self.whole:
            raise self._mismatch("the part on disk is longer than the server's file")
        if status not in (200, 206):
            raise UserError(
                f"{_shown(response.url)} answered {status} {response.reason}: {self.otherwise}"
            )
        start, total = _content_range(response)
        length = _content_length(response)
        if status == 200 and (start is None or length == total):
            if "Range" in response.request.headers:
                self.notify(f"{host} sends the whole file: what is there already is compared")
            return 0, length
        if start is None or start > self.have or (start + (length or 0) > (total or 1 << 62)):
            raise self._mismatch(f"{host} sent another part of the file than was asked for")
        if known and known["total"] not in (None, total):
            raise self._mismatch(f"{host} has a file of another size than the part on disk is of")
        return start, total

    def _mismatch(self, message: str) -> Exception:
        if self.whole:
            return UserError(f"{message}, twice: {self.otherwise}")
        self.whole = True
        return _Mismatch(message)

    def _receive(self, response, chunk: bytes, start: int, total: int | None) -> None:
        """Body to disk: what the part has already is compared, the rest is appended."""
        have, position, complete, noted = self.have, start, False, False
        out = self.file
        bar = tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=self.path.name,
            disable=None,
        )
        try:
            while chunk:
                if out is self.file and position < have:
                    old = os.pread(out.fileno(), min(len(chunk), have - position), position)
                    if not chunk.startswith(old):
                        out = self._start_fresh(start, position, total)
                new = chunk[max(0, have - position) :] if out is self.file else chunk
                if new and out is self.file and not noted:
                    self._note(response, total)
                    noted = True
                _write(out, new)
                position += len(chunk)
                bar.update(len(chunk))
                chunk = _read(response, self.url)
            if position < (have if total is None else total):
                raise _Retry(f"the connection ended at {position:,} of {total or have:,} bytes")
            if out is self.file and position < have:
                out = self._start_fresh(start, position, total)
            complete = True
        finally:
            bar.close()
            if out is not self.file:
                if complete or position > have:
                    self._note(response, total)
                    os.replace(self.fresh, self.part)
                    self.file, out = out, self.file
                else:
                    self.fresh.unlink()
                out.close()

    def _start_fresh(self, start: int, position: int, total: int | None) -> BinaryIO:
        """A file beside the part that begins with the `position` bytes that are the same."""
        if start:
            raise self._mismatch("the part on disk does not fit the server's file")
        _check_disk(self.path.parent, total or self.have)
        fresh = open(self.fresh, "w+b", buffering=0)  # noqa: SIM115 (it becomes the part)
        files.lock(fresh, self.fresh)
        for offset in range(0, position, CHUNK):
            size = min(CHUNK, position - offset)
            _write(fresh, os.pread(self.file.fileno(), size, offset))
        return fresh

    def _known(self) -> dict | None:
        """What an earlier answer said about the part."""
        try:
            known = json.loads(self.info.read_text())
            return known if {"url", "validator", "total"} <= known.keys() else None
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None

    def _note(self, response, total: int | None) -> None:
        etag = response.headers.get("ETag", "")
        # If-Range allows strong validators only
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        known = {"url": _shown(self.url), "validator": validator, "total": total}
        files.write_file(self.info, json.dumps(known).encode())


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it: an unbuffered file may take less at once."""
    while data:
        data = data[file.write(data) :]


def _not_an_archive(head: bytes) -> str | None:
    """What a file with these first bytes is, if it is no tar or tar.gz."""
    tar = head
    if head[:2] == b"\x1f\x8b":
        try:
            tar = zlib.decompressobj(wbits=31).decompress(head, tarfile.BLOCKSIZE)
        except zlib.error:
            return "a damaged gzip file"
    try:
        tarfile.TarInfo.frombuf(tar[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        return None
    except tarfile.HeaderError:
        pass
    if re.match(rb"\s*<(!doctype|html|\?xml|!--|head|body)", head, re.IGNORECASE):
        return "a web page (of a login, an error or a confirmation)"
    return "a file without a tar archive in it" if head else "an empty file"


def _get(url: str, headers: dict):
    """The answer, its body still to be read. Raises _Retry, or UserError if no waiting helps."""
    host = _host(url)
    if urlsplit(url).scheme not in ("http", "https") or not host:
        raise UserError(f"{_shown(url)} is not a usable address: http or https is needed")
    proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    who = f"the proxy {_shown(proxy or '')} of http_proxy, https_proxy or all_proxy"
    _knock(proxy or url, who if proxy else host)
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=(CONNECT, STALL))
    except requests.TooManyRedirects:
        raise UserError(f"{_shown(url)} redirects in circles") from None
    except requests.exceptions.InvalidSchema as error:
        if "SOCKS" in str(error):
            raise UserError(f"{who} needs PySocks: pip install pysocks") from None
        raise UserError(f"{_shown(url)} leads to an unusable address: {error}") from None
    except requests.exceptions.ProxyError as error:
        refused = re.search(r"Tunnel connection failed: (\d+) ([^')]*)", str(error))
        if not refused:
            raise _NoConnection(f"no connection through {who} ({_cause(error)})") from None
        status, reason = int(refused[1]), refused[2]
    except requests.exceptions.InvalidURL as error:
        raise UserError(f"{_shown(url)} is not a usable address: {error}") from None
    except requests.ConnectTimeout:
        raise _NoConnection(f"no connection to {host} within {CONNECT:g} s") from None
    except requests.Timeout:
        raise _Retry(f"no answer from {host} within {STALL:g} s") from None
    except requests.exceptions.SSLError as error:
        raise UserError(
            f"the certificate of {host} is not accepted ({_cause(error)}); if a proxy replaces "
            "it, REQUESTS_CA_BUNDLE names the file of the proxy's own"
        ) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _NoConnection(f"no connection to {host} ({_cause(error)})") from None
    else:
        if response.status_code != 407:
            return response
        response.close()
        status, reason = 407, response.reason
    if status >= 500:
        raise _Retry(f"{who} answered {status} {reason}")
    hint = ": write the variable as http://USER:PASSWORD@HOST:PORT" if status == 407 else ""
    raise UserError(f"{who} refuses with {status} {reason}{hint}")


def _knock(address: str, who: str) -> None:
    """Raises _NoConnection unless something listens there: the system's own waiting, for a name
    or for each of a host's addresses, takes minutes."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 1080)
        if not parts.hostname:
            raise ValueError("it has no host")
    except ValueError as error:
        raise UserError(f"{who} is not a usable address: {error}") from None
    outcome: list[Exception | None] = []

    def knock() -> None:
        try:
            socket.create_connection((parts.hostname, port), CONNECT).close()
            outcome.append(None)
        except (OSError, UnicodeError) as error:
            outcome.append(error)

    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(CONNECT)
    error = outcome[0] if outcome else TimeoutError()
    if isinstance(error, TimeoutError):
        raise _NoConnection(f"no connection to {who} within {CONNECT:g} s")
    if error is not None:
        raise _NoConnection(f"no connection to {who} ({_cause(error)})")


def _read(response, url: str) -> bytes:
    """The next piece of the body. `raw`: requests itself would unpack a .gz sent with
    Content-Encoding."""
    try:
        return response.raw.read(NETWORK_CHUNK, decode_content=False)
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
        raise _Retry(f"{_host(url)} sent nothing for {STALL:g} s") from None
    except (urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise _Retry(f"the connection to {_host(url)} broke ({_cause(error)})") from None


def _content_range(response) -> tuple[int | None, int | None]:
    """(first byte, total bytes) of a Content-Range header; None where it does not say."""
    match = re.fullmatch(
        r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if not match:
        return None, None
    start, total = match.groups()
    return int(start), int(total) if total != "*" else None


def _content_length(response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed + DISK_MARGIN > free:
        raise UserError(
            f"{folder} has {_bytes(free)} free, {_bytes(needed + DISK_MARGIN)} are needed: make "
            "room"
        )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _shown(url: str) -> str:
    """An address without the password in it."""
    return re.sub(r"//[^/@]*@", "//", url)


def _host(url: str) -> str:
    return urlsplit(_shown(url)).netloc


def _cause(error: BaseException) -> str:
    """The innermost reason in a chain of network errors, short."""
    while True:
        inner = next((a for a in error.args if isinstance(a, BaseException)), None)
        inner = inner or getattr(error, "reason", None)
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason.split(">: ")[-1][:200]


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = {task: name for name, archive in ARCHIVES.items() for task in archive.tasks}
    parser.add_argument(
        "--task", required=True, choices=list(tasks), help="whose archive to fetch"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "data",
        help="(default: data/ of the project)",
    )
    parser.add_argument("--mirror", metavar="URL", help="fetch URL/<official file name> instead")
    parser.add_argument("--sha256", help="digest that the archive must have, in hex")
    args = parser.parse_args(argv)
    try:
        fetch(tasks[args.task], args.output_dir, mirror=args.mirror, sha256=args.sha256)
    except KeyboardInterrupt:
        return 130
    except (OSError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
