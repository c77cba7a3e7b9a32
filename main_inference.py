"""Evaluate a trained model, ours or a published one of the reference, on the test set.

python main_inference.py --mode eval --task lra-image --random 0 --name sat
"""

import os
import sys

from training.options import add_inference_arguments, build_parser, interrupted_early


def parse_arguments(argv):
    parser = build_parser(
        "main_inference.py",
        "Evaluate a saved model on the test set, every example once, with the attention it was "
        "trained with.",
        modes=["eval"],
        default_mode="eval",
    )
    add_inference_arguments(parser)
    return parser.parse_args(argv)


def main(argv) -> int:
    args = parse_arguments(argv)
    try:
        import config
        from training.commands import evaluate, launch
    except KeyboardInterrupt:
        return interrupted_early()

    def job() -> int:
        launch.check_text(argv)
        place = launch.Launch.from_environment(os.environ)
        aliases = getattr(config, "Aliases", {})  # the original's config.py has none
        return evaluate.evaluate_run(args, config.Config, aliases, place)

    return launch.guarded(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
