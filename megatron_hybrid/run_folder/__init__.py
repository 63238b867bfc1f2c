"""What lies in a run's --save folder, read and written without torch, Megatron or unpickling.

| file | what it knows |
|---|---|
| ``checkpoints.py`` | which checkpoints there are, which are whole, which to load, which to remove |
| ``state.py`` | ``state.json``: whether the run is under way, finished, stopped or failed |
| ``metrics.py`` | ``metrics.jsonl``: the records, the last of each iteration |
"""
