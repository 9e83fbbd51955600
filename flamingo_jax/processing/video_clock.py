"""The seconds at which a film's frames are shown, out of time stamps that may lack or jump."""

LONGEST = 10.0
"""Seconds. A longer gap between two stamps is a jump of the clock rather than a still: ffplay
and ffmpeg take the same bound for forms whose clocks may jump.
"""
SLIDES = 10
"""Times the average step. A gap below it is one of many, and so no jump."""
SETBACK = 1.0
"""Seconds that a stamp may lie behind the one before without being a jump: stamps in the order
of decoding are off by so much at most.
"""
BEHIND = 16
"""Frames in a row that may lie behind, as many as a decoder may hold back."""
USUAL_STEP = 1 / 25
"""Seconds, where a file says nothing of its rate."""
GAP = 1.5
"""Times the usual step that is a gap in a film of a steady rate."""
STEADY = 0.05
"""Share of gaps up to which a film's rate is called steady."""


class FrameClock:
    """Says, called with every frame in turn, when each is shown, counted from the first.

    The second never falls, and rises by the usual step where a stamp lacks, is the one before
    again, or has jumped.
    """

    def __init__(self, rate: float, average: float = 0.0, *, trusted: bool = False):
        """rate: frames a second by the file's header; 0 where it is not known.

        average: their count over the film's length, which tells slides from a clock that
          jumped.
        trusted: stamps are sums of the times that frames stay, and cannot jump (moving GIFs).
        """
        self._usual = 1 / rate if 1e-3 < rate < 1e4 else USUAL_STEP
        slides = SLIDES / average if average > 0 else 0.0
        self._limit = float("inf") if trusted else max(LONGEST, SLIDES * self._usual, slides)
        self._step = self._usual
        self._now: float | None = None
        self._stamp: float | None = None
        self._shift: float | None = None
        self._behind = 0
        self._steps = self._gaps = 0

    def __call__(self, stamp: float | None, lasted: float | None = None) -> float:
        """Seconds of a frame. stamp: its time by the file. lasted: how long the one before it
        stays by the file, which counts where the stamp is of no use."""
        self._hear(lasted)
        self._now = self._next(stamp)
        self._stamp = self._stamp if stamp is None else stamp
        return self._now

    def last(self, lasts: float | None) -> float:
        """The second at which the last frame leaves the screen."""
        self._hear(lasts)
        return (self._now or 0.0) + self._step

    def _hear(self, lasted: float | None) -> None:
        if lasted is not None and 0 < lasted <= self._limit:
            self._step = lasted

    @property
    def stamp(self) -> float:
        """The last stamp, jumps and all; headers count a film's length up to it."""
        return self._stamp or 0.0

    @property
    def gaps(self) -> int:
        """Gaps in a film that is steady but for them; 0 where the rate varies."""
        return self._gaps if self._gaps <= STEADY * self._steps else 0

    def _next(self, stamp: float | None) -> float:
        now = self._now
        if now is None:
            self._shift = None if stamp is None else -stamp
            return 0.0
        if stamp is None or stamp == self._stamp:
            return now + self._step
        if self._shift is None:
            self._shift = now + self._step - stamp
        delta = stamp + self._shift - now
        if 0 < delta <= self._limit:
            self._behind = 0
            self._steps += 1
            self._gaps += delta > GAP * self._usual
            self._step = delta
            return now + delta
        if -SETBACK < delta <= 0 and self._behind < BEHIND:
            self._behind += 1
            return now
        self._behind = 0
        self._shift = now + self._step - stamp
        return now + self._step
