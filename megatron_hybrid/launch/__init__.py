"""The launcher behind tools/launch.py. Only ``agent.py`` imports torch; nothing here imports Megatron.

| file | what it does |
|---|---|
| ``allocation.py`` | the allocation of a job by SLURM or on one machine: nodes, processes, the rendezvous address |
| ``preflight.py`` | whether the flags' layout and folders fit the allocation, before anything starts |
| ``environment.py`` | the variables that ranks get unless the user set them |
| ``events.py`` | ``events_NODE.jsonl``: signals and failures of ranks, with their causes |
| ``requeue.py`` | whether a job is requeued after its end |
| ``summary.py`` | one screen at the start, one at the end |
| ``jobs.py`` | the three programs: the batch step, a node's agent, the local run |
| ``agent.py`` | torchrun's agent of a node, with other ways to stop and to restart |
| ``rank.py`` | redirects a rank's output to its log, then becomes the rank |
"""
