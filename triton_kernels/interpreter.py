"""Repairs of the interpreter (TRITON_INTERPRET=1) of Triton 3.6 to 3.8, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Mend loop bounds with NumPy 2.4, rounding to bf16, warnings, and the time that all takes."""
    patch_lang, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    cast = interpreter.InterpreterBuilder.cast_impl

    def patch_lang_once(fn: Any) -> Any:
        # The original patches anew for every call of a function, which takes half of all time.
        if tl.core.is_builtin(tl.load):
            return patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        return interpreter._LangPatchScope()

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # The original calls int() on an array of one element, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_rounded(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if (source, target) == (tl.float32, tl.bfloat16):  # the original truncates
            return interpreter.TensorHandle(_to_bfloat16(src.data), target)
        if (source, target) == (tl.bfloat16, tl.float32):  # the original loses subnormals
            widened = (src.data.astype(np.uint32) << 16).view(np.float32)
            return interpreter.TensorHandle(widened, target)
        return cast(self, src, dst_type)

    # Inf - Inf is no more worth a warning than on a GPU.
    interpreter.GridExecutor.__call__ = np.errstate(all="ignore")(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = patch_lang_once
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.cast_impl = cast_rounded
    _quicken()


def _quicken() -> None:
    """The same results in a third of the time.

    Nearly all of it goes into describing types and shapes, anew for every operation of a kernel.
    """
    # Repeats every int32 operation in int64, for an assertion that options.debug would turn on.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)

    _remember(tl.core.block_type, lambda element, shape: (element.name, *shape), "element_ty")
    _remember(tl.core.tensor, lambda handle, type: type.name, "handle", "type")
    describe = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}
    interpreter._get_np_dtype = lambda type: (
        dtypes.get(type.name) or dtypes.setdefault(type.name, describe(type))
    )


def _remember(cls: Any, key_of: Callable[..., Any], *kept: str) -> None:
    """Derive the attributes of `cls` once a key, but for the first arguments, which it keeps."""
    original, known = cls.__init__, {}

    def initialise(self: Any, *arguments: Any) -> None:
        key = key_of(*arguments)
        if key not in known:
            original(self, *arguments)
            known[key] = dict(vars(self))
        vars(self).update(known[key], **dict(zip(kept, arguments, strict=False)))

    cls.__init__ = initialise


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of fp32 values, to nearest even, as uint16 (the interpreter's bf16)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
