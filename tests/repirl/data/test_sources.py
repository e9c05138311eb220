"""Reading data sets, and what is said of those that cannot be read."""

import csv
import gzip
import json
import sys

import pytest

from repirl.config import ConfigError
from repirl.configfile import build_config
from repirl.data.errors import DataError
from repirl.data.sources import read_rows
from repirl.dataconfig import SourceConfig

ROWS = [{"prompt": "é, 1+1", "answer": "007"}, {"prompt": 'two\n"lines"', "answer": "NA"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Nothing goes to the hub, or into the user's cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def read(path, default="train", **options):
    places = list(read_rows(SourceConfig(path=str(path), **options), default))
    assert [number for number, _, _ in places] == list(range(len(places)))
    return [row for _, _, row in places]


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path, rows=ROWS):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(LINES))
    names = ["a.jsonl", "b.jsonl", "c.json.gz"]
    files = [tmp_path / name for name in names]
    files += [write_csv(tmp_path / "d.csv"), write_csv(tmp_path / "e.tsv", "\t"), write_parquet(tmp_path / "f.parquet")]
    (tmp_path / "g.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    for file in [*files, tmp_path / "g.csv.gz"]:
        assert read(file) == ROWS, file
    # Nested values of tables are what they are in JSON.
    rows = [{"prompt": [{"role": "user", "content": "1"}], "reward_model": {"ground_truth": "2"}}]
    assert read(write_parquet(tmp_path / "h.parquet", rows)) == rows


def test_folders_have_splits(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(LINES)
    write_csv(tmp_path / "test.csv")
    (tmp_path / "test.csv").rename(tmp_path / "test.jsonl")
    (tmp_path / "test.jsonl").write_bytes(LINES[: LINES.index(b"\n") + 1])
    assert read(tmp_path) == ROWS
    assert read(tmp_path, "test") == read(tmp_path, split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split 'validation', it has \['test', 'train'\]"):
        read(tmp_path, split="validation")
    (tmp_path / "train.jsonl").write_bytes(LINES + b"[1]\n")
    with pytest.raises(DataError, match=r"train.jsonl, line 3 is a list"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder '.*empty' cannot be loaded"):
        read(tmp_path / "empty")


def test_folders_that_datasets_wrote(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "two") == ROWS
    assert read(tmp_path / "two", split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"has no split 'dev'"):
        read(tmp_path / "two", split="dev")


def test_hub_data_sets_are_asked_for_by_name_split_and_revision(tmp_path, monkeypatch):
    import datasets

    asked = {}
    (tmp_path / "download").write_bytes(gzip.compress(LINES))

    class Builder:
        class config:
            data_files = {"train": ["hf://datasets/a/b@1/t.jsonl.gz"]}  # noqa: RUF012

    def load(path, **options):
        asked.update(options, path=path)
        return Builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(datasets.DownloadManager, "download", lambda self, urls: [tmp_path / "download" for _ in urls])
    assert read("a/b", name="main", split="train", revision="1") == ROWS
    assert asked == {"path": "a/b", "name": "main", "revision": "1"}
    with pytest.raises(DataError, match=r"'a/b' has no split 'test', it has \['train'\]"):
        read("a/b", "test")

    def fail(*_, **__):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(DataError, match=r"^no file or folder here, and .* 'a/b' cannot be loaded: no network$"):
        read("a/b")


HOSTILE = {
    "empty.jsonl": (b"\n \n", "is empty"),
    "utf16.jsonl": ("{}".encode("utf-16"), "is UTF-16 text, expected UTF-8: convert it"),
    "latin1.jsonl": (b"{}\n" + '{"a": "é"}'.encode("latin-1"), "line 2 is not UTF-8 text (byte 0xe9 at 7)"),
    "zipped.jsonl": (gzip.compress(LINES), "is compressed: give it a name that ends with .gz"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-12], "cannot be read: Compressed file ended"),
    "plain.jsonl.gz": (LINES, "cannot be read: Not a gzipped file"),
    "parquet.jsonl": (b"PAR1....", "is a Parquet file: give it a name"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "lfs.csv": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "digits.jsonl": (b'{}\n{"a": ' + b"1" * 5000 + b"}", "line 2: a number is too long to be read"),
    "deep.jsonl": (b'{}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: lists or objects are nested too"),
    "list.json": (b"[{}, {}]", "line 1 is a list, expected a JSON object; one JSON list over the whole file"),
    "pretty.json": (b"{\n}", "line 1 is not valid JSON"),
    "nul.jsonl": (b"\0\0", "line 1 is not valid JSON"),
    "short.csv": (b"a,b\n1,2\n1\n", "line 3: 1 fields, but the header has 2"),
    "twice.csv": (b"a,a\n1,2\n", "has two columns 'a'"),
    "quote.csv": (b'a,b\n1,"2\n', "is not valid CSV: unexpected end of data"),
    "head.csv": (b"a,b\n", "is empty"),
    "latin1.csv": ("a,b\n1,é\n".encode("latin-1"), "line 2 is not UTF-8 text"),
    "bad.parquet": (b"PAR1....", "cannot be read as Parquet"),
    "none.parquet": (b"", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read(tmp_path / name)
    assert name in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere.jsonl", {}, "data file 'nowhere.jsonl' does not exist"),
        ("no/where.jsonl", {}, "data file 'no/where.jsonl' does not exist"),
        ("no/such/file", {}, "does not exist"),
        ("/dev/null", {}, "is neither a file nor a folder"),
        ("x" * 300, {}, "cannot be read: "),
        ("a\0b", {}, "does not exist"),
        (__file__, {"split": "train"}, "is a file, which has no split ('train'): leave it out"),
        (__file__, {"revision": "1"}, "is a file, which has no revision ('1')"),
    ],
)
def test_paths_that_lead_nowhere(path, options, message):
    with pytest.raises(DataError) as error:
        read(path, **options)
    assert message in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="a file that fails when it is read")
def test_a_file_that_cannot_be_read():
    with pytest.raises(DataError, match=r"/proc/self/mem cannot be read: \[Errno 5\]"):
        read("/proc/self/mem")


def test_sources_are_paths_or_their_options():
    values = {"output_dir": "o", "steps": 1, "policy": {"model": "m"}, "objective": "sft"}
    source = {"path": "a/b", "name": "main", "split": "dev", "revision": "1"}
    data = {"train": source, "eval": "t.csv", "solution_column": "s", "experts": {**source, "solution_column": "x"}}
    config = build_config({**values, "data": data}).data
    assert config.train == SourceConfig(**source)
    assert config.eval == SourceConfig(path="t.csv")
    assert config.experts.split == "dev"
    for wrong in (5, ["t"], {"path": 1}, {"splitt": "x", "path": "t"}):
        with pytest.raises(ConfigError, match=r"data.train"):
            build_config({**values, "data": {**data, "train": wrong}})
