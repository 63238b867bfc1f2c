"""Settings of all tests."""

from hypothesis import settings

# an example that takes longer on a busy machine is no failure
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
