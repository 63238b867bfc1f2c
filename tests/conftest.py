"""Settings of all tests."""

import signal

from hypothesis import settings

# an example that takes longer on a busy machine is no failure
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# a shell gives programs in its background no Ctrl-C, and they would give none to those that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
