"""Training methods by name, one module per method. Read ``base.py`` first."""

from typing import Any

from mmtard_bench.errors import InputError
from mmtard_bench.registry import near_matches
from mmtard_bench.schema import explained
from mmtard_bench.train.methods import (
    ard,
    clean_ft,
    fare,
    mmt_ard,
    mmt_ard_shipped,
    mtard,
    pmg_aft,
    sim_clip,
    tecoa,
    tga_zsr,
)
from mmtard_bench.train.methods.base import Method, Options

METHODS = {
    module.METHOD.name: module.METHOD
    for module in (
        clean_ft,
        tecoa,
        fare,
        sim_clip,
        pmg_aft,
        tga_zsr,
        ard,
        mtard,
        mmt_ard_shipped,
        mmt_ard,
    )
}


def find_method(name: str, options: dict[str, Any]) -> tuple[Method, Options]:
    """The method of a name with its checked options. Raises InputError for unknown ones."""
    if name not in METHODS:
        raise InputError(f"There is no method '{name}'. {near_matches(name, METHODS)}")
    method = METHODS[name]
    with explained(f"The options of {name} are not valid"):
        return method, method.options.model_validate(options)
