"""Types of card fields. They are strict: a quoted number, a truth value or a fraction is not read as a count."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(strict=True, ge=1)]
"""A whole number, one or more."""

Index = Annotated[int, Field(strict=True, ge=0)]
"""A place in a list, from 0 on."""

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
"""A finite number above zero."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""Any finite number."""

Flag = Annotated[bool, Field(strict=True)]
"""true or false."""
