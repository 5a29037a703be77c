"""What the parts of a model give, checked: tokens, embeddings, the logit scale."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtard_bench.errors import InputError, first_line

LARGEST_LOG_SCALE = 11.0
"""exp(11) is 60,000; CLIP's scale ends at 100, whose logarithm is 4.6."""


def tokens_of(tokenizer: Callable[[Any], Any], texts: Sequence[str], model: str) -> Tensor:
    """The tokens of texts, one row each. Raises InputError for anything else."""
    try:
        tokens = tokenizer(list(texts))
        if isinstance(tokens, list):
            tokens = torch.tensor(tokens)
    except InputError:
        raise
    except Exception as error:  # anybody's code
        raise InputError(
            f"The tokenizer of the model '{model}' failed on {len(texts)} prompts, of which the "
            f"first is {texts[0]!r}: {type(error).__name__}: {first_line(error)}. Expected a "
            "tensor with one row a prompt."
        ) from error
    if not isinstance(tokens, Tensor) or tokens.ndim == 0 or len(tokens) != len(texts):
        raise InputError(
            f"The tokenizer of the model '{model}' returned {_described(tokens)} for {len(texts)} "
            "prompts; expected a tensor with one row a prompt. A tokenizer of transformers is "
            'wrapped so: lambda texts: tokenizer(texts, padding="max_length", truncation=True, '
            'return_tensors="pt").input_ids.'
        )
    return tokens.detach().cpu().clone()  # a tokenizer may use its buffer again


def embeddings_of(encode: Callable[[Tensor], Any], inputs: Tensor, model: str) -> Tensor:
    """Unit embeddings (N, D), float32, of N inputs. Raises InputError for anything else."""
    what = f"{getattr(encode, '__name__', 'encode')} of the model '{model}'"
    try:
        found = encode(inputs)
    except RuntimeError as error:
        if not re.search("dtype|scalar type|Input type", str(error)):
            raise
        raise InputError(
            f"{what} mixes precisions: {first_line(error)} Inputs are float32; cast the weights "
            "before the Clip is made: Clip(module.float(), ...)."
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(inputs):
        raise InputError(
            f"{what} returned {_described(found)} for {len(inputs)} inputs; expected one tensor of "
            "embeddings (N, D). Return the embedding alone, such as output.pooler_output, "
            "output.image_embeds or output[0]."
        )
    return F.normalize(found.float(), dim=-1)


def text_embeddings_of(encode: Callable[[Tensor], Any], tokens: Tensor, model: str) -> Tensor:
    """As ``embeddings_of``, where whatever else is raised is an InputError too.

    That of images is left to those who make batches smaller when memory is short.
    """
    try:
        return embeddings_of(encode, tokens, model)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anybody's code
        raise InputError(
            f"encode_text of the model '{model}' failed on tokens of shape {tuple(tokens.shape)} "
            f"and type {tokens.dtype}: {type(error).__name__}: {first_line(error)}. Does the "
            "tokenizer belong to the model?"
        ) from error


def require_log_scale(value: Any, model: str) -> None:
    """Raise InputError unless this can be the logarithm of a logit scale."""
    try:
        log_scale = float(torch.as_tensor(value).detach())
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The logit_scale of the model '{model}' is {_described(value)}; expected one number, "
            "the logarithm of the scale: log(100) for OpenAI's models."
        ) from error
    if not log_scale <= LARGEST_LOG_SCALE or log_scale == -math.inf:
        raise InputError(
            f"The logit_scale of the model '{model}' is {log_scale:g}, so that logits would be "
            f"exp({log_scale:g}) times the cosine. Expected the logarithm of the scale, at most "
            f"{LARGEST_LOG_SCALE:g}: 4.605 for a scale of 100."
        )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
