"""What every job on Ray pays: a TorchTrainer whose one worker imports torchrec and does nothing. Imports nothing of mtrec.

`python -m mtrec.jobs.empty_trainer SPEC OUT`, launched by `mtrec bench`: seconds from `launched` (in SPEC, Unix time) until the
worker has imported torchrec, and the memory that it holds then, in bytes.
"""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any


def idle(config: dict[str, Any]) -> None:
    """The worker."""
    import torchrec  # noqa: F401

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    held = int(status["VmHWM"].split()[0]) * 1024
    Path(config["note"]).write_text(json.dumps({"at": time.time(), "bytes": held}))


def main() -> None:
    """Runs the trainer and writes what it took."""
    spec = json.loads(sys.argv[1])
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    note, storage = Path(spec["work"]) / "idle.json", Path(spec["work"]) / "ray"
    TorchTrainer(
        idle,
        train_loop_config={"note": str(note)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(name="idle", storage_path=str(storage)),
    ).fit()
    found = json.loads(note.read_text())
    Path(sys.argv[2] + "0").write_text(json.dumps({"seconds": found["at"] - spec["launched"], "idle_bytes": found["bytes"]}))


if __name__ == "__main__":
    main()
