"""Raw data to pickles."""

import training as _training  # says what is missing on Windows

del _training
