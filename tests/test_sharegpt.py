"""Kind sharegpt: prepared LLaMA-Factory files as people carry them from machine to machine."""

import base64
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stages import preprocess
from stages.core.errors import UserError
from stages.pairs.pairs import Record
from stages.params import params
from stages.sources import archives, manifest, sharegpt
from stages.sources.places import Place, match
from stages.sources.sharegpt import ShareGptSource

COLAB = "/content/drive/MyDrive/dpo/images/"


def by_messages(number: int, image: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": f"<image>Question {number}?"}],
        "chosen": {"role": "assistant", "content": "Yes."},
        "rejected": {"role": "assistant", "content": "No."},
        "images": [image],
    }


def by_conversations(number: int, image: str) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": f"<image>Question {number}?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
        "images": [image],
    }


def rows(*images: str, of: Callable[[int, str], dict[str, Any]] = by_messages) -> list[Any]:
    return [of(number, image) for number, image in enumerate(images)]


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    elif not isinstance(content, bytes):
        content = json.dumps(content).encode()
    path.write_bytes(content)
    return path


def zipped(path: Path, files: Mapping[str, Any]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            packed.writestr(name, data)
    return path


def source(*files: Any, **keys: Any) -> ShareGptSource:
    given = [str(file) if isinstance(file, Path) else file for file in files]
    values = {"remap": [], "datasets": None, "licence": None} | keys
    return ShareGptSource.model_validate({"kind": "sharegpt", "files": given, **values})


def fetched(out: Path, *files: Any, **keys: Any) -> list[Record]:
    sharegpt.fetch_data(source(*files, **keys), out)
    found, questions = sharegpt.read(out)
    assert list(questions) == []
    return list(found)


def mistake(out: Path, *files: Any, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        fetched(out, *files, **keys)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 900
    assert not (out / "SOURCE.json").exists()
    return text


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [by_messages, by_conversations])
@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.txt"])
def test_both_spellings_are_read_from_lists_and_lines(tmp_path, of, name):
    table = write(tmp_path / "pairs.jsonl", rows("a.png", "b.png", of=of))
    if not name.endswith("l"):
        table = write(tmp_path / name, rows("a.png", "b.png", of=of))
    images = [write(tmp_path / each, each.encode()) for each in ("a.png", "b.png")]
    first, second = fetched(tmp_path / "raw", table, *images)
    assert (first.question, first.chosen, first.rejected) == ("<image>Question 0?", "Yes.", "No.")
    assert (first.images, second.images) == ((b"a.png",), (b"b.png",))
    assert (first.system, first.history, first.split, first.origin) == ("", (), "", "")


A = {"chosen": "A", "rejected": "B"}
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "system first": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]}
        | A,
        {"system": "Be brief.", "question": "Q", "chosen": "A", "rejected": "B"},
    ),
    "system column": (
        {"conversations": [{"from": "human", "value": "Q"}], "system": "Be brief."} | A,
        {"system": "Be brief.", "question": "Q"},
    ),
    "earlier turns": (
        {
            "conversations": [
                {"from": "human", "value": "One?"},
                {"from": "gpt", "value": "1."},
                {"from": "human", "value": "Two?"},
            ]
        }
        | A,
        {"history": (("One?", "1."),), "question": "Two?"},
    ),
    "answers in lists": (
        {
            "messages": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": "A"}],
            "rejected": [{"role": "assistant", "content": "B"}],
        },
        {"chosen": "A", "rejected": "B"},
    ),
    "ms-swift": (
        {
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "rejected_response": "B",
        },
        {"question": "Q", "chosen": "A", "rejected": "B", "history": ()},
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
            ]
        }
        | A,
        {"question": "<image>Q"},
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_texts_of_a_row_are_taken_as_llamafactory_takes_them(name):
    row, expected = SAID[name]
    said = sharegpt.fields(row, None)
    assert {key: getattr(said, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (5, "no JSON object"),
        ({"messages": 1} | A, "messages holds int"),
        ({"conversations": [{"from": "observation", "value": "x"}]} | A, "from 'observation'"),
        ({"messages": [{"role": "user", "content": 5}]} | A, "messages holds int, not text"),
        ({"messages": [{"role": "assistant", "content": "Q"}]} | A, "must go user, assistant"),
        ({"messages": []}, "it has no messages"),
    ],
)
def test_an_odd_row_is_left_to_preprocess_with_its_reason(tmp_path, row, why):
    table = write(tmp_path / "pairs.json", [by_messages(0, "a.png"), row])
    good, bad = fetched(tmp_path / "raw", table, write(tmp_path / "a.png", b"a"))
    assert (good.images, bad.images, bad.question) == ((b"a",), None, None)
    assert why in bad.note
    assert bad.where == "pairs.json row 2"


def test_an_image_inside_a_row_needs_no_file(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(picture(1)).decode()
    table = write(tmp_path / "pairs.json", rows(url, "a.png"))
    first, second = fetched(tmp_path / "raw", table, write(tmp_path / "a.png", b"a"))
    assert (first.images, second.images) == ((picture(1),), (b"a",))


def test_a_row_may_have_no_image_or_several(tmp_path):
    several = by_messages(1, "a.png") | {"images": ["b.png", "a.png"]}
    none = by_messages(2, "a.png")
    del none["images"]
    table = write(
        tmp_path / "pairs.jsonl", [several, none, by_messages(3, "a.png") | {"images": []}]
    )
    images = [write(tmp_path / each, each.encode()) for each in ("a.png", "b.png")]
    found = fetched(tmp_path / "raw", table, *images)
    assert [row.images for row in found] == [(b"b.png", b"a.png"), (), ()]


# ---- where images are ----------------------------------------------------------------------------


def packed(folder: Path, how: str, files: Mapping[str, bytes]) -> Path:
    if how == "zip":
        return zipped(folder / "images.zip", files)
    if how == "folder":
        for name, content in files.items():
            write(folder / "images" / name, content)
        return folder / "images"
    with tarfile.open(folder / f"images.{how}", f"w:{how[4:]}") as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return folder / f"images.{how}"


@pytest.mark.parametrize("how", ["zip", "tar", "tar.gz", "folder"])
@pytest.mark.parametrize("inside", ["", "images/", "pack/dpo/images/"])
@pytest.mark.parametrize(
    "prefix", [COLAB, "/kaggle/input/dpo/images/", "images/", "", "C:\\dpo\\images\\", "./images/"]
)
def test_an_image_is_found_below_a_foreign_prefix(tmp_path, how, inside, prefix):
    files = {f"{inside}{name}": name.encode() for name in ("a.png", "b.avif", "c")}
    table = write(
        tmp_path / "pairs.json", rows(*(f"{prefix}{n}" for n in ("a.png", "b.avif", "c")))
    )
    found = fetched(tmp_path / "raw", table, packed(tmp_path, how, files))
    assert [row.images for row in found] == [(b"a.png",), (b"b.avif",), (b"c",)]


def test_of_two_files_of_one_name_the_longer_tail_decides(tmp_path):
    files = {"train/0001.png": b"train", "val/0001.png": b"val"}
    archive = zipped(tmp_path / "x.zip", files)
    table = write(tmp_path / "pairs.json", rows(f"{COLAB}val/0001.png", f"{COLAB}train/0001.png"))
    assert [row.images for row in fetched(tmp_path / "raw", table, archive)] == [
        (b"val",),
        (b"train",),
    ]


def test_what_is_missing_is_listed_and_not_guessed(tmp_path, capsys):
    files = {"train/1.png": b"1", "train/2.png": b"2", "a/3.png": b"3", "b/3.png": b"4"}
    names = ["/y/train/1.png", "/y/val/1.png", "/y/c/3.png", "/y/none.png", "https://host/1.png"]
    table = write(tmp_path / "pairs.json", rows(*names))
    found = fetched(tmp_path / "raw", table, zipped(tmp_path / "x.zip", files))
    assert [row.images for row in found] == [(b"1",), None, None, None, None]
    assert found[3].note == "'/y/none.png' was not found by fetch"
    said = capsys.readouterr().out
    assert "4 of 5 images are missing" in said
    assert "'/y/val/1.png': 'x/train/1.png' fits another name better" in said
    assert "'/y/c/3.png' ends like 2 files" in said
    assert "'/y/none.png': no file ends like it" in said
    assert "'https://host/1.png' is an address" in said
    assert "1 of 5 images, such as '/y/train/1.png' at 'x/train/1.png'" in said


def test_a_rule_says_what_no_tail_can(tmp_path):
    files = {"a/3.png": b"a", "b/3.png": b"b"}
    table = write(tmp_path / "pairs.json", rows("/x/one/3.png", "/x/two/3.png"))
    rules = [{"from": "/x/one/", "to": "b/"}, {"from": "/x/two/", "to": "a/"}]
    archive = zipped(tmp_path / "x.zip", files)
    found = fetched(tmp_path / "raw", table, archive, remap=rules)
    assert [row.images for row in found] == [(b"b",), (b"a",)]
    unused = [{"from": "/y/", "to": ""}]
    assert "no image's name begins with '/y/'; the first is '/x/one/3.png'" in mistake(
        tmp_path / "raw", table, archive, remap=unused
    )


def test_images_that_are_all_missing_stop_the_run_with_what_is_there(tmp_path):
    table = write(tmp_path / "pairs.json", rows(*(f"{COLAB}{i}.jpg" for i in range(7))))
    archive = zipped(tmp_path / "x.zip", {"pictures/a.png": b"a", "__MACOSX/pictures/._a.png": b""})
    text = mistake(tmp_path / "raw", table, archive)
    assert f"none of the 7 images that rows name is there: '{COLAB}0.jpg'" in text
    assert "and 2 more; what is there: 'x/pictures/a.png'. Add" in text
    assert "what is there: no image" in mistake(tmp_path / "raw", table)


def test_case_and_accents_are_looked_past_where_one_file_is_left(tmp_path):
    files = {
        "Images/CAT.PNG": b"1",
        "images/e\u0301.png": b"2",
        "x/dog.png": b"3",
        "x/DOG.png": b"4",
    }
    table = write(tmp_path / "pairs.json", rows("images/cat.png", "images/é.png", "/y/x/DOG.png"))
    found = fetched(tmp_path / "raw", table, zipped(tmp_path / "x.zip", files))
    assert [row.images for row in found] == [(b"1",), (b"2",), (b"4",)]


def test_only_the_files_that_rows_name_are_copied_from_a_folder(tmp_path):
    here = tmp_path / "dpo"
    write(here / "pairs.json", rows("images/a.ppm"))
    for name in ("images/a.ppm", "images/unused.png", "notes.txt", ".git/x", "run.py"):
        write(here / name, b"x")
    write(here / "coco.json", {"annotations": []})
    sharegpt.fetch_data(source(here), tmp_path / "raw")
    names = [file.path for file in manifest.read(tmp_path / "raw").files]
    assert names == ["dpo/images/a.ppm", "dpo/pairs.json", "index.json"]


# ---- dataset_info.json and splits ----------------------------------------------------------------


def test_columns_and_tags_of_dataset_info_are_honoured(tmp_path):
    row = {
        "talk": [{"who": "asker", "says": "Q"}],
        "good": {"who": "bot", "says": "A"},
        "bad": {"who": "bot", "says": "B"},
        "pictures": ["a.png"],
        "rules": "Be brief.",
    }
    info: dict[str, dict[str, Any]] = {
        "mine": {
            "file_name": "rows.json",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "talk",
                "chosen": "good",
                "rejected": "bad",
                "images": "pictures",
                "system": "rules",
            },
            "tags": {
                "role_tag": "who",
                "content_tag": "says",
                "user_tag": "asker",
                "assistant_tag": "bot",
            },
        },
        "sft": {"file_name": "sft.json", "formatting": "sharegpt"},
    }
    here = tmp_path / "data"
    write(here / "dataset_info.json", info)
    write(here / "rows.json", [row])
    write(here / "sft.json", rows("a.png"))
    write(here / "a.png", b"a")
    (found,) = fetched(tmp_path / "raw", here)
    assert (found.question, found.chosen, found.rejected) == ("Q", "A", "B")
    assert (found.system, found.origin, found.images) == ("Be brief.", "mine", (b"a",))
    assert "no entry 'mien'; did you mean 'mine'?" in mistake(
        tmp_path / "raw", here, datasets=["mien"]
    )
    write(here / "dataset_info.json", info | {"mine": info["mine"] | {"file_name": "gone.json"}})
    assert "describes 'mine' by the file 'gone.json', which is not" in mistake(tmp_path / "r", here)
    wrong = info["mine"] | {"columns": {"messages": "talks"}}
    write(here / "dataset_info.json", {"mine": wrong})
    assert "has no talks, chosen and rejected" in mistake(tmp_path / "r", here)


def test_the_pipelines_own_formatted_data_can_be_read_back(tmp_path):
    from stages.model import formatted

    here = tmp_path / "formatted"
    write(here / "dataset_info.json", formatted.dataset_info(system_prompts=False))
    for number, split in enumerate(("train", "validation", "test")):
        write(here / f"{split}.json", [by_messages(number, "a.png")])
    write(here / "a.png", b"a")
    found = fetched(tmp_path / "raw", here)
    assert [row.split for row in found] == ["test", "validation", "train"]
    assert [row.question for row in found] == [f"<image>Question {i}?" for i in (2, 1, 0)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["dpo_train.json", "dpo_val.json"], ["validation", "train"]),
        (["train.json", "dev.jsonl", "test.json"], ["test", "validation", "train"]),
        (["train.json"], [""]),
        (["pairs.json", "more.json"], ["", ""]),
        (["pairs.json", "eval.json"], ["test", ""]),
        (["interval.json", "constrained.json"], ["", ""]),
    ],
)
def test_a_published_split_is_kept_and_one_side_alone_is_none(tmp_path, names, expected):
    for number, name in enumerate(names):
        write(tmp_path / "d" / name, rows(f"{number}.png"))
        write(tmp_path / "d" / f"{number}.png", b"x")
    assert [row.split for row in fetched(tmp_path / "raw", tmp_path / "d")] == expected


def test_a_split_that_the_user_gives_goes_before_a_files_name(tmp_path):
    one, two = (write(tmp_path / name, rows("a.png")) for name in ("train.json", "b.json"))
    given = [{"at": str(one), "split": "test"}, {"at": str(two), "split": "train"}]
    found = fetched(tmp_path / "raw", *given, write(tmp_path / "a.png", b"a"))
    assert [(row.where, row.split) for row in found] == [
        ("train.json row 1", "test"),
        ("b.json row 1", "train"),
    ]


# ---- the folder that fetch fills -----------------------------------------------------------------


def test_the_same_files_give_the_same_folder_and_a_second_fetch_writes_no_file_again(tmp_path):
    table = write(tmp_path / "pairs.json", rows("a.png"))
    archive = zipped(tmp_path / "x.zip", {"a.png": b"a"})
    for out in ("one", "two"):
        fetched(tmp_path / out, table, archive)
    for name in ("SOURCE.json", "index.json", "pairs.json", "x.zip"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "one" / "index.json").read_text()
    inode = os.stat(tmp_path / "one" / "x.zip").st_ino
    fetched(tmp_path / "one", table, archive)
    assert os.stat(tmp_path / "one" / "x.zip").st_ino == inode
    found = manifest.read(tmp_path / "one")
    assert (found.kind, found.repo, found.licence) == ("sharegpt", None, None)


def test_two_entries_of_one_name_do_not_meet(tmp_path):
    one, two = (write(tmp_path / d / "pairs.json", rows(f"{d}.png")) for d in "ab")
    images = [write(tmp_path / f"{d}.png", d.encode()) for d in "ab"]
    found = fetched(tmp_path / "raw", one, two, *images)
    assert {(row.where, row.images) for row in found} == {
        ("pairs.json row 1", (b"a",)),
        ("pairs-2.json row 1", (b"b",)),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{]", "line 1 is not valid JSON"),
        (b"[{]", "is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b"[]", "no JSON or JSONL file there holds rows"),
        (b"", "no JSON or JSONL file there holds rows"),
        (b'[{"question": "Q"}]', "no JSON or JSONL file there holds rows"),
        (b'{\n "messages": []\n}', "no JSON or JSONL file there holds rows"),
        (b"5", "no JSON or JSONL file there holds rows"),
    ],
)
def test_a_file_without_rows_to_read_is_one_sentence(tmp_path, content, message):
    assert message in mistake(tmp_path / "raw", write(tmp_path / "pairs.json", content))


def test_what_is_not_there_or_another_file_is_said(tmp_path):
    assert "nothing.json does not exist" in mistake(tmp_path / "raw", "nothing.json")
    table = write(tmp_path / "pairs.json", rows("a.png"))
    given = {"at": str(table), "sha256": "0" * 64}
    assert "has another sha256" in mistake(tmp_path / "raw", given)
    assert "there is no dataset_info.json" in mistake(tmp_path / "raw", table, datasets=["x"])
    (tmp_path / "raw" / "x").mkdir(parents=True)
    assert "the folder to be filled" in mistake(tmp_path / "raw" / "x", tmp_path / "raw")


def test_a_file_that_no_memory_holds_is_refused_before_it_is_read(tmp_path):
    table = write(tmp_path / "pairs.json", rows("a.png"))
    os.truncate(table, archives.MEMBER + 1)  # a hole, which takes no room
    assert "pairs.json is above 2.1 GB, and read at once; divide it" in mistake(
        tmp_path / "raw", table
    )


@pytest.mark.parametrize("member", ["../evil.png", "/tmp/evil.png", r"..\evil.png"])
def test_a_hostile_archive_leaves_nothing_behind(tmp_path, member):
    archive = zipped(tmp_path / "x.zip", {"a.png": b"a", member: b"evil"})
    table = write(tmp_path / "pairs.json", rows("a.png"))
    assert "leads out of its folder" in mistake(tmp_path / "raw", table, archive)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["pairs.json", "raw", "raw/.partial", "x.zip"]
    assert not Path("/tmp/evil.png").exists()


def test_a_damaged_index_is_said(tmp_path):
    table = write(tmp_path / "pairs.json", rows("a.png"))
    fetched(tmp_path / "raw", table, write(tmp_path / "a.png", b"a"))
    (tmp_path / "raw" / "index.json").write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is missing or damaged"):
        list(sharegpt.records(tmp_path / "raw"))


@pytest.mark.parametrize("name", ["a/../../x.png", "/etc/passwd", "\ud800.png", "x" * 5000, "~/a"])
def test_no_name_of_a_row_reads_a_file_that_was_not_given(tmp_path, name):
    table = write(tmp_path / "pairs.json", rows(name, "a.png"))
    first, second = fetched(tmp_path / "raw", table, write(tmp_path / "a.png", b"a"))
    assert (first.images, second.images) == (None, (b"a",))
    assert len(first.note) < 250


def test_the_longest_tail_is_the_only_candidates_or_none():
    """Property, over small trees: a name found by its tail shares it with that file alone."""
    names = [f"{a}/{b}/{c}" for a in "xy" for b in "pq" for c in "12"]
    for count in range(1, len(names)):
        candidates = [Place(name) for name in names[:count]]
        wanted = {(".", f"/far/{name}"): f"/far/{name}" for name in names}
        found, by_tail, why = match(wanted, candidates)
        assert found.keys() | why.keys() == wanted.keys()
        assert len(set(found.values())) == len(found)
        for (_, name), place in found.items():
            if name.removeprefix("/far/") in names[:count]:
                assert name == f"/far/{place.path}"
        assert by_tail == found


# ---- the stages ----------------------------------------------------------------------------------


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 40), (3 * number % 256, number % 7 * 30, 100)).save(stream, "PNG")
    return stream.getvalue()


def test_a_zip_with_foreign_paths_goes_through_fetch_and_preprocess(
    tmp_path, write_params, monkeypatch
):
    train = [by_conversations(i, f"{COLAB}{i}.png") for i in range(40)]
    held_out = [by_conversations(i, f"{COLAB}{i}.png") for i in range(40, 50)]
    content = {"dpo/train.json": train, "dpo/val.json": held_out}
    images = {f"dpo/images/{i}.png": picture(i) for i in range(50)}
    archive = zipped(tmp_path / "dpo.zip", content | images)
    chosen = {"kind": "sharegpt", "files": [str(archive)], "remap": [], "datasets": None}
    write_params(tmp_path / "params.yaml", **{"data.source": chosen | {"licence": "CC0-1.0"}})
    monkeypatch.chdir(tmp_path)
    loaded = params.load().data.source
    assert isinstance(loaded, ShareGptSource)
    sharegpt.fetch_data(loaded, Path("raw"))
    preprocess.main(Path("raw"), Path("pairs"), Path("report.json"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows_in"], report["rows_kept"]) == (50, 50)
    assert report["pairs_by_split"]["validation"] == 10
    assert report["pairs_by_split"]["test"] > 0  # drawn from train, where none was published
