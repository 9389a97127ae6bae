"""Kind path: own files as people have them, copied by fetch and read by preprocess."""

import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.errors import UserError
from stages.pairs.pairs import Record
from stages.sources import easyvqa, kinds, local, source
from stages.sources.local import PathData
from tests.copies import copied_data, copied_model
from tests.hub_server import DEMO, Repo, serve
from tests.pictures import picture
from tests.repository import call
from tests.run_stages import fresh_clone

COLAB = "/content/drive/MyDrive/dpo/images/"


def plain(number: int, image: Any) -> dict[str, Any]:
    texts = {"question": f"Question {number}?", "chosen": "Yes.", "rejected": "No."}
    return {"image": image} | texts


def ranking(number: int, image: str) -> dict[str, Any]:
    """A row as LLaMA-Factory's preference data have it."""
    said = [{"from": "human", "value": f"<image>Question {number}?"}]
    answers = {s: {"from": "gpt", "value": t} for s, t in (("chosen", "Yes."), ("rejected", "No."))}
    return {"conversations": said, "images": [image]} | answers


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def pictures(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}{number}.png": picture(number) for number in range(6)}


def zipped(path: Path, files: Mapping[str, Any]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
    return path


def tarred(path: Path, files: Mapping[str, bytes], **changes: Any) -> Path:
    """A tar, packed as its name says; ``changes`` are made to every member's header."""
    packing: Any = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, packing) as packed:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in changes.items():
                setattr(member, key, value)
            packed.addfile(member, io.BytesIO(content))
    return path


def entry(path: Path, **keys: Any) -> PathData:
    return PathData.model_validate({"kind": "path", "path": str(path), "licence": None, **keys})


def fetched(out: Path, **sources: PathData) -> list[Record]:
    """The rows of local sources, as preprocess reads what fetch has made of them."""
    for name, asked in sources.items():
        local.fetch_data(asked, out / name)
        assert source.read(out / name).kind == "path"
    rows, questions = kinds.read({name: out / name for name in sources}, dict(sources))
    assert list(questions) == []
    return list(rows)


def refusal(path: Path, out: Path) -> str:
    with pytest.raises(UserError) as caught:
        copied_data(path, out)
    assert "\n" not in str(caught.value)
    assert not (out / "SOURCE.json").exists()
    return str(caught.value)


# Own data, in the shapes in which people have them


def zip_with_foreign_paths(folder: Path) -> PathData:
    rows = [ranking(i, f"{COLAB}{i}.png") for i in range(6)]
    return entry(zipped(folder / "dpo.zip", {"dpo/train.json": rows} | pictures("dpo/images/")))


def tar_with_a_rule(folder: Path) -> PathData:
    files = {"train.json": json.dumps([ranking(i, f"/x/{i}.png") for i in range(6)]).encode()}
    rule = {"from": "/x/", "to": "b/"}
    path = tarred(folder / "x.tar.gz", files | pictures("a/") | pictures("b/"))
    return entry(path, remap=[rule])


def jsonl_with_pictures(folder: Path) -> PathData:
    lines = [json.dumps(plain(i, f"img/{i}.png")) for i in range(6)]
    write(folder, {"rows.jsonl": "\n".join(lines).encode(), "unused.png": b"x"} | pictures("img/"))
    return entry(folder / "rows.jsonl")


def parquet_of_rlaif_v(folder: Path) -> PathData:
    rows = [plain(i, {"bytes": picture(i), "path": f"{i}.png"}) | {"idx": i} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return entry(folder / "data.parquet")


@pytest.mark.parametrize(
    "made",
    [zip_with_foreign_paths, tar_with_a_rule, jsonl_with_pictures, parquet_of_rlaif_v],
    ids=lambda made: made.__name__,
)
def test_own_data_are_copied_and_every_row_has_its_image(made, tmp_path):
    (tmp_path / "mine").mkdir()
    rows = fetched(tmp_path / "raw", mine=made(tmp_path / "mine"))
    assert [row.images for row in rows] == [(picture(i),) for i in range(6)]
    assert {str(row.chosen) for row in rows} == {"Yes."}
    assert {row.origin for row in rows} <= {"mine", "dpo.json"}
    assert str(tmp_path) not in (tmp_path / "raw" / "mine" / "SOURCE.json").read_text()


@pytest.mark.rehearsal
@pytest.mark.slow
def test_a_file_from_https_or_s3_is_imported_by_dvc_and_read(tmp_path, s3):
    """The guide's lines, from a server of this machine."""
    import botocore.session

    path = zip_with_foreign_paths(write(tmp_path / "web", {"x": b""})).path
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    keys |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": s3, "NO_PROXY": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        client = botocore.session.get_session().create_client("s3")
        client.put_object(Bucket="shared", Key="dpo.zip", Body=path.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        (tmp_path / "project").mkdir()
        for words in (
            ("git", "init", "-q"),
            ("dvc", "init", "-q"),
            ("dvc", "import-url", f"http://127.0.0.1:{web.server_port}/dpo.zip", "web.zip"),
            ("dvc", "import-url", "s3://shared/dpo.zip", "s3.zip"),
        ):
            call(*words, folder=tmp_path / "project", **keys)
        web.shutdown()
    for name in ("web", "s3"):
        assert "md5: " in (tmp_path / "project" / f"{name}.zip.dvc").read_text()
        rows = fetched(tmp_path / "raw", **{name: entry(tmp_path / "project" / f"{name}.zip")})
        assert [row.images for row in rows] == [(picture(i),) for i in range(6)]


def test_two_sources_are_read_in_turn_and_name_their_rows(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sources = {
        "two": jsonl_with_pictures(tmp_path / "two"),
        "one": parquet_of_rlaif_v(tmp_path / "one"),
    }
    rows = fetched(tmp_path / "raw", **sources)
    assert [row.where for row in rows[::6]] == ["two: rows.jsonl row 1", "one: data.parquet row 1"]
    assert [row.origin for row in rows] == ["two"] * 6 + ["one"] * 6
    del sources["two"]  # its folder stays, and nobody reads it
    assert len(fetched(tmp_path / "raw", **sources)) == 6
    easy = easyvqa.EasyVqaSource(kind="easy-vqa")
    easyvqa.fetch_data(easy, tmp_path / "raw" / "easy")
    places = {name: tmp_path / "raw" / name for name in ("easy", "one")}
    records, questions = kinds.read(places, {"easy": easy, **sources})
    assert (next(records).origin, next(questions).where) == ("easy", "easy: test question 0")


@pytest.mark.slow
def test_an_experiment_with_one_source_fetches_that_one_alone(tmp_path, write_params):
    clone = fresh_clone(tmp_path)
    for name in ("one", "two-2"):
        write(clone / "in" / name, {"rows.json": [plain(0, None)]})
    sources = {
        name: {"kind": "path", "path": f"in/{name}", "licence": None} for name in ("one", "two-2")
    }
    write_params(clone / "params.yaml", **{"data.sources": sources})
    call("dvc", "repro", "fetch@one", "fetch@two-2", folder=clone)
    call("git", "add", ".", folder=clone)
    call("git", "commit", "-qm", "two sources", folder=clone)
    change = ("-S", "data.sources.two-2.licence=MIT")
    said = call("dvc", "exp", "run", *change, "fetch@one", "fetch@two-2", folder=clone)
    assert "Stage 'fetch@one' didn't change" in said
    assert "Running stage 'fetch@two-2'" in said
    assert source.read(clone / "data" / "raw" / "two-2").licence == "MIT"


# What is copied, and what is not


def test_a_table_brings_the_images_it_names_and_nothing_from_outside(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(b"private")
    names = ["images/a.jpg", "./images/b.png", "../outside.jpg", str(tmp_path / "outside.jpg")]
    rows = [plain(i, name) for i, name in enumerate([*names, "images/absent.jpg"])]
    here = write(tmp_path / "here", {"pairs.json": rows, "images/unused.jpg": b"x"})
    write(here, {"images/a.jpg": b"a", "images/b.png": b"b"})
    brought = copied_data(here / "pairs.json", tmp_path / "raw")
    assert [file.path for file in brought.files] == ["images/a.jpg", "images/b.png", "pairs.json"]
    assert (brought.kind, brought.repo, brought.commit) == ("path", None, None)


def test_a_folder_is_copied_but_for_what_is_hidden_or_can_run_code(tmp_path):
    rows = [plain(0, "a.avif")]
    here = write(tmp_path / "here", {"sub/rows.json": rows, "sub/a.avif": b"a", "run.py": b""})
    write(here, {".git/x.json": rows, "__MACOSX/x.json": rows, "weights.pkl": b"", "notes": b""})
    first = copied_data(here, tmp_path / "raw")
    assert [file.path for file in first.files] == ["notes", "sub/a.avif", "sub/rows.json"]
    before = (tmp_path / "raw" / "sub" / "a.avif").stat().st_ino
    assert copied_data(here, tmp_path / "raw") == first
    assert (tmp_path / "raw" / "sub" / "a.avif").stat().st_ino == before  # not copied again


def cut_zip(folder: Path) -> Path:
    path = zipped(folder / "x.zip", {"rows.json": [plain(0, None)]})
    path.write_bytes(path.read_bytes()[:-30])
    return path


def zip_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("rows.json", bytes(10**6))
    return folder / "x.zip"


ROWS = json.dumps([plain(0, None)]).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (lambda at: at / "absent", "does not exist"),
    "no table": (lambda at: write(at / "x", {"a.png": b"x"}), "holds no .parquet"),
    "pointer": (lambda at: write(at, {"rows.json": POINTER}) / "rows.json", "Git LFS pointer"),
    "cut zip": (cut_zip, "can't be unpacked"),
    "cut tar": (lambda at: write(at, {"x.tar.gz": b"\x1f\x8b"}) / "x.tar.gz", "can't be unpacked"),
    "bomb": (zip_bomb, "would unpack to more than"),
    "tar out": (lambda at: tarred(at / "x.tgz", {"../rows.json": ROWS}), "can't be unpacked"),
    "tar link": (
        lambda at: tarred(at / "x.tgz", {"x": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        "can't be unpacked",
    ),
    "zip out": (lambda at: zipped(at / "x.zip", {"../rows.json": ROWS}), "holds no .parquet"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_used_or_is_not_safe_is_refused(tmp_path, what, monkeypatch):
    monkeypatch.setattr(local, "MOST", 10**5)
    made, told = REFUSED[what]
    (tmp_path / "in").mkdir()
    text = refusal(made(tmp_path / "in"), tmp_path / "out" / "raw")
    assert told in text
    there = {path.name for path in tmp_path.rglob("rows.json") if "in" not in path.parts}
    assert not there


def test_a_link_inside_an_archive_becomes_the_file_that_it_leads_to(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as packed:
        for name, content in {"rows.json": [plain(0, "a.png")], "z.png": picture(0)}.items():
            path = write(tmp_path / "in", {name: content}) / name
            packed.add(path, name)
        (tmp_path / "in" / "a.png").symlink_to("z.png")
        packed.add(tmp_path / "in" / "a.png", "a.png")
    (row,) = fetched(tmp_path / "raw", mine=entry(tmp_path / "x.tar.gz"))
    assert row.images == (picture(0),)
    assert not any(path.is_symlink() for path in (tmp_path / "raw").rglob("*"))


def test_a_source_that_holds_the_folder_to_be_filled_is_refused(tmp_path):
    write(tmp_path, {"rows.json": [plain(0, None)]})
    assert "name another folder" in refusal(tmp_path, tmp_path / "sub" / "raw")


def test_a_model_in_the_hugging_face_cache_can_be_named_by_its_snapshot_folder(
    hub, tmp_path, monkeypatch
):
    with serve([Repo("owner/model", DEMO)]) as url:
        hub(monkeypatch, tmp_path, url)
        path = huggingface_hub.snapshot_download("owner/model", cache_dir=tmp_path / "c")
    brought = copied_model(Path(path), tmp_path / "base")
    assert "model.safetensors" in {file.path for file in brought.files}
    assert not any(path.is_symlink() for path in (tmp_path / "base").iterdir())
