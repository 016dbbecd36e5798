"""`prepare`: what it writes, when it reuses, what it refuses, and what is left when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import DATA_FILES, DataError, Task, UserError, load_manifest, prepare, read_examples
from data_prep.files import SPLITS
from data_prep.sources import Files, Row, sample
from data_prep.task import AG_NEWS

LABELS = AG_NEWS.labels


@dataclass
class Feed:
    """A source that is no folder of files; `breaks_at` is the validation row at which it fails."""

    there: dict[str, list[Row]]
    breaks_at: int | None = None
    name: str = "feed"
    task: Task = AG_NEWS

    def splits(self):
        return tuple(self.there)

    def rows(self, split) -> Iterator[Row]:
        for number, row in enumerate(self.there[split]):
            if split == "validation" and number == self.breaks_at:
                raise DataError("feed", "the connection broke", number)
            yield row

    def provenance(self):
        return {"kind": self.name}

    def place(self, split):
        return f"feed {split}"

    def recognised(self):
        return []


def feed(**changes) -> Feed:
    rows = {split: list(sample(AG_NEWS).rows(split))[:48] for split in SPLITS}
    return Feed(rows, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def modification_times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def word_counts(chats) -> list[int]:
    return [sum(len(message["content"].split()) for message in chat) for chat in chats]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "datasets" / "csv"


class TestOutput:
    def test_every_row_is_in_exactly_one_split(self, make_source, folder):
        source = make_source(train=80, test=20)
        manifest, reused = prepare(source, folder, prompt="lean", validation_rows=12)
        assert not reused
        assert sorted(contents(folder)) == sorted([*DATA_FILES, "manifest.json"])
        rows = {split: list(read_examples(folder, split)) for split in SPLITS}
        assert {split: len(examples) for split, examples in rows.items()} == {"train": 68, "validation": 12, "test": 20}
        ids = [example.id for split in ("train", "validation") for example in rows[split]]
        assert sorted(ids) == sorted(f"train-{row}" for row in range(80))
        for split, examples in rows.items():
            assert manifest.rows[split] == Counter(example.label for example in examples)

    def test_each_example_is_its_article_under_the_prompt(self, make_source, folder):
        source = make_source(train=80, test=20)
        prepare(source, folder, prompt="verbose", validation_rows=12)
        rows = list(source.rows("train"))
        for example in [*read_examples(folder, "train"), *read_examples(folder, "validation")]:
            row = rows[int(example.id.removeprefix("train-"))]
            assert (example.text, example.label) == (row.text, row.label)
            assert example.messages == AG_NEWS.messages("verbose", row.text, row.label)

    def test_the_file_format_is_that_of_the_documentation(self, make_source, folder):
        prepare(make_source(), folder, prompt="lean", validation_rows=8)
        row = json.loads((folder / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert row.keys() == {"id", "text", "label", "messages", "has_duplicate", "in_validation"}
        assert [message.keys() for message in row["messages"]] == [{"role", "content"}] * 3
        assert row["messages"][1]["content"].startswith("Classify the following news article")
        assert row["messages"][2]["content"] == '{"category":"World"}'

    def test_the_sample_s_fingerprint_is_that_of_the_published_records(self, folder):
        """Whatever the form of the files: 7 records in results/reference/cpu hold the first of these."""
        for prompt, fingerprint in (("lean", "e345ee7c61c4"), ("verbose", "8192628adecf")):
            assert prepare(sample(AG_NEWS), folder, prompt=prompt)[0].fingerprint == fingerprint

    def test_the_manifest_says_where_the_data_came_from(self, make_source, folder):
        source = make_source()
        manifest, _ = prepare(source, folder, prompt="lean", seed=7, validation_rows=8)
        assert manifest == load_manifest(folder)
        assert manifest.source == source.provenance()
        assert (manifest.prompt, manifest.seed, manifest.normalised, manifest.tokens) == ("lean-1", 7, True, None)

    @pytest.mark.parametrize(("clean", "text"), [(True, "Oil's up it's said"), (False, "Oil #39;s up it #39;s\\said")])
    def test_normalisation_can_be_switched_off(self, make_source, folder, clean, text):
        rows = [(str(label), "Oil #39;s up", "it #39;s\\said") for label in (1, 2, 3, 4)]
        prepare(make_source(rows * 5, rows), folder, prompt="lean", validation_rows=4, clean=clean)
        example = next(read_examples(folder, "test"))
        assert example.text == text

    def test_a_row_that_normalisation_empties_is_refused(self, make_source, folder):
        rows = [(str(label), "Title", "Text") for label in (1, 2, 3, 4)]
        source = make_source(rows * 5, [*rows, ("1", "", "&lt;br&gt;")])
        with pytest.raises(DataError, match="empty text"):
            prepare(source, folder, prompt="lean", validation_rows=4)


class TestValidationSplit:
    @pytest.mark.parametrize("sizes", [(40, 40, 40, 40), (100, 60, 30, 10), (97, 41, 23, 39)])
    @pytest.mark.parametrize("rows", [20, 33])
    def test_the_classes_keep_their_shares(self, make_source, folder, sizes, rows):
        train = [
            (str(label), f"Title {label} {number}", "Text")
            for label, size in enumerate(sizes, 1)
            for number in range(size)
        ]
        manifest, _ = prepare(make_source(train), folder, prompt="lean", validation_rows=rows)
        assert manifest.total("validation") == rows
        for label, size in zip(LABELS, sizes, strict=True):
            assert abs(manifest.rows["validation"][label] - rows * size / len(train)) < 1
            assert manifest.rows["validation"][label] + manifest.rows["train"][label] == size

    def test_the_same_seed_gives_the_same_bytes(self, make_source, tmp_path):
        source = make_source()
        prepare(source, tmp_path / "first", prompt="lean", validation_rows=12)
        prepare(source, tmp_path / "second", prompt="lean", validation_rows=12)
        assert contents(tmp_path / "first") == contents(tmp_path / "second")

    def test_another_seed_cuts_other_rows_and_leaves_the_test_split_alone(self, make_source, tmp_path):
        source = make_source()
        for seed in (1, 2):
            prepare(source, tmp_path / str(seed), prompt="lean", validation_rows=12, seed=seed)
        first, second = contents(tmp_path / "1"), contents(tmp_path / "2")
        assert first["validation.jsonl"] != second["validation.jsonl"]
        assert first["train.jsonl"] != second["train.jsonl"]
        assert first["test.jsonl"] == second["test.jsonl"]

    @pytest.mark.parametrize("rows", [0, 3, 41, 80, 1000])
    def test_an_impossible_size_is_refused_with_what_is_possible(self, make_source, folder, rows):
        with pytest.raises(UserError, match=f"validation_rows={rows} .*between 4 and 40"):
            prepare(make_source(train=80), folder, prompt="lean", validation_rows=rows)
        assert not folder.exists()

    def test_a_split_of_the_source_s_own_is_used(self, make_source, folder):
        source = make_source(train=80, validation=16)
        manifest, _ = prepare(source, folder, prompt="lean", validation_rows=12)
        assert (manifest.total("train"), manifest.total("validation")) == (80, 16)
        assert [row.id for row in read_examples(folder, "validation")] == [f"validation-{n}" for n in range(16)]

    @pytest.mark.parametrize(("split", "lacking"), [("train", ["train", "validation"]), ("test", ["test"])])
    def test_a_class_without_rows_is_said(self, make_source, folder, split, lacking):
        rows = [(str(1 + number % 3), f"Title {number}", "Text") for number in range(60)]
        manifest, _ = prepare(make_source(**{split: rows}), folder, prompt="lean", validation_rows=12)
        assert manifest.missing == {name: ["Sci/Tech"] for name in lacking}
        assert not [of for of in manifest.rare if "Sci/Tech (0" in of]

    def test_training_rows_of_one_class_are_refused(self, make_source, folder):
        source = make_source(train=[("2", "Title", "Text")] * 60, validation=16)
        with pytest.raises(DataError, match=r"train\.csv: rows of the class Sports alone for train"):
            prepare(source, folder, prompt="lean")
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize(
        ("count", "rows", "reason"),
        [
            (
                2,
                20,
                "2 of 302 rows, of which validation_rows=20 puts 0 into validation .* choose validation_rows=76, or",
            ),
            (1, 20, "1 of 301 rows, .* add rows of this class, or give a validation split"),
        ],
    )
    def test_a_class_too_rare_for_both_splits_is_named_with_what_helps(self, make_source, folder, count, rows, reason):
        train = [(str(1 + row % 3), f"Title {row}", "Text") for row in range(300)] + [("4", "Title", "Text")] * count
        with pytest.raises(UserError, match=rf"train\.csv: the class Sci/Tech has {reason}"):
            prepare(make_source(train), folder, prompt="lean", validation_rows=rows)
        if count == 2:
            manifest, _ = prepare(make_source(train), folder, prompt="lean", validation_rows=76)
            assert [manifest.rows[split]["Sci/Tech"] for split in ("train", "validation")] == [1, 1]


class TestReuse:
    def test_a_second_call_rewrites_nothing(self, make_source, folder):
        source = make_source()
        first, _ = prepare(source, folder, prompt="lean", validation_rows=12)
        before = modification_times(folder)
        second, reused = prepare(source, folder, prompt="lean", validation_rows=12)
        assert reused
        assert second == first
        assert modification_times(folder) == before

    @pytest.mark.parametrize(
        "change",
        [{"prompt": "verbose"}, {"seed": 1}, {"validation_rows": 16}, {"clean": False}, {"count_tokens": word_counts}],
        ids=lambda change: next(iter(change)),
    )
    def test_another_request_prepares_again(self, make_source, folder, change):
        source, request = make_source(), {"prompt": "lean", "validation_rows": 12}
        first, _ = prepare(source, folder, **request)
        second, reused = prepare(source, folder, **(request | change))
        assert not reused
        assert second != first
        assert load_manifest(folder) == second
        assert len(list(read_examples(folder, "train"))) == second.total("train")

    def test_the_fingerprint_covers_task_and_prompt(self, make_source, tmp_path, monkeypatch):
        """A row's request, system text and answer count as much as its text."""
        lean = AG_NEWS.prompts["lean"]
        other = [
            replace(AG_NEWS, request="What is it about?"),
            replace(AG_NEWS, answer_key="topic"),
            replace(AG_NEWS, prompts={"lean": replace(lean, system="World or not?")}),
        ]
        source = make_source()
        found = []
        for number, task in enumerate([AG_NEWS, *other]):
            manifest, _ = prepare(replace(source, task=task), tmp_path / str(number), prompt="lean", validation_rows=12)
            found.append(manifest.fingerprint)
        manifest, _ = prepare(source, tmp_path / "verbose", prompt="verbose", validation_rows=12)
        assert len({*found, manifest.fingerprint}) == 5

    def test_data_of_an_older_version_is_prepared_again(self, make_source, folder):
        source = make_source()
        first, _ = prepare(source, folder, prompt="lean", validation_rows=12)
        older = json.loads((folder / "manifest.json").read_text())
        for name in ("version", "recognised"):
            del older[name]
        del older["duplicates"]["test_in_validation"]
        (folder / "manifest.json").write_text(json.dumps(older))
        assert prepare(source, folder, prompt="lean", validation_rows=12) == (first, False)

    def test_tokens_that_were_counted_serve_who_does_not_ask_for_them(self, make_source, folder):
        prepare(make_source(), folder, prompt="lean", validation_rows=12, count_tokens=word_counts)
        manifest, reused = prepare(make_source(), folder, prompt="lean", validation_rows=12)
        assert reused and manifest.tokens

    @pytest.mark.parametrize("name", DATA_FILES)
    def test_a_changed_or_missing_file_is_prepared_again(self, make_source, folder, name):
        source = make_source()
        prepare(source, folder, prompt="lean", validation_rows=12)
        whole = contents(folder)
        for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-30])):
            damage(folder / name)
            _, reused = prepare(source, folder, prompt="lean", validation_rows=12)
            assert not reused
            assert contents(folder) == whole

    def test_a_source_with_its_own_validation_split_is_reused(self, make_source, folder, tmp_path):
        for source, target in ((make_source(validation=16), folder), (feed(), tmp_path / "feed")):
            prepare(source, target, prompt="lean")
            _, reused = prepare(source, target, prompt="lean")
            assert reused, source.name


class TestRefusal:
    def test_a_folder_of_another_source_is_refused_and_kept(self, make_source, folder):
        prepare(make_source(name="first"), folder, prompt="lean", validation_rows=12)
        before = contents(folder)
        with pytest.raises(DataError, match="another source"):
            prepare(make_source(train=84, name="second"), folder, prompt="lean", validation_rows=12)
        with pytest.raises(DataError, match=r"another source \(csv \w+, not sample \w+\)"):
            prepare(sample(AG_NEWS), folder, prompt="lean")
        assert contents(folder) == before

    def test_a_folder_of_other_files_is_refused_and_kept(self, make_source, folder):
        folder.mkdir(parents=True)
        (folder / "thesis.tex").write_text("years of work")
        (folder / "train.jsonl").write_text("years of work too")
        before = contents(folder)
        with pytest.raises(DataError, match=r"thesis\.tex"):
            prepare(make_source(), folder, prompt="lean", validation_rows=12)
        assert contents(folder) == before

    @pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b"[]", b"\xff", b'{"schema_version": 1}'])
    def test_a_broken_manifest_is_refused_with_the_remedy(self, make_source, folder, content):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json: not a manifest of this version .*delete"):
            prepare(make_source(), folder, prompt="lean", validation_rows=12)


class TestFailure:
    @pytest.mark.parametrize("split", ["train", "test", "validation"])
    def test_a_bad_last_line_leaves_nothing(self, make_source, folder, split):
        source = make_source(validation=16)
        path = source.at / f"{split}.csv"
        lines = path.read_text().count("\n")
        with path.open("a") as file:
            file.write('"1","Title","Text that ends')
        with pytest.raises(DataError, match=f"{split}.csv:{lines + 1}: "):
            prepare(source, folder, prompt="lean")
        assert not folder.exists() or list(folder.iterdir()) == []

    def test_an_earlier_result_is_never_mixed_with_a_failed_one(self, folder):
        prepare(feed(), folder, prompt="lean")
        before = contents(folder)
        with pytest.raises(DataError, match="connection broke"):
            prepare(feed(breaks_at=40), folder, prompt="verbose")
        assert {name: data for name, data in contents(folder).items() if name != "manifest.json"} == {
            name: before[name] for name in DATA_FILES
        }
        if "manifest.json" in contents(folder):
            assert contents(folder) == before
        else:
            with pytest.raises(DataError, match="prepare the data first"):
                next(read_examples(folder, "train"))
        prepare(feed(), folder, prompt="lean")
        assert contents(folder) == before

    def test_a_full_disk_is_named_and_nothing_is_left(self, make_source, small_disk):
        folder = small_disk / "csv"
        with pytest.raises(UserError, match="no space left on the disk"):
            prepare(make_source(train=800, test=20), folder, prompt="verbose", validation_rows=12)
        assert list(folder.iterdir()) == []

    def test_a_disk_too_small_for_the_manifest_leaves_an_unfinished_folder(self, make_source, small_disk):
        """Whatever the point at which the disk fills, there is a manifest with whole files or none."""
        refused = 0
        for blocks in range(4, 16):
            filler = small_disk / "filler"
            filler.write_bytes(bytes(4096 * blocks))
            folder = small_disk / "csv"
            try:
                prepare(make_source(train=24, test=8), folder, prompt="lean", validation_rows=4)
                assert len(list(read_examples(folder, "train"))) == 20
            except UserError as error:
                refused += 1
                assert "no space left" in str(error)
                assert not (folder / "manifest.json").exists()
                assert not list(folder.glob("*.partial"))
            filler.unlink()
            for path in folder.iterdir():
                path.unlink()
        assert 0 < refused < 12

    @pytest.mark.parametrize("earlier", [False, True], ids=["empty folder", "over an earlier result"])
    def test_a_killed_preparation_does_not_disturb_the_next(self, make_source, folder, tmp_path, earlier):
        source = make_source(train=400, test=20)
        if earlier:
            prepare(source, folder, prompt="verbose", validation_rows=12)
        killed = subprocess.run([sys.executable, "-c", KILLED_AT_ROW_300, source.at, folder], timeout=60)
        assert killed.returncode == -signal.SIGKILL
        assert list(folder.glob("*.partial")), "the kill must come while the files are written"
        with pytest.raises(DataError, match="prepare the data first"):
            load_manifest(folder)
        _, reused = prepare(source, folder, prompt="lean", validation_rows=12)
        assert not reused
        prepare(source, tmp_path / "undisturbed", prompt="lean", validation_rows=12)
        assert contents(folder) == contents(tmp_path / "undisturbed")


KILLED_AT_ROW_300 = """
import os, signal, sys
from pathlib import Path
from data_prep import prepare
from data_prep.sources import Files
from data_prep.task import AG_NEWS

class Killed(Files):
    readings = []
    def rows(self, split):
        self.readings.append(split)
        for number, article in enumerate(super().rows(split)):
            if self.readings.count("train") == 2 and number == 300:
                os.kill(os.getpid(), signal.SIGKILL)
            yield article

prepare(Killed(Path(sys.argv[1]), AG_NEWS), Path(sys.argv[2]), prompt="lean", validation_rows=12)
"""


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


class TestTokens:
    def test_statistics_are_those_of_the_counts_under_both_prompts(self, make_source, folder):
        source = make_source(train=80)
        manifest, _ = prepare(source, folder, prompt="lean", validation_rows=12, count_tokens=word_counts)
        assert manifest.tokens.keys() == {"lean-1", "verbose-1"}
        for prompt in AG_NEWS.prompts:
            chats = [AG_NEWS.messages(prompt, row.text, row.label) for row in source.rows("train")]
            counts = np.array(word_counts(chats))
            assert manifest.tokens[f"{prompt}-1"] == {
                "rows": 80,
                "mean": round(counts.mean(), 1),
                "median": np.median(counts),
                "p99": np.percentile(counts, 99),
                "max": counts.max(),
            }

    @pytest.mark.parametrize("rows", [1999, 2001, 3996, 4100])
    def test_the_sample_of_a_large_split_reaches_its_end(self, make_source, folder, rows):
        """Sorted files exist: the last tenth of this one is long."""
        train = [(str(1 + row % 4), "Title", "long " * 50 if row > 0.9 * rows else "short") for row in range(rows)]
        manifest, _ = prepare(make_source(train), folder, prompt="lean", validation_rows=12, count_tokens=word_counts)
        statistics = manifest.tokens["lean-1"]
        assert statistics["rows"] <= 2000
        assert statistics["max"] > 50
        assert statistics["mean"] == pytest.approx(12 + 0.1 * 49, abs=1)


class TestRealRows:
    @pytest.fixture(scope="class")
    def prepared(self, ag_news, tmp_path_factory):
        folder = tmp_path_factory.mktemp("ag-news")
        manifest, _ = prepare(Files(ag_news, AG_NEWS), folder, prompt="lean")
        return folder, manifest

    def test_every_row_is_there(self, prepared):
        _, manifest = prepared
        assert AG_NEWS.title_of(manifest.source) == "AG News" and manifest.recognised == []
        assert manifest.total("train") + manifest.total("validation") == 16_390
        assert manifest.total("validation") == 2000
        assert manifest.rows["test"] == dict.fromkeys(LABELS, 1900)

    def test_duplicates_are_as_many_as_published(self, prepared):
        folder, manifest = prepared
        found = sum(example.has_duplicate for example in read_examples(folder, "test"))
        assert 200 <= found <= 300
        assert found == manifest.duplicates.test_exact_in_train + manifest.duplicates.test_near_in_train

    def test_the_fingerprint_does_not_depend_on_the_process(self, prepared, ag_news, tmp_path):
        _, manifest = prepared
        program = (
            "import sys; from pathlib import Path; from data_prep import prepare;"
            "from data_prep.sources import Files; from data_prep.task import AG_NEWS;"
            "print(prepare(Files(Path(sys.argv[1]), AG_NEWS), Path(sys.argv[2]), prompt='lean')[0].fingerprint)"
        )
        output = subprocess.run(
            [sys.executable, "-c", program, ag_news, tmp_path / "again"],
            env={**os.environ, "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert output.strip() == manifest.fingerprint


def test_memory_does_not_grow_with_the_rows(make_source, tmp_path):
    """Rows of 5 kB: 6,000 more of them would take 30 MB if they were held."""
    peaks = {}
    for rows in (2000, 8000):
        text = "x" * 5000
        train = [(str(1 + row % 4), f"Title {row}", f"Text {text}{row}") for row in range(rows)]
        source = make_source(train, name=str(rows))
        output = subprocess.run(
            [sys.executable, "-c", PEAK_OF_PREPARATION, source.at, tmp_path / f"out-{rows}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        peaks[rows] = int(output)
    assert peaks[8000] - peaks[2000] < 15_000, f"peak resident memory in kB: {peaks}"


# VmHWM instead of ru_maxrss, which a child inherits from a larger parent.
PEAK_OF_PREPARATION = """
import sys
from pathlib import Path
from data_prep import prepare
from data_prep.sources import Files
from data_prep.task import AG_NEWS

prepare(Files(Path(sys.argv[1]), AG_NEWS), Path(sys.argv[2]), prompt="lean", validation_rows=100)
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_data_prep_imports_no_torch():
    program = "import sys, data_prep; print(sorted({'torch', 'transformers', 'datasets', 'trl'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
