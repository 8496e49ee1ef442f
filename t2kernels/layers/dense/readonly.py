"""A weight that can be read and not written: what `layer.weight` of a factored layer returns.

Such a weight is rebuilt from the factors at each access. Whatever is written into it would be lost without a word, so
every in-place operation on it, on its views and on its `.data` raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t2kernels import T2Error

_DATA = torch.Tensor.data
_REQUIRES_GRAD = torch.Tensor.requires_grad
_GRAD = torch.Tensor.grad


class ReadOnlyWeightError(T2Error, RuntimeError):
    """Something was written into the weight of a layer in factored form."""


def refuse(what: str) -> NoReturn:
    """Raise ReadOnlyWeightError. what: the operation that was tried."""
    raise ReadOnlyWeightError(
        f"{what} would change the weight of a layer in factored form, but this layer keeps only the factors of its "
        "weight, and a change would be lost; unpatch_model(model) first, or patch with form='delta'"
    )


class ReadOnlyWeight(Tensor):
    """A tensor that shares memory with `plain` and refuses in-place operations. Results of reading it are ordinary.

    A view of it is read-only as well. A copy (`clone`, `deepcopy`, pickle, another dtype or device) is an ordinary
    tensor.
    """

    plain: Tensor
    held: weakref.ref[ReadOnlyWeight]

    @staticmethod
    def __new__(cls, plain: Tensor) -> ReadOnlyWeight:
        """plain: the tensor to be read."""
        new = torch.Tensor._make_subclass(cls, plain.detach())
        new.plain = plain
        new.held = weakref.ref(new)  # torch.utils.swap_tensors refuses a tensor that has one
        return new

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handle what does not reach the dispatcher: `.data`, `.requires_grad`, `.numpy()` and the like."""
        kwargs = kwargs or {}
        if func == _DATA.__get__:
            return cls(args[0].plain)
        if func in (_DATA.__set__, Tensor.set_, Tensor.resize_) and isinstance(args[0], cls):
            refuse("setting .data")
        if (func == Tensor.requires_grad_ and (*args[1:], *kwargs.values(), True)[0]) or (
            func == _REQUIRES_GRAD.__set__ and args[1]
        ):
            refuse("training it")
        if func == _GRAD.__set__:
            refuse("setting .grad")
        if func == Tensor.__dlpack__:
            refuse("what another library writes into it (read a copy, .clone())")
        if func in (Tensor.numpy, Tensor.__array__):
            array = func(args[0].plain, *args[1:], **kwargs)
            array.flags.writeable = False
            return array
        if func == Tensor.tolist:
            return args[0].plain.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the plain tensor; raise if its schema says that it writes into this one."""
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            if argument.is_out or (argument.alias_info is not None and argument.alias_info.is_write):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if any(isinstance(t, cls) for t in pytree.tree_leaves(value)):
                    refuse(func._schema.name.removeprefix("aten::"))
        plain_args, plain_kwargs = pytree.tree_map_only(cls, lambda t: t.plain, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        return pytree.tree_map_only(Tensor, cls, out) if any(views) else out

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.plain.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ReadOnlyWeight({self.plain!r})"


class NoWeight(dict[str, Any]):
    """The `_parameters` of a module that has no parameter "weight": code that takes it out of there gets a sentence."""

    def __missing__(self, name: str) -> Any:
        if name == "weight":
            refuse("a parametrisation of it")
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name not in self:
            self.__missing__(name)
        super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        if name.partition("_")[0] == "weight":
            refuse(f"the parameter {name!r}")
        super().__setitem__(name, value)

    def update(self, *others: Any, **values: Any) -> None:
        """As of a dict, by `__setitem__`."""
        for name, value in dict(*others, **values).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of a dict, by `__setitem__`."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> NoWeight:
        self.update(other)
        return self

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict; without a default, "weight" raises ReadOnlyWeightError."""
        return super().pop(name, *default) if name in self or default else self.__missing__(name)
