"""The helpers beside the tests (logs, ranks, runs) are importable from all of them, spawned ranks included."""

import os
import sys
from pathlib import Path

from hypothesis import settings

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples at every run, so that a commit that passed goes on passing; MTREC_HYPOTHESIS=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MTREC_HYPOTHESIS", "repeatable"))
