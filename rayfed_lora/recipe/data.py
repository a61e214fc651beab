"""The data and how they are dealt to clients: sections of the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import InitErrorDetails

from rayfed_lora.plugins.tables import DATA, PARTITIONS
from rayfed_lora.recipe.fields import (
    Auto,
    Choosing,
    ClassLabel,
    Count,
    Fraction,
    NameIn,
    Positive,
    PositiveFloat,
    Section,
    also_plain,
    option,
    section,
    short_for,
)


class Partition(Choosing):
    """How the training examples are dealt to clients."""

    choice = ("kind", PARTITIONS)

    kind: Annotated[str, NameIn(PARTITIONS)] = option(
        "dirichlet",
        "iid: even and random | dirichlet: label skew | shards: sorted by label, a few pieces each"
        " | quantity: sizes differ, labels do not | column: one client for each value of `column`,"
        " in the order of the values: numbers where all are whole numbers, else texts",
    )
    alpha: PositiveFloat = option(
        0.5, "concentration for dirichlet and quantity; smaller is more uneven"
    )
    clients: Positive = option(100, "number of clients (column: found in the data)", "clients")
    min_examples: Count = option(
        4, "clients with fewer get more from the largest clients (dirichlet, quantity)", "examples"
    )
    shards_per_client: Positive = option(2, "pieces for each client (shards)", "shards")
    column: str | None = option(None, "the column that names the client (column)")


def _known_encoding(name: str) -> str:
    if name != "auto":
        try:
            "".encode(name)
        except LookupError:
            raise ValueError("expected auto or an encoding that Python knows") from None
    return name


Sources = str | Annotated[list[str], Field(min_length=1)]
Encoding = Annotated[str, AfterValidator(_known_encoding)]
# Arrow's reader knows no others.
Character = Annotated[str, Field(pattern=r"^[\x00-\x09\x0b\x0c\x0e-\x7f]$")]


class TextFormat(Section):
    """How rows stand for examples, and how text files (CSV, TSV, JSON) are written."""

    kind: Literal["auto", "text", "instruction", "chat"] = option(
        "auto",
        "what a row holds (causal-lm): text | instruction: a prompt and its response (instruction,"
        " input and output; prompt and response; question and answer) | chat: a list of messages"
        " (messages of role and content, conversations of from and value); auto: told by the names"
        " of the columns, text where text_column is given. `format: chat` is short for it",
    )
    separator: Literal["auto", "tab"] | Character = option(
        "auto",
        "character between the values (CSV, TSV), or `tab`; auto: a tab in .tsv files; in .csv"
        " files the comma, or the one of ; | and tab that the first line has in place of a comma",
    )
    quote: Character | None = option(
        '"', "character around values, doubled inside of them; null: quotes are plain characters"
    )
    encoding: Encoding = option(
        "auto",
        "such as latin-1, cp1252 or utf-16-le; auto: that of the byte order mark, otherwise UTF-8",
    )
    columns: list[str] | None = option(
        None, "names of the columns of files without a first line that names them (CSV, TSV)"
    )


class Data(Choosing):
    """Where the examples come from and how they are split.

    Options of a method that `source` names stand beside it.
    """

    choice = ("source", DATA)

    @classmethod
    def _checked(cls, name: str, others: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the options of the method that `source` names, if it names one that has any."""
        if others and not (name in DATA and DATA.method(name).options.model_fields):
            raise ValidationError.from_exception_data(
                cls.__name__,
                [
                    InitErrorDetails(type="extra_forbidden", loc=(key,), input=value)
                    for key, value in others.items()
                ],
            )
        return super()._checked(name, others)

    source: Sources = option(
        "digits",
        "a built-in name (digits, trec, vader, fashion-mnist) or that of an own method, whose"
        " options stand beside it; a path or URI of a .parquet, .csv,"
        " .tsv, .jsonl, .json or .arrow file, also packed (.csv.gz), a pattern (rows-*.csv), or a"
        " list of them; a folder of such files, of images by class, or of datasets.save_to_disk; or"
        " hf:ID, hf:ID:CONFIGURATION or hf:ID:CONFIGURATION:SPLIT of a Hugging Face data set",
    )
    test_source: Sources | None = option(
        None,
        "the examples to test on, written like `source`; they replace test_fraction and a test"
        " split of the source; null: none of its own",
    )
    format: Annotated[TextFormat, short_for({str: "kind"})] = Field(
        default_factory=TextFormat,
        description="kind of the rows; separator, quotes and encoding of text files; a text: the"
        " kind",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    template: Annotated[str, Field(min_length=1)] = option(
        "auto",
        "how turns of instruction and chat data become a text; auto: the tokenizer's chat template,"
        " else alpaca | alpaca | vicuna | a Jinja text, or a path or URI of a file with one, which"
        " gets messages, bos_token, eos_token and add_generation_prompt as in transformers",
    )
    loss_on: Literal["response", "all"] = option(
        "response",
        "tokens of instruction and chat data that losses and metrics are over: response: those of"
        " the assistant's turns with their end tokens | all",
    )
    packing: bool = option(
        False,
        "whether training examples of a client share a row of up to max_length tokens, without"
        " seeing each other (causal-lm); batch_size and weights then count rows",
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = option(
        0.2, "share kept for testing without test_source and a test split of the source"
    )
    validation_fraction: Fraction | Auto = option(
        "auto",
        "share of the training examples kept on the server for annealing feedback and selection;"
        " auto: 0.1 when acceptance, early stopping or keep_best needs it (in a comparison: of any"
        " method), else 0",
    )
    text_column: str | Auto = option("auto", "column of the text (text tasks)")
    image_column: str | Auto = option(
        "auto", "column of the image, or of its path from the table's folder (image tasks)"
    )
    resize: Annotated[int, Field(ge=1, le=10_000)] | None = option(
        None,
        "side of the square to which encoded images and image files are scaled and cropped at the"
        " centre; null: they must all have one size",
        "pixels",
    )
    label_column: str | Auto = option("auto", "column of the label")
    labels: list[ClassLabel] | None = option(
        None, "keep only the examples with these labels (renumbered in this order); null: all"
    )
    max_examples: Positive | None = option(
        None, "use a random subset of the training examples of this size", "examples"
    )
    max_length: Positive = option(64, "longest text; longer ones are cut", "tokens")
    partition: Partition = section(Partition, "how examples are dealt to clients")
