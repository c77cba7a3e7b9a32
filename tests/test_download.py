"""preprocess/download.py against local servers and proxies that misbehave in every way we could
think of. `NAME` is a published archive; here the server's address and digest stand for its own."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import os
import random
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
from training.errors import UserError

NAME = "cifar-10-binary.tar.gz"
ROOT = Path(__file__).parents[1]


def archive(seed: int = 0, size: int = 262_144, compress=gzip.compress) -> bytes:
    """A tar.gz of one file of random bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.size = size
        tar.addfile(member, io.BytesIO(random.Random(seed).randbytes(size)))
    return compress(buffer.getvalue())


BODY = archive()
OTHER = archive(seed=1)  # of the same length, give or take
DIGEST = hashlib.sha256(BODY).hexdigest()
PAGE = b"<!DOCTYPE html>\n<html><body>Please accept our terms.</body></html>" + b" " * 1000
SENT = 150_000  # before a cut or a stall
STALLED = SENT // download.NETWORK_CHUNK * download.NETWORK_CHUNK


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`; `faults` holds a method name per coming request, then requests go well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.faults = BODY, '"one"', []
        self.requests = []  # (path, Range, If-Range)
        self.released = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.address}/official/{NAME}"

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

    def do_CONNECT(self):
        getattr(self, self.server.faults.pop(0))(b"", None)

    def start(self, status, **headers):
        self.send_response(status)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def well(self, body, wanted, send=None, announced=None, status=206):
        """The whole or the wanted range; `send` bytes of it, though `announced` are promised."""
        condition = self.headers.get("If-Range")
        if wanted and condition in (None, self.server.etag):
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if first >= len(body):
                self.start(416, Content_Range=f"bytes */{len(body)}", Content_Length=0)
                return
            part = body[first:]
            content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self.start(status, Content_Length=len(part), Content_Range=content_range)
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

    def range_as_200(self, body, wanted):
        """The range that was asked for, with the status of a whole file."""
        self.well(body, wanted, status=200)

    def whole_with_range(self, body, wanted):
        size = len(body)
        self.start(200, Content_Length=size, Content_Range=f"bytes 0-{size - 1}/{size}")
        self.wfile.write(body)

    def no_range(self, body, wanted):
        self.start(200, Content_Length=len(body))
        self.wfile.write(body)

    def no_range_cut(self, body, wanted):
        self.start(200, Content_Length=len(body))
        self.wfile.write(body[: SENT // 2])
        self.close_connection = True

    def no_length(self, body, wanted):
        self.start(200)
        self.wfile.write(body)
        self.close_connection = True

    def no_length_cut(self, body, wanted):
        self.no_length(body[: SENT // 2], wanted)

    def wrong_range(self, body, wanted):
        """Answers the wrong place: glued together it would look complete."""
        part = body[1000:]
        self.start(
            206, Content_Length=len(part), Content_Range=f"bytes 1000-{len(body) - 1}/{len(body)}"
        )
        self.wfile.write(part)

    def gap(self, body, wanted):
        """Answers a place beyond what was asked for."""
        part = body[SENT + 1000 :]
        place = f"bytes {SENT + 1000}-{len(body) - 1}/{len(body)}"
        self.start(206, Content_Length=len(part), Content_Range=place)
        self.wfile.write(part)

    def page(self, body, wanted):
        """A captive portal: whatever was asked for, its own page."""
        self.start(200, Content_Length=len(PAGE), Content_Type="text/html")
        self.wfile.write(PAGE)

    def page_as_range(self, body, wanted):
        """A cache that glues: a page in the place of the range."""
        part = PAGE[:10] * (len(body) // 10 + 1)
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        part = part[: len(body) - first]
        place = f"bytes {first}-{len(body) - 1}/{len(body)}"
        self.start(206, Content_Length=len(part), Content_Range=place)
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

    def wants_password(self, body, wanted):
        self.start(407, Content_Length=0)

    def forbidden(self, body, wanted):
        self.start(403, Content_Length=0)

    def moved(self, body, wanted):
        self.start(302, Location="/elsewhere.gz", Content_Length=0)

    def circle(self, body, wanted):
        self.server.faults.insert(0, "circle")
        self.start(302, Location=self.path, Content_Length=0)


def serve():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


server = pytest.fixture(serve, name="server")
mirror = pytest.fixture(serve, name="mirror")


@pytest.fixture(autouse=True)
def published(request, monkeypatch):
    """NAME is published by `server`; waiting is short; no proxy of this machine."""
    for name in ("http", "https", "all", "no"):
        for variable in (f"{name}_proxy", f"{name}_proxy".upper()):
            monkeypatch.delenv(variable, raising=False)
    for name, value in (("STALL", 0.3), ("CONNECT", 0.3), ("RETRIES", 2), ("BACKOFF", 0.01)):
        monkeypatch.setattr(download, name, value)
    if "server" in request.fixturenames:
        publish(monkeypatch, url=request.getfixturevalue("server").url)


def publish(monkeypatch, **changes):
    defaults = {"size": len(BODY), "sha256": DIGEST}
    archive = dataclasses.replace(download.ARCHIVES[NAME], **defaults | changes)
    monkeypatch.setitem(download.ARCHIVES, NAME, archive)


def fetch(folder, **options):
    """Notices of a call that ends well, leaving one file."""
    notes = []
    path = download.fetch(NAME, folder, notify=notes.append, **options)
    assert path == folder / NAME
    assert os.listdir(folder) == [NAME], "something is left behind"
    return notes


def cut_short(server, folder, sent=SENT):
    """What a connection that broke after `sent` bytes leaves."""
    server.faults = ["cut", "not_found"]
    with pytest.raises(UserError, match="404"):
        fetch(folder)
    assert (folder / f"{NAME}.part").read_bytes() == server.body[:sent]


def test_a_file_comes_whole_and_checked(server, tmp_path):
    notes = fetch(tmp_path / "new")
    assert (tmp_path / "new" / NAME).read_bytes() == BODY
    assert len(server.requests) == 1
    size = f"{len(BODY) / 1e6:.2f} MB"
    assert notes[0] == f"fetching CIFAR-10 ({size}) from {server.url} to {tmp_path / 'new' / NAME}"
    assert notes[1].endswith(f"{len(BODY):,} bytes, sha256 {DIGEST} (as expected)")
    assert not fetch(tmp_path / "new") and len(server.requests) == 1, "nothing to do"


@pytest.mark.parametrize(
    ("faults", "resumed", "says"),
    [
        (["cut"], True, "connection"),
        (["cut", "cut", "cut"], True, "connection"),  # each brought something
        (["stall"], True, "sent nothing for 0.3 s"),
        (["silent"], False, "no answer"),
        (["broken", "busy"], False, "500"),
        (["cut", "broken", "busy"], True, "503"),
        (["cut", "wrong_range"], True, ""),  # begins early: what is there is compared
        (["cut", "gap"], False, "another part of the file"),
        (["cut", "page_as_range"], False, "does not fit the server's file"),
        (["cut", "no_range"], True, "sends the whole file"),
        (["cut", "no_range_cut"], True, "the connection"),
        (["cut", "no_length_cut"], True, "the connection ended at 75,000"),
        (["cut", "range_as_200"], True, ""),
        (["whole_with_range"], False, ""),
        (["moved"], False, ""),
        (["no_length"], False, ""),
        (["claims_gzip"], False, ""),
    ],
)
def test_faults_that_pass_end_in_the_right_file(server, tmp_path, faults, resumed, says):
    server.faults = list(faults)
    notes = fetch(tmp_path)
    assert (tmp_path / NAME).read_bytes() == BODY
    assert says in "\n".join(notes)
    last_range, last_condition = server.requests[-1][1:]
    assert (last_range is not None) == resumed
    assert last_condition == ('"one"' if last_range else None)
    if "moved" in faults:
        assert server.requests[-1][0] == "/elsewhere.gz"


@pytest.mark.parametrize(
    ("faults", "options", "says"),
    [
        (
            ["not_found"],
            {},
            "404 Not Found: --mirror names another address, or put the file at",
        ),
        (["circle"], {}, "redirects in circles"),
        (["broken"] * 3, {}, "giving up on .* after 3 attempts: .* answered 500"),
        (["silent"] * 3, {}, "no answer from 127.0.0.1:[0-9]+ within 0.3 s"),
        (
            [],
            {"size": len(BODY) + 1},
            r"a file of [0-9,]+ bytes \([0-9,]+ are published\), not CIFAR",
        ),
        ([], {"sha256": "0" * 64}, f"has SHA-256 {DIGEST}, expected 0000.*kept as .*unverified"),
        (["promises_less"], {}, r"a file of [0-9,]+ bytes \([0-9,]+ are published\), not CIFAR"),
        (["promises_more"] * 9, {"sha256": None}, "giving up"),
        (["no_length"], {"size": len(BODY) - 1}, "has [0-9,]+ bytes, expected [0-9,]+"),
        (["cut", "gap", "gap"], {}, "another part of the file than was asked for, twice"),
        (["page"], {}, "is a web page .*not CIFAR-10: --mirror"),
    ],
)
def test_faults_that_stay_are_one_sentence(server, tmp_path, monkeypatch, faults, options, says):
    server.faults = faults
    publish(monkeypatch, url=server.url, **options)
    with pytest.raises(UserError, match=says):
        fetch(tmp_path)
    assert not (tmp_path / NAME).exists()


# ---- what has arrived is kept -------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["page", "promises_less", "not_found", "broken", "no_range_cut", "no_length_cut"]
)
def test_no_answer_harms_what_has_arrived(server, tmp_path, monkeypatch, fault):
    cut_short(server, tmp_path)
    server.faults = [fault] * 9
    with pytest.raises(UserError):
        fetch(tmp_path)
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:SENT]
    server.faults = []
    fetch(tmp_path)
    assert server.requests[-1][1] == f"bytes={SENT - download.OVERLAP}-", "it goes on"


@pytest.mark.parametrize("published_digest", [True, False])
@pytest.mark.parametrize("fault", ["page", "page_as_range"])
def test_a_captive_portal_gets_no_name(server, mirror, tmp_path, fault, published_digest):
    """Signing in and repeating the command is enough."""
    options = {} if published_digest else {"mirror": f"{server.address}/official"}
    server.faults = ["cut", "not_found"]
    with pytest.raises(UserError):
        fetch(tmp_path, **options)
    server.faults = ["page"] if fault == "page" else [fault, "page"]
    with pytest.raises(UserError, match="web page"):
        fetch(tmp_path, **options)
    assert set(os.listdir(tmp_path)) == {f"{NAME}.part", f"{NAME}.part.json"}
    fetch(tmp_path, **options)
    assert (tmp_path / NAME).read_bytes() == BODY


def test_another_mirror_continues_the_same_file(server, mirror, tmp_path):
    cut_short(server, tmp_path)
    mirror.etag = '"of the mirror"'
    fetch(tmp_path, mirror=mirror.address)
    assert mirror.requests == [(f"/{NAME}", f"bytes={SENT - download.OVERLAP}-", None)]
    assert (tmp_path / NAME).read_bytes() == BODY


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("where", ["there", "elsewhere"])
def test_a_changed_file_is_never_glued_to_an_old_part(server, mirror, tmp_path, same_size, where):
    """The old part stays until there is more of the new file."""
    server.faults = ["cut", "not_found"]
    with pytest.raises(UserError, match="404"):
        fetch(tmp_path, mirror=server.address)
    other = mirror if where == "elsewhere" else server
    other.body = OTHER if same_size else archive(seed=1, size=200_000)
    other.body += b"\0" * (len(BODY) - len(other.body)) if same_size else b""
    other.etag = '"two"' if where == "there" else None
    other.faults = ["no_range_cut"] * 3
    with pytest.raises(UserError, match="giving up"):
        fetch(tmp_path, mirror=other.address)
    assert (tmp_path / f"{NAME}.part").read_bytes() == BODY[:SENT]
    fetch(tmp_path, mirror=other.address)
    assert (tmp_path / NAME).read_bytes() == other.body


def test_the_new_file_goes_on_where_it_was_cut(server, tmp_path):
    """Once longer than the old part it takes its place."""
    cut_short(server, tmp_path)
    server.body, server.etag = archive(seed=1, size=400_000), '"two"'
    server.faults = ["well", "not_found"]
    real = Handler.well
    options = {"mirror": f"{server.address}/official"}
    server.faults = ["cut_later", "not_found"]
    Handler.cut_later = lambda self, body, wanted: (
        real(self, body, wanted, send=SENT * 2),
        setattr(self, "close_connection", True),
    )
    with pytest.raises(UserError, match="404"):
        fetch(tmp_path, **options)
    assert (tmp_path / f"{NAME}.part").read_bytes() == server.body[: 2 * SENT]
    fetch(tmp_path, **options)
    assert server.requests[-1][1:] == (f"bytes={2 * SENT - download.OVERLAP}-", '"two"')
    assert (tmp_path / NAME).read_bytes() == server.body


def test_a_shorter_file_takes_the_place_when_it_is_whole(server, tmp_path):
    cut_short(server, tmp_path)
    server.body, server.etag = archive(seed=1, size=10_000), None
    fetch(tmp_path, mirror=server.address)
    assert (tmp_path / NAME).read_bytes() == server.body


def test_without_an_etag_the_total_must_agree(server, tmp_path):
    server.etag = None
    cut_short(server, tmp_path)
    server.body = archive(seed=1, size=300_000)
    notes = fetch(tmp_path, mirror=f"{server.address}/official")
    assert (tmp_path / NAME).read_bytes() == server.body
    assert "of another size" in "\n".join(notes)


@pytest.mark.parametrize("part", [b"something else", BODY[:SENT], PAGE, b""])
def test_a_part_of_unknown_origin_is_compared(server, tmp_path, part):
    (tmp_path / f"{NAME}.part").write_bytes(part)
    fetch(tmp_path)
    assert server.requests[-1][1] is None
    assert (tmp_path / NAME).read_bytes() == BODY


def test_a_complete_part_is_taken(server, tmp_path):
    cut_short(server, tmp_path)
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    fetch(tmp_path)
    assert len(server.requests) == 3


def test_a_killed_download_continues(server, tmp_path):
    server.faults = ["stall"]
    code = f"import sys; from preprocess.download import fetch; fetch({NAME!r}, sys.argv[1], "
    code += "mirror=sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path), server.address]
    child = subprocess.Popen(command, cwd=ROOT)
    part = tmp_path / f"{NAME}.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= STALLED):
        assert time.monotonic() < deadline, "nothing of the part reached the disk"
        time.sleep(0.02)
    child.kill()
    child.wait()
    fetch(tmp_path, mirror=server.address)
    assert server.requests[-1][1] == f"bytes={STALLED - download.OVERLAP}-"


def test_two_at_once(server, tmp_path):
    server.faults = ["stall"]
    thread = threading.Thread(target=lambda: fetch(tmp_path))
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another download is writing"):
        download.fetch(NAME, tmp_path, notify=lambda _: None)
    thread.join()
    assert (tmp_path / NAME).read_bytes() == BODY


# ---- what is under the final name ---------------------------------------------------------------


@pytest.mark.parametrize("body", [PAGE, b"", b"\x1f\x8bnot gzip", gzip.compress(b"no tar" * 200)])
def test_a_wrong_file_under_the_final_name_is_to_be_deleted(server, tmp_path, body):
    (tmp_path / NAME).write_bytes(body)
    with pytest.raises(UserError, match=f"{NAME} is an? .*, not CIFAR-10: delete it"):
        fetch(tmp_path)
    assert (tmp_path / NAME).read_bytes() == body and not server.requests


def test_a_file_of_another_size_is_told(server, tmp_path):
    (tmp_path / NAME).write_bytes(BODY[:-5])
    notes = fetch(tmp_path)
    assert f"instead of the {len(BODY):,} that are published: delete it" in notes[0]


def test_the_digest_of_the_publishers_binds_their_address_alone(server, mirror, tmp_path):
    mirror.body = OTHER
    digest = hashlib.sha256(OTHER).hexdigest()
    notes = fetch(tmp_path / "1", mirror=f"{mirror.address}/a/folder/")
    assert mirror.requests[0][0] == f"/a/folder/{NAME}"
    assert "(not verified: no digest is known for this address)" in notes[-1]
    assert digest in notes[-1]
    assert (
        "(as expected)" in fetch(tmp_path / "2", mirror=mirror.address, sha256=digest.upper())[-1]
    )
    with pytest.raises(UserError, match=f"has SHA-256 {digest}, expected {DIGEST}"):
        fetch(tmp_path / "3", mirror=mirror.address, sha256=DIGEST)
    with pytest.raises(UserError, match=f"has SHA-256 {DIGEST}, expected {digest}"):
        fetch(tmp_path / "4", sha256=digest)
    fetch(tmp_path / "2", sha256=digest)
    with pytest.raises(UserError, match=f"a file without SHA-256 {DIGEST}, .*: delete it"):
        fetch(tmp_path / "2", sha256=DIGEST)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        fetch(tmp_path / "5", sha256="abc")


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["tar.gz", "tar"])
def test_the_release_may_be_a_plain_tar(server, tmp_path, compress):
    server.body = archive(compress=compress)
    fetch(tmp_path, mirror=server.address)
    assert (tmp_path / NAME).read_bytes() == server.body


def test_the_digests_that_are_published_are_digests():
    for name, archive in download.ARCHIVES.items():
        assert archive.sha256 is None or re.fullmatch("[0-9a-f]{64}", archive.sha256), name
        assert archive.size > 10**7 and archive.url.startswith("http")


# ---- no network, no room, proxies ---------------------------------------------------------------


def test_a_full_disk_is_known_before_the_first_request(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"needs 0\.3 GB, only 0\.0 GB are free .* make room"):
        fetch(tmp_path)
    assert not server.requests
    publish(monkeypatch, url=server.url, size=7_700_000_000, sha256=None)
    with pytest.raises(UserError, match=r"needs 8\.0 GB"):
        fetch(tmp_path)


def test_nobody_listens(tmp_path, monkeypatch):
    publish(monkeypatch, url="http://127.0.0.1:9/x")
    with pytest.raises(
        ValueError, match=rf"127.0.0.1:9 .*refused.*elsewhere and put it at {tmp_path / NAME}"
    ):
        fetch(tmp_path)
    assert not list(tmp_path.iterdir()), "no empty part is left"


@pytest.fixture
def deaf():
    """An address that never answers."""
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for fills in (first, second):
            fills.setblocking(False)
            fills.connect_ex(deaf.getsockname())
        yield "http://{}:{}".format(*deaf.getsockname())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux drops what does not fit")
def test_a_network_that_swallows_everything(tmp_path, monkeypatch, deaf):
    """A firewall that drops packets."""
    publish(monkeypatch, url=deaf)
    with pytest.raises(UserError, match=r"no connection .* within 0.3 s; without a network"):
        fetch(tmp_path)


@pytest.mark.parametrize("way", ["deaf", "slow names"])
def test_an_unreachable_network_takes_less_than_10_seconds(tmp_path, deaf, way):
    """The command with its real limits: exit code 2 and one sentence."""
    url = f"{deaf}/x" if way == "deaf" else "http://a-name.invalid/x"
    code = "import socket, sys, time\nfrom preprocess import download\n"
    if way != "deaf":  # a resolver that waits for its servers
        code += "socket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"
    code += "sys.exit(download.main(sys.argv[1:]))"
    options = ["--task", "lra-text", "--mirror", url, "--output_dir", str(tmp_path)]
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert time.monotonic() - start < 10
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert "within 5 s; without a network, fetch " in run.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1", "http:///", "file:///etc/passwd"])
def test_an_address_that_is_none(tmp_path, url):
    with pytest.raises(UserError, match="not a usable address"):
        fetch(tmp_path, mirror=url)


@pytest.mark.parametrize(
    ("url", "variable", "scheme", "faults", "says"),
    [
        ("http", "http_proxy", "http", ["wants_password"], "refuses with 407 .*USER:PASSWORD@"),
        ("https", "https_proxy", "http", ["wants_password"], "refuses with 407 .*USER:PASSWORD@"),
        ("https", "https_proxy", "http", ["forbidden"], "refuses with 403"),
        ("https", "https_proxy", "http", ["busy"] * 3, "answered 503"),
        ("http", "all_proxy", "socks5", [], "PySocks"),
        ("http", "http_proxy", "", ["wants_password"], "refuses with 407"),
        ("http", "http_proxy", "http://x:no-port/", [], "not a usable address"),
        ("http", "http_proxy", "http://127.0.0.1:9", [], "no connection to the proxy .*refused"),
    ],
)
def test_a_proxy_is_blamed_for_what_it_does(
    server, tmp_path, monkeypatch, url, variable, scheme, faults, says
):
    if "socks" in scheme:
        pytest.importorskip("requests")
        monkeypatch.setitem(sys.modules, "socks", None)
    server.faults = faults
    place = scheme if "://" in scheme else server.address.replace("http", scheme, 1)
    if not scheme:
        place = server.address.removeprefix("http://")
    if "127.0.0.1:" in place and scheme:
        place = place.replace("://", "://somebody:secret@")
    monkeypatch.setenv(variable, place)
    with pytest.raises(UserError, match=says) as error:
        fetch(tmp_path, mirror=f"{url}://data.example/folder")
    assert "the proxy " in str(error.value) and "secret" not in str(error.value)


def test_a_proxy_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    fetch(tmp_path, mirror="http://data.example/folder")
    assert server.requests[0][0] == f"http://data.example/folder/{NAME}"


def test_a_password_in_an_address_is_not_repeated(server, tmp_path):
    server.faults = ["cut", "not_found"]
    notes = []
    address = server.address.replace("://", "://me:secret@")
    with pytest.raises(UserError) as error:
        download.fetch(NAME, tmp_path, mirror=address, notify=notes.append)
    left = "".join(path.read_text(errors="replace") for path in tmp_path.iterdir())
    assert "secret" not in f"{error.value}{notes}{left}"


# ---- the command --------------------------------------------------------------------------------


def test_the_command(server, tmp_path, capsys):
    options = ["--task", "lra-image", "--output_dir", str(tmp_path)]
    assert download.main(options) == 0
    assert DIGEST in capsys.readouterr().out
    server.faults = ["page"]
    assert download.main([*options[:3], str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "web page" in err
    assert download.main([*options[:3], "/dev/null/x"]) == 2
    assert "Not a directory" in capsys.readouterr().err
