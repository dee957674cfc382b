"""Stage 2: shuffled rows of a store in, nested SAE checkpoints out. No language model is loaded.

Words: a *member* of the grid is one SAE in training (`step.member.Member`: its weights and its step). On disk it is a
`Folder`; a `Task` is that folder and where it stands when a run begins; a `Trainee` is a member at work in its folder
(logged, checkpointed, finished); an `Outcome` is what a run made of it. `config` is always a TrainConfig, what fixes a
member; `job` always a RunConfig, what fixes a run.
"""

import _signal

held = _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT})  # Ctrl-C waits until pipeline has taken it
import pipeline  # noqa: E402, F401

if _signal.SIGINT not in held:
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})
