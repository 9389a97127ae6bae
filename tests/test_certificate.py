"""The certificate follows from dvc.lock and the sources, and one changed byte anywhere is named."""

import base64
import copy
import hashlib
import importlib.util
import json
import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from stages.commands import certificate, croissant, signature, statement
from stages.core.errors import UserError
from stages.pairs.pairs import PAIRS

FILES = {
    "dvc.yaml": "stages: {}\n",
    "params.yaml": "train: {beta: 0.1}\n",
    "requirements.txt": "torch==2.11.0\n",
    "stages/train.py": "print(1)\n",
    "stages/model/a.py": "print(2)\n",
    "stages/commands/plan.py": "not a dependency\n",
    ".gitignore": "/data/raw\n/data/pairs\n/models\n",
    "data/raw/rows.json": "[]",
    "data/pairs/pairs.parquet": "table",
    "data/pairs/images/a.jpg": "image",
    "data/pairs/images/b.jpg": "image",
    "models/adapter/adapter_model.safetensors": "weights",
    "models/adapter/adapter_config.json": "{}",
    "reports/headline.json": '{"win_rate": 0.9}',
    "reports/report.html": "<p>",
}
SOURCE = {
    "kind": "hub",
    "repo": "helehan/topic-overwrite",
    "revision": "818d",
    "commit": "818d38f4",
    "licence": "cc-by-nc-4.0",
    "files": [],
}
OUTS = {
    "fetch@data": ["data/raw"],
    "preprocess": ["data/pairs"],
    "train": ["models/adapter"],
    "evaluate": ["reports/headline.json"],
    "report": ["reports/report.html"],
}


def git(root, *words):
    own = ["-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    subprocess.run(["git", *own, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with sources, a lock and what five stages made."""
    for name, text in {**FILES, "data/raw/SOURCE.json": json.dumps(SOURCE)}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def content(path):
        if not (tmp_path / path).is_dir():
            text = (tmp_path / path).read_bytes()
            return {"path": path, "md5": hashlib.md5(text).hexdigest(), "size": len(text)}
        entries = [
            {
                "md5": hashlib.md5(p.read_bytes()).hexdigest(),
                "relpath": p.relative_to(tmp_path / path).as_posix(),
            }
            for p in sorted((tmp_path / path).rglob("*"))
            if p.is_file()
        ]
        text = json.dumps(entries).encode()
        md5 = hashlib.md5(text).hexdigest() + ".dir"
        listing = tmp_path / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_bytes(text)
        return {"path": path, "md5": md5, "size": 1, "nfiles": len(entries)}

    stages = {
        name: {
            "cmd": f"python -m stages.{name.partition('@')[0]}",
            "deps": [content("stages/train.py"), content("stages/model")],
            "outs": [content(out) for out in outs],
        }
        for name, outs in OUTS.items()
    }
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML().dump({"schema": "2.0", "stages": stages}, file)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "--quiet", "-m", "made")
    monkeypatch.chdir(tmp_path)
    statement.write(statement.CERTIFICATE, statement.make())
    return tmp_path


def off(project):
    return statement.differences(statement.read(statement.CERTIFICATE), statement.make(), project)


def test_it_is_an_in_toto_statement_with_slsa_provenance(project):
    found = statement.read(statement.CERTIFICATE)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    weights = {"sha256": hashlib.sha256(b"weights").hexdigest()}
    subjects = {one["name"]: one["digest"] for one in found["subject"]}
    assert subjects["models/adapter/adapter_model.safetensors"] == weights
    assert subjects.keys() == {
        name for name in FILES if name.startswith(("models/", "reports/"))
    }  # what was trained, measured and written; not the data
    build = found["predicate"]["buildDefinition"]
    assert build["externalParameters"] == {"train": {"beta": 0.1}}
    materials = {one["name"]: one for one in build["resolvedDependencies"]}
    assert materials["data/raw"]["uri"] == (
        "https://huggingface.co/datasets/helehan/topic-overwrite/tree/818d38f4"
    )
    assert materials["data/raw"]["annotations"]["licence"] == "cc-by-nc-4.0"
    for name in ("requirements.txt", "params.yaml", "dvc.lock", "stages/train.py"):
        assert len(materials[name]["digest"]["sha256"]) == 64
    assert len(materials["sources"]["digest"]["gitCommit"]) == 40
    assert "stages/commands/plan.py" not in materials


def test_the_folder_hash_is_gos_h1(tmp_path):
    """golang.org/x/mod/sumdb/dirhash hashes what `sha256sum` prints of the files."""
    (tmp_path / "abc").write_text("xyz")
    (tmp_path / "def").write_text("")
    lines = (
        "3608bca1e44ea6c4d268eb6db02260269892c0b42b86bbf1e77a6fa16c3c9282  abc\n"
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  def\n"
    )
    expected = base64.b64encode(hashlib.sha256(lines.encode()).digest()).decode()
    assert statement.dir_hash(tmp_path) == f"h1:{expected}"


def test_it_is_the_same_bytes_again_in_a_clone_and_after_it_is_committed(project, tmp_path_factory):
    first = statement.CERTIFICATE.read_bytes()
    git(project, "add", "-A")
    git(project, "commit", "--quiet", "-m", "the certificate")
    statement.write(statement.CERTIFICATE, statement.make())
    assert statement.CERTIFICATE.read_bytes() == first
    clone = tmp_path_factory.mktemp("clone") / "c"
    git(project, "clone", "--quiet", ".", str(clone))
    for name in ("data", "models"):
        shutil.copytree(project / name, clone / name, dirs_exist_ok=True)
    statement.write(clone / "again.json", statement.make(clone))
    assert (clone / "again.json").read_bytes() == first


TRACKED = [name for name in FILES if name not in (".gitignore", "stages/commands/plan.py")]


@pytest.mark.parametrize("name", [*TRACKED, "dvc.lock", "data/raw/SOURCE.json"])
def test_one_changed_byte_anywhere_is_found_and_named(project, name):
    assert off(project) == []
    path = project / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if name == "params.yaml":  # stays YAML, says something else
        content = bytearray(b"train: {beta: 0.2}\n")
    elif name == "dvc.lock":
        content = bytearray(path.read_bytes()) + b"\n"
    path.write_bytes(content)
    found = "\n".join(off(project))
    assert name in found


def test_a_missing_and_a_new_file_are_named(project):
    (project / "models/adapter/adapter_config.json").unlink()
    (project / "data/pairs/images/new.jpg").write_text("x")
    found = off(project)
    assert "models/adapter/adapter_config.json: it is missing" in found
    assert "data/pairs: other content" in found
    assert "  data/pairs/images/new.jpg" in found


def test_a_changed_byte_of_the_certificate_itself_is_found(project):
    honest = statement.read(statement.CERTIFICATE)
    for change in (
        lambda s: s["subject"][0]["digest"].update(sha256="0" * 64),
        lambda s: s["subject"].pop(),
        lambda s: s["predicate"]["buildDefinition"]["externalParameters"]["train"].update(beta=9),
        lambda s: s["predicate"]["runDetails"]["builder"].update(id="https://other.invalid"),
        lambda s: s["predicate"]["buildDefinition"]["resolvedDependencies"][0].update(uri="x"),
    ):
        forged = copy.deepcopy(honest)
        change(forged)
        assert statement.differences(forged, statement.make(), project)


def test_the_command_says_so_and_fails(project, capsys):
    certificate.main()
    assert "all as it says: 4 files that were made" in capsys.readouterr().out
    (project / "reports/report.html").write_text("<q>")
    with pytest.raises(UserError, match=r"not as reports/certificate\.json says: 1, listed above"):
        certificate.main()
    assert "reports/report.html: other content" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"subject": [1]}', '{"subject": []}'])
def test_a_damaged_certificate_is_refused_in_a_sentence(project, text):
    statement.CERTIFICATE.write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        certificate.main()
    statement.CERTIFICATE.unlink()
    with pytest.raises(UserError, match="is missing; `make verify` makes it"):
        certificate.main()


def test_without_its_package_a_certificate_stays_unsigned_and_says_how_to_sign(project):
    if importlib.util.find_spec("model_signing"):
        pytest.skip("model_signing is installed")
    said = signature.sign(statement.CERTIFICATE, project / "key.pem")
    assert "is not signed: the package model_signing is missing" in said
    with pytest.raises(UserError, match="the certificate is not signed"):
        signature.verify(statement.CERTIFICATE, project / "key.pub")
    signature.beside(statement.CERTIFICATE).write_text("{}")
    with pytest.raises(UserError, match="can't be checked without the package"):
        signature.verify(statement.CERTIFICATE, project / "key.pub")


def test_a_signature_is_checked_against_the_signers_key(project):
    pytest.importorskip("model_signing")
    for name in ("key", "other"):
        private = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
        subprocess.run([*private, "-out", f"{name}.pem"], check=True)
        public = ["openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"]
        subprocess.run(public, check=True, capture_output=True)
    assert "signed with key.pem" in signature.sign(statement.CERTIFICATE, project / "key.pem")
    assert "signed by the owner" in signature.verify(statement.CERTIFICATE, project / "key.pub")
    with pytest.raises(UserError, match="is not a signature of"):
        signature.verify(statement.CERTIFICATE, project / "other.pub")
    statement.CERTIFICATE.write_text(statement.CERTIFICATE.read_text() + " ")
    with pytest.raises(UserError, match="is not a signature of"):
        signature.verify(statement.CERTIFICATE, project / "key.pub")
    (project / "bad.pem").write_text("no key")
    with pytest.raises(UserError, match="can't sign"):
        signature.sign(statement.CERTIFICATE, project / "bad.pem")


# Croissant


def test_croissant_describes_the_table_by_content_licence_and_origin(project):
    found = croissant.make()
    assert found["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    assert found["license"] == "cc-by-nc-4.0"
    assert "non-commercial use only" in found["usageInfo"]
    assert found["url"].startswith("https://huggingface.co/datasets/helehan/topic-overwrite")
    table, images = found["distribution"]
    assert table["sha256"] == hashlib.sha256(b"table").hexdigest()
    assert images["includes"] == "data/pairs/images/*.jpg"
    splits, pairs = found["recordSet"]
    assert [row["splits/name"] for row in splits["data"]] == ["train", "validation", "test"]
    assert [field["name"] for field in pairs["field"]] == PAIRS.names
    assert set(croissant.MEANINGS) == set(PAIRS.names)


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ("CC BY-NC 4.0", "non-commercial use only"),
        ("MIT", "As MIT allows"),
        (None, "names no licence"),
    ],
)
def test_the_conditions_of_use_follow_from_the_licence(licence, words):
    assert words in croissant.use(licence)


def test_mlcroissant_finds_no_error_in_it(project):
    mlcroissant = pytest.importorskip("mlcroissant")
    found = mlcroissant.Dataset(jsonld=croissant.make())
    assert not found.metadata.issues.errors


def test_writing_makes_both_files_and_takes_an_old_signature_away(project, monkeypatch, capsys):
    monkeypatch.setattr(statement, "require_current", lambda: None)
    signature.beside(statement.CERTIFICATE).write_text("of an older certificate")
    certificate.main(write="yes")
    assert statement.read(statement.CERTIFICATE) == statement.make()
    assert json.loads(croissant.FILE.read_text()) == croissant.make()
    assert not signature.beside(statement.CERTIFICATE).exists()
    assert "reports/croissant.json: the pairs" in capsys.readouterr().out
    certificate.main()
