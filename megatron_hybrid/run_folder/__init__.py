"""The files of a run's --save folder, read and written without torch, Megatron or unpickling.

| file | content |
|---|---|
| ``checkpoints.py`` | which checkpoints there are, which are valid, which to load, which to remove |
| ``state.py`` | ``state.json``: whether the run is running, finished, stopped or failed |
| ``metrics_file.py`` | ``metrics.jsonl``: the records, the last of each iteration |
"""
