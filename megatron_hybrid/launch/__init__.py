"""The launcher behind tools/launch.py. Only ``agent.py`` imports torch; nothing here imports Megatron.

| file | what it does |
|---|---|
| ``allocation.py`` | the allocation of a job by SLURM or on one machine: nodes, processes, the rendezvous address |
| ``preflight.py`` | whether the flags' layout and folders fit the allocation, before anything starts |
| ``environment.py`` | the variables that ranks get unless the user set them |
| ``events.py`` | ``events_NODE.jsonl``: signals and failed ranks, with the causes |
| ``requeue.py`` | whether a job is requeued after its end |
| ``summary.py`` | one screen at the start, one at the end |
| ``jobs.py`` | the three programs: the batch step, a node's agent, the local run |
| ``rank.py`` | starts a rank with its log |
| ``leash.py`` | what stands in front of a process that must not outlive the one that started it |

The agent of a node is torchrun's; ``agent.py`` overrides parts of it.
"""
