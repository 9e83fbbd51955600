"""What goes wrong on purpose: one sentence for the user, one exit code for the launcher."""

EXIT_BAD_INPUT = 2
"""Config, data, checkpoint or prompt refused before any work started."""
EXIT_NOT_FINITE = 3
"""Too many steps in a row were not finite; the last good checkpoint is whole."""
EXIT_NOT_LEARNED = 4
"""The run is finished and saved, but a held-out loss is above what the config requires of it."""
EXIT_PREEMPTED = 75
"""SIGTERM (or SIGINT): everything is saved; start the same command again to go on."""


class UserError(Exception):
    """A mistake that its user can mend: the message names the culprit and the mend in one sentence."""

    exit_code = EXIT_BAD_INPUT


class NotFiniteError(UserError):
    """The run stopped because too many steps in a row were not finite."""

    exit_code = EXIT_NOT_FINITE


class NotLearnedError(UserError):
    """The run ended above a loss that the config requires of it."""

    exit_code = EXIT_NOT_LEARNED
