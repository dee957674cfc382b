"""Stage 3: checkpoints in, scores out (JSON, CSV), and the report made of them."""

import _signal

held = _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT})  # Ctrl-C waits until pipeline has taken it
import pipeline  # noqa: E402, F401

if _signal.SIGINT not in held:
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})
