"""Run under a launcher: write the gradient of the first step, averaged over processes."""

import sys
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from mmtard_bench.train.loop import Trainer
from mmtard_bench.train.recipe import load_recipe
from mmtard_bench.train.session import Place, train

recipe, folder, *overrides = sys.argv[1:]


def keep_gradient(self, step, loss):
    self.accelerator.backward(sum(loss.terms.values()))
    if self.accelerator.is_main_process:
        gradients = {name: p.grad.contiguous() for name, p in self.tower.named_parameters()}
        save_file(gradients, f"{folder}.safetensors")
    self.optimiser.zero_grad()


Trainer._update = keep_gradient
train(load_recipe(recipe, overrides), Place(Path(folder), cpu=True), Console(quiet=True))
