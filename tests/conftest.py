"""Settings of the whole suite: one thread a process, since the tests run side by side; Ctrl-C as on a terminal."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the scripts started by tests inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background shell ignores it, and so would what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
