"""Labels, splits, subsets and client columns."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import parquet

from rayfed_lora.data.dataset import load, number_column
from rayfed_lora.errors import DataError
from rayfed_lora.recipe.data import Data, Partition

TASK = "text-classification"


@pytest.fixture
def save(tmp_path):
    """Return a function that writes columns to a Parquet file and returns its path."""

    def write(**columns) -> str:
        path = tmp_path / "rows.parquet"
        parquet.write_table(pa.table(columns), path)
        return str(path)

    return write


def texts(count: int) -> list[str]:
    return [f"text {i}" for i in range(count)]


def text_set(table: pa.Table) -> set[str]:
    return set(table["text"].to_pylist())


def test_whole_number_labels_are_numbered_by_value_not_by_spelling(save):
    source = save(text=texts(30), label=[10, 2, -1] * 10)
    dataset = load(Data(source=source), TASK, 0, 0.0)
    assert dataset.label_names == ("-1", "2", "10")
    row = dataset.train.to_pylist()[0]
    place = int(row["text"].removeprefix("text "))
    assert row["label"] == [2, 1, 0][place % 3]


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["no", "yes"] * 5).dictionary_encode(),
        pa.array(["no", "yes"] * 5, pa.large_string()),
        pa.array(["no", "yes"] * 5),
    ],
)
def test_text_labels_of_every_arrow_type_are_the_same_labels(save, labels):
    assert load(Data(source=save(text=texts(10), label=labels)), TASK, 0, 0.0).label_names == (
        "no",
        "yes",
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (pa.array([7, 5] * 5, pa.uint64()), ("5", "7")),
        (pa.array([7, 5] * 5).dictionary_encode(), ("5", "7")),
        (pa.array([True, False] * 5), ("false", "true")),
    ],
)
def test_number_and_boolean_labels_of_other_arrow_types_are_read_too(save, labels, names):
    dataset = load(Data(source=save(text=texts(10), label=labels)), TASK, 0, 0.0)
    assert dataset.label_names == names


def test_labels_beyond_int64_are_an_error(save):
    source = save(text=texts(2), label=pa.array([2**64 - 1, 0], pa.uint64()))
    with pytest.raises(DataError, match="labels that fit int64"):
        load(Data(source=source), TASK, 0, 0.0)


def test_chosen_labels_are_kept_and_renumbered_in_their_order(save):
    source = save(text=texts(40), label=["a", "b", "c", "d"] * 10)
    dataset = load(Data(source=source, labels=["d", "b"]), TASK, 0, 0.0)
    assert dataset.label_names == ("d", "b")
    for table in (dataset.train, dataset.test):
        for row in table.to_pylist():
            assert int(row["text"].removeprefix("text ")) % 4 == [3, 1][row["label"]]
    assert dataset.train.num_rows + dataset.test.num_rows == 20


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "z"], "got 'z'; its labels are a, b, c"),
        ([1, 2], "got 1; its labels are a, b, c"),
        (["a", "a"], r"once, got \['a', 'a'\]"),
        (["a"], "at least 2 classes, got 1"),
        ([], "at least 2 classes, got 0"),
    ],
)
def test_labels_that_cannot_be_chosen_are_an_error(save, labels, message):
    source = save(text=texts(9), label=["a", "b", "c"] * 3)
    with pytest.raises(DataError, match=message):
        load(Data(source=source, labels=labels), TASK, 0, 0.0)


def test_the_splits_share_no_row_lose_none_and_keep_the_class_shares(save):
    source = save(text=texts(200), label=[0] * 150 + [1] * 50)
    dataset = load(Data(source=source, test_fraction=0.2), TASK, 0, 0.25)
    tables = (dataset.train, dataset.validation, dataset.test)
    # 200 * 0.2 = 40 for testing, a quarter of 160 = 40 for validation; a quarter of each is class 1
    assert [table.num_rows for table in tables] == [120, 40, 40]
    assert [sum(table["label"].to_pylist()) for table in tables] == [30, 10, 10]
    assert text_set(dataset.train) | text_set(dataset.validation) | text_set(dataset.test) == set(
        texts(200)
    )


def test_a_class_too_small_to_be_stratified_makes_the_split_plainly_random(save):
    source = save(text=texts(20), label=[0] * 19 + [1])
    dataset = load(Data(source=source, test_fraction=0.25), TASK, 0, 0.0)
    assert (dataset.train.num_rows, dataset.test.num_rows) == (15, 5)


def test_more_classes_than_test_rows_make_the_split_plainly_random(save):
    source = save(text=texts(20), label=list(range(10)) * 2)
    dataset = load(Data(source=source, test_fraction=0.1), TASK, 0, 0.0)
    assert (dataset.train.num_rows, dataset.test.num_rows) == (18, 2)
    assert len(dataset.label_names) == 10


def test_no_validation_share_means_no_validation_table(save):
    source = save(text=texts(20), label=[0, 1] * 10)
    assert load(Data(source=source), TASK, 0, 0.0).validation is None


def test_the_seed_alone_decides_the_split(save):
    source = save(text=texts(100), label=[0, 1] * 50)
    one, same, other = (load(Data(source=source), TASK, seed, 0.1) for seed in (1, 1, 2))
    assert one.train.equals(same.train)
    assert one.validation.equals(same.validation)
    assert one.test.equals(same.test)
    assert not one.test.equals(other.test)


def test_a_subset_is_drawn_from_the_training_rows_only(save):
    source = save(text=texts(100), label=[0, 1] * 50)
    whole = load(Data(source=source), TASK, 0, 0.1)
    part = load(Data(source=source, max_examples=30), TASK, 0, 0.1)
    assert part.train.num_rows == 30
    assert text_set(part.train) < text_set(whole.train)
    assert part.validation.equals(whole.validation)
    assert part.test.equals(whole.test)
    numbers = [int(text.removeprefix("text ")) for text in part.train["text"].to_pylist()]
    assert numbers == sorted(numbers)
    assert numbers != list(range(min(numbers), min(numbers) + 30))


def test_a_subset_larger_than_the_training_rows_is_all_of_them(save):
    source = save(text=texts(10), label=[0, 1] * 5)
    assert load(Data(source=source, max_examples=1000), TASK, 0, 0.0).train.num_rows == 8


@pytest.mark.parametrize(
    ("test_fraction", "validation", "message"),
    [(0.9, 0.0, "0.9 is kept for the test split"), (0.2, 0.9, "0.9 is kept for the validation")],
)
def test_a_split_that_leaves_no_training_row_is_an_error(save, test_fraction, validation, message):
    source = save(text=texts(3), label=[0, 1, 0])
    with pytest.raises(DataError, match=message):
        load(Data(source=source, test_fraction=test_fraction), TASK, 0, validation)


@pytest.mark.parametrize(
    "clients",
    [
        pa.array(["mia", "bob"] * 10),
        pa.array(["mia", "bob"] * 10).dictionary_encode(),
        pa.array([7, 5] * 10),
        pa.array([2**64 - 1, 5] * 10, pa.uint64()),
    ],
    ids=lambda clients: str(clients.type),
)
def test_the_client_column_is_kept_as_strings_where_it_makes_the_clients(save, clients):
    source = save(text=texts(20), label=[0, 1] * 10, who=clients)
    partition = Partition(kind="column", column="who")
    train = load(Data(source=source, partition=partition), TASK, 0, 0.0).train
    assert train.schema.field("client").type == "string"
    for row in train.to_pylist():
        assert row["client"] == str(clients[int(row["text"].removeprefix("text "))])


def test_the_client_column_is_not_kept_where_another_kind_makes_the_clients(save):
    source = save(text=texts(20), label=[0, 1] * 10, who=["mia", "bob"] * 10)
    data = Data(source=source, partition=Partition(kind="iid", column="who"))
    assert load(data, TASK, 0, 0.0).train.column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("clients", "message"),
    [(["mia", None] * 5, "column 'who': .* null in row 2"), ([0.5, 1.5] * 5, "got double")],
)
def test_a_client_column_that_names_no_clients_is_an_error(save, clients, message):
    source = save(text=texts(10), label=[0, 1] * 5, who=clients)
    partition = Partition(kind="column", column="who")
    with pytest.raises(DataError, match=message):
        load(Data(source=source, partition=partition), TASK, 0, 0.0)


def test_columns_of_numbers_stay_with_the_training_rows_and_not_with_the_test(save):
    pace = [float(i + 1) for i in range(30)]
    source = save(text=texts(30), label=[0, 1] * 15, pace=pace, ping=list(range(1, 31)))
    dataset = load(Data(source=source), TASK, 0, 0.1, ("pace", "ping"))
    for row in dataset.train.to_pylist():
        place = int(row["text"].removeprefix("text "))
        assert row[number_column("pace")] == row[number_column("ping")] == place + 1
    assert dataset.test.column_names == ["text", "label"]


@pytest.mark.parametrize(
    ("pace", "message"),
    [
        ([1.0, None] * 5, "need a value in every row, got null in row 2"),
        ([1.0, 0.0] * 5, "need positive numbers, got 0"),
        ([1.0, float("nan")] * 5, "need positive numbers, got nan"),
        (["a", "b"] * 5, "need numbers, got string"),
    ],
)
def test_a_column_that_is_not_of_positive_numbers_is_an_error(save, pace, message):
    source = save(text=texts(10), label=[0, 1] * 5, pace=pace)
    with pytest.raises(DataError, match=rf"column 'pace': {message}"):
        load(Data(source=source), TASK, 0, 0.0, ("pace",))


def test_a_column_of_numbers_that_is_not_there_is_an_error(save):
    source = save(text=texts(10), label=[0, 1] * 5)
    with pytest.raises(DataError, match="need a column pace, got the columns text, label"):
        load(Data(source=source), TASK, 0, 0.0, ("pace",))
