"""The exceptions that end a command in one sentence."""


class UserError(ValueError):
    """What the user can mend. The message is one sentence; a command ends with it and exit code 2.

    Any other exception is a fault of the program and shows its traceback.
    """


class TrainingFailed(RuntimeError):
    """A run cannot go on; the message is one sentence for its user."""
