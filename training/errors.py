"""The one exception that stands for a mistake of the user."""


class UserError(ValueError):
    """What the user can mend. The message is one sentence; a command ends with it and exit code 2.

    Any other exception is a fault of the program and shows its traceback.
    """
