"""What goes wrong on purpose: one sentence for the user, one exit code for the launcher."""

EXIT_BAD_INPUT = 2
"""Config, data, checkpoint or prompt refused before any work started."""
EXIT_NOT_FINITE = 3
"""Too many steps in a row were not finite; the last good checkpoint is whole."""
EXIT_NOT_LEARNED = 4
"""The run is finished and saved, but a held-out loss is above what the config requires of it.
"""
EXIT_ABSENT = 69
"""Of a run of several processes, one never arrived at the start."""
EXIT_SAVE_FAILED = 74
"""A checkpoint, or another file, could not be written; the checkpoints before it are whole."""
EXIT_PREEMPTED = 75
"""SIGTERM (or SIGINT): everything is saved; start the same command again to go on."""
EXIT_LOST = 76
"""Another process of the run died, or was not heard of for too long; what was saved is whole.
"""
EXIT_HUNG = 77
"""No step ended within the time limit; what was saved is whole."""
RESTARTABLE = (EXIT_ABSENT, EXIT_SAVE_FAILED, EXIT_PREEMPTED, EXIT_LOST, EXIT_HUNG)
"""After these the same command may go on where the run stood: nothing of its input is wrong."""


class UserError(Exception):
    """A mistake that its user can mend: the message names the culprit and the mend in one
    sentence.
    """

    exit_code = EXIT_BAD_INPUT


class NotFiniteError(UserError):
    """The run stopped because too many steps in a row were not finite."""

    exit_code = EXIT_NOT_FINITE


class NotLearnedError(UserError):
    """The run ended above a loss that the config requires of it."""

    exit_code = EXIT_NOT_LEARNED


class StorageError(UserError):
    """Something could not be written, or read, while the run went on; the checkpoints before it
    are whole.
    """

    exit_code = EXIT_SAVE_FAILED
