"""Runs that are ended at any moment and resumed end with the bits of a run that was not.

Real processes get real signals, or run out of memory. To afford hundreds of them, this file
started as a script is a server that imports torch and the program once and forks for every run.
"""

import collections
import contextlib
import functools
import importlib
import itertools
import json
import os
import pickle
import random
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from training.recording.checkpoint import load_checkpoint
from training.recording.log import RunLog, import_tensorboard
from training.recording.paths import RunPaths
from training.recording.reference_files import load_masks

ROOT = Path(__file__).resolve().parent.parent
TASK, LENGTH, MODEL = tiny.TASK, tiny.LENGTH, tiny.MODEL
STEPS = 60
TRAINING = {
    "num_eval_steps": 1,
    "eval_frequency": 7,
    "learning_rate": 0.01,
    "save_seconds": 1e-6,  # a checkpoint after every step
}


# ---- runs ----------------------------------------------------------------------------------


# functions that a run is seen to enter and to leave, and what it does there
PLACES = {
    "training.commands.launch.guarded": "start",
    "training.loop.train_step": "step",
    "training.loop.evaluate_and_keep_best": "evaluation",
    "training.loop.enter_next_phase": "transition",
    "training.loop.probe": "probe",
    "training.loop.save_last": "save",
    "training.loop.save_checkpoint": "save",
    "training.recording.words.draw_blocks": "picture",
    "training.recording.words.save_png": "picture",
    "training.recording.words.write_run_page": "report",
    "training.commands.train.timed_test": "test",
}


def serve(drawing):
    """Forks a run for each line of stdin, a JSON list [arguments, file for its output, file that
    tells where it is]; answers with its process id, then with its exit code (-9: killed).

    drawing: whether runs draw their pictures, which takes most of a short run's time.
    """
    # what a run imports late, so that only the server has to
    import matplotlib.figure  # noqa: F401

    import main_learnable_skewness
    from config import Config  # noqa: F401
    from training import loop
    from training.commands import train  # noqa: F401
    from training.recording import provenance, words

    import_tensorboard()
    provenance.commit = lambda: {}  # starts git
    loop.FIRST_BEST_STEP = 1  # these runs are shorter than the 100 steps it takes otherwise
    torch.set_num_threads(1)
    if not drawing:
        words.draw_blocks, words.write_run_page = (lambda *_: None), (lambda *_: None)
        words.save_png = lambda *_: np.zeros((2, 2, 3), np.uint8)
    inside = ["arguments"]

    def note():
        if where is not None:
            os.write(where, f"{time.monotonic()} {inside[-1]}\n".encode())

    def watched(function, place):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            inside.append(place)
            note()
            try:
                return function(*arguments, **keywords)
            finally:
                inside.pop()
                note()

        return call

    for name, place in PLACES.items():
        module, _, function = name.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, function, watched(getattr(owner, function), place))

    def run_out_of_memory(*_):
        error = random.choice((MemoryError(), torch.OutOfMemoryError("out of memory (injected)")))
        raise error

    signal.signal(signal.SIGUSR2, run_out_of_memory)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
    for line in sys.stdin:
        arguments, output, places = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                where = places and os.open(places, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                note()
                code = main_learnable_skewness.main(arguments)
                sys.stdout.flush()
            except SystemExit as error:
                code = error.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Server:
    """Client of `serve`."""

    def __init__(self, folder, drawing=False):
        self.output, self.where = folder / "output.txt", folder / "where.txt"
        self.drawing = drawing
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *(["draw"] if drawing else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def start(self, arguments):
        """Starts a run; returns its process id."""
        for path in (self.output, self.where):
            path.unlink(missing_ok=True)
        words = [arguments, str(self.output), str(self.where)]
        self.process.stdin.write(json.dumps(words) + "\n")
        return int(self._answer())

    def places(self):
        """[(seconds, what the run began or came back to then)] so far."""
        lines = self.where.read_text().splitlines(keepends=True) if self.where.exists() else []
        words = [line.split() for line in lines if line.endswith("\n")]
        return [(float(seconds), place) for seconds, place in words]

    def finish(self):
        """Waits for the run; returns its exit code."""
        return int(self._answer())

    def run(self, arguments):
        self.start(arguments)
        code = self.finish()
        assert code == 0, self.output.read_text()

    def _answer(self):
        ready, _, _ = select.select([self.process.stdout], [], [], 120)
        assert ready, "a run hangs: " + self.output.read_text()[-2000:]
        return self.process.stdout.readline()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(60) == 0


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A task that is learned in a few steps: one class uses other ids."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("dev", 40), ("test", 16)):
        items = []
        for _ in range(count):
            label = rng.integers(0, 2)
            ids = np.zeros(LENGTH, np.int32)
            used = rng.integers(LENGTH // 2, LENGTH + 1)
            ids[:used] = rng.integers(1, 8, used) + 8 * label * (rng.random(used) < 0.3)
            items.append({"input_ids_0": ids, "label": np.int64(label)})
        (folder / f"{TASK}.{split}.pickle").write_bytes(pickle.dumps(items))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def arguments(data_dir, output_dir, *more):
    given = ["--task", TASK, "--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    for section, values in (("model", MODEL), ("training", TRAINING)):
        for name, value in values.items():
            given += ["--set", f"{section}.{name}={value}"]
    return [*given, "--train_steps", str(STEPS), "--batch_size", "8", *more]


# ---- what a run leaves ---------------------------------------------------------------------


def events(paths):
    """metrics.jsonl without a last line that a kill tore."""
    if not paths.metrics.exists():
        return []
    lines = paths.metrics.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def train_steps(paths):
    return [event["step"] for event in events(paths) if event["event"] == "train"]


def without_measurements(value):
    """Drops what may differ between two runs: durations, memory, names of TensorBoard's files."""
    if isinstance(value, dict):
        measured = ("seconds", "peak_memory_bytes", "log", "save_seconds")
        return {k: without_measurements(v) for k, v in value.items() if k not in measured}
    if isinstance(value, (list, tuple)):
        return [without_measurements(item) for item in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes()]
    return value


def curves(paths):
    """Every TensorBoard scalar as [(step, value)], as tensorboard itself reads the folder."""
    import_tensorboard()
    from tensorboard.backend.event_processing import event_accumulator

    sizes = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 0)
    accumulator = event_accumulator.EventAccumulator(str(paths.tensorboard), sizes).Reload()
    scalars = accumulator.Tags()["scalars"]
    assert scalars
    found = {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in scalars}
    for tag in accumulator.Tags()["images"]:
        found[tag] = [e.step for e in accumulator.Images(tag)]
    return found


def results(output_dir):
    """All that must be the same bits whether or not a run was interrupted."""
    paths = RunPaths(output_dir, 0, TASK, "sat")
    return {
        "last": without_measurements(vars(load_checkpoint(paths.last))),
        "best": without_measurements(vars(load_checkpoint(paths.model))),
        "masks": load_masks(paths.masks).tolist(),
        "metrics": without_measurements(events(paths)),
        "result": without_measurements(json.loads(paths.run_json.read_text())["result"]),
        "curves": curves(paths),
    }


def assert_same_results(found, expected):
    for name, value in expected.items():
        if found[name] != value and isinstance(value, dict):
            for key in value:
                assert found[name][key] == value[key], f"{name}: {key}"
        assert found[name] == value, name


def wait_for_step(paths, step):
    deadline = time.monotonic() + 60
    while max(train_steps(paths), default=0) < step:
        assert time.monotonic() < deadline, f"the run does not reach step {step}"
        time.sleep(0.002)


def log_tail(paths, position):
    return paths.log.read_text()[position:] if paths.log.exists() else ""


# ---- the tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("transition", [10, 30, 50])
def test_kill_and_sigterm_change_nothing(server, data_dir, tmp_path, transition):
    """60 steps at once against 20 + kill -9 + 20 + SIGTERM + 20, the transition in each part."""
    options = ["--max_dense_steps", str(transition)]
    server.run(arguments(data_dir, tmp_path / "whole", *options))
    paths = RunPaths(tmp_path / "parts", 0, TASK, "sat")
    command = arguments(data_dir, tmp_path / "parts", *options)

    os.kill(start_until(server, command, paths, 20), signal.SIGKILL)
    assert server.finish() == -signal.SIGKILL
    step = load_checkpoint(paths.last).step
    assert step in (19, 20, 21, 22)

    position = len(log_tail(paths, 0))
    os.kill(start_until(server, [*command, "--resume"], paths, 40), signal.SIGTERM)
    assert server.finish() == 128 + signal.SIGTERM
    assert f"resumed at step {step}, " in log_tail(paths, position)
    assert "stopped by SIGTERM after step" in server.output.read_text()
    assert "--resume" in server.output.read_text()
    step = load_checkpoint(paths.last).step
    assert train_steps(paths) == list(range(1, step + 1))  # the step was finished and saved

    position = len(log_tail(paths, 0))
    server.run([*command, "--resume"])
    assert f"resumed at step {step}, " in log_tail(paths, position)
    assert_same_results(results(tmp_path / "parts"), results(tmp_path / "whole"))


def test_a_second_signal_exits_at_once(server, data_dir, tmp_path):
    paths = RunPaths(tmp_path, 0, TASK, "sat")
    process = start_until(server, arguments(data_dir, tmp_path), paths, 3)
    os.kill(process, signal.SIGSTOP)  # so that both find it in the same step
    os.kill(process, signal.SIGINT)
    os.kill(process, signal.SIGTERM)
    os.kill(process, signal.SIGCONT)
    assert server.finish() in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "stopped by" not in server.output.read_text()  # it did not take the time to save


def test_patience_that_ran_out_stays_so(server, data_dir, tmp_path):
    """Resuming a run that patience has ended does not train on."""
    server.run(arguments(data_dir, tmp_path, "--patience", "2"))
    paths = RunPaths(tmp_path, 0, TASK, "sat")
    before = without_measurements(events(paths))
    assert max(train_steps(paths)) < STEPS
    server.run([*arguments(data_dir, tmp_path), "--resume"])
    assert without_measurements(events(paths)) == before
    assert "(--patience)" in server.output.read_text()


def test_curves_of_a_run_killed_between_evaluation_and_save(tmp_path):
    """val/ is numbered from 0: the points of the first repeated evaluation and of the last step
    that is kept have the same number, and neither may be lost or doubled."""
    paths = RunPaths(tmp_path, 0, TASK, "sat")
    places = {"metrics_path": paths.metrics, "tensorboard_dir": paths.tensorboard}

    def session(steps, **resume):
        log = RunLog(paths.log, **places, **resume)
        positions = []
        for step in steps:
            log.scalars(step, {"train/loss": step / 10})
            log.scalars(step - 1, {"val/loss": step / 10})
            positions.append(log.sync())
        log.close()
        return positions

    saved = session(range(1, 6))[2]  # 4 and 5 were done, and not saved
    session(range(4, 8), resume_step=3, resume_position=saved)
    found = {tag: [step for step, _ in points] for tag, points in curves(paths).items()}
    assert found == {"train/loss": [1, 2, 3, 4, 5, 6, 7], "val/loss": [0, 1, 2, 3, 4, 5, 6]}
    before = {path: path.read_bytes() for path in paths.tensorboard.iterdir()}
    session(range(1, 3), resume_step=-1)  # nothing to go on from: what is there is somebody's
    assert all(path.read_bytes() == content for path, content in before.items())


def test_stop_after_and_its_resume(server, data_dir, tmp_path):
    server.run([*arguments(data_dir, tmp_path), "--stop_after", "5"])
    paths = RunPaths(tmp_path, 0, TASK, "sat")
    assert train_steps(paths) == [1, 2, 3, 4, 5]
    hint = server.output.read_text().strip().splitlines()[-1]
    assert re.match("--stop_after reached after step 5; go on with: .*main_learnable", hint)
    assert hint.endswith("--resume") and hint.count("--stop_after") == 1
    server.start([*arguments(data_dir, tmp_path), "--resume", "--stop_after", "5"])
    assert server.finish() == 2
    assert "the run has 5 completed steps already" in server.output.read_text()
    server.run([*arguments(data_dir, tmp_path), "--resume", "--stop_after", "8"])
    assert train_steps(paths) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("kilobytes", [4, 8, 12, 16, 20, 200, 300])
@pytest.mark.parametrize("save_seconds", [1e-6, 1000])
def test_full_disk_ends_in_one_sentence(server, data_dir, small_disk, kilobytes, save_seconds):
    folder = small_disk(kilobytes)
    settings = (f"training.save_seconds={save_seconds}", "training.eval_frequency=99")
    more = [word for setting in settings for word in ("--set", setting)]
    server.start(arguments(data_dir, folder, *more))
    code = server.finish()
    output = server.output.read_text()
    assert code in (1, 2) and "Traceback" not in output, output
    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith("error: ") and "No space left on device" in last_line
    assert not [p for p in folder.rglob("*") if p.name.endswith(".saving")]
    last = RunPaths(folder, 0, TASK, "sat").last
    if last.exists():
        load_checkpoint(last)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many kilobytes and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(kilobytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "sat-test", str(folder)]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("mounting a small tmpfs needs rights that this user or container lacks")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def start_until(server, command, paths, step):
    process = server.start(command)
    wait_for_step(paths, step)
    return process


# how a run is ended, and what it then answers with: killed by a signal, or its exit code
KINDS = {
    "SIGKILL": (-signal.SIGKILL,),
    # before it listens, or while it says its last words
    "SIGTERM": (128 + signal.SIGTERM, -signal.SIGTERM),
    "SIGHUP": (128 + signal.SIGHUP, -signal.SIGHUP),
    "no memory": (1,),  # raised between any two operations of Python
}
# which of its visits of a place a run is ended in, at most
VISITS = {"start": 1, "step": 9, "save": 9, "evaluation": 3, "probe": 2}
LONG = ("step", "evaluation", "transition", "save", "picture", "test")
MOMENTS = list(itertools.product(KINDS, dict.fromkeys(PLACES.values())))


def end_in(server, command, kind, place, rng, lasts):
    """Starts a run and ends it at a random moment of its visit of a place, unless it is done
    before.

    Returns: its exit code, and where it was.
    """
    process = server.start(command)
    visit = rng.randint(1, VISITS.get(place, 1))
    number = signal.SIGUSR2 if kind == "no memory" else getattr(signal, kind)
    hit = None
    with contextlib.suppress(ProcessLookupError):  # it was done before
        while sum(name == place for _, name in server.places()) < visit:
            os.kill(process, 0)
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, lasts[place]))
        where = server.places()[-1][1]
        os.kill(process, number)
        hit = where
    code = server.finish()
    if kind == "SIGKILL":  # cannot be missed: a run that answers 0 was done before it came
        hit = server.places()[-1][1] if code < 0 else None
    return code, hit


def check_what_is_left(paths, said, before, step):
    """After a run went on from `step` (None: began) with `before` in its metrics."""
    kept = [event for event in before if step is not None and event["step"] <= step]
    kept = [event for event in kept if event["event"] != "end"]
    after = events(paths)
    if "resumed at step" in said:
        # What was done before the last completed save is never done again: not a byte of its
        # records changes, not even the durations.
        assert f"resumed at step {step}, " in said
        assert after[: len(kept)] == kept
        done = [event["step"] for event in after[len(kept) :] if event["event"] == "train"]
        assert done == list(range(step + 1, step + 1 + len(done)))
    if paths.last.exists():
        saved = load_checkpoint(paths.last).step
        assert step is None or saved >= step
        # no step is lost that was saved: records are never behind their checkpoint
        assert max(train_steps(paths), default=0) >= saved
        return saved
    assert step is None
    return None


def end_often(server, data_dir, tmp_path, moments, rng):
    """Ends runs at moments [(kind, place)] and resumes them until all have been met.

    Returns: how often which kind met which place, and how the run then ended.
    """
    options = ["--train_steps", "24", "--max_dense_steps", "8"]
    options += ["--batch_size", "4", "--micro_batch_size", "1"]
    server.run(arguments(data_dir, tmp_path / "whole", *options))
    expected = results(tmp_path / "whole")
    assert expected["last"]["phase"] == "sparse" and expected["last"]["step"] == 24
    pictures = {"train.sat.html", "train.sat.transition.png"}
    visited = server.places()
    stays = collections.defaultdict(list)
    for (began, place), (left, _) in itertools.pairwise(visited):
        stays[place].append(left - began)
    lasts = {place: statistics.median(seconds) for place, seconds in stays.items()}
    moments, met = list(moments), collections.Counter()
    for number in itertools.count():
        output_dir = tmp_path / f"ended{number}"
        paths = RunPaths(output_dir, 0, TASK, "sat")
        saves = ["--set", f"training.save_seconds={rng.choice(('1e-6', '0.2'))}"]
        command = arguments(data_dir, output_dir, *options, *saves)
        code, step, unseen = None, None, set()
        while code != 0:
            before, position = events(paths), len(log_tail(paths, 0))
            kind, place = moments[-1] if moments else ("SIGKILL", "never")
            given = command if code is None else [*command, "--resume"]
            code, hit = end_in(server, given, kind, place, rng, lasts)
            output = server.output.read_text()
            saved = check_what_is_left(paths, log_tail(paths, position), before, step)
            if hit is None:
                assert code == 0, output
            else:
                moments.pop()
                met[kind, hit, "went on" if code == 0 else "ended"] += 1
                print(f"{sum(met.values())}: {kind}, {hit}, {code}", flush=True)
                assert code in (0, *KINDS[kind]) and (code or kind != "SIGKILL"), output
            if code > 128:  # it took its time to save: no step is lost
                assert f"stopped by {kind}" in output
                assert saved == max(train_steps(paths))
            if code == 1:
                assert output.splitlines()[-1].startswith("error: "), output
            if "could not make the" in output:  # decoration, which the run goes on without
                assert kind == "no memory", output
                unseen |= {"picture"}
            step = saved
        found, wanted = results(output_dir), expected
        if unseen:
            found["curves"].pop("transition", None)
            curves_ = {k: v for k, v in expected["curves"].items() if k != "transition"}
            wanted = {**expected, "curves": curves_}
        else:
            assert (
                pictures <= {path.name for path in paths.log.parent.iterdir()}
                or not server.drawing
            )
        assert_same_results(found, wanted)
        left = [p for p in output_dir.rglob("*") if p.name.endswith((".saving", ".tmp"))]
        assert left == []
        shutil.rmtree(output_dir)
        if not moments:
            return met


def test_ended_at_random_moments(server, data_dir, tmp_path):
    rng = random.Random(0)
    moments = [(kind, place) for kind in KINDS for place in rng.sample(LONG, 2)]
    end_often(server, data_dir, tmp_path, moments, rng)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ended_at_200_random_moments(data_dir, tmp_path, part):
    """50 in each part, every kind in every place and 14 more."""
    rng = random.Random(part)
    moments = MOMENTS + rng.sample(MOMENTS, 14)
    rng.shuffle(moments)
    server = Server(tmp_path, drawing=True)
    met = end_often(server, data_dir, tmp_path, moments, rng)
    server.close()
    for (kind, place, how), count in sorted(met.items()):
        print(f"{kind}, {place}: {how} {count} times")
    assert sum(met.values()) == 50
    assert {place for _, place, _ in met} >= {*LONG} and {kind for kind, _, _ in met} == {*KINDS}


if __name__ == "__main__":
    serve(drawing=sys.argv[1:] == ["draw"])
