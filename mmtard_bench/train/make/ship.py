"""Take a checkpoint into the package: ``python -m mmtard_bench.train.make.ship CHECKPOINT NAME``.

Only the image tower learns, so only it is kept, as float16, with the card beside it; the text
tower is that of the model that the recipe starts from, which must be one that ships. The card
names the digest of what ships; rounding made it another than the one that was trained.
"""

import argparse
import sys
from pathlib import Path

from mmtard_bench.errors import InputError
from mmtard_bench.files import write_atomically
from mmtard_bench.models.loading import load_local_dir, load_model
from mmtard_bench.models.tiny import WEIGHTS
from mmtard_bench.models.towers import with_visual
from mmtard_bench.train.checkpoint import read_card, write_weights


def ship(checkpoint: Path, name: str, folder: Path) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json`` into a folder that holds the start's directory.

    Raises InputError for a checkpoint without a card, or whose start is not in the folder.
    """
    card = read_card(checkpoint)
    if card is None:
        raise InputError(f"{checkpoint} has no card.json; expected what a finished training left.")
    state = load_model(f"local-dir:{checkpoint}").module.state_dict()  # type: ignore[attr-defined]
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in state.items()
        if key.startswith("visual.")
    }
    tower = folder / f"{name}.safetensors"
    write_weights(tower, half)
    digest = with_visual(load_local_dir(folder / card.recipe["student"], name), tower, name).digest
    card = card.model_copy(update={"weights_digest": digest})
    write_atomically(folder / f"{name}.json", card.model_dump_json(indent=1) + "\n")


def main() -> int:
    """Parse the arguments and ship."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    try:
        ship(arguments.checkpoint, arguments.name, WEIGHTS)
    except InputError as error:
        print(f"ship: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
