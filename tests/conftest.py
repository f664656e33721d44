"""One thread: the tests' networks are small, and threads of several libraries on few cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
