"""Run tests of Triton kernels in Triton's interpreter, on CPU tensors.

Triton decides between compiler and interpreter when it is imported (TRITON_INTERPRET), for the
whole process. So one child process is started with the variable set; a test that is decorated with
`interpreted` runs there, with its own name, parameters and traceback, and everything else in the
same pytest run, the compile-only checks among it, sees the compiler.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def interpreted(test: Callable) -> Callable:
    """Decorate a test function (of a module, with picklable arguments) to run in the child."""

    @functools.wraps(test)
    def run_in_child(*args, **kwargs):
        call = (test.__module__, test.__qualname__, args, kwargs)
        child().submit(run_here, sys.path, *call).result()

    return run_in_child


@functools.cache
def child() -> ProcessPoolExecutor:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare)
        pool.submit(int).result()  # the process has started, with the variable
    finally:
        del os.environ["TRITON_INTERPRET"]
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def prepare() -> None:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    np.seterr(all="ignore")  # inf - inf and the like are part of the tests
    patch_lang, patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched = {}

    def patch_lang_once(fn):
        """Triton patches its language anew for every call of every device function, which takes
        longer than the call; here it stays patched.
        """
        modules = tuple(
            m.__name__
            for m in (tl, tl.core)
            if any(m is value for value in fn.__globals__.values())
        )
        if modules not in patched:
            patched[modules] = patch_lang(fn)
            patched[modules].restore = lambda: None
        return patched[modules]

    def patch_tensor(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_in_order(self, a, b, total, *options):
        """BLAS adds up one row of a tile in another order than the next; a GPU does not."""
        if a.data.dtype != np.float32 or a.data.ndim != 2:
            return create_dot(self, a, b, total, *options)
        sums = total.data.copy()
        for k in range(a.data.shape[1]):
            sums += a.data[:, k, None] * b.data[k]
        return interpreter.TensorHandle(sums, total.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot_in_order
    # triton 3.6.0 writes int(array of one element), which numpy 2.4 refuses; so no kernel could
    # have `range(scalar)`. Goes with the first triton that works without it.
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_lang_once


def run_here(path: list[str], module: str, name: str, args: tuple, kwargs: dict) -> None:
    sys.path[:] = path
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
