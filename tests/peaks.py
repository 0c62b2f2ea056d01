"""Memory of this process while it runs, for tests and benchmarks; Linux."""

import threading
from pathlib import Path


def status(field: str) -> int:
    """Bytes of one field of /proc/self/status: VmRSS, VmHWM, RssAnon, RssFile."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(size) * 1024


class Sampler(threading.Thread):
    """Peaks of anonymous and of mapped memory while the block runs, in bytes: ``anonymous`` and ``files``."""

    def __init__(self):
        super().__init__(daemon=True)
        self.anonymous = self.files = 0
        self._done = threading.Event()

    def run(self):
        while not self._done.wait(0.001):
            self.anonymous = max(self.anonymous, status("RssAnon"))
            self.files = max(self.files, status("RssFile"))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self.join()
