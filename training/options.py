"""The command lines of both entry scripts. Imports no torch: --help has to answer at once."""

from __future__ import annotations

import argparse
import sys

from sparsity import CRITERIA, PATTERNS


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number


def micro_batch(text: str) -> int | None:
    """auto is None."""
    return None if text == "auto" else positive(text)


def interrupted_early() -> int:
    """Says so; the exit code of a command that Ctrl-C ended before it had anything to save."""
    print("interrupted before anything was written", file=sys.stderr)
    return 130


# several options under one name, as --set writes them; whatever is given beside a recipe wins
RECIPES = {
    "sat": ["sparsity.pattern=learned", "sparsity.transition_when=settled"],
    "attention": ["sparsity.pattern=mass_rows", "sparsity.transition_when=concentrated"],
}


class Recipe(argparse.Action):
    """Puts a recipe's settings before those of --set."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.set = [*RECIPES[values], *namespace.set]


def numbers(text: str) -> tuple[float, ...]:
    """0.3,0.1 as a tuple."""
    return tuple(float(part) for part in text.split(","))


def build_parser(prog: str, description: str, *, modes: list[str], default_mode: str | None):
    """A parser with what both entry scripts take: which run, on what, from and to where."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
    )
    run = parser.add_argument_group("which run")
    run.add_argument(
        "--mode", choices=modes, default=default_mode, help="what to do (default: %(default)s)"
    )
    run.add_argument(
        "--task",
        default="lra-image",
        metavar="T",
        help="task, a key of config.py (default: %(default)s)",
    )
    run.add_argument(
        "--random",
        type=not_negative,
        metavar="SEED",
        help="seed of the run (default: 0)",
    )
    run.add_argument(
        "--name",
        default="sat",
        help="name of the run, part of its file names (default: %(default)s)",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help=(
            "any field of the task's dict in config.py, for example model.num_layers=4, and any "
            "option as sparsity.pattern=mass or run.seed=1; repeatable"
        ),
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, ...; auto (default): cuda if there is one",
    )
    machine.add_argument(
        "--backend",
        default="auto",
        choices=["auto", "reference", "cpu", "triton", "cuda"],
        help=(
            "of the kernels; auto (default): the fastest that is built; a named one never falls "
            "back"
        ),
    )
    machine.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16", "fp16"],
        help=(
            "of products and activations; auto: bf16 where the processor multiplies it natively, "
            "else fp32 (CPU) or fp16 (CUDA)"
        ),
    )
    machine.add_argument(
        "--micro_batch_size",
        type=micro_batch,
        default="auto",
        metavar="{auto,N}",
        help="examples in memory at once (default: auto); never changes the batch",
    )

    files = parser.add_argument_group("files")
    files.add_argument(
        "--data_dir",
        default="data/lra_processed",
        help="folder of the data pickles (default: %(default)s)",
    )
    files.add_argument(
        "--output_dir",
        default=".",
        help="folder of checkpoints/, pickle/ and logs/ (default: %(default)s)",
    )
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What only training takes."""
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train_steps",
        type=positive,
        metavar="N",
        help="steps of the whole schedule (default: the task's)",
    )
    training.add_argument(
        "--batch_size", type=positive, metavar="N", help="examples a step (default: the task's)"
    )
    training.add_argument(
        "--stop_after",
        type=positive,
        metavar="N",
        help="cut after N steps of the full schedule, to be resumed",
    )
    training.add_argument(
        "--patience",
        type=positive,
        metavar="N",
        help="end after N evaluations without a better one",
    )
    training.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of this run"
    )
    training.add_argument(
        "--fork",
        metavar="CHECKPOINT",
        help=(
            "start a new run from another's dense prefix, bit for bit: from its NAME.last.model, "
            "under another --name; the transition, the pattern and the density may differ"
        ),
    )
    training.add_argument(
        "--other_data",
        action="store_true",
        help="resume with other data pickles than the run was started with",
    )
    training.add_argument(
        "--dry_run",
        action="store_true",
        help=(
            "one step of each phase on made-up data of the real shape: predicts memory and time, "
            "writes nothing"
        ),
    )

    transition = parser.add_argument_group("transition from dense to sparse")
    transition.add_argument(
        "--recipe",
        choices=[*RECIPES],
        action=Recipe,
        default="sat",
        help=(
            "sat (default): the reference's pattern and criterion, learned and settled; "
            "attention: blocks by the attention they hold once it has concentrated, mass_rows and "
            "concentrated"
        ),
    )
    transition.add_argument(
        "--sk",
        type=float,
        metavar="S",
        help="skewness every layer has to reach, no unit (default: the task's, else 1.7)",
    )
    transition.add_argument(
        "--ds",
        type=float,
        metavar="D",
        help="change of the Frobenius distance, in percent (default: the task's, else 1.3)",
    )
    transition.add_argument(
        "--transition_when",
        choices=[*CRITERIA],
        help="; ".join(f"{name}: {entry.description}" for name, entry in CRITERIA.items())
        + " (default: settled)",
    )
    transition.add_argument(
        "--lift",
        type=float,
        metavar="X",
        help=(
            "of concentrated: attention in the best blocks against chance, in multiples of its "
            "mean over steps 1 to 20 (default: 3)"
        ),
    )
    transition.add_argument(
        "--agreement",
        type=float,
        metavar="A",
        help="of agreeing: intersection over union of two choices, in (0, 1] (default: 0.9)",
    )
    transition.add_argument(
        "--max_dense_steps",
        type=not_negative,
        metavar="N",
        help="switch after N dense steps at the latest; 0: sparse from the start",
    )
    transition.add_argument(
        "--pattern",
        choices=[*PATTERNS],
        help="which blocks are kept; "
        + "; ".join(f"{name}: {entry.description}" for name, entry in PATTERNS.items())
        + " (default: learned)",
    )
    transition.add_argument(
        "--densities",
        type=numbers,
        metavar="D1,D2,...",
        help=(
            "falling densities of several sparse phases, the last one that of the model; each "
            "chooses its blocks from dense statistics as it begins"
        ),
    )
    transition.add_argument(
        "--phase_steps",
        type=positive,
        metavar="N",
        help="steps of each sparse phase but the last, with --densities",
    )
    transition.add_argument(
        "--reselect_every",
        type=positive,
        metavar="N",
        help=(
            "choose the blocks anew every N sparse steps, from dense statistics of that step's "
            "whole batch; for patterns that look at the attention"
        ),
    )
    transition.add_argument(
        "--probe_every",
        type=positive,
        metavar="N",
        help=(
            "every N sparse steps, and at every evaluation, see on one micro-batch what sparse "
            "attention leaves out"
        ),
    )
    transition.add_argument(
        "--masks",
        metavar="FILE",
        help="block masks for --pattern given: as a run writes them, or .npy [nb, nb] or "
        "[layers, nb, nb]",
    )


def add_inference_arguments(parser: argparse.ArgumentParser) -> None:
    """What only main_inference.py takes."""
    inference = parser.add_argument_group("inference")
    inference.add_argument(
        "--batch_size",
        type=positive,
        metavar="N",
        help="examples at a time (default: as memory allows)",
    )
    inference.add_argument(
        "--attention",
        choices=["auto", "dense", "sparse"],
        default="auto",
        help="auto: as the model was trained",
    )
    inference.add_argument(
        "--masks", metavar="FILE", help="block masks to use instead of the checkpoint's own"
    )
