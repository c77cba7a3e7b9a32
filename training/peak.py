"""The most memory a process has held, without torch: preprocess scripts use it too."""

import resource
import sys
from contextlib import suppress


def peak_resident_bytes() -> int:
    """Resident bytes of this process at its peak."""
    # ru_maxrss would count what the parent had when it started this process
    with suppress(OSError), open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
