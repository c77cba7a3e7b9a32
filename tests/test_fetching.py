"""The create commands on a machine with nothing prepared, against a local server."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import test_create_cifar10 as cifar
import test_create_pathfinder as pathfinder
import test_create_retrieval as retrieval
import test_create_text as text
from preparing import tar

from training.settings import build_config

ROOT = Path(__file__).resolve().parents[1]
LRA = {
    f"lra_release/lra_release/{name}": data
    for name, data in (
        {f"tsv_data/{name}": data for name, data in retrieval.ROWS.items()}
        | pathfinder._release("curv_contour_length_14")
    ).items()
}
ARCHIVES = {
    "cifar-10-binary.tar.gz": {
        f"cifar-10-batches-bin/{n}": d for n, d in cifar.batches("binary").items()
    },
    "aclImdb_v1.tar.gz": {f"aclImdb/{n}": d for n, d in text.REVIEWS.items()},
    "lra_release.gz": LRA,
}
# command -> (archive, stem, examples)
TASKS = {
    "cifar10": ("cifar-10-binary.tar.gz", "lra-image", [135, 15, 40]),
    "text": ("aclImdb_v1.tar.gz", "lra-text", [6, 3, 3]),
    "retrieval": ("lra_release.gz", "lra-retrieval", [6, 3, 1]),
    "pathfinder": ("lra_release.gz", "lra-pathfinder32-curv_contour_length_14", [16, 2, 2]),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Files with ranges; each byte costs `pause` seconds."""

    pause = 0.0
    requests: ClassVar[list[int]] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.requests.append(first)
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(data) - first))
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        with_pause = range(first, len(data), 4096)
        try:
            for begin in with_pause:
                self.wfile.write(data[begin : begin + 4096])
                time.sleep(self.pause * 4096)
        except OSError:
            pass  # killed, on purpose


@pytest.fixture(scope="module")
def server():
    handler = type("Handler", (Handler,), {"requests": [], "pause": 0.0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.files = {f"/{name}": tar(files) for name, files in ARCHIVES.items()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def clone(tmp_path):
    """A fresh clone: the code alone."""
    for part in ("preprocess", "training"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def environment(clone: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(clone), "no_proxy": "127.0.0.1", **more}


def command(clone: Path, name: str, *options) -> list[str]:
    script = clone / "preprocess" / f"create_{name}.py"
    return [sys.executable, *map(str, [script, *options])]


def mirror(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def finished(clone: Path, stem: str, counts: list[int]) -> dict:
    """The manifest, after checking that it and the pickles are in the clone's own folder."""
    folder = clone / "data" / "lra_processed"
    facts = json.loads((folder / f"{stem}.json").read_text())
    splits = ("train", "dev", "test")
    assert [facts["splits"][split]["examples"] for split in splits] == counts
    for split in splits:
        data = (folder / f"{stem}.{split}.pickle").read_bytes()
        assert hashlib.sha256(data).hexdigest() == facts["splits"][split]["sha256"]
    return facts


@pytest.mark.parametrize("name", TASKS)
def test_one_command_fetches_and_converts(clone, server, name):
    """From a working directory of its own, into the clone's data folder."""
    archive, stem, counts = TASKS[name]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
    options = ("--mirror", mirror(server), "--allow_partial")
    (clone / "elsewhere").mkdir()
    done = run(command(clone, name, *options), cwd=clone / "elsewhere", env=environment(clone))
    assert done.returncode == 0, done.stderr
    facts = finished(clone, stem, counts)
    digest = hashlib.sha256(server.files[f"/{archive}"]).hexdigest()
    assert facts["source"]["sha256"] == digest and digest in done.stdout
    assert mirror(server) in done.stdout and "known are" in "".join(facts["warnings"])
    assert not list((clone / "elsewhere").iterdir())
    # again: nothing is fetched; without --allow_partial the small set is refused, all stays
    server.RequestHandlerClass.requests.clear()
    again = run(command(clone, name), env=environment(clone))
    assert again.returncode == 2 and "--allow_partial" in again.stderr
    assert again.stderr.count("\n") == 1 and not server.RequestHandlerClass.requests
    assert finished(clone, stem, counts) == facts


def test_killed_in_the_download_and_in_the_conversion_it_goes_on(clone, server):
    archive, stem, counts = TASKS["cifar10"]
    start = command(clone, "cifar10", "--mirror", mirror(server), "--allow_partial")
    part = clone / "data" / f"{archive}.part"
    server.RequestHandlerClass.pause = 5e-6  # a few seconds in all
    try:
        process = subprocess.Popen(start, env=environment(clone), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 100_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        server.RequestHandlerClass.pause = 0.0
    there, server.RequestHandlerClass.requests[:] = part.stat().st_size, []
    process = subprocess.Popen(start, env=environment(clone), stdout=subprocess.DEVNULL)
    pickle = clone / "data" / "lra_processed" / f"{stem}.train.pickle.part"
    while not pickle.exists():  # the conversion has begun
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < server.RequestHandlerClass.requests[0] <= there, "it went on where it was"
    server.RequestHandlerClass.requests.clear()
    done = subprocess.run(start, env=environment(clone), capture_output=True, text=True)
    assert done.returncode == 0 and not server.RequestHandlerClass.requests
    finished(clone, stem, counts)


@pytest.mark.parametrize("name", [*TASKS, "agnews", "yelp"])
def test_without_a_network_it_ends_soon_in_one_sentence(clone, name):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"  # nobody listens there
        env = environment(clone, http_proxy=proxy, https_proxy=proxy)
        began = time.monotonic()
        done = subprocess.run(command(clone, name), env=env, capture_output=True, text=True)
    assert done.returncode == 2 and time.monotonic() - began < 10
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert proxy.removeprefix("http://") in done.stderr
    assert not list((clone / "data").rglob("*")), "nothing is left"


@pytest.mark.parametrize("name", [*TASKS, "inaturalist"])
def test_without_a_download_it_says_what_to_do(clone, name):
    options = () if name == "inaturalist" else ("--no_download",)
    done = subprocess.run(
        command(clone, name, *options), env=environment(clone), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    wanted = TASKS[name][0] if name in TASKS else "put them, not unpacked, into data/inaturalist"
    assert wanted in done.stderr and "--source names what you have elsewhere" in done.stderr


def test_listops_says_whether_it_reads_or_generates(clone):
    options = ("--limit", 10, "--workers", 2)  # which find the script's own modules
    run = functools.partial(
        subprocess.run, env=environment(clone), capture_output=True, text=True, timeout=60
    )
    done = run(command(clone, "listops", *options))
    assert done.returncode == 0 and "the examples are generated" in done.stdout, done.stderr
    manifest = clone / "data/lra_processed/lra-listops.json"
    assert json.loads(manifest.read_text())["about"] == ["generated", "14 tokens (no brackets)"]
    rows = b"Source\tTarget\r\n" + b"".join(b"[MAX %d %d ]\t%d\r\n" % (d, d, d) for d in range(10))
    names = ("train", "val", "test")
    files = {f"lra_release/listops-1000/basic_{name}.tsv": rows for name in names}
    (clone / "data/lra_release.gz").write_bytes(tar(files))
    done = run(command(clone, "listops", *options, "--keep_brackets"))
    assert done.returncode == 0 and "reading" in done.stdout and "lra_release.gz" in done.stdout
    assert json.loads(manifest.read_text())["about"] == ["15 tokens"]


def test_too_small_a_disk_is_noticed_before_anything_is_fetched(clone):
    """Pickles and archive together (a disk that has 1 GB free)."""
    (clone / "sitecustomize.py").write_text(
        "import collections, shutil\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(2 * 10**9, 10**9, 10**9)\n"
    )
    env = environment(clone, PYTHONPATH=str(clone))
    done = subprocess.run(
        command(clone, "retrieval"), env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "only 1.0 GB are free" in done.stderr, done.stderr
    assert "13." in done.stderr and "fetching" not in done.stdout  # 6 GB pickles, 7.7 GB archive


def test_the_task_of_the_docs_works_as_it_is_written(clone):
    """docs/data.md, "Your own task": that file, two CSV files, one command; its dict is one."""
    page = (ROOT / "docs/data.md").read_text()
    code = page.split("## Your own task")[1].split("```python\n")[1].split("```")[0]
    assert len(code.split("TASK = ")[1].split("\n)\n")[0].splitlines()) <= 15
    (clone / "my_task.py").write_text(code)
    rows = "".join(f"{i},{5 if i % 2 else 1},review {i}\n" for i in range(30))
    for name, start in (("train.csv", "0"), ("test.csv", "9")):
        text = "id,stars,review\n" + "".join(start + row for row in rows.splitlines(True))
        (clone / name).write_text(text.replace("review ", f"{name} "))
    options = ("--source", clone, "--dev_from_train", 0.3)
    command = [sys.executable, *map(str, (clone / "my_task.py", *options))]
    done = subprocess.run(command, env=environment(clone), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads((clone / "data/lra_processed/my-reviews.json").read_text())
    assert facts["labels"]["test"] == {"bad": 15, "good": 15} and facts["trial"] == ""
    counts = [facts["splits"][split]["examples"] for split in ("train", "dev", "test")]
    assert counts[0] + counts[1] == 30 and counts[1] and counts[2] == 30
    entry = page.split("## Your own task")[1].split("```python\n")[2].split("```")[0]
    tasks: dict = {}
    exec((ROOT / "config.py").read_text() + entry, tasks)
    config, notices = build_config("my-reviews", tasks["Config"]["my-reviews"])
    assert config.model.max_seq_len == 1024 and not notices


def test_every_task_is_listed_with_its_options(clone):
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=clone)
    listing = run([sys.executable, "-m", "preprocess"], env=environment(clone))
    names = [line.split()[0] for line in listing.stdout.splitlines() if line.startswith("  ")]
    assert listing.returncode == 2 and {"lra-text", "lra-pathfinder", "planted"} <= set(names)
    page = (ROOT / "docs/data.md").read_text()
    for name in names:
        help_ = run([sys.executable, "-m", "preprocess", name, "--help"], env=environment(clone))
        assert (
            help_.returncode == 0 and "--output_dir" in help_.stdout and "--limit" in help_.stdout
        )
        assert name.removesuffix("finder") in page
    wrong = run([sys.executable, "-m", "preprocess", "lra-txt"], env=environment(clone))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
