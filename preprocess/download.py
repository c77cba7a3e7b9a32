"""Fetches the published archives, whole or not at all.

    python preprocess/download.py --task lra-text   # without converting, for a node with a network

The create scripts call `fetch` themselves. A cut download continues where it stopped. What a
server sends is compared with what is there already before anything is written, and nothing that
has arrived is given up before its replacement is known to be the archive.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from preprocess import writer
from training.errors import UserError
from training.recording import files

CHUNK = 1 << 20
NETWORK_CHUNK = 16 << 10  # of this what a stalled connection had sent is lost
OVERLAP = 64 << 10  # asked for again when a download goes on: does the server have the same file?
DISK_MARGIN = 256 << 20  # kept free: a full disk harms everything else that runs
CONNECT = 5.0  # seconds for a name and a connection together
STALL = 30.0  # seconds without a byte
RETRIES = 5  # attempts in a row without a new byte
BACKOFF = 1.0  # seconds before the first of those, doubled each time, at most 60


@dataclass(frozen=True)
class Archive:
    """A published archive, a tar or tar.gz."""

    what: str  # its name for people
    tasks: tuple[str, ...]  # who reads it
    url: str  # the publishers' address
    size: int  # bytes; if no digest is published only about
    sha256: str | None = None  # as TensorFlow Datasets publishes it; None: nobody does


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


def fetch(
    name: str,
    folder: str | os.PathLike,
    *,
    mirror: str | None = None,
    sha256: str | None = None,
    notify: Callable[[str], None] = print,
) -> Path:
    """The path of the archive `name`, a key of ARCHIVES, in `folder`, fetched if it is not there;
    what has arrived of it is `name`.part.

    mirror: address of a folder that has the archive under this very name. Its digest is said, not
        compared: that of the publishers binds their own address.
    sha256: digest that the file must have, in hex, wherever it is from.
    notify: gets a line before it starts, one for each fault that may pass, one with the digest.
    Raises: UserError or OSError with one sentence on what is wrong and what to do."""
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
    about = f"{'' if size else 'about '}{_bytes(archive.size)}"
    notify(f"fetching {archive.what} ({about}) from {_shown(url)} to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_Transfer(url, path, archive, size, notify)) as transfer:
        if path.exists():  # another process has just finished it
            return path
        transfer.check_disk(archive.size if mirror is None else 0)
        transfer.persist()
        files.sync(transfer.file, transfer.part)
        digest, received, wrong = writer.sha256(transfer.part), transfer.have, None
        if size is not None and received != size:
            wrong = f"has {received:,} bytes, expected {size:,}"
        elif sha256 is not None and digest != sha256.lower():
            wrong = f"has SHA-256 {digest}, expected {sha256.lower()}"
        transfer.info.unlink(missing_ok=True)
        if wrong:
            unverified = path.with_name(name + ".unverified")
            os.replace(transfer.part, unverified)
            raise UserError(f"what came from {_shown(url)} {wrong}; it is kept as {unverified}")
        os.replace(transfer.part, path)
        files.sync_folder(path.parent)
    verified = "as expected" if sha256 else "not verified: no digest is known for this address"
    notify(f"{path}: {received:,} bytes, sha256 {digest} ({verified})")
    return path


def _check_present(path: Path, archive: Archive, sha256: str | None, notify) -> None:
    """Raises UserError if a file under the final name cannot be the archive."""
    if path.is_dir():
        raise UserError(f"{path} is a folder where {archive.what} should be: move it away")
    with open(path, "rb") as file:
        wrong = _not_an_archive(file.read(NETWORK_CHUNK))
    if not wrong and sha256 is not None and writer.sha256(path) != sha256.lower():
        wrong = f"a file without SHA-256 {sha256.lower()}"
    if wrong:
        raise UserError(f"{path} is {wrong}, not {archive.what}: delete it to fetch it again")
    size = path.stat().st_size
    if archive.sha256 is not None and size != archive.size:
        sizes = f"{size:,} bytes instead of the {archive.size:,} that are published"
        notify(f"{path} is there already, with {sizes}: delete it to fetch it again")


class _Transfer:
    """The requests that fill one part. Beside it lies what is known of it (`info`: address,
    validator, total), and a whole file that comes anew (`fresh`)."""

    def __init__(self, url: str, path: Path, archive: Archive, size: int | None, notify):
        self.url, self.path, self.size, self.notify = url, path, size, notify
        names = (path.with_name(path.name + end) for end in (".part", ".part.json", ".new"))
        self.part, self.info, self.fresh = names
        self.what = archive.what
        self.whole = False  # ask for all of it: a range did not fit
        self.otherwise = f"--mirror names another address, or put the file at {path}"
        try:
            self.file = files.open_locked(self.part, buffering=0)
        except BlockingIOError:
            raise UserError(f"another download is writing {self.part}: wait for it") from None

    def close(self) -> None:
        if not self.have:
            self.part.unlink(missing_ok=True)
        self.file.close()

    @property
    def have(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def persist(self) -> None:
        """Attempts until the part is whole. Raises UserError for what does not pass by waiting."""
        fruitless, reached, begin = 0, False, time.monotonic()
        while True:
            before = self.have
            try:
                self.attempt()
                return
            except _Retry as fault:
                fruitless = 0 if self.have > before else fruitless + 1
                reached = reached or not isinstance(fault, _NoConnection)
                if not reached and (fruitless > 1 or time.monotonic() - begin > CONNECT / 2):
                    todo = f"fetch {_shown(self.url)} elsewhere and put it at {self.path}"
                    raise UserError(f"{fault}; without a network, {todo}") from None
                if fruitless > RETRIES:
                    gave_up = f"giving up on {_shown(self.url)} after {fruitless} attempts"
                    kept = f"{_bytes(self.have)} are kept, the same command continues there"
                    raise UserError(f"{gave_up}: {fault}; {kept}") from None
                wait = min(60.0, BACKOFF * 2 ** max(0, fruitless - 1))
                self.notify(f"{fault}; trying again in {wait:g} s ({_bytes(self.have)} so far)")
                time.sleep(wait)
            except KeyboardInterrupt:
                kept = f"{_bytes(self.have)} are kept in {self.part}"
                self.notify(f"{kept}: the same command goes on")
                raise

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
                where = _shown(response.url)
                raise UserError(f"{where} is {wrong}, not {self.what}: {self.otherwise}")
            self.check_disk(total or 0)
            self._receive(response, chunk, start, total)

    def _placed(self, response, known: dict | None) -> tuple[int, int | None]:
        """(first byte, total) of the body, whatever was asked for. Raises: as `attempt`, if it is
        not the file, or not a place that can be continued."""
        status, host = response.status_code, _host(self.url)
        if status in (408, 425, 429) or (status >= 500 and status != 511):
            raise _Retry(f"{host} answered {status} {response.reason}")
        if status == 416 and not self.whole:
            raise self._mismatch("the part on disk is longer than the server's file")
        if status not in (200, 206):
            answer = f"{_shown(response.url)} answered {status} {response.reason}"
            raise UserError(f"{answer}: {self.otherwise}")
        text = response.headers.get("Content-Range", "").strip()
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text)
        start = int(match[1]) if match else None
        total = int(match[2]) if match and match[2] != "*" else None
        text = response.headers.get("Content-Length", "")
        length = int(text) if text.isdecimal() else None
        if status == 200 and (start is None or length == total):
            if "Range" in response.request.headers:
                self.notify(
                    f"{host} sends the whole file: the part stays until there is more of it"
                )
            return 0, length
        if start is None or start > self.have or (start + (length or 0) > (total or 1 << 62)):
            raise self._mismatch(f"{host} sent another part of the file than was asked for")
        if known and known["total"] not in (None, total):
            raise self._mismatch(f"{host} has a file of another size than the part on disk is of")
        return start, total

    def _mismatch(self, message: str) -> Exception:
        """For an answer that does not continue what is on disk: the whole file is asked for next,
        once."""
        if self.whole:
            return UserError(f"{message}, twice: {self.otherwise}")
        self.whole = True
        return _Retry(message)

    def _receive(self, response, chunk: bytes, start: int, total: int | None) -> None:
        """Body to disk, behind what the part has already, which is compared. A whole file that
        comes anew goes beside the part and takes its place once there is more of it."""
        have, position, noted, complete = self.have, start, False, False
        beside = start == 0 and have > 0
        out = self.file
        if beside:
            self.check_disk(total or have, 0)
            out = open(self.fresh, "w+b", buffering=0)  # noqa: SIM115 (it may become the part)
            files.lock(out, self.fresh)
        try:
            shown = {"unit": "B", "unit_scale": True, "desc": self.path.name, "disable": None}
            with tqdm(total=total, initial=start, **shown) as bar:
                while chunk:
                    old = b"" if beside else os.pread(out.fileno(), len(chunk), position)
                    if not chunk.startswith(old):
                        raise self._mismatch("the part on disk does not fit the server's file")
                    if not (beside or noted) and len(chunk) > len(old):
                        self._note(response, total)
                        noted = True
                    new = memoryview(chunk)[len(old) :]
                    while new:  # an unbuffered file may take less at once
                        new = new[out.write(new) :]
                    position += len(chunk)
                    bar.update(len(chunk))
                    chunk = _read(response, self.url)
            if position < (have if total is None else total):
                raise _Retry(f"the connection ended at {position:,} of {total or have:,} bytes")
            if not beside and position < have:
                raise self._mismatch("the part on disk is longer than the server's file")
            complete = True
        finally:
            if beside:
                if complete or position > have:
                    self._note(response, total)
                    os.replace(self.fresh, self.part)
                    self.file, out = out, self.file
                else:
                    self.fresh.unlink()
                out.close()

    def check_disk(self, total: int, kept: int | None = None) -> None:
        needed = total - (self.have if kept is None else kept) + DISK_MARGIN
        writer.check_free_space(self.path.parent, needed)

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
        if response.status_code != 407:
            return response
        response.close()
        status, reason = 407, response.reason
    except requests.TooManyRedirects:
        raise UserError(f"{_shown(url)} redirects in circles") from None
    except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
        if "SOCKS" in str(error):
            raise UserError(f"{who} needs PySocks: pip install pysocks") from None
        raise UserError(f"{_shown(url)} leads to no usable address: {error}") from None
    except requests.exceptions.ProxyError as error:
        refused = re.search(r"Tunnel connection failed: (\d+) ([^')]*)", str(error))
        if not refused:
            raise _NoConnection(f"no connection through {who} ({_cause(error)})") from None
        status, reason = int(refused[1]), refused[2]
    except requests.ReadTimeout:
        raise _Retry(f"no answer from {host} within {STALL:g} s") from None
    except requests.exceptions.SSLError as error:
        hint = "if a proxy replaces it, REQUESTS_CA_BUNDLE names the file of the proxy's own"
        refusal = f"the certificate of {host} is not accepted ({_cause(error)}); {hint}"
        raise UserError(refusal) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _NoConnection(f"no connection to {host} ({_cause(error)})") from None
    if status >= 500:
        raise _Retry(f"{who} answered {status} {reason}")
    hint = ": write the variable as http://USER:PASSWORD@HOST:PORT" if status == 407 else ""
    raise UserError(f"{who} refuses with {status} {reason}{hint}")


def _knock(address: str, who: str) -> None:
    """Raises _NoConnection unless something listens there: the system's own waiting, for a name
    or for each of a host's addresses, takes minutes."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
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
    if error is not None:
        slow = isinstance(error, TimeoutError)
        why = f"within {CONNECT:g} s" if slow else f"({_cause(error)})"
        raise _NoConnection(f"no connection to {who} {why}")


def _read(response, url: str) -> bytes:
    """The next piece of the body. `raw`: requests itself would unpack a .gz sent with
    Content-Encoding."""
    try:
        return response.raw.read(NETWORK_CHUNK, decode_content=False)
    except (urllib3.exceptions.ReadTimeoutError, TimeoutError):
        raise _Retry(f"{_host(url)} sent nothing for {STALL:g} s") from None
    except (urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise _Retry(f"the connection to {_host(url)} broke ({_cause(error)})") from None


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
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    tasks = {task: name for name, archive in ARCHIVES.items() for task in archive.tasks}
    parser.add_argument("--task", required=True, choices=list(tasks), help="whose archive")
    folder, text = Path(__file__).resolve().parents[1] / "data", "(default: data/ of the project)"
    parser.add_argument("--output_dir", type=Path, default=folder, help=text)
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
