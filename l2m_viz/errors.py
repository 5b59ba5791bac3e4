"""Errors that speak to the user: what was wrong, what was expected, what came, what to do."""


class L2MError(ValueError):
    """Base of every error this package raises for input it cannot use.

    >>> str(L2MError("depth is empty", expected="at least one valid pixel", got="0 of 12", todo="check the mask"))
    'depth is empty: expected at least one valid pixel, got 0 of 12. Check the mask.'
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", todo: str = "") -> None:
        facts = ", ".join(
            part for part in (f"expected {expected}" * bool(expected), f"got {got}" * bool(got)) if part
        )
        message = f"{what}: {facts}" if facts else what
        if todo:
            message = f"{message}. {todo[0].upper()}{todo[1:]}."
        super().__init__(message)


class ShapeError(L2MError):
    """An array has the wrong shape or size."""


def require_tensor(name: str, value: object) -> None:
    """Refuse arrays and lists where only a tensor will do: torch's own words would not say which argument it was.

    Raises:
        ShapeError: the value is not a tensor.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        todo = "torch.as_tensor makes one of an array or a list"
        raise ShapeError(name, expected="a torch tensor", got=f"a {type(value).__name__}", todo=todo)


class ImageError(L2MError):
    """A picture cannot be read or is not a picture."""


class FileFormatError(L2MError):
    """A file is truncated, foreign, or not what its name says."""


class MissingError(L2MError):
    """Something optional is not here: a package, a weight file, a backend, a sample."""
