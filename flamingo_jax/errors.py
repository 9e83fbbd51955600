"""The errors that end a command: each has one sentence for the user and an exit code, by which
launchers decide whether to restart it.
"""

EXIT_BAD_INPUT = 2
"""Config, data, checkpoint or prompt was rejected before any work started."""
EXIT_NOT_FINITE = 3
"""Too many steps in a row were not finite; the last checkpoint is intact."""
EXIT_NOT_LEARNED = 4
"""The run is finished and saved, but a held-out loss is above what the config requires."""
EXIT_ABSENT = 69
"""One of the run's processes never arrived at the start."""
EXIT_SAVE_FAILED = 74
"""A checkpoint or another file could not be written; earlier checkpoints are intact."""
EXIT_PREEMPTED = 75
"""SIGTERM or SIGINT; everything is saved, and the same command resumes."""
EXIT_LOST = 76
"""Another process of the run died, or sent no heartbeat for too long; checkpoints are intact."""
EXIT_HUNG = 77
"""No step ended within the time limit; checkpoints are intact."""
RESTARTABLE = (EXIT_ABSENT, EXIT_SAVE_FAILED, EXIT_PREEMPTED, EXIT_LOST, EXIT_HUNG)
"""Exit codes after which the same command resumes the run: its input was not at fault."""


class UserError(Exception):
    """A mistake that the user can fix; the message says in one sentence what is wrong and how
    to fix it.
    """

    exit_code = EXIT_BAD_INPUT


class NotFiniteError(UserError):
    """The run stopped because too many steps in a row were not finite."""

    exit_code = EXIT_NOT_FINITE


class NotLearnedError(UserError):
    """The run ended with a held-out loss above what the config requires."""

    exit_code = EXIT_NOT_LEARNED


class StorageError(UserError):
    """A file could not be written or read during the run; earlier checkpoints are intact."""

    exit_code = EXIT_SAVE_FAILED
