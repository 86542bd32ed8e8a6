"""Parquet logs with a known truth: for the first run, for tests and for measuring speed.

`write_log` writes impressions whose true p(click), p(conversion | click) and E[dwell | click] stand in columns of their
own, so that a model can be held against the best possible. `write_reference` writes the workload that speed is
measured on. The population is in `population.py`, the rows and their truth in `log.py`, the reference workload in
`reference.py`, the files in `files.py`.
"""

from mtrec.synthetic.files import LogSummary, write_log, write_reference
from mtrec.synthetic.log import SyntheticLog
from mtrec.synthetic.reference import ReferenceLog

__all__ = ["LogSummary", "ReferenceLog", "SyntheticLog", "write_log", "write_reference"]
