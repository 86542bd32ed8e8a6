"""mtrec: a distributed trainer for multi-objective recommenders (torchrec tables, Ray workers, Parquet in and out)."""
