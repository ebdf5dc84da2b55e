"""A session whose engine makes a decode step only when a test lets it, and tells what it did."""

import threading
import time

__all__ = ["Gate", "wait_until"]


class Gate:
    """Stands in front of a session's real decoder.

    Attributes:
        events: "prefill" or "step", in order.
        fail: Raised by the next step, once.
    """

    def __init__(self, session, monkeypatch):
        self.events, self.fail = [], None
        self._permits, self._open = threading.Semaphore(0), False
        make, prefill = session.decoder, session.prefill
        monkeypatch.setattr(session, "decoder", lambda **shape: self._guard(make(**shape)))
        monkeypatch.setattr(
            session,
            "prefill",
            lambda *given, **named: (self.events.append("prefill"), prefill(*given, **named))[1],
        )

    def _guard(self, decoder):
        step = decoder.step

        def guarded(tokens):
            if not self._open:
                self._permits.acquire()
            self.events.append("step")
            error, self.fail = self.fail, None
            if error:
                raise error
            return step(tokens)

        decoder.step = guarded
        return decoder

    def let(self, steps):
        """Let so many steps go on."""
        for _ in range(steps):
            self._permits.release()

    def open(self):
        """Let all steps go on from now."""
        self._open = True
        self._permits.release()


def wait_until(condition):
    """Poll; fails after half a minute, which no working engine needs."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
