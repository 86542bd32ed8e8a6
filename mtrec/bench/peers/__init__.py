"""What runs in environments without mtrec: other libraries on the reference workload.

`python -m peers.rechub SPEC OUT`, launched with the folder above as PYTHONPATH; nothing here imports mtrec.

    rechub.py        torch-rechub, and                        workload.py   the rows that these two train on, as NumPy arrays
    deepctr.py       deepctr-torch, for `mtrec bench --peers`
    torcheasyrec.py  TorchEasyRec, for pipelines/benchmark/torcheasyrec.py
"""
