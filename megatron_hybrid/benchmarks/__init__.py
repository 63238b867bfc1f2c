"""What programs in ``tools/benchmarks/`` share.

=================  ================================================================
``timing``         seconds and peak memory of a function; versions
``single_layers``  layers of a model's command line, built and measured one by one
``short_runs``     short training runs on mock data
=================  ================================================================
"""
