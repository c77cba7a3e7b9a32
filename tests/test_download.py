"""preprocess/download.py against a local server that misbehaves in every way we could think of."""

import gzip
import hashlib
import http.server
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from preprocess import download

BODY = bytes(range(256)) * 1024 + b"the end"  # 262,151 bytes
SENT = 50_000  # before a cut or a stall
STALLED = SENT // download.NETWORK_CHUNK * download.NETWORK_CHUNK
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `faults` holds a method name per coming request, then requests go well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.faults = BODY, '"one"', []
        self.requests = []  # (path, Range, If-Range)
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/file.gz"

    def handle_error(self, request, client_address):
        pass  # clients that leave early are the point here


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted, self.headers.get("If-Range")))
        fault = self.server.faults.pop(0) if self.server.faults else "well"
        getattr(self, fault)(self.server.body, wanted)

    def start(self, status, **headers):
        self.send_response(status)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def well(self, body, wanted, send=None, announced=None):
        """The whole or the wanted range; `send` bytes of it, though `announced` are promised."""
        condition = self.headers.get("If-Range")
        if wanted and condition in (None, self.server.etag):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if first >= len(body):
                self.start(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
                return
            part = body[first:]
            content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.start(206, Content_Length=len(part), Content_Range=content_range)
        else:
            part = body
            self.start(200, Content_Length=announced or len(part))
        self.wfile.write(part[:send])

    def cut(self, body, wanted):
        self.well(body, wanted, send=SENT)
        self.close_connection = True

    def stall(self, body, wanted):
        self.well(body, wanted, send=SENT)
        self.wfile.flush()
        self.server.released.wait(20)

    def silent(self, body, wanted):
        self.server.released.wait(20)

    def promises_more(self, body, wanted):
        self.well(body, None, announced=len(body) + 1000)
        self.close_connection = True

    def promises_less(self, body, wanted):
        self.well(body, None, announced=len(body) - 1000)
        self.close_connection = True

    def no_range(self, body, wanted):
        self.start(200, Content_Length=len(body))
        self.wfile.write(body)

    def no_length(self, body, wanted):
        self.start(200)
        self.wfile.write(body)
        self.close_connection = True

    def wrong_range(self, body, wanted):
        """Answers the wrong place: glued together it would look complete."""
        part = body[1000:]
        self.start(
            206, Content_Length=len(part), Content_Range=f"bytes 1000-{len(body) - 1}/{len(body)}"
        )
        self.wfile.write(part)

    def claims_gzip(self, body, wanted):
        self.start(200, Content_Length=len(body), Content_Encoding="gzip")
        self.wfile.write(body)

    def not_found(self, body, wanted):
        self.start(404, Content_Length=0)

    def broken(self, body, wanted):
        self.start(500, Content_Length=0)

    def busy(self, body, wanted):
        self.start(503, Content_Length=0)

    def moved(self, body, wanted):
        self.start(302, Location="/elsewhere.gz", Content_Length=0)

    def circle(self, body, wanted):
        self.server.faults.insert(0, "circle")
        self.start(302, Location=self.path, Content_Length=0)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server, path, **options):
    notes = []
    options = {"timeout": 0.3, "retries": 2, "backoff": 0.01, "notify": notes.append} | options
    digest = download.download(server.url, path, **options)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    left = [name for name in os.listdir(path.parent) if name != path.name]
    assert not left, f"left behind: {left}"
    return notes


def test_a_file_comes_whole_and_checked(server, tmp_path):
    path = tmp_path / "new" / "file.gz"
    fetch(server, path, sha256=DIGEST.upper(), size=len(BODY))
    assert path.read_bytes() == BODY
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("faults", "resumed", "says"),
    [
        (["cut"], True, "connection"),
        (["cut", "cut", "cut", "cut", "cut"], True, "connection"),  # each brought something
        (["stall"], True, "sent nothing for 0.3 s"),
        (["silent"], False, "no answer"),
        (["broken", "busy"], False, "500"),
        (["cut", "broken", "busy"], True, "503"),
        (["cut", "wrong_range"], False, "does not continue"),
        (["cut", "no_range"], False, "starting from the first byte"),
        (["moved"], False, ""),
        (["no_length"], False, ""),
        (["claims_gzip"], False, ""),
    ],
)
def test_faults_that_pass_end_in_the_right_file(server, tmp_path, faults, resumed, says):
    server.faults = list(faults)
    notes = fetch(server, tmp_path / "file.gz", sha256=DIGEST)
    assert (tmp_path / "file.gz").read_bytes() == BODY
    assert says in "\n".join(notes)
    last_range, last_condition = server.requests[-1][1:]
    assert (last_range is not None) == (resumed or "no_range" in faults)
    assert last_condition == ('"one"' if last_range else None)
    if "moved" in faults:
        assert server.requests[-1][0] == "/elsewhere.gz"


@pytest.mark.parametrize(
    ("faults", "options", "says"),
    [
        (["not_found"], {}, "404 Not Found"),
        (["circle"], {}, "redirects in circles"),
        (["broken"] * 3, {}, "giving up on .* after 3 attempts: .* answered 500"),
        (["silent"] * 3, {}, "no answer from 127.0.0.1:[0-9]+ within 0.3 s"),
        ([], {"size": len(BODY) + 1}, "offers 262,151 bytes, expected 262,152"),
        ([], {"sha256": "0" * 64}, f"has SHA-256 {DIGEST}, expected 0000"),
        (["promises_less"], {"size": len(BODY)}, "offers 261,151 bytes, expected 262,151"),
        (["promises_less"], {"sha256": DIGEST}, "has SHA-256 .* it is kept as .*unverified"),
        (["promises_more"] * 9, {}, "the connection .*; trying|giving up"),
        (["no_length"], {"size": len(BODY) - 1}, "has 262,151 bytes, expected 262,150"),
    ],
)
def test_faults_that_stay_are_one_sentence(server, tmp_path, faults, options, says):
    server.faults = faults
    path = tmp_path / "file.gz"
    with pytest.raises(ValueError, match=says):
        fetch(server, path, **options)
    assert not path.exists()


def test_nobody_listens(tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"no connection to 127.0.0.1:9 .*refused.*--source"):
        download.download("http://127.0.0.1:9/x", tmp_path / "x", notify=lambda _: None)
    assert time.monotonic() - start < 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux drops what does not fit")
def test_a_network_that_swallows_everything(tmp_path):
    """A firewall that drops packets: one more try, whatever --retries says, and what to do."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for fills in (first, second):
            fills.setblocking(False)
            fills.connect_ex(deaf.getsockname())
        url = "http://{}:{}/x".format(*deaf.getsockname())
        notices = []
        with pytest.raises(ValueError, match=r"after 2 attempts: no connection .* within 0.3 s"):
            download.download(url, tmp_path / "x", timeout=0.3, backoff=0.1, notify=notices.append)
        assert len(notices) == 1


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1/x", "http://", "file:///etc/passwd"])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(ValueError, match="not a usable address"):
        download.download(url, tmp_path / "x", retries=0, notify=lambda _: None)


def test_a_later_call_continues_an_earlier_one(server, tmp_path):
    server.faults = ["cut", "not_found"]
    with pytest.raises(ValueError, match="404"):
        fetch(server, tmp_path / "file.gz")
    assert (tmp_path / "file.gz.part").stat().st_size == 50_000
    fetch(server, tmp_path / "file.gz", sha256=DIGEST)
    assert server.requests[-1][1:] == ("bytes=50000-", '"one"')


def test_a_changed_file_is_never_glued_to_an_old_part(server, tmp_path):
    server.faults = ["cut", "not_found"]
    with pytest.raises(ValueError, match="404"):
        fetch(server, tmp_path / "file.gz")
    server.body, server.etag = BODY[::-1], '"two"'
    fetch(server, tmp_path / "file.gz")
    assert (tmp_path / "file.gz").read_bytes() == BODY[::-1]


def test_without_an_etag_the_total_must_agree(server, tmp_path):
    server.etag = None
    server.faults = ["cut", "not_found"]
    with pytest.raises(ValueError, match="404"):
        fetch(server, tmp_path / "file.gz")
    server.body = BODY[::-1] + b"longer"
    notes = fetch(server, tmp_path / "file.gz")
    assert (tmp_path / "file.gz").read_bytes() == server.body
    assert "does not continue" in notes[0]


def test_a_part_of_unknown_origin_is_not_continued(server, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(b"something else")
    fetch(server, tmp_path / "file.gz", sha256=DIGEST)
    assert server.requests[-1][1] is None


def test_a_complete_part_is_taken(server, tmp_path):
    server.faults = ["cut", "not_found"]
    with pytest.raises(ValueError, match="404"):
        fetch(server, tmp_path / "file.gz")
    (tmp_path / "file.gz.part").write_bytes(BODY)
    fetch(server, tmp_path / "file.gz", sha256=DIGEST)
    assert len(server.requests) == 3


def test_a_killed_download_continues(server, tmp_path):
    server.faults = ["stall"]
    path = tmp_path / "file.gz"
    code = "import sys; from preprocess.download import download; from pathlib import Path\n"
    code += "download(sys.argv[1], Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, server.url, str(path)])
    part = tmp_path / "file.gz.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= STALLED):
        assert time.monotonic() < deadline, "nothing of the part reached the disk"
        time.sleep(0.02)
    child.kill()
    child.wait()
    fetch(server, path, sha256=DIGEST)
    assert server.requests[-1][1] == f"bytes={STALLED}-"


def test_two_at_once(server, tmp_path):
    server.faults = ["stall"]
    thread = threading.Thread(
        target=lambda: fetch(server, tmp_path / "file.gz", timeout=1, sha256=DIGEST)
    )
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another download is writing"):
        download.download(server.url, tmp_path / "file.gz", notify=lambda _: None)
    thread.join()
    assert (tmp_path / "file.gz").read_bytes() == BODY


def test_a_full_disk_is_known_before_the_first_byte(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=r"0.00 MB free, 0\.27 GB are needed"):
        fetch(server, tmp_path / "file.gz")
    assert (tmp_path / "file.gz.part").stat().st_size == 0


# ---- the release, and the command ---------------------------------------------------------------

FILES = {
    "lra_release/lra_release/README": b"hello",
    "lra_release/lra_release/listops-1000/basic_train.tsv": b"Source\tTarget\r\n",
    "lra_release/lra_release/listops-1000/basic_val.tsv": b"v",
    "lra_release/lra_release/listops-1000/basic_test.tsv": b"t",
    "lra_release/lra_release/tsv_data/new_aan_pairs.train.tsv": b"1.0\ta\tb\tc\td\n" * 100,
    "lra_release/lra_release/tsv_data/new_aan_pairs.eval.tsv": b"e",
    "lra_release/lra_release/tsv_data/new_aan_pairs.test.tsv": b"t",
    "lra_release/lra_release/pathfinder32/curv_baseline/imgs/0/sample_0.png": b"png",
    "lra_release/lra_release/pathfinder32/curv_baseline/imgs/0/sample_172.png": b"",
    "lra_release/lra_release/pathfinder32/curv_baseline/metadata/0.npy": b"imgs/0 sample_0.png",
}


def release(files=FILES) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("tasks", "folders"),
    [
        ([], ("listops-1000", "tsv_data", "pathfinder32")),
        (["--task", "lra-retrieval"], ("tsv_data",)),
        (["--task", "lra-listops", "--task", "lra-pathfinder"], ("listops-1000", "pathfinder32")),
    ],
)
def test_the_command_unpacks_what_the_task_needs(server, tmp_path, capsys, tasks, folders):
    server.body = release()
    options = [*tasks, "--url", server.url, "--output_dir", str(tmp_path)]
    assert download.main(options) == 0
    wanted = {name for name in FILES if name.split("/")[2] in folders}
    assert unpacked(tmp_path) == wanted | {"lra_release.gz"}
    for name in wanted:
        assert (tmp_path / name).read_bytes() == FILES[name]
    out = capsys.readouterr().out
    assert hashlib.sha256(server.body).hexdigest() in out, "an unknown digest is printed"
    assert download.main(options) == 0, "a second run has nothing to do"
    assert len(server.requests) == 1


def test_the_checksums_file_is_used_and_can_be_extended(server, tmp_path, capsys):
    server.body = release()
    digest = hashlib.sha256(server.body).hexdigest()
    checksums = tmp_path / "sums"
    options = ["--task", "lra-listops", "--url", server.url, "--output_dir", str(tmp_path)]
    options += ["--checksums", str(checksums)]
    checksums.write_text(f"# ours\n{'0' * 64}  {len(server.body)}  {server.url}\n")
    assert download.main(options) == 2
    assert "has SHA-256" in capsys.readouterr().err
    checksums.write_text(f"{digest}  {len(server.body)}  {server.url}\n")
    assert download.main(options) == 0
    assert "not verified" not in capsys.readouterr().out
    checksums.write_text("no checksum line\n")
    assert download.main(options) == 2
    assert "line 1: expected SHA-256, size in bytes and URL" in capsys.readouterr().err


def test_the_checksums_we_ship_can_be_read():
    known = download.read_checksums(download.CHECKSUMS)
    assert set(known) <= {source.url for source in download.DOWNLOADS.values()}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<!DOCTYPE html><p>please log in", "cut off, damaged or not a tar archive"),
        (gzip.compress(b"not a tar"), "cut off, damaged or not a tar archive"),
        (release()[:-40], "cut off, damaged or not a tar archive"),
        (release({"other/file": b"x"}), "holds no listops-1000, no tsv_data, no pathfinder32"),
        (
            release({k: v for k, v in FILES.items() if "eval" not in k}),
            "holds no tsv_data/new_aan_pairs.eval.tsv",
        ),
        (release({"lra_release/tsv_data/../../../escape": b"x"}), "unsafe path"),
    ],
)
def test_an_archive_that_is_not_the_release(server, tmp_path, capsys, body, says):
    server.body = body
    output_dir = tmp_path / "inside"
    assert download.main(["--url", server.url, "--output_dir", str(output_dir)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert unpacked(tmp_path) == {f"inside/{name}" for name in unpacked(output_dir)}
    assert not [name for name in unpacked(output_dir) if name.endswith(".part")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sha256", "abc"], "64 hexadecimal digits"),
        (["--timeout", "0"], "must be above 0 seconds"),
        (["--task", "lra-text", "--task", "lra-yelp1", "--url", "http://x/"], "for one archive"),
        (["--checksums", "/none/at/all"], "No such file"),
        (["--output_dir", "/dev/null/x", "--task", "lra-text"], "Not a directory"),
    ],
)
def test_options_that_cannot_be(capsys, options, says):
    assert download.main(options) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


def test_links_and_devices_in_an_archive_are_ignored(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("basic_train.tsv", "basic_val.tsv", "basic_test.tsv"):
            link = tarfile.TarInfo(f"listops-1000/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="holds no listops-1000"):
        download.unpack(tmp_path / "a.tar", {"listops-1000": ()}, tmp_path)
    assert unpacked(tmp_path) == {"a.tar"}
