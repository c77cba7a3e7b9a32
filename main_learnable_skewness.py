"""Train a transformer: dense attention first, block-sparse once attention is skewed and has
settled.

python main_learnable_skewness.py --mode train --task lra-image --sk 1.7 --ds 1.3
python main_learnable_skewness.py --mode eval --task lra-image
"""

import os
import sys

from training.options import add_training_arguments, build_parser, interrupted_early


def parse_arguments(argv):
    parser = build_parser(
        "main_learnable_skewness.py",
        "Train with dense attention, watch it, go on with block-sparse attention once it is "
        "skewed and settled; then test.",
        modes=["train", "eval"],
        default_mode="train",
    )
    add_training_arguments(parser)
    return parser.parse_args(argv)


def main(argv) -> int:
    args = parse_arguments(argv)
    try:  # after parsing, so that --help and typing errors answer without loading torch
        import config
        from training import shell
        from training.commands import evaluate, launch, train
    except KeyboardInterrupt:  # in the seconds that it takes
        return interrupted_early()

    def job() -> int:
        launch.check_text(argv)
        place = launch.Launch.from_environment(os.environ)
        aliases = getattr(config, "Aliases", {})  # the original's config.py has none
        if args.mode == "eval":
            return evaluate.evaluate_run(args, config.Config, aliases, place)
        command = shell.command(__file__, argv, launcher=place.torchrun)
        return train.train_run(args, config.Config, aliases, place, command)

    return launch.guarded(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
