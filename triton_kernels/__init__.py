"""The four stages in Triton: stats, apply, bwd_reduce and bwd_apply, behind the raw ops.

Nothing here imports fusedskip: a call goes ops → launcher → kernel; checks are the caller's.
"""

from triton import knobs

from . import interpreter

if knobs.runtime.interpret:
    interpreter.repair()
