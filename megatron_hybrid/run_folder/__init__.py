"""The files of a run's --save folder, read and written without torch, Megatron or unpickling.

| file | content |
|---|---|
| ``checkpoints.py`` | which checkpoints there are, which are valid, which to load, which to remove |
| ``state.py`` | ``state.json``: whether the run is running, finished, stopped or failed |
| ``metrics_file.py`` | ``metrics.jsonl``: the records, the last of each iteration |
| ``progress.py`` | how far a run is and how fast it goes |
| ``training_summary.py``, ``compare_runs.py`` | a run, or several, in a table and a picture |
| ``watch.py``, ``watch_plots.py`` | runs as they go, in a terminal and as PNG |
| ``verify_checkpoints.py`` | checkpoints checked by hand |
"""
