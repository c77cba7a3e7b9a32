"""Runs that are killed at any moment and resumed end with the bits of a run that was not.

Real processes are killed with real signals. To afford hundreds of them, this file started as a
script is a server that imports torch and the program once and forks for every run.
"""

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from preprocess import writer
from training.recording.checkpoint import load_checkpoint
from training.recording.log import RunLog, import_tensorboard
from training.recording.paths import RunPaths
from training.recording.reference_files import load_masks

ROOT = Path(__file__).resolve().parent.parent
TASK, STEPS, LENGTH = "lra-listops", 60, 64
MODEL = {
    "num_layers": 2,
    "max_seq_len": LENGTH,
    "block_size": 16,
    "density": 0.3,
    "embedding_dim": 16,
    "transformer_dim": 16,
    "transformer_hidden_dim": 16,
    "head_dim": 8,
}
TRAINING = {
    "num_eval_steps": 1,
    "eval_frequency": 7,
    "learning_rate": 0.01,
    "save_seconds": 1e-6,  # a checkpoint after every step
}


# ---- runs ----------------------------------------------------------------------------------


def serve():
    """Forks a run for each line of stdin, a JSON list [arguments, file for its output]; answers
    with its process id, then with its exit code (-9: killed)."""
    # what a run imports late, so that only the server has to
    import matplotlib.figure  # noqa: F401

    import main_learnable_skewness
    from config import Config  # noqa: F401
    from training import loop
    from training.recording import words

    import_tensorboard()  # what a run does late, so that only the server has to
    # Drawing would take most of a run's time, and most kills would hit it.
    words.draw_transition = lambda *_: np.zeros((2, 2, 3), np.uint8)
    words.draw_run = lambda *_: None
    loop.FIRST_BEST_STEP = 1  # these runs are shorter than the 100 steps it takes otherwise
    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments, output = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
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

    def __init__(self, folder):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def start(self, arguments):
        """Starts a run; returns its process id."""
        self.output = self.folder / "output.txt"
        self.output.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps([arguments, str(self.output)]) + "\n")
        return int(self._answer())

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
        with writer.SplitWriter(folder, TASK, split) as items:
            for _ in range(count):
                label = rng.integers(0, 2)
                ids = np.zeros(LENGTH, np.int32)
                used = rng.integers(LENGTH // 2, LENGTH + 1)
                ids[:used] = rng.integers(1, 8, used) + 8 * label * (rng.random(used) < 0.3)
                items.add(input_ids_0=ids, label=np.int64(label))
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


def records(paths):
    return paths.metrics.read_bytes().count(b"\n") if paths.metrics.exists() else 0


def train_steps(paths):
    return [event["step"] for event in events(paths) if event["event"] == "train"]


def without_measurements(value):
    """Drops what may differ between two runs: durations, memory, names of TensorBoard's files."""
    if isinstance(value, dict):
        measured = ("seconds", "peak_memory_bytes", "log")
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


def kill_until_done(server, command, output_dir, rng):
    """Kills a run at random moments until it ends by itself.

    Returns: for every kill whether it left a half-written checkpoint.
    """
    paths = RunPaths(output_dir, 0, TASK, "sat")
    inside = []
    while True:
        before = events(paths)
        step = load_checkpoint(paths.last).step if paths.last.exists() else None
        position = len(log_tail(paths, 0))
        process = server.start([*command, "--resume"] if inside else command)
        with contextlib.suppress(ProcessLookupError):  # it was done before
            # any place within the next steps, and any moment within a step and its save
            steps = rng.randrange(0, 15)
            while records(paths) < len(before) + steps:
                os.kill(process, 0)
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.2 if steps == 0 else 0.05))
            os.kill(process, signal.SIGKILL)
        code = server.finish()
        # What was done before the last completed save is never done again: not a byte of its
        # records changes, not even the durations.
        kept = [event for event in before if step is not None and event["step"] <= step]
        kept = [event for event in kept if event["event"] != "end"]
        after = events(paths)
        said = log_tail(paths, position)
        if "resumed at step" in said:
            assert f"resumed at step {step}, " in said
            assert after[: len(kept)] == kept
            done = [event["step"] for event in after[len(kept) :] if event["event"] == "train"]
            assert done == list(range(step + 1, step + 1 + len(done)))
        if code == 0:
            return inside
        assert code == -signal.SIGKILL, server.output.read_text()
        if paths.last.parent.exists():
            inside.append(any(p.name.endswith(".saving") for p in paths.last.parent.iterdir()))
        else:
            inside.append(False)
        if paths.last.exists():
            saved = load_checkpoint(paths.last).step
            assert step is None or saved >= step
            # no step is lost that was saved: records are never behind their checkpoint
            assert max(train_steps(paths)) >= saved
        else:
            assert step is None


def kill_often(server, data_dir, tmp_path, kills):
    options = ["--max_dense_steps", "25"]
    server.run(arguments(data_dir, tmp_path / "whole", *options))
    expected = results(tmp_path / "whole")
    assert expected["last"]["phase"] == "sparse" and expected["last"]["step"] == STEPS
    rng = random.Random(0)
    inside, runs = [], 0
    while len(inside) < kills:
        output_dir = tmp_path / f"killed{runs}"
        command = arguments(data_dir, output_dir, *options)
        inside += kill_until_done(server, command, output_dir, rng)
        assert_same_results(results(output_dir), expected)
        left = [p for p in output_dir.rglob("*") if p.name.endswith((".saving", ".tmp"))]
        assert left == []
        runs += 1
    print(f"{len(inside)} kills in {runs} runs, {sum(inside)} inside a save")
    return sum(inside) / len(inside)


def test_killed_at_random_moments(server, data_dir, tmp_path):
    kill_often(server, data_dir, tmp_path, 5)


@pytest.mark.slow
def test_killed_200_times_at_random_moments(server, data_dir, tmp_path):
    assert kill_often(server, data_dir, tmp_path, 200) > 0.1


if __name__ == "__main__":
    serve()
