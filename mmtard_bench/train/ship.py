"""Take a checkpoint into the package: ``python -m mmtard_bench.train.ship CHECKPOINT NAME``.

Only the image tower learns, so only it is kept, as float16, with the card beside it; the text
tower is that of the model that the recipe starts from.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

from mmtard_bench.models.loading import load_model
from mmtard_bench.records import write_atomically
from mmtard_bench.train.checkpoint import CARD, write_weights


def ship(checkpoint: Path, name: str) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json`` among the package's weights."""
    state = load_model(f"local-dir:{checkpoint}").module.state_dict()  # type: ignore[attr-defined]
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in state.items()
        if key.startswith("visual.")
    }
    folder = Path(str(files("mmtard_bench.models"))) / "weights"
    write_weights(folder / f"{name}.safetensors", half)
    card = json.loads((checkpoint / CARD).read_text("utf-8"))
    write_atomically(folder / f"{name}.json", json.dumps(card, indent=1) + "\n")


def main() -> None:
    """Parse the arguments and ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    ship(arguments.checkpoint, arguments.name)


if __name__ == "__main__":
    main()
