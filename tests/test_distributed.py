"""Several processes under torchrun: the numbers of one, and an end or a restart when one is
lost."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

from training.distributed import SILENCE_SECONDS
from training.recording.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# the transition comes after two dozen steps, by the rule
RULE = ["--sk", "-100", "--ds", "1.5"]
SIZES = (48, 31, 21)  # nothing divides evenly


class Job:
    """A running torchrun, its output in a file; `standalone` finds a free port by itself."""

    def __init__(self, folder, arguments, processes=2, restarts=0, script=None):
        self.output = folder / "torchrun.txt"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                    *(f"--nproc_per_node={processes}", f"--max_restarts={restarts}"),
                    *("--monitor_interval=0.1", script or "main_learnable_skewness.py"),
                    *arguments,
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait(self, seconds=200):
        """Exit code and output."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("the job hangs: " + self.output.read_text()[-3000:]) from None
        return code, self.output.read_text()

    def workers(self):
        """Process ids by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                rank = re.search(rb"\0LOCAL_RANK=(\d+)", environment)
                if parent == self.process.pid and rank:
                    found[int(rank.group(1))] = int(entry.name)
        return found

    def wait_for(self, pattern, seconds=120):
        """Until the output contains `pattern`."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.output.read_text()):
            assert self.process.poll() is None, self.output.read_text()[-3000:]
            assert time.monotonic() < end, "never: " + pattern
            time.sleep(0.02)


def run_arguments(folder, *more, steps=60):
    tiny.write_data(folder / "data", sizes=SIZES)
    given = ["--train_steps", str(steps), "--batch_size", "32", *tiny.SETTINGS, *RULE, *more]
    return tiny.arguments(folder, *given)


def wait_for_step(folder, step, job, seconds=120):
    path = tiny.logs(folder) / "sat.metrics.jsonl"
    end = time.monotonic() + seconds
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert job.process.poll() is None, job.output.read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.01)


def records(folder):
    lines = (tiny.logs(folder) / "sat.metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train_records(folder):
    return [r for r in records(folder) if r["event"] == "train"]


def weights(folder, name="sat.last.model"):
    return load_checkpoint(tiny.checkpoints(folder) / name).model_state_dict


def equal_bits(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Two processes from start to end."""
    folder = tmp_path_factory.mktemp("two")
    code, output = Job(folder, run_arguments(folder)).wait()
    assert code == 0, output[-3000:]
    return folder


def test_two_processes_observe_and_choose_as_one(tmp_path):
    from main_learnable_skewness import main

    method = ["--pattern", "mass", "--max_dense_steps", "22", "--reselect_every", "4"]
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        folder.mkdir()
    code, output = Job(two, run_arguments(two, *method, steps=32)).wait()
    assert code == 0, output[-3000:]
    assert main(run_arguments(one, *method, steps=32)) == 0
    for event, values in (
        ("train", ("kept_mass", "best_mass", "chance_mass", "agreement", "capture")),
        ("reselection", ("exchanged", "kept_mass", "kept_mass_before")),
        ("transition", ("kept_mass", "kept_mass_row_min", "kept_mass_row_p10")),
    ):
        pairs = [[r for r in records(f) if r["event"] == event] for f in (two, one)]
        for ours, expected in zip(*pairs, strict=True):
            for value in values:
                assert ours[value] == [
                    x if x is None else pytest.approx(x, rel=1e-4) for x in expected[value]
                ]
    assert len(pairs[0]) == 1 and sum(r["event"] == "reselection" for r in records(two)) == 2


def test_two_processes_equal_one(undisturbed, tmp_path):
    from main_learnable_skewness import main

    assert main(run_arguments(tmp_path)) == 0
    ours, expected = train_records(undisturbed), train_records(tmp_path)
    assert [r["phase"] for r in ours] == [r["phase"] for r in expected]
    assert {r["phase"] for r in expected} == {"dense", "sparse"}
    for two, one in zip(ours, expected, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["accuracy"] == pytest.approx(one["accuracy"])
        for name in ("skewness", "distance"):
            if one[name][0] is not None:
                assert two[name] == pytest.approx(one[name], rel=1e-3)
    two, one = (
        load_checkpoint(tiny.checkpoints(f) / "sat.model") for f in (undisturbed, tmp_path)
    )
    assert torch.equal(two.block_masks, one.block_masks)
    assert two.best_accuracy == one.best_accuracy
    results = [
        [(r["num_examples"], r["accuracy"]) for r in records(f) if r["event"] == "eval"]
        for f in (undisturbed, tmp_path)
    ]
    assert results[0] == results[1] and results[0][0][0] == 31  # odd, every example once
    losses = [
        [r["loss"] for r in records(f) if r["event"] == "eval"] for f in (undisturbed, tmp_path)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_one_process_speaks(undisturbed):
    output = (undisturbed / "torchrun.txt").read_text()
    assert output.count("Evaluation Results") == 1
    assert "2 processes" in output


def test_inference_on_two_processes_repeats_the_result(undisturbed, tmp_path):
    log = (tiny.logs(undisturbed) / "train.sat.log").read_text()
    accuracy = re.search(r"^Accuracy: .*$", log, re.MULTILINE).group()
    arguments = tiny.arguments(undisturbed, mode="eval")
    code, output = Job(tmp_path, arguments, script="main_inference.py").wait()
    assert code == 0, output[-3000:]
    assert output.count("Evaluation Results") == 1
    assert accuracy in output and "examples: 21" in output


def test_a_lost_process_ends_the_job(tmp_path):
    job = Job(tmp_path, run_arguments(tmp_path, steps=100_000))
    wait_for_step(tmp_path, 20, job)
    os.kill(job.workers()[1], signal.SIGKILL)
    killed = time.monotonic()
    code, _ = job.wait(60)
    assert code != 0
    assert time.monotonic() - killed < 30
    assert load_checkpoint(tiny.checkpoints(tmp_path) / "sat.last.model").step % 10 == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_the_process_that_is_left_says_so(tmp_path, lost):
    """Without torchrun, which would end it before it has said a word."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = run_arguments(tmp_path, steps=100_000)
    jobs = []
    for rank in "01":
        with open(tmp_path / f"rank{rank}.txt", "w") as output:
            jobs.append(
                subprocess.Popen(
                    [sys.executable, "main_learnable_skewness.py", *arguments],
                    cwd=ROOT,
                    env={**environment, "RANK": rank, "LOCAL_RANK": rank},
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                )
            )
    try:
        metrics, end = tiny.logs(tmp_path) / "sat.metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or '"step": 12,' not in metrics.read_text():
            assert time.monotonic() < end and all(job.poll() is None for job in jobs)
            time.sleep(0.01)
        jobs[lost].kill()
        assert jobs[1 - lost].wait(60) == 1
    finally:
        for job in jobs:
            job.kill()
    said = (tmp_path / f"rank{1 - lost}.txt").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    # its store goes with the first process: what the watch or the exchange finds, either first
    assert "another process of this job has ended" in line or (
        lost == 0 and "the job's store does not answer" in line
    )
    assert line.endswith("or let torchrun do it with --max-restarts")
    assert "Traceback" not in said
    assert load_checkpoint(tiny.checkpoints(tmp_path) / "sat.last.model").step == 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_process_ends_the_job_and_the_restart_continues(undisturbed, tmp_path, rank):
    job = Job(tmp_path, run_arguments(tmp_path), restarts=1)
    wait_for_step(tmp_path, 25, job)
    hung = job.workers()[rank]
    os.kill(hung, signal.SIGSTOP)  # alive, its connections open, and silent
    stopped = time.monotonic()
    try:
        job.wait_for(f"process {rank} of this job has given no sign of life", seconds=30)
        assert time.monotonic() - stopped > 5  # a busy process is not a hung one
    finally:
        # torchrun itself would end it after half a minute; a continued one obeys at once
        os.kill(hung, signal.SIGCONT)
    code, output = job.wait()
    assert code == 0, output[-3000:]
    assert "resumed at step" in output
    assert equal_bits(weights(tmp_path), weights(undisturbed))


def test_a_job_stopped_as_a_whole_goes_on(undisturbed, tmp_path):
    """Ctrl-Z and fg, or a laptop that sleeps: nobody is dead."""
    job = Job(tmp_path, run_arguments(tmp_path))
    wait_for_step(tmp_path, 25, job)
    workers = job.workers().values()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(SILENCE_SECONDS + 2)
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    code, output = job.wait()
    assert code == 0, output[-3000:]
    assert equal_bits(weights(tmp_path), weights(undisturbed))


def kill_one_and_compare(folder, undisturbed, rank, step):
    job = Job(folder, run_arguments(folder, "--resume"), restarts=3)
    wait_for_step(folder, step, job)
    os.kill(job.workers()[rank], signal.SIGKILL)
    code, output = job.wait()
    assert code == 0, output[-3000:]
    assert re.search("resumed at step|starts at step 0", output)
    assert equal_bits(weights(folder), weights(undisturbed))
    assert [r["loss"] for r in train_records(folder)] == [
        r["loss"] for r in train_records(undisturbed)
    ]


def test_torchrun_restarts_from_the_last_checkpoint(undisturbed, tmp_path):
    kill_one_and_compare(tmp_path, undisturbed, rank=1, step=25)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(20))
def test_any_process_may_be_lost_at_any_step(undisturbed, tmp_path, attempt):
    choose = random.Random(attempt)
    kill_one_and_compare(tmp_path, undisturbed, choose.randrange(2), choose.randrange(1, 55))


def test_a_signal_to_one_process_stops_all_after_the_same_step(undisturbed, tmp_path):
    job = Job(tmp_path, run_arguments(tmp_path))
    wait_for_step(tmp_path, 15, job)
    os.kill(job.workers()[1], signal.SIGTERM)
    _, output = job.wait()
    stopped = re.search(r"stopped by SIGTERM after step (\d+); go on with: ", output)
    assert stopped, output[-3000:]
    # torchrun's report of its processes; its own exit code is 1 whatever theirs is
    assert "143" in re.findall(r"exitcode *: (-?\d+)", output)
    state = load_checkpoint(tiny.checkpoints(tmp_path) / "sat.last.model")
    assert state.step == int(stopped.group(1)) == len(train_records(tmp_path))
    code, output = Job(tmp_path, run_arguments(tmp_path, "--resume")).wait()
    assert code == 0, output[-3000:]
    assert equal_bits(weights(tmp_path), weights(undisturbed))


def test_a_signal_to_the_launcher_stops_the_job(tmp_path):
    job = Job(tmp_path, run_arguments(tmp_path, steps=100_000))
    wait_for_step(tmp_path, 15, job)
    job.process.send_signal(signal.SIGTERM)
    code, output = job.wait(60)
    assert code != 0
    assert len(re.findall("stopped by SIGTERM after step", output)) == 1
    state = load_checkpoint(tiny.checkpoints(tmp_path) / "sat.last.model")
    assert state.step == len(train_records(tmp_path))


def test_resuming_on_another_number_of_devices(undisturbed, tmp_path, capsys):
    from main_learnable_skewness import main

    code, output = Job(tmp_path, run_arguments(tmp_path, "--stop_after", "30")).wait()
    assert code == 0, output[-3000:]
    assert main(run_arguments(tmp_path, "--resume")) == 0
    assert "processes was 2 when the run started and is 1 now" in capsys.readouterr().out
    for ours, expected in zip(train_records(tmp_path), train_records(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a virtual link: prefixes that run a command in one of
    them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and iproute2")
    names = [f"sat{os.getpid()}{side}" for side in "ab"]
    inside = [["ip", "netns", "exec", name] for name in names]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name]).returncode:
                pytest.skip("this machine does not allow network namespaces")
        link = ["ip", "link", "add", "veth0", "netns", names[0], "type", "veth"]
        subprocess.run([*link, "peer", "name", "veth0", "netns", names[1]], check=True)
        for number, prefix in enumerate(inside, start=1):
            address = ["ip", "addr", "add", f"10.77.0.{number}/24", "dev", "veth0"]
            subprocess.run([*prefix, *address], check=True)
            for device in ("lo", "veth0"):
                subprocess.run([*prefix, "ip", "link", "set", device, "up"], check=True)
        yield inside
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_hosts_equal_one(undisturbed, tmp_path, two_hosts):
    """The command of docs/scaling.md, on two machines as far as the network can tell."""
    arguments = run_arguments(tmp_path)
    hosts = []
    for number, prefix in enumerate(two_hosts, start=1):
        command = [
            *prefix,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *("--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29400", "--rdzv_id=test"),
            # both namespaces have this machine's host name: torchrun cannot tell which one is
            # meant
            f"--rdzv_conf=is_host={int(number == 1)}",
            *(f"--local_addr=10.77.0.{number}", "main_learnable_skewness.py", *arguments),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "veth0"}
        with open(tmp_path / f"host{number}.txt", "w") as output:
            hosts.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            )
    outputs = []
    try:
        for number, host in enumerate(hosts, start=1):
            code = host.wait(240)
            outputs.append((tmp_path / f"host{number}.txt").read_text())
            assert code == 0, outputs[-1][-3000:]
    finally:
        for host in hosts:
            host.kill()
    assert sum(output.count("Evaluation Results") for output in outputs) == 1
    assert equal_bits(weights(tmp_path), weights(undisturbed))
