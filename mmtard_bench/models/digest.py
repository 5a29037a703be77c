"""Which model is this? A digest of what it is made of and of what it answers.

Weights alone do not tell: the number of heads, a mask, an activation or a line of Python changes
the answers and leaves no trace in them. So the digest also covers the configuration and the
answers to fixed probes.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmtard_bench.models.clip import Clip

DIGEST_VERSION = 2
"""Version 1 hashed the logit scale, the kinds of layers and the weights alone."""

PROMPTS = ("a photo of a cat.", "the digit 7", "Something ELSE, in capitals", "x")
_PROJECTIONS = 8
_SHADES = (0.7, 2.3)
"""Phases of the probe images: one image each."""

_STEP, _COARSE_STEP = 1e-3, 2e-2
"""What answers are rounded to, in float64 and where a model runs in float32 alone. Devices agree
to 1e-13 and to 1e-6 of these numbers, whose size is about one, so that hardly any of them lies so
near to the border between two roundings that devices round it apart."""

_FAILS = "fails"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def model_digest(clip: "Clip") -> str:
    """SHA-256 over scale, configuration, kinds of layers, weights as float32, and answers.

    Which file held the weights, and in which precision, does not matter.
    """
    sha = hashlib.sha256(f"mmtard_bench model {DIGEST_VERSION}".encode())
    sha.update(f"scale {float(clip.scale()):.6g}".encode())
    sha.update(f"given {clip.given_digest} architecture {clip.architecture}".encode())
    sha.update(f"configuration {_configuration(clip.config)}".encode())
    if isinstance(clip.module, nn.Module):
        for key, layer in clip.module.named_modules():
            sha.update(f"{key} {type(layer).__qualname__}".encode())
        for key, value in sorted(clip.module.state_dict().items()):
            if not isinstance(value, Tensor):  # a layer's extra state may be anything
                sha.update(f"{key} {value!r}".encode())
                continue
            sha.update(f"{key} {tuple(value.shape)}".encode())
            sha.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    sha.update(f"answers {answers(clip)}".encode())
    return sha.hexdigest()


def _configuration(config: dict[str, Any] | None) -> str:
    """What an ``open_clip_config.json`` says of the model, without what is the default anyway."""
    if config is None or not isinstance(config.get("model_cfg"), dict):
        return json.dumps(config, sort_keys=True, default=str)
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    model = {key: value for key, value in config["model_cfg"].items() if value not in (None, False)}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        given = model.get(part)
        if isinstance(given, dict):
            model[part] = {
                key: value
                for key, value in given.items()
                if key not in defaults or value != defaults[key]
            }
    return json.dumps(model, sort_keys=True, default=str)


Answers = dict[str, list[int] | str]


def answers(clip: "Clip") -> Answers:
    """What a model answers to fixed images and prompts, as rounded projections of embeddings.

    They are computed in float64, on a copy of the module, so that devices agree; those of a tower
    that fails there, in float32. A tower that cannot answer the probes (a tokenizer that takes
    certain texts only), or that does not repeat itself, is described by that instead.
    """
    exact = {"images": _FAILS, "texts": _FAILS} | _in_float64(clip)
    if _FAILS not in exact.values():
        return exact
    coarse = _ask(clip, clip.module, torch.float32, _COARSE_STEP)
    return {name: coarse[name] if found == _FAILS else found for name, found in exact.items()}


def _in_float64(clip: "Clip") -> Answers:
    if not isinstance(clip.module, nn.Module):
        return {}
    try:
        module = deepcopy(clip.module)
        if _device(module).type == "mps":  # it has no float64
            module.cpu()
        module.double()
    except Exception:  # modules may hold what cannot be copied
        return {}
    return _ask(clip, module, torch.float64, _STEP)


def _ask(clip: "Clip", module: Any, dtype: torch.dtype, step: float) -> Answers:
    device = _device(module)
    images = _images(clip, dtype, device)

    def of_images() -> Tensor:
        return module.encode_image(images)  # type: ignore[no-any-return]

    def of_texts() -> Tensor:
        return module.encode_text(clip.tokens(PROMPTS).to(device))  # type: ignore[no-any-return]

    devices = [device] if device.type == "cuda" else []
    towers = {"images": of_images, "texts": of_texts}
    return {name: _rounded(tower, dtype, step, devices) for name, tower in towers.items()}


def _rounded(
    embed: Callable[[], Tensor], dtype: torch.dtype, step: float, devices: list[torch.device]
) -> list[int] | str:
    """Projections of unit embeddings (N, D) on fixed directions, in units of ``step``."""
    seen = []
    for _ in range(2):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(0)
                found = embed()
                if found.dtype.itemsize < dtype.itemsize:
                    return _FAILS
                unit = F.normalize(found.double(), dim=-1).cpu().numpy()
            signs = np.random.RandomState(0).randint(0, 2, (unit.shape[-1], _PROJECTIONS)) * 2 - 1
            seen.append(unit @ signs)
        except Exception:  # other people's code, which may do anything
            return _FAILS
    if not np.isfinite(seen).all():
        return "not finite"
    if np.abs(seen[0] - seen[1]).max() > step / 10:
        return "does not repeat"
    return [int(value) for value in np.rint(seen[0] / step).flatten()]


def _device(module: object) -> torch.device:
    return next((tensor.device for _, tensor in _tensors(module)), torch.device("cpu"))


def _images(clip: "Clip", dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed input (2, 3, H, W) of the image tower, of deviation one: waves of many lengths.

    It depends on the model's input size and not on its normalisation, which a record's identity
    has beside the digest.
    """
    height, width = clip.preprocess.size
    row, column = (torch.arange(n, dtype=torch.float64) / n for n in (height, width))
    shade = torch.tensor(_SHADES, dtype=torch.float64).view(-1, 1, 1, 1)
    channel = torch.arange(3, dtype=torch.float64).view(1, -1, 1, 1)
    along, across = row.view(1, 1, -1, 1), column.view(1, 1, 1, -1)
    waves = torch.sin(7 * along * (1 + shade) + channel) + torch.sin(11 * across + shade * channel)
    fine = torch.cos(61 * along * across + shade)
    return ((waves + fine) / 1.2).to(device, dtype)


def checksum(*objects: object) -> int:
    """CRC-32 over the tensors, plain settings and code of objects: did they change since?

    For one process alone: unlike the digest it is cheap, and means nothing elsewhere.
    """
    found = 0
    for one in objects:
        found = _checksum(one, found)
    return found


def _checksum(module: object, found: int) -> int:
    for key, value in _tensors(module):
        found = zlib.crc32(f"{key} {value.dtype} {tuple(value.shape)}".encode(), found)
        if value.numel():
            flat = value.detach().cpu().contiguous().flatten()
            found = zlib.crc32(flat.view(torch.uint8).numpy().data, found)
    for key, setting in _settings(module):
        found = zlib.crc32(f"{key} {setting!r}".encode(), found)
    return found


def _layers(module: object) -> Iterator[tuple[str, object, dict[str, Any]]]:
    """Each layer's name, the layer, and what it keeps as plain attributes."""
    layers = module.named_modules() if isinstance(module, nn.Module) else [("", module)]
    registered = ("_modules", "_parameters", "_buffers", "training")
    for name, layer in layers:
        held = getattr(layer, "__dict__", {})
        yield name, layer, {key: value for key, value in held.items() if key not in registered}


def _tensors(module: object) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers (saved with the module or not) and tensors kept as plain attributes."""
    if isinstance(module, nn.Module):
        yield from module.named_parameters()
        yield from module.named_buffers()
    for name, _, held in _layers(module):
        yield from ((f"{name}.{k}", v) for k, v in held.items() if isinstance(v, Tensor))


def _settings(module: object) -> Iterator[tuple[str, object]]:
    """Kinds of layers with their code, and what they keep: numbers, texts, functions, hooks.

    Code may change under an object: notebooks reload modules in place.
    """
    for name, layer, held in _layers(module):
        kinds = [kind for kind in type(layer).__mro__ if kind not in (nn.Module, object)]
        members = [member for kind in kinds for member in vars(kind).values()]
        yield name, (kinds, [getattr(member, "__code__", None) for member in (*members, layer)])
        for key, value in held.items():
            parts = [*value] if isinstance(value, tuple | list) else [value]
            if isinstance(layer, nn.Module):  # a tokenizer's hold vocabularies, or remember texts
                held_by = value if isinstance(value, dict) else getattr(value, "__dict__", None)
                parts = [*held_by.values()] if held_by and not callable(value) else parts
            found = [part for part in parts if isinstance(part, _PLAIN) or callable(part)]
            if found:
                yield f"{name}.{key}", found
