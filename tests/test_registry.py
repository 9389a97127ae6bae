"""A kind of source is one file and one registration; params, fetch, preprocess follow."""

import json

from stages.sources import source
from tests.repository import ROOT, attempt

MADE_UP = """
import hashlib, io, sys
from pathlib import Path
from typing import Literal

from PIL import Image

from stages.sources.source import SourceSection
from stages.pairs.pairs import Question, Record
from stages.sources import kinds, source


class Colours(SourceSection):
    kind: Literal["colours"]
    number: int


def fetch(asked, out):
    source.begin(out)
    path = out / source.PARTIAL / "n"
    path.write_text(str(asked.number))
    file = source.described(path, "number.txt")
    source.place(path, out, "number.txt")
    return source.finish(out, source.Source("colours", "colours", None, None, "CC0", (file,)))


def picture(number):
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (4 * number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def read(raw):
    number = int((raw / "number.txt").read_text())
    rows = (Record(f"colour {i}", (picture(i),), "Red?", "Yes.", "No.") for i in range(number))
    return rows, iter([Question("test", (picture(63),), "Red?", "yes")])


kind = source.Kind(Colours, fetch, read=read)
kinds.KINDS[kind.tag] = kind

if __name__ == "__main__":
    from stages import fetch as fetch_stage, preprocess

    fetch_stage.main("data.sources.mine", Path("raw/mine"))
    preprocess.main(Path("raw"), Path("pairs"), Path("report.json"))
"""


def test_a_new_kind_goes_through_params_fetch_and_preprocess(tmp_path):
    text = (ROOT / "params" / "demo.yaml").read_text()
    start, end = text.index("    easy-vqa:"), text.index("\nmodel:")
    asked = "    mine:\n      kind: colours\n      number: 60\n"
    (tmp_path / "made_up.py").write_text(MADE_UP)
    (tmp_path / "params.yaml").write_text(text[:start] + asked + text[end:])
    done = attempt("python", "made_up.py", folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "licence CC0" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows_kept"], report["questions_kept"]) == (60, 1)
    assert source.read(tmp_path / "raw" / "mine").kind == "colours"
