"""Toy architectures, and checkpoints whose weights differ from the untrained ones."""

import pytest
import torch

import mmtard_bench as mb
from tests.models.toys import add_toys


@pytest.fixture(scope="session", autouse=True)
def toys(tmp_path_factory):
    add_toys(tmp_path_factory.mktemp("architectures"))


def trained(spec, seed=1):
    """The state dict of a model after some training: each number a little moved."""
    generator = torch.Generator().manual_seed(seed)
    state = mb.load_model(spec).module.state_dict()
    return {
        key: value + 0.02 * torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else value.clone()
        for key, value in state.items()
    }


def visual_of(state):
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
