"""The run. Windows, which lacks what every module here takes for granted, gets a sentence."""

import sys

try:
    import fcntl as _fcntl
    import resource as _resource
except ModuleNotFoundError:
    print("error: this needs Linux or macOS; on Windows use WSL (wsl --install)", file=sys.stderr)
    raise SystemExit(2) from None
del _fcntl, _resource
