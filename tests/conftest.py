"""Settings of the whole suite: one thread a process, since the tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the scripts started by tests inherit it
