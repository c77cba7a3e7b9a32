"""Raw data to pickles."""

import training  # noqa: F401  says what is missing on Windows
