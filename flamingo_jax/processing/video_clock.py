"""Computes when frames of a video are shown, from timestamps that may be missing or jump."""

LONGEST = 10.0
"""Seconds. A longer gap between two timestamps is a discontinuity of the clock, not a still
image: ffplay and ffmpeg use the same bound for formats with discontinuities.
"""
SLIDES = 10
"""Times the average step. In slide shows long gaps are normal: below this bound a gap is none.
"""
SETBACK = 1.0
"""Seconds that a timestamp may go backwards without being a discontinuity: timestamps in
decoding order are off by this much at most.
"""
BEHIND = 16
"""Consecutive frames whose timestamps may go backwards: the most that a decoder reorders."""
USUAL_STEP = 1 / 25
"""Seconds between frames where a file does not state its rate."""
GAP = 1.5
"""Times the usual step. A longer step is a gap, if the video's rate is steady."""
STEADY = 0.05
"""A video's rate is steady if at most this fraction of its steps are gaps."""


class FrameClock:
    """Computes frames' presentation times in seconds from the first; call it with each in
    turn.

    Times never decrease. Where a timestamp is missing, repeated or jumps, the time advances by
    the usual step.
    """

    def __init__(self, rate: float, average: float = 0.0, *, trusted: bool = False):
        """Starts the clock of a video.

        Args:
          rate: frames per second by the file's header; 0 if unknown.
          average: number of frames / duration, which distinguishes a slide show from a clock
            with discontinuities; 0 if unknown.
          trusted: timestamps are sums of frame durations and cannot jump (animated GIFs).
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
        """Returns a frame's presentation time in seconds.

        Args:
          stamp: its timestamp in the file, in seconds.
          lasted: the previous frame's duration in the file, used where `stamp` is unusable.
        """
        self._hear(lasted)
        self._now = self._next(stamp)
        self._stamp = self._stamp if stamp is None else stamp
        return self._now

    def last(self, lasts: float | None) -> float:
        """Returns the time at which the last frame ends, given its duration in the file."""
        self._hear(lasts)
        return (self._now or 0.0) + self._step

    def _hear(self, lasted: float | None) -> None:
        """Takes a plausible frame duration as the usual step."""
        if lasted is not None and 0 < lasted <= self._limit:
            self._step = lasted

    @property
    def stamp(self) -> float:
        """Returns the last raw timestamp: durations in headers include discontinuities."""
        return self._stamp or 0.0

    @property
    def gaps(self) -> int:
        """Returns the number of gaps in a video of steady rate; 0 where the rate varies."""
        return self._gaps if self._gaps <= STEADY * self._steps else 0

    def _next(self, stamp: float | None) -> float:
        """Computes the next time; `_shift` maps the file's clock to seconds from the first
        frame.
        """
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
            self._behind += 1  # Reordered: hold the time.
            return now
        # A discontinuity: continue one usual step later, with a new shift.
        self._behind = 0
        self._shift = now + self._step - stamp
        return now + self._step
