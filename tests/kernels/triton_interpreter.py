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
import math
import multiprocessing
import os
import sys
import time
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
    return start_children(1)


def start_children(num_children: int) -> ProcessPoolExecutor:
    """Processes with the interpreter; they end with this one."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(num_children, multiprocessing.get_context("spawn"), prepare)
        # They have all started, with the variable.
        for started in [pool.submit(time.sleep, 0.1) for _ in range(num_children)]:
            started.result()
    finally:
        del os.environ["TRITON_INTERPRET"]
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def prepare() -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    np.seterr(all="ignore")  # inf - inf and the like are part of the tests
    patch_once()
    add_dots_in_order()
    remember_types()


def patch_once() -> None:
    """Triton patches its language anew for every call of every device function, which takes longer
    than the call; here it stays patched.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch_lang, patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched = {}

    @functools.cache
    def patch_lang_once(fn):
        modules = tuple(
            m.__name__
            for m in (tl, tl.core)
            if any(m is value for value in fn.__globals__.values())
        )
        if modules not in patched:
            patched[modules] = patch_lang(fn)
            patched[modules].restore = lambda: None
        return patched[modules]

    def patch_attr(obj, name, member, builder, scope):
        semantic = TritonSemantic(builder)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, call)

    def patch_tensor(tensor, scope):
        patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    # triton 3.6.0 writes int(array of one element), which numpy 2.4 refuses; so no kernel could
    # have `range(scalar)`. Goes with the first triton that works without it.
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_lang_once
    interpreter._patch_attr = patch_attr  # without a new dict for every call


def add_dots_in_order() -> None:
    import numpy as np
    from triton.runtime import interpreter

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


def remember_types() -> None:
    """Triton builds the type and shape of every value anew, two thirds of the interpreter's time;
    here equal ones are built once. They are never changed.
    """
    import numpy as np
    import triton.language.core as core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    init_block_type, broadcast = core.block_type.__init__, TritonSemantic.broadcast_impl_value
    numpy_dtype = interpreter._get_np_dtype
    block_types, shapes, numpy_dtypes = {}, {}, {}
    scalar_shape = core.tuple([]), core.constexpr(1)

    def block_type(self, element_ty, shape):
        # A pointer's element type is part of its name.
        sizes = tuple(s if type(s) is int else s.value for s in shape)
        key = (type(element_ty), element_ty.name, *sizes)
        if key not in block_types:
            init_block_type(self, element_ty, shape)
            block_types[key] = dict(self.__dict__)
        self.__dict__.update(block_types[key])

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = scalar_shape
        if type.is_block():
            key = tuple(type.shape)
            if key not in shapes:
                sizes = [core.constexpr(size) for size in key]
                shapes[key] = core.tuple(sizes), core.constexpr(math.prod(key))
            self.shape, self.numel = shapes[key]

    def get_np_dtype(type):
        scalar = type.element_ty if isinstance(type, core.block_type) else type
        if isinstance(scalar, core.pointer_type):
            return np.dtype(np.uint64)
        if scalar.name not in numpy_dtypes:
            numpy_dtypes[scalar.name] = numpy_dtype(scalar)
        return numpy_dtypes[scalar.name]

    def broadcast_impl_value(self, lhs, rhs):
        if list(lhs.type.shape if lhs.type.is_block() else ()) == list(
            rhs.type.shape if rhs.type.is_block() else ()
        ):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = get_np_dtype
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def run_here(path: list[str], module: str, name: str, args: tuple, kwargs: dict) -> None:
    sys.path[:] = path
    getattr(importlib.import_module(module), name).__wrapped__(*args, **kwargs)
