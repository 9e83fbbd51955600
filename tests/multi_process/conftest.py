"""The synthetic world, small, for runs of several processes."""

from tests.end_to_end.conftest import data

__all__ = ["data"]
