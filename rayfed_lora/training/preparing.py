"""Prepare a recipe's data for its model: the workload that every engine starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayfed_lora.annealing.stages import scheduled_rank
from rayfed_lora.data.client_numbers import check_settings
from rayfed_lora.data.client_table import ClientTable, hold_out
from rayfed_lora.data.columns import LANGUAGE_TASK
from rayfed_lora.data.dataset import Dataset, load, number_column
from rayfed_lora.data.examples import COUNTED, PIXELS, Examples
from rayfed_lora.data.packing import packed
from rayfed_lora.data.partition import client_names, deal
from rayfed_lora.data.prompts import Prompts
from rayfed_lora.data.traces import read_trace
from rayfed_lora.data.workload import Workload, with_fingerprint
from rayfed_lora.errors import DataError
from rayfed_lora.models.precision import is_short
from rayfed_lora.models.shapes import model_shape
from rayfed_lora.models.tokenizer import check_length, check_tokens, may_exceed
from rayfed_lora.models.tokens import known_inputs, pad_with, padded, tokenize, tokenize_whole
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.spread_checks import WHOLE
from rayfed_lora.training.image_inputs import image_inputs
from rayfed_lora.training.matching import Match, match
from rayfed_lora.training.proof import judged_without_weights
from rayfed_lora.training.rehearsal import rehearse
from rayfed_lora.training.texts import IDS, TextCounts, counted_of, ids_of, tokenised
from rayfed_lora.types import AdapterState, AvailabilityTrace, DeviceFacts, ModelShape
from rayfed_lora.wire.upload import malicious_clients

# Texts that a plan tokenises (the longest, and as many others), and images that it prepares.
_FEW, _IMAGES = 32, 3


@dataclass(frozen=True)
class Outline:
    """The sizes of a workload, known without loading a weight.

    Of plain texts, a few are tokenised; of instruction and chat data, and to pack texts, all.

    Attributes:
        label_names: name of class i at index i.
        notes: on data and model, for the user, one line each.
        validation_examples: training examples that the server keeps; 0 without such a split.
        texts: what became of the rows of instruction or chat data.
        short: whether the source has its weights in 16 bits.
    """

    shape: ModelShape
    devices: DeviceFacts
    test_examples: int
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    validation_examples: int = 0
    texts: TextCounts | None = None
    short: bool = False


def outline(recipe: Recipe) -> Outline:
    """Return the sizes of a recipe's workload; reads the data, but no weights.

    Raises:
        DataError: the data cannot be read, or not be partitioned as the recipe says.
        ModelError: the model or its adapter does not fit.
    """
    texts = tokenised(_match(recipe, local_only=True), recipe)
    matched, dataset = texts.match, texts.match.dataset
    clients, held_out = _partition(recipe, dataset)
    devices, trace = _devices(recipe, dataset, clients)
    notes = _notes(recipe, dataset, held_out)
    if recipe.data.packing:
        train, clients, held_out = _training(matched, recipe, clients, held_out)
        examples, notes = _longest(train), (*notes, _packing_note(dataset, train))
    else:
        examples = _some_examples(dataset, matched, recipe)
    facts = DeviceFacts(clients.counts, devices, trace)
    net = rehearse(recipe, matched.config, examples, facts)
    shape = model_shape(net, recipe)
    notes = (*notes, *_start(recipe, matched.config, shape)[1])
    _prompts(recipe, dataset)
    shape = judged_without_weights(shape, matched.config, examples, recipe)
    return Outline(
        shape=shape,
        devices=facts,
        test_examples=dataset.test.num_rows,
        label_names=dataset.label_names,
        notes=(*dataset.notes, *notes, *matched.notes, *shape.notes),
        validation_examples=0 if dataset.validation is None else dataset.validation.num_rows,
        texts=texts.counts,
        short=recipe.model.source != "config" and is_short(matched.config.dtype),
    )


def prepare(recipe: Recipe) -> Workload:
    """Return a recipe's workload, texts tokenised.

    Raises:
        DataError: the data cannot be read, or not be partitioned as the recipe says.
        ModelError: the model's configuration or tokenizer cannot be read, or does not fit the data.
    """
    texts = tokenised(_match(recipe, local_only=False), recipe)
    matched = texts.match
    dataset, config = matched.dataset, matched.config
    clients, held_out = _partition(recipe, dataset)
    device_columns, trace = _devices(recipe, dataset, clients)
    names = _client_names(dataset)
    validated = dataset.test.slice(0, 0) if dataset.validation is None else dataset.validation
    notes = _notes(recipe, dataset, held_out)
    test, validation = (_examples(each, matched, recipe) for each in (dataset.test, validated))
    train, clients, held_out = _training(matched, recipe, clients, held_out)
    if recipe.data.packing:
        notes = (*notes, _packing_note(dataset, train))
    train = _with_false_labels(train, clients, recipe, len(dataset.label_names))
    net = rehearse(recipe, config, train, DeviceFacts(clients.counts, device_columns))
    start = None
    if recipe.model.adapter is not None:
        start, of_start = _start(recipe, config, model_shape(net, recipe))
        notes = (*notes, *of_start)
    workload = Workload(
        train=train,
        validation=_by_length(validation),
        test=_by_length(test),
        clients=clients,
        label_names=dataset.label_names,
        config=config.to_dict(),
        held_out=held_out,
        columns=device_columns,
        trace=trace,
        notes=(*dataset.notes, *notes, *matched.notes),
        client_names=None if names is None else pa.array(names, pa.string()),
        float_pixels=dataset.floats,
        chat_template=texts.template,
        start=start,
        prompts=_prompts(recipe, dataset),
    )
    return with_fingerprint(workload)


def _start(recipe: Recipe, config: Any, shape: ModelShape) -> tuple[AdapterState | None, list[str]]:
    """Return the adapter that the run starts from, if any, and notes on it."""
    if recipe.model.adapter is None:
        return None, []
    # Here, as it imports peft.
    from rayfed_lora.models.start import read_start, start_note

    start = read_start(recipe.model, config, shape)
    return start, start_note(recipe.model, start, scheduled_rank(recipe.annealing, 0))


def _prompts(recipe: Recipe, dataset: Dataset) -> Prompts | None:
    """Return the prompts of `evaluation.generate`, if any are asked."""
    if recipe.evaluation.generate is None:
        return None
    if IDS not in dataset.test.column_names:
        raise DataError(
            "evaluation.generate: expected instruction or chat data, the rows are plain texts"
        )
    from rayfed_lora.training.generating import prompts_of

    return prompts_of(dataset.test, recipe)


def _match(recipe: Recipe, *, local_only: bool) -> Match:
    validated, columns = recipe.validation_fraction, recipe.device_columns
    dataset = load(recipe.data, recipe.model.task, recipe.seed, validated, columns)
    return match(recipe, dataset, local_only=local_only)


def _devices(
    recipe: Recipe, dataset: Dataset, clients: ClientTable
) -> tuple[Mapping[str, npt.NDArray[np.float64]], AvailabilityTrace | None]:
    """Return the device figures of clients by column, and the trace of their availability."""
    figures = {}
    names = _client_names(dataset)
    for name in recipe.device_columns:
        values = dataset.train[number_column(name)].to_numpy()
        if (clients.counts == 0).any():
            raise DataError(f"column {name!r}: expected an example of each client, some have none")
        ordered, first = values[clients.order], clients.offsets[:-1]
        figures[name] = np.add.reduceat(ordered, first) / clients.counts
        for key, spread in recipe.own_settings.items():
            if spread.column == name:
                check_settings(key, name, ordered, clients, names, whole=key in WHOLE)
                figures[name] = ordered[first]
    availability = recipe.clients.availability
    if availability.trace is None:
        return figures, None
    known = dataset.clients or ()
    trace = read_trace(availability.trace, clients.clients, availability.period_s, names, known)
    return figures, trace


def _client_names(dataset: Dataset) -> list[str] | None:
    """Return the clients' names in the data, in order; None where the data have none."""
    if "client" not in dataset.train.column_names:
        return None
    return client_names(dataset.train["client"].to_pylist())


def _partition(recipe: Recipe, dataset: Dataset) -> tuple[ClientTable, ClientTable | None]:
    """Return the training examples and the held-out examples of each client."""
    table = dataset.train
    column = table["client"].to_pylist() if "client" in table.column_names else None
    labels = table["label"].to_numpy()
    clients = deal(labels, recipe.data.partition, recipe.seed, column)
    per_round = recipe.clients.per_round
    if isinstance(per_round, int) and per_round > clients.clients:
        raise DataError(
            f"clients.per_round: expected at most {clients.clients}, the number of clients found"
            f" in column {recipe.data.partition.column!r}, got {per_round}"
        )
    kept, held_out = hold_out(clients, recipe.evaluation.client_fraction, recipe.seed)
    if held_out is not None and not held_out.counts.any():
        raise DataError(
            "evaluation.client_fraction: expected clients of two examples or more, every client has"
            " one at most: there is nothing to test them on"
        )
    return kept, held_out


def _notes(recipe: Recipe, dataset: Dataset, held_out: ClientTable | None) -> tuple[str, ...]:
    """Return notes on settings of the recipe that these data do not allow."""
    notes = []
    without = 0 if held_out is None else int((held_out.counts == 0).sum())
    if held_out is not None and without > 0:
        notes.append(
            f"evaluation.client_fraction: {without} of {held_out.clients} clients have fewer than"
            " two examples, and are not tested on any of their own"
        )
    data, wanted = recipe.data, recipe.evaluation.clients
    default_fraction = type(data).model_fields["test_fraction"].default
    if held_out is not None and wanted != "all" and wanted > held_out.clients:
        notes.append(f"evaluation.clients {wanted}: there are only {held_out.clients} clients")
    rows = dataset.train.num_rows
    if data.max_examples is not None and data.max_examples > rows:
        notes.append(f"data.max_examples {data.max_examples}: there are only {rows} examples")
    own = data.test_source is None
    if own and dataset.official_test and data.test_fraction != default_fraction:
        notes.append("no effect with a data source that has a test split: data.test_fraction")
    return tuple(notes)


def _examples(table: pa.Table, matched: Match, recipe: Recipe) -> Examples:
    labels = np.ascontiguousarray(table["label"].to_numpy(), dtype=np.int64)
    if matched.tokenizer is None:
        return Examples.of({PIXELS: image_inputs(table, matched.image_processor)}, labels)
    texts = table["text"].to_pylist()
    if not texts:
        return Examples.of({"input_ids": np.zeros((0, 1), np.int32)}, labels)
    config, language = matched.config, recipe.model.task == LANGUAGE_TASK
    counted = None
    if IDS in table.column_names:
        rows = ids_of(table)
        masks = [np.ones_like(ids) for ids in rows]
        tokens = {"input_ids": padded(rows, least=1), "attention_mask": padded(masks, least=1)}
        counted = counted_of(table, recipe.data)
    elif language:
        tokens = tokenize_whole(matched.tokenizer, texts, recipe.data.max_length)
    else:
        tokens = tokenize(matched.tokenizer, texts, recipe.data.max_length)
    if language and tokens["attention_mask"][:, 1:].sum() == 0:
        raise DataError(f"data.source {recipe.data.source!r}: need texts of two tokens or more")
    tokens = pad_with(tokens, None if language else config.get_text_config().pad_token_id)
    check_length(matched.net, config, tokens["input_ids"].shape[1])
    check_tokens(matched.net, matched.tokenizer, tokens, texts)
    inputs = known_inputs(matched.net, config, tokens)
    if counted is not None:
        inputs[COUNTED] = padded(counted, least=1)
    return Examples.of(inputs, labels)


def _training(
    matched: Match, recipe: Recipe, clients: ClientTable, held_out: ClientTable | None
) -> tuple[Examples, ClientTable, ClientTable | None]:
    """Return the training examples, packed where the recipe says so, and who holds them."""
    train = _examples(matched.dataset.train, matched, recipe)
    if not recipe.data.packing:
        return train, clients, held_out
    return packed(train, clients, held_out, recipe.data.max_length)


def _packing_note(dataset: Dataset, train: Examples) -> str:
    return (
        f"data.packing: {dataset.train.num_rows:,} training texts are in {len(train):,} rows, which"
        " clients.batch_size and the weights of clients count"
    )


def _longest(examples: Examples) -> Examples:
    """Return a few rows, the longest first."""
    lengths = examples.inputs["attention_mask"].sum(axis=1)
    few = examples.rows(np.argsort(-lengths, kind="stable")[:_FEW])
    return Examples.of(few.inputs, few.labels)


def _with_false_labels(
    train: Examples, clients: ClientTable, recipe: Recipe, classes: int
) -> Examples:
    """Return the training examples, those of malicious clients with the labels of the attack."""
    attack = recipe.clients.attack
    method = None if attack is None else attack.named.method()
    if attack is None or method is None or method.acts_on != "labels":
        return train
    labels = train.labels.copy()
    for client in malicious_clients(recipe.seed, attack.share, clients.clients).tolist():
        rows = clients.examples(client)
        labels[rows] = method.labels(labels[rows], classes)
    return Examples.of(train.inputs, labels)


def _some_examples(dataset: Dataset, matched: Match, recipe: Recipe) -> Examples:
    """Return a few examples, the longest texts among them; every text where one may be too long."""
    tokenizer = matched.tokenizer
    if tokenizer is None:
        return _examples(dataset.train.slice(0, _IMAGES), matched, recipe)
    splits = (dataset.train, dataset.test, dataset.validation)
    names = [n for n in ("text", "label", IDS, COUNTED) if n in dataset.train.column_names]
    texts = pa.concat_tables(s.select(names) for s in splits if s is not None)
    if not may_exceed(matched.net, matched.config, tokenizer, recipe.data.max_length):
        sizes = pc.list_value_length(texts[IDS]) if IDS in names else pc.utf8_length(texts["text"])
        longest = np.argsort(-sizes.to_numpy().astype(np.int64), kind="stable")[:_FEW]
        others = np.linspace(0, texts.num_rows - 1, _FEW).astype(np.int64)
        texts = texts.take(np.unique([*longest, *others]))
    return _examples(texts, matched, recipe)


def _by_length(examples: Examples) -> Examples:
    """Sort texts by length, so that batches of an evaluation need little padding."""
    mask = examples.inputs.get("attention_mask")
    if mask is None:
        return examples
    order = np.argsort(mask.sum(axis=1), kind="stable")
    inputs = {name: values[order] for name, values in examples.inputs.items()}
    return Examples.of(inputs, examples.labels[order])
