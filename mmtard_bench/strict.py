"""What every model of data from outside begins with."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Fields as they are declared, no others, no conversion, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
