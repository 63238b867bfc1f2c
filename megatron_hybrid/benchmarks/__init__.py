"""What programs in ``tools/benchmarks/`` share.

==================  ================================================================
``attention_arms``  kernels of attention on the layers' shapes (``attention_search``: their configurations)
``timing``          seconds and peak memory of a function; versions
``single_layers``   layers of a model's command line, built and measured one by one
``short_runs``      short training runs on mock data
``kernel_classes``  what a GPU did in a step: its kernels by class
``rival_tuning``    configurations that mamba_ssm's kernels have chosen by trial
``measured_run``    a training run whose steps are timed and profiled
``step_runs``       such runs of several recipes, one after the other
``step_report``     their rows, tables and picture
==================  ================================================================
"""
