"""Failures of a machine that a flag or a variable mends: torch says a hundred lines, here it is one.

Too little memory of a GPU, no C++ compiler, a cache folder that cannot be written."""
import contextlib
import os
import sys
import traceback

import torch

from nanolost.errors import UserError

def passed_the_compiler(error: BaseException) -> bool:
    """Whether an error came through torch.compile, or through loading it, which torch's optimizers do too."""
    parts = [frame.f_code.co_filename.split(os.sep) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any("_inductor" in part or "_dynamo" in part for part in parts)

def is_of_the_compiler(error: BaseException) -> bool:
    # to import the module takes seconds, and fails where the cache folder does
    known = sys.modules.get("torch._dynamo.exc")
    return known is not None and isinstance(error, known.BackendCompilerFailed)

@contextlib.contextmanager
def failures_with_their_repair():
    """The failures of a machine that a flag or a variable mends, in one line each."""
    cache = "a cache folder that you may write by TORCHINDUCTOR_CACHE_DIR"
    try:
        yield
    except torch.OutOfMemoryError as e:
        cause = str(e).partition(" Of the allocated")[0]
        raise MemoryError(f"{cause} With a smaller --micro_batch or --recompute true the same command "
                          "continues, with the same samples") from e
    except OSError as e:
        if not passed_the_compiler(e):
            raise
        raise UserError(f"torch cannot use the cache folder of its compiler ({e}): name {cache}") from e
    except RuntimeError as e:
        if not is_of_the_compiler(e):
            raise
        # torch 2.13 wraps some causes, in words over several lines, and not others
        cause = getattr(e, "inner_exception", e)
        line = str(cause).strip().partition("\n")[0]
        raise UserError(f"torch.compile failed ({line}): use --compile false, or name a C++ compiler by the "
                        f"variable CXX and {cache}") from e
