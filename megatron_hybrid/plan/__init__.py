"""Plans: what a run would cost and where it would fit, from ``costs``; the package behind ``tools/plan.py``.

In the order of its flow; each file imports those above it only:

===============  ===================================================================================
``subject``      a command line, checked as the run itself would check it, with its sizes and layout
``time``         seconds of a step on a GPU: an explained model
``figures``      everything that a plan says, as plain values: what ``--json`` prints
``comparison``   several architectures side by side; equal parameters, equal FLOPs
``fit``          layouts that fit, ranked
``tables``       figures as text
``plots``        figures as a picture
``request``      from the options of the tool to its figures
===============  ===================================================================================
"""
