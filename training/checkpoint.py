"""The public name of training/recording/checkpoint.py, for other people's scripts."""

from training.recording.checkpoint import TrainState, load_checkpoint

__all__ = ["TrainState", "load_checkpoint"]
