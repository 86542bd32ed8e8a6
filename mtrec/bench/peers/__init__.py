"""What `mtrec bench --peers` runs in an environment without mtrec: two other libraries on the reference workload.

`python -m peers.rechub SPEC OUT`, launched with the folder above as PYTHONPATH; nothing here imports mtrec.

    rechub.py     torch-rechub                       workload.py      the rows both of them train on, as NumPy arrays
    deepctr.py    deepctr-torch                      torcheasyrec.py  TorchEasyRec, for pipelines/benchmark/torcheasyrec.py
"""
