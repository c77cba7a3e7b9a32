"""The report of a run: what it says, and that a browser shows it, from disk, without network."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import report  # noqa: E402

import main_learnable_skewness  # noqa: E402
from sparsity import CRITERIA, PATTERNS  # noqa: E402
from sparsity.criteria import Condition, Criterion  # noqa: E402
from sparsity.patterns import Pattern  # noqa: E402
from training.recording import figures, page, words  # noqa: E402
from training.recording.checkpoint import load_checkpoint  # noqa: E402

FAST = ["--sk", "-100", "--ds", "1e9", "--set", "training.eval_frequency=5"]


# options of each session of a run, and the figures on its page
RUNS = {
    "switched": ([FAST], 6),
    "never switched": ([["--sk", "1e6"]], 6),
    "sparse from the start": ([["--max_dense_steps", "0", "--pattern", "band"]], 5),
    "resumed": ([[*FAST, "--stop_after", "12"], [*FAST, "--resume"]], 6),
    "chosen anew": ([[*FAST, "--pattern", "mass", "--reselect_every", "6"]], 7),
    "of two documents": ([FAST], 6),
}


def write_pairs(folder):
    """A tiny lra-retrieval."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "dev", "test"):
        items = [
            {f"input_ids_{i}": random.integers(1, 200, 64).astype(np.int32) for i in (0, 1)}
            | {"label": np.int32(number % 2)}
            for number in range(21)
        ]
        (folder / f"lra-retrieval.{split}.pickle").write_bytes(pickle.dumps(items))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A page of each kind of run."""
    pages = {}
    for kind, (sessions, _) in RUNS.items():
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        task = "lra-retrieval" if kind == "of two documents" else tiny.TASK
        (tiny.write_data if task == tiny.TASK else write_pairs)(folder / "data")
        for given in sessions:
            assert tiny.train(folder, "--task", task, *given) == 0
        pages[kind] = folder / "out/logs/log-0" / task / "train.sat.html"
    return pages


def text(path):
    """What a reader reads."""
    content = re.sub(r"<style>.*?</style>", "", path.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", content))


# ---- what it says ------------------------------------------------------------------


def test_the_result_is_that_of_run_json(runs):
    facts = json.loads(runs["switched"].with_name("sat.run.json").read_text())
    said = text(runs["switched"])
    assert f"Test accuracy {facts['result']['test_accuracy']:.4f} on 21 examples" in said
    assert "with sparse attention, after 30 steps" in said
    assert "Sparse after 3 dense steps: every layer is skewed and settled." in said
    for word in ("skewness -100", "change percent", facts["command"].split()[-1], "model tested"):
        assert word in said
    if facts["sessions"][0]["commit"]:
        assert facts["sessions"][0]["commit"] in said


def test_each_kind_of_run_is_told_apart(runs):
    never = text(runs["never switched"])
    assert "It never switched: all of its training was dense." in never
    assert "over the last 30 dense steps" in never and "times as fast" not in never
    start = text(runs["sparse from the start"])
    assert "It was sparse from the start." in start and "No attention was measured" in start
    resumed = text(runs["resumed"])
    assert "started at step 0" in resumed and "started at step 12" in resumed
    anew = text(runs["chosen anew"])
    assert "Blocks were chosen 5 times, last after step 27." in anew
    for step in (3, 27):
        assert f"Attention and kept blocks after step {step}." in anew
    assert "lra-retrieval, sat, seed 0" in text(runs["of two documents"])


@pytest.mark.parametrize("kind", RUNS)
def test_pages_hold_everything_and_every_figure(runs, kind):
    content = runs[kind].read_text()
    assert "not drawn" not in content
    assert content.count("<svg") == RUNS[kind][1]
    # nothing is fetched: the only addresses are names of XML
    addresses = set(re.findall(r'(?:src|href)="([^"]*)|url\(([^)]*)', content))
    addresses = {first or second for first, second in addresses}
    assert all(a.startswith(("#", "data:", "http://www.w3.org/")) for a in addresses), addresses
    assert "<script" not in content and "@import" not in content


def test_costs_are_those_of_the_metrics(runs):
    lines = runs["switched"].with_name("sat.metrics.jsonl").read_text().splitlines()
    train = [r for r in map(json.loads, lines) if r["event"] == "train"]
    seconds = np.diff([0.0] + [r["seconds"] for r in train])
    dense, sparse = np.median(seconds[:3]), np.median(seconds[3:])
    said = text(runs["switched"])
    assert f"A sparse step takes {sparse * 1e3:,.0f} ms, a dense one {dense * 1e3:,.0f} ms" in said
    assert f"{dense / sparse:.2f} times as fast" in said
    share = seconds[:3].sum() / seconds.sum()
    assert f"{share:.0%} of the training time went into the 3 dense steps, 10% of all" in said


def test_what_the_picture_shows_is_what_was_kept(runs):
    folder = runs["switched"].parent
    events = map(json.loads, (folder / "sat.metrics.jsonl").read_text().splitlines())
    (event,) = [event for event in events if event["event"] == "transition"]
    checkpoint = folder.parents[2] / "checkpoints/checkpoints-0" / tiny.TASK / "sat.model"
    masks = load_checkpoint(checkpoint).block_masks
    for layer, mask in enumerate(masks):
        assert mask.flatten().nonzero().flatten().tolist() == event["kept_blocks"][layer]
        attention = np.array(event["pooled"][layer])
        assert attention.shape == (4, 4)
        # a query's attention adds up to one over its 64 keys; padded queries have some too
        assert attention.mean() == pytest.approx(1 / 64, rel=0.01)


def test_a_curve_of_many_steps_is_thinned_but_keeps_its_extremes():
    records = [
        {"event": "train", "step": s, "phase": "dense", "loss": 1.0, "seconds": s * 1.0,
         "peak_memory_bytes": 1, "odd": [50.0 if s == 7777 else 1.0]}
        for s in range(1, 20_001)
    ]  # fmt: skip
    drawn = figures.others(records, {})
    assert len(drawn) < 60_000
    assert ">50<" in drawn or ">40<" in drawn, "the axis reaches the one high value"


def test_a_criterion_is_shown_by_its_names_alone(tmp_path):
    """As one that a plug-in brings: the page knows no list of names."""
    records = [{"event": "start", "step": 0, "task": "t", "thresholds": {"wonder_ratio": 0.75}}]
    for step in range(1, 9):
        train = {"event": "train", "step": step, "phase": "dense", "loss": 1.0, "accuracy": 0.5}
        values = {"wonder_ratio": [0.1 * step, None], "curiosity": [1.0, step / 2]}
        records.append(train | values | {"seconds": float(step), "peak_memory_bytes": 1})
    path = tmp_path / "page.html"
    path.write_text(page.run_page("sat", records, {"result": None}))
    said = text(path)
    assert said.count("wonder ratio") == 2, "an axis and a row of the table"
    assert "wonder ratio 0.75 0.8 –" in said and "threshold" in said
    assert said.count("curiosity") == 1 and "not drawn" not in said


def corner(observation, count, seed):
    """A pattern of somebody else: the first blocks of the matrix."""
    mask = torch.zeros_like(observation.pattern_scores, dtype=torch.bool)
    mask.flatten(1)[:, :count] = True
    return mask


class Lively(Criterion):
    """A criterion of somebody else."""

    description = "the attention of every layer is lively"
    conditions = (Condition("liveliness", ">=", 0.125, "liveliness"),)

    def measure(self, observation):
        return {"liveliness": observation.pooled.amax((1, 2)).mul(observation.step).tolist()}


def test_a_pattern_and_a_criterion_of_ten_lines_appear_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PATTERNS, "corner", Pattern(corner, "the first blocks"))
    monkeypatch.setitem(CRITERIA, "lively", Lively)
    with pytest.raises(SystemExit):
        main_learnable_skewness.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "corner: the first blocks" in said and f"lively: {Lively.description}" in said
    tiny.write_data(tmp_path / "data")
    given = ["--pattern", "corner", "--transition_when", "lively", "--train_steps", "12"]
    assert tiny.train(tmp_path, *given) == 0
    log = (tiny.logs(tmp_path) / "train.sat.log").read_text()
    assert f"rule: {Lively.description}" in log and "blocks: corner (the first blocks)" in log
    assert "(all conditions hold)" in log
    said = text(tiny.logs(tmp_path) / "train.sat.html")
    assert said.count("liveliness") == 2 and "liveliness 0.125" in said and "corner" in said


# ---- it may fail, training may not -------------------------------------------------


def test_pictures_that_fail_end_nothing(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such font")

    tiny.write_data(tmp_path / "data")
    monkeypatch.setattr(figures, "_svg", broken)
    monkeypatch.setattr(words, "draw_blocks", broken)
    assert tiny.train(tmp_path, *FAST) == 0
    assert "could not make the picture" in capsys.readouterr().out
    said = text(tiny.logs(tmp_path) / "train.sat.html")
    assert said.count("not drawn (RuntimeError: no such font)") == 6 and "Test accuracy" in said


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    tiny.write_data(tmp_path / "data")
    (tiny.logs(tmp_path) / "train.sat.html").mkdir(parents=True)
    assert tiny.train(tmp_path, *FAST) == 0
    output = capsys.readouterr().out
    assert "could not make the report of the run" in output and "Evaluation Results" in output


def test_a_backend_of_matplotlib_that_is_not_there_ends_nothing(tmp_path):
    """What a notebook leaves in the environment of the commands it starts."""
    tiny.write_data(tmp_path / "data")
    program = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import tiny; "
    program += f"from pathlib import Path; sys.exit(tiny.train(Path({str(tmp_path)!r}), *{FAST}))"
    environment = {"MPLBACKEND": "not_there", "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "Evaluation Results" in ended.stdout


# ---- experiments/report.py ---------------------------------------------------------


def test_a_run_that_was_cut_has_a_report_too(tmp_path, capsys):
    tiny.write_data(tmp_path / "data")
    assert tiny.train(tmp_path, *FAST, "--stop_after", "7") == 0
    written = tiny.logs(tmp_path) / "train.sat.html"
    assert not written.exists()
    with open(written.with_name("sat.metrics.jsonl"), "a") as file:
        file.write('{"event": "train", "st')  # as a kill leaves it
    capsys.readouterr()
    assert report.main([str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{written}\n"
    assert "Not finished: 7 of 30 steps are done." in text(written)


def test_a_record_of_an_older_version_has_a_report_too(tmp_path):
    """docs/ keeps runs that were made before there were pages."""
    import gzip

    old = gzip.decompress((ROOT / "docs/results/lra-image-seed-1.metrics.jsonl.gz").read_bytes())
    (tmp_path / "sat.metrics.jsonl").write_bytes(old)
    (tmp_path / "sat.run.json").write_text(json.dumps({"command": "c", "result": None}))
    assert report.main([str(tmp_path)]) == 0
    said = text(tmp_path / "train.sat.html")
    assert "Sparse after 153 dense steps: every layer is skewed and settled." in said
    assert "skewness 1.7 13.63" in said and "3.55 times as fast" in said
    assert "not drawn" not in said


@pytest.mark.parametrize("case", ["nothing", "torn", "no facts"])
def test_mistakes_are_one_sentence(tmp_path, capsys, case):
    if case != "nothing":
        (tmp_path / "sat.metrics.jsonl").write_text("{}}\n" if case == "torn" else "")
    if case == "torn":
        (tmp_path / "sat.run.json").write_text("{}")
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error
    assert not list(tmp_path.glob("*.html"))


# ---- in a browser ------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
FLAGS += ["--hide-scrollbars", "--enable-logging=stderr"]
# a window cannot be narrower than 500 pixels, a frame in it can; the page in it measures itself
FRAME = """<title></title><script>onmessage = event => document.title = event.data</script>
<iframe src="page.html" width="{}" height="3000" style="border: 0"></iframe>"""
PROBE = """<script>
const wide = document.documentElement.scrollWidth, boxes = [...document.querySelectorAll("svg")]
  .map(svg => svg.getBoundingClientRect());
const fonts = [...document.querySelectorAll("svg text")].map(t =>
  t.getBoundingClientRect().height);
parent.postMessage(JSON.stringify({inner: innerWidth, wide, heights: boxes.map(b => b.height),
  right: Math.max(...boxes.map(b => b.right)), smallest: Math.min(...fonts)}), "*");
</script>"""


def browse(tmp_path, path, width, *more):
    """Standard output of Chromium with a page, after a look at its messages."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: what the page looks like cannot be tested")
    profile = tmp_path / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},4000"]
    done = subprocess.run(
        [*command, *more, f"file://{path}"], capture_output=True, text=True, timeout=120
    )
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("kind", RUNS)
def test_the_page_fits_its_window(runs, tmp_path, kind, width):
    probed = tmp_path / "page.html"
    probed.write_text(runs[kind].read_text().replace("</body>", PROBE + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME.format(width))
    more = ["--dump-dom", "--virtual-time-budget=3000"]
    dom = browse(tmp_path, tmp_path / "frame.html", 1700, *more)
    found = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert found["inner"] == width and found["wide"] <= width and found["right"] <= width
    assert min(found["heights"]) > 100
    assert found["smallest"] >= 7, "labels can be read"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_show_in_light_and_dark(runs, tmp_path, scheme):
    """No empty figure, and ink that stands out from the paper."""
    shot = tmp_path / "shot.png"
    # 0 is dark, 1 light
    setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(tmp_path, runs["switched"], 1000, setting, f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    paper = pixels[-1, 0]
    assert (paper.mean() > 200) == (scheme == "light") and (paper.mean() < 60) == (
        scheme == "dark"
    )
    contrast = np.abs(pixels - paper).max(axis=2)
    # ink: axes and text; colour: the curves of both layers
    assert (contrast > 150).sum() > 5_000
    for color in figures.COLORS[:2]:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        near = np.abs(pixels - wanted).max(axis=2) < 40
        assert near.sum() > 300, color


def test_the_console_is_listened_to(tmp_path):
    """Otherwise the tests above could not fail."""
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.log('hello')</script>")
    with pytest.raises(AssertionError, match="hello"):
        browse(tmp_path, bad, 360, "--dump-dom")
