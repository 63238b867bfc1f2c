"""The launcher's own logic, behind tools/launch.py: no torch, no Megatron.

| file | what it does |
|---|---|
| ``allocation.py`` | what SLURM, or one machine, gives a job: nodes, processes, the address where they meet |
| ``checks.py`` | whether the flags' layout and folders fit the allocation, before anything starts |
| ``environment.py`` | the variables that ranks get unless the user set them |
| ``events.py`` | ``events_NODE.jsonl``: signals and deaths of ranks, with their reasons |
| ``requeue.py`` | what happens after a job's end |
| ``summary.py`` | one screen at the start, one at the end |
| ``jobs.py`` | the three programs: the batch step, a node's agent, the local run |
| ``rank.py`` | what stands in front of a rank: its log |
| ``leash.py`` | what stands in front of a process that must not outlive the one that started it |

The agent of a node is torchrun's; ``launch/agent.py`` has every reach into it.
"""
