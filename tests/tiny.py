"""A task small enough that a whole run takes a second: what the tests of runs share."""

import pickle

import numpy as np
import torch

import main_inference
import main_learnable_skewness

TASK = "lra-listops"
LENGTH = 64
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
SETTINGS = [
    *(f"--set=model.{name}={value}" for name, value in MODEL.items()),
    "--set=training.num_eval_steps=1",
    "--set=training.eval_frequency=10",
    "--set=training.learning_rate=0.01",
]


def write_data(folder, sizes=(48, 30, 21), change=lambda split, items: items):
    """Pickles in which the label can be read off the first token."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        items = []
        for _ in range(size):
            ids = np.zeros(LENGTH, np.int32)
            ids[: random.integers(20, LENGTH)] = 1
            ids[ids > 0] = random.integers(1, 15, int((ids > 0).sum()))
            items.append({"input_ids_0": ids, "label": np.int32(ids[0] % 10)})
        with open(folder / f"{TASK}.{split}.pickle", "wb") as file:
            pickle.dump(change(split, items), file, protocol=4)


def arguments(folder, *more, mode="train"):
    """Of a run with the data and the output below `folder`.

    "auto" precision is bf16 on some machines; these tests compare what fp32 alone keeps equal.
    """
    common = ["--mode", mode, "--task", TASK, "--data_dir", str(folder / "data")]
    return [*common, "--output_dir", str(folder / "out"), "--precision", "fp32", *more]


def train(folder, *more):
    """Exit code of a run of 30 steps of 8."""
    given = ["--train_steps", "30", "--batch_size", "8", *SETTINGS, *more]
    return main_learnable_skewness.main(arguments(folder, *given))


def evaluate(folder, *more):
    return main_learnable_skewness.main(arguments(folder, *more, mode="eval"))


def infer(folder, *more):
    return main_inference.main(arguments(folder, *more, mode="eval"))


def exhaust_memory_in_optimizer(monkeypatch):
    """Once, when a few parameters have their state in the optimizer, the next one half of it."""
    step, zeros_like, calls = torch.optim.AdamW.step, torch.zeros_like, []

    def limited(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return zeros_like(*arguments, **keywords)

    def limited_step(self, *arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", limited)
            return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", limited_step)


def logs(folder):
    return folder / "out" / "logs" / "log-0" / TASK


def checkpoints(folder):
    return folder / "out" / "checkpoints" / "checkpoints-0" / TASK
