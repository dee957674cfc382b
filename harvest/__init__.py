"""Stage 1: text and a language model in, a Zarr store of one layer's residual stream out."""

import _signal

held = _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT})  # Ctrl-C waits until pipeline has taken it
import pipeline  # noqa: E402, F401

if _signal.SIGINT not in held:
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})
