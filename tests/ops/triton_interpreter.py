"""Triton's interpreter, made to run the kernels of flash-linear-attention on tensors of the CPU.

``TRITON_INTERPRET=1`` has Triton compute in NumPy, block by block, what it would compile. Two things of it do
not fit fla's kernels; :func:`prepare` mends both, and makes it faster, in a process of its own.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from typing import Any


def prepare() -> None:
    """Make Triton interpret, and able to interpret fla. To be called before anything imports Triton.

    Raises:
        ImportError: there is no Triton.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    # There is no driver to time configurations with, and all of them compute the same.
    run = autotuner.Autotuner.run

    def with_the_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self.configs[1:]
        return run(self, *args, **kwargs)

    autotuner.Autotuner.run = with_the_first

    # In a compiled kernel the variable of a loop is a tensor, whose method `to` fla calls; here it is an int.
    class LoopVariable(int):
        def to(self, dtype: Any) -> Any:
            return interpreter._implicit_cvt(int(self)).to(dtype)

    def loop_variables(*bounds: Any) -> Iterator[LoopVariable]:
        return map(LoopVariable, builtins.range(*(int(bound) for bound in bounds)))

    # The interpreter replaces the functions of triton.language around every call of a kernel, and again in
    # every function that a kernel calls, a third of the time. Nothing here needs them as they were.
    patch_language, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Kept:
        scope = function.__globals__
        scope["range"] = loop_variables
        names = frozenset(id(value) for value in scope.values() if value is tl or value is tl.core)
        if names not in patched:
            patch_language(function)
            patched.add(names)
        return Kept()

    interpreter._patch_lang = patch_once
