"""The command line: one file per verb."""

from whence.cli import stopping as stopping  # first: it listens to Ctrl-C while all the rest is imported
