"""The base of every configuration model, and the one error for bad input."""

from pydantic import BaseModel, ConfigDict


class UserError(ValueError):
    """Bad input from the user; `str()` is one clear line: what is wrong, the values, the fix."""


class Config(BaseModel):
    """A frozen, strictly validated configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
