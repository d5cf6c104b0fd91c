"""Calls without argument names, as the plain model takes them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Forward = TypeVar("Forward", bound=Callable[..., Any])


def positional_as_plain(forward: Forward) -> Forward:
    """Lets a `forward` take arguments without names in the plain model's order, which differs between families."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            plain = self.parts[0].model if hasattr(self, "parts") else self.model
            names = list(inspect.signature(plain.forward).parameters)[: len(args)]
            if len(names) < len(args) or set(names) & kwargs.keys():
                raise TypeError(
                    f"Got {len(args)} arguments without names, and {sorted(kwargs)}; expected each argument of "
                    f"{type(plain).__name__}.forward at most once. Name them."
                )
            kwargs.update(zip(names, args, strict=True))
        return forward(self, **kwargs)

    return wrapper  # type: ignore[return-value]
