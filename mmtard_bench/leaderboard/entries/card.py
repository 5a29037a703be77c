"""A model card: who made a model of what, and where its weights are."""

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from mmtard_bench.errors import InputError
from mmtard_bench.leaderboard.entries.text import EntryName, Plain, Url
from mmtard_bench.records.schema import Count, Digest, Name
from mmtard_bench.schema import Strict, explain

_WEIGHTS = (
    r"hf-hub:[\w.-]+/[\w.-]+(@[\w.-]+)?"
    r"|transformers:[\w.-]+/[\w.-]+(@[\w.-]+)?"
    r"|(?!local-dir:|transformers:|hf-hub:)[\w-]+:[a-z0-9_]+"  # an open_clip architecture and tag
    r"|[a-z0-9-]+"  # a model that ships
)


def _weights(text: str) -> str:
    if not re.fullmatch(_WEIGHTS, text, re.ASCII) or ".." in text:
        raise ValueError(
            "expected weights that anybody can get and that run no code: hf-hub:ORG/REPO, "
            "transformers:ORG/REPO, ARCH:TAG of open_clip, or a model that ships"
        )
    return text


Weights = Annotated[str, Field(max_length=200), AfterValidator(_weights)]


class Card(Strict):
    """The facts about a model. None means that the submitter did not say.

    ``weights`` is what ``load_model`` takes and ``digest`` hashes them; both are checked when an
    entry is replayed. ``training_threat`` is what the model was trained to withstand: "linf 4/255",
    or "none". ``adversarials`` is the SHA-256 of a file of adversarial images, kept elsewhere.
    """

    name: EntryName
    authors: list[Plain] = Field(default=[], max_length=100)
    paper: Url | None = None
    code: Url | None = None
    weights: Weights
    digest: Name
    architecture: Plain | None = None
    parameters: Count | None = None
    pretraining_data: Plain | None = None
    finetuning_data: Plain | None = None
    training_threat: Plain | None = None
    licence: Plain | None = None
    contact: Plain | None = None
    adversarials: Digest | None = None

    @property
    def unsaid(self) -> list[str]:
        """The fields that the submitter left open, but for the file of adversarial images."""
        fields = self.model_dump(exclude={"adversarials"})
        return [name for name, value in fields.items() if value in (None, [])]


def card_from_text(text: str, where: str) -> Card:
    """Read a card. Raises InputError for what is not one."""
    try:
        body: Any = json.loads(text)
        if isinstance(body, dict):
            body.pop("$schema", None)
        return Card.model_validate_json(json.dumps(body))
    except ValidationError as error:
        why = explain(error)
    except (ValueError, RecursionError) as error:
        why = f"it is no JSON ({error})."
    raise InputError(f"The model card {where} is not valid: {why}")


def card_to_text(card: Card) -> str:
    """A card as it is kept, with what editors need to help with it."""
    body = {"$schema": "../../card.schema.json", **card.model_dump(mode="json")}
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def card_schema() -> str:
    """The JSON Schema of a card."""
    schema = Card.model_json_schema()
    schema["properties"]["$schema"] = {"type": "string"}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    print(card_schema(), end="")  # noqa: T201
