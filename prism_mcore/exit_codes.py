"""What the exit code of a launcher means to whatever started it (see launch/README.md)."""

DONE = 0  # all steps were taken
FAILED = 1  # an exception, a lost rank, a save past its deadline: start again, it resumes
BAD_SETTINGS = 2  # refused, the settings, the data or a folder in use: starting again changes nothing
STOPPED_BY_SIGNAL = 75  # SIGTERM, SIGUSR1 or Ctrl-C: saved; start again to resume
STOPPED_BY_GUARD = 76  # NaN, Inf or loss spikes beyond guards.skip_budget: a person has to look
