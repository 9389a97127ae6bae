"""Kind ``sharegpt``: preference files as they were prepared for LLaMA-Factory, and their images.

What people carry between Colab, Drive and Kaggle: JSON or JSON Lines with ``messages`` or
``conversations``, ``chosen``, ``rejected`` and ``images``, perhaps a ``dataset_info.json``, and the
images in a folder, a zip or a tar archive, named by a path of the machine that wrote the files.

fetch brings the files, finds each image that a row names, and writes what goes where into
``index.json``; preprocess reads by that index. Archives stay packed.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from stages.core.errors import UserError, did_you_mean
from stages.core.project import is_forced
from stages.core.schema import Section, SourceSection
from stages.core.text import readable
from stages.ingest import named
from stages.sources import addresses, archives, manifest
from stages.sources.kind import Kind
from stages.sources.local import walk
from stages.sources.manifest import PARTIAL, File, Source
from stages.sources.mentions import json_lines, parsed
from stages.sources.names import IMAGES, is_hidden, suffix

if TYPE_CHECKING:  # pyarrow takes longer to import than all of the parameters
    from stages.dataset.pairs import Question, Record

Split = Literal["train", "validation", "test"]
JSON = (".json", ".jsonl")
INDEX = "index.json"
INFO = "dataset_info.json"
_SHOWN = 5  # names that a message lists
_SPLITS = {  # words in a file's name that say its split, as the datasets library reads them
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}


class Given(Section):
    """A file, an archive or a folder: a path, or an address of https, s3 or gdrive."""

    at: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    split: Split | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_place_alone(cls, value: Any) -> Any:
        return {"at": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _an_address_that_can_be_kept(self) -> "Given":
        if addresses.is_remote(self.at) and (problem := addresses.problem_with(self.at)):
            raise PydanticCustomError("address", "{problem}", {"problem": problem})
        return self


# A rule for images' names, both keys given: what begins with ``from`` begins with ``to`` instead.
Remap = Annotated[dict[Literal["from", "to"], str], Field(min_length=2)]


class ShareGptSource(SourceSection):
    """Prepared preference files and their images; ``datasets`` are entries of dataset_info.json,
    null for all that hold preferences."""

    kind: Literal["sharegpt"]
    files: list[Given] = Field(min_length=1)
    remap: list[Remap]
    datasets: list[str] | None
    licence: str | None


@dataclass(frozen=True)
class Place:
    """Where content is: a file below the folder, or a member of an archive there."""

    file: str
    member: str | None = None

    @property
    def path(self) -> str:
        """The path by which it is known: of a member, below the archive's name."""
        return f"{PurePosixPath(self.file).stem}/{self.member}" if self.member else self.file


@dataclass(frozen=True)
class Layout:
    """How rows say what: names of columns and tags, as in ``dataset_info.json``.

    The defaults of LLaMA-Factory. Where ``messages`` is ``None``, rows tell by themselves.
    """

    messages: str | None = None
    system: str = "system"
    images: str = "images"
    chosen: str = "chosen"
    rejected: str = "rejected"
    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    system_tag: str = "system"


@dataclass(frozen=True)
class Table:
    """A file of rows: where it is, its split as published, and how to read it.

    ``images`` says where each image is that a row names.
    """

    place: Place
    split: str
    origin: str
    layout: Layout
    images: dict[str, Place] = field(default_factory=dict)


# fetch


def fetch_data(source: ShareGptSource, out: Path) -> Source:
    """Bring the files here, and find every image that a row names.

    Raises:
        UserError: a file can't be had or read, holds no preferences, or no image is found.
    """
    kept = _kept(out)
    manifest.begin(out)
    here: dict[str, Path] = {}  # by path below the folder; where each is now
    splits: dict[str, Split | None] = {}
    origins: dict[str, str] = {}
    for given in source.files:
        for name, path in _brought(given, out, kept, set(here)).items():
            here[name], splits[name] = path, given.split
            if addresses.is_remote(given.at):
                origins[name] = addresses.shown(given.at)
    with ExitStack() as stack:
        contents = Contents(here, stack)
        places = list(contents.places())
        tables = _tables(contents, places, splits, source.datasets)
        found = _located(contents, places, tables, source.remap)
        used = {table.place.file for table in tables}
        used |= {place.file for table in found for place in table.images.values()}
    files = []
    for name in sorted(used):
        _place(here[name], out, name)
        files.append(File(name, manifest.size_of(out / name), manifest.sha256_of(out / name)))
    index = {
        "from": {f.path: [origins[f.path], f.sha256] for f in files if f.path in origins},
        "tables": [asdict(table) for table in found],
    }
    text = json.dumps(index, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (out / PARTIAL / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    manifest.place(out / PARTIAL / INDEX, out, INDEX)
    files.append(File(INDEX, manifest.size_of(out / INDEX), manifest.sha256_of(out / INDEX)))
    repo = ", ".join(dict.fromkeys(origins.values())) or None
    return manifest.finish(out, Source("sharegpt", repo, None, None, source.licence, tuple(files)))


def _kept(out: Path) -> dict[str, tuple[str, str]]:
    """What an earlier fetch left: name and sha256 of a file by the address that it came from."""
    if is_forced():
        return {}
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        found = {at: (str(name), str(digest)) for name, (at, digest) in index["from"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {at: kept for at, kept in found.items() if (out / kept[0]).is_file()}


def _brought(
    given: Given, out: Path, kept: Mapping[str, tuple[str, str]], taken: set[str]
) -> dict[str, Path]:
    """Where the files of one entry are, by the paths below the folder that they will have."""
    if addresses.is_remote(given.at):
        name, digest = kept.get(addresses.shown(given.at), (INDEX, ""))
        if digest and given.sha256 in (digest, None) and manifest.sha256_of(out / name) == digest:
            return {_free(name, taken): out / name}
        path = addresses.bring(given.at, out / PARTIAL, given.sha256)
        return {_free(addresses.name_of(given.at), taken): path}
    path = Path(given.at).expanduser()
    if path.is_dir():
        if out.resolve().is_relative_to(path.resolve()):
            raise UserError(
                f"{path} holds {out}, the folder to be filled from it; name a folder next to it"
            )
        top = _free(path.resolve().name, taken)
        return {f"{top}/{name}": path / name for name in walk(path)}
    if not path.is_file():
        raise UserError(f"data.source.files: {path} does not exist; name a file or a folder")
    manifest.refuse_lfs_pointer(path, str(path))
    if given.sha256 and manifest.sha256_of(path) != given.sha256.lower():
        raise UserError(
            f"{path} has another sha256 than data.source.files gives for it; check the file"
        )
    return {_free(path.name, taken): path}


def _free(name: str, taken: set[str]) -> str:
    """``name``, or with a number where it is taken; nothing of ours goes by it either."""
    tops = {each.split("/")[0] for each in taken} | {INDEX, manifest.MANIFEST, PARTIAL}
    path, number = PurePosixPath(name), 2
    while name in tops:
        name, number = f"{path.stem}-{number}{path.suffix}", number + 1
    return name


def _place(path: Path, out: Path, name: str) -> None:
    """A file at its place below ``out``; what is there already, and right, is left alone."""
    if path == out / name or (
        manifest.size_of(out / name) == path.stat().st_size
        and (out / name).is_file()
        and manifest.sha256_of(out / name) == manifest.sha256_of(path)
    ):
        return
    if path.parent == out / PARTIAL:
        manifest.place(path, out, name)
        return
    manifest.check_room(out, path.stat().st_size, what=str(path))
    try:
        shutil.copyfile(path, out / PARTIAL / "copying")
    except OSError as error:
        raise UserError(f"{path} can't be copied ({error.strerror})") from None
    manifest.place(out / PARTIAL / "copying", out, name)


class Contents:
    """Files and members of archives, by place. Archives are opened once, when first asked for."""

    def __init__(self, files: Mapping[str, Path], stack: ExitStack) -> None:
        self.files = files
        self.stack = stack
        self.archives: dict[str, archives.Archive] = {}

    def places(self) -> Iterator[Place]:
        """All there is, hidden files aside."""
        for name, path in sorted(self.files.items()):
            if is_hidden(name):
                continue
            if suffix(name) not in IMAGES and archives.is_archive(path):
                sizes = self.archive(name).sizes
                yield from (Place(name, member) for member in sizes if not is_hidden(member))
            else:
                yield Place(name)

    def archive(self, name: str) -> archives.Archive:
        if name not in self.archives:
            opened = archives.opened(self.files[name], name)
            self.archives[name] = self.stack.enter_context(opened)
        return self.archives[name]

    def read(self, place: Place) -> bytes:
        if place.member is not None:
            return self.archive(place.file).read(place.member)
        try:
            return self.files[place.file].read_bytes()
        except OSError as error:
            raise UserError(f"{place.path} can't be read ({error.strerror})") from None


def _tables(
    contents: Contents,
    places: Sequence[Place],
    splits: Mapping[str, Split | None],
    datasets: Sequence[str] | None,
) -> list[Table]:
    """The files of rows: those that a ``dataset_info.json`` describes, or else all JSON files."""
    places = [place for place in places if _is_json(place, contents)]
    infos = [place for place in places if PurePosixPath(place.path).name == INFO]
    if datasets is not None and not infos:
        raise UserError(
            f"data.source.datasets names {', '.join(datasets)}, but there is no {INFO} among the "
            "files; add it, or set datasets to null"
        )
    tables = [
        table for info in infos for table in _described(info, places, contents, splits, datasets)
    ]
    for place in [] if infos else places:
        split = splits[place.file] or _split_of(place.path)
        tables.append(Table(place, split, "", Layout()))
    without = [table for table in tables if not _holds_preferences(table, contents)]
    tables = [table for table in tables if table not in without]
    if without and tables:
        names = _listed([table.place.path for table in without])
        print(f"left out, because they hold no preferences: {names}")
    if not tables:
        raise UserError(
            "data.source.files: no JSON or JSONL file there holds rows with messages (or "
            f"conversations), chosen and rejected ({_listed([p.path for p in places]) or 'none'}); "
            "name the prepared files"
        )
    if len({table.split for table in tables}) == 1:  # one side alone is no division
        tables = [Table(t.place, "", t.origin, t.layout) for t in tables]
    order = ["test", "validation", "train", ""]
    return sorted(tables, key=lambda table: order.index(table.split))


def _is_json(place: Place, contents: Contents) -> bool:
    """Whether a file is JSON by its name; one that the user named himself, by its content too."""
    if suffix(place.path) in JSON or place.member is not None or "/" in place.file:
        return suffix(place.path) in JSON
    with contents.files[place.file].open("rb") as file:
        return file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{")


def _split_of(path: str) -> str:
    """The split that a file's name says, or none."""
    for split, words in _SPLITS.items():
        if re.search(rf"(?i)(?<![a-z])({words})(?![a-z])", PurePosixPath(path).stem):
            return split
    return ""


def _described(
    info: Place,
    places: Sequence[Place],
    contents: Contents,
    splits: Mapping[str, Split | None],
    datasets: Sequence[str] | None,
) -> Iterator[Table]:
    """The tables that a ``dataset_info.json`` describes."""
    entries = parsed(_text(contents.read(info), info.path), info.path)
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise UserError(f"{info.path} is not LLaMA-Factory's: it maps names to descriptions")
    for name in datasets or ():
        if name not in entries:
            raise UserError(
                f"{info.path} has no entry {named.shown(name)}{did_you_mean(name, entries)}"
            )
    folder = PurePosixPath(info.path).parent
    for name, entry in entries.items():
        if name not in datasets if datasets is not None else not entry.get("ranking"):
            continue
        wanted = f"{folder}/{entry.get('file_name')}".removeprefix("./")
        there = [p for p in places if p.path == wanted or p.path.startswith(f"{wanted}/")]
        if not there:
            raise UserError(
                f"{info.path} describes {named.shown(name)} by the file "
                f"{named.shown(str(entry.get('file_name')))}, which is not among the files; add "
                "it, or name the other entries in data.source.datasets"
            )
        if entry.get("formatting", "alpaca") != "sharegpt":
            raise UserError(
                f"{info.path}: {named.shown(name)} is not of formatting sharegpt, which this kind "
                "of source reads; name the other entries in data.source.datasets"
            )
        given = {**(entry.get("columns") or {}), **(entry.get("tags") or {})}
        known = {key: str(given[key]) for key in Layout.__dataclass_fields__ if given.get(key)}
        layout = Layout(**{"messages": "conversations", **known})
        for place in there:
            yield Table(
                place, splits[place.file] or _split_of(f"{name}-{place.path}"), name, layout
            )


def _holds_preferences(table: Table, contents: Contents) -> bool:
    """Whether a file's first row has what a preference needs.

    Raises:
        UserError: it is described as preferences, and is not.
    """
    row = next((row for _, row in _rows(table, contents)), None)
    layout = table.layout
    columns = {layout.messages or "messages", layout.messages or "conversations"}
    answers = ({layout.chosen, layout.rejected}, {"rejected_response"})
    if isinstance(row, dict) and columns & {*row} and any(names <= {*row} for names in answers):
        return True
    if table.origin:
        there = _listed(list(row)) if isinstance(row, dict) else "no rows of keys"
        raise UserError(
            f"{table.place.path} has no {layout.messages}, {layout.chosen} and {layout.rejected}, "
            f"by which {INFO} describes {named.shown(table.origin)}; it has {there}"
        )
    return False


def _located(
    contents: Contents,
    places: Sequence[Place],
    tables: Sequence[Table],
    rules: Sequence[Remap],
) -> list[Table]:
    """The tables, with the place of each image that their rows name.

    What is not found is printed: how many, and the first of them.

    Raises:
        UserError: images are named and none of them is there, or a rule fits no name.
    """
    candidates = [place for place in places if suffix(place.path) not in JSON]
    wanted: dict[tuple[str, str], str] = {}  # by the table's folder and the name: after the rules
    for table in tables:
        folder = PurePosixPath(table.place.path).parent.as_posix()
        for _, row in _rows(table, contents):
            for name in _image_names(row, table.layout) or ():
                wanted.setdefault((folder, name), _remapped(name, rules))
    for rule in rules:
        if wanted and not any(name.startswith(rule["from"]) for _, name in wanted):
            first = next(iter(wanted))[1]
            raise UserError(
                f"data.source.remap: no image's name begins with {named.shown(rule['from'])}; the "
                f"first is {named.shown(first)}"
            )
    found, by_tail, why = match(wanted, candidates)
    if wanted and not found:
        raise UserError(
            f"none of the {len(wanted):,} images that rows name is there: "
            f"{_listed([name for _, name in wanted])}; what is there: "
            f"{_listed([place.path for place in candidates]) or 'no image'}. Add the images to "
            "data.source.files, or a rule to data.source.remap"
        )
    if by_tail:
        (_, name), place = next(iter(by_tail.items()))
        print(
            f"found by the ends of their names: {len(by_tail):,} of {len(wanted):,} images, such "
            f"as {named.shown(name)} at {named.shown(place.path)}"
        )
    if why:
        listed = "; ".join(list(why.values())[:_SHOWN])
        print(f"{len(why):,} of {len(wanted):,} images are missing: {listed}")
    return [
        Table(
            table.place,
            table.split,
            table.origin,
            table.layout,
            {
                name: place
                for (folder, name), place in found.items()
                if folder == PurePosixPath(table.place.path).parent.as_posix()
            },
        )
        for table in tables
    ]


def match(
    wanted: Mapping[tuple[str, str], str], candidates: Iterable[Place]
) -> tuple[dict[tuple[str, str], Place], dict[tuple[str, str], Place], dict[tuple[str, str], str]]:
    """Places of the wanted images, those of them found by their tail alone, and why others weren't.

    A name is found next to its table, or below one of the files given, or else by the longest tail
    (parts at its end) that it shares with a candidate. The tail has to be that of one candidate;
    and of two names that lead to one candidate, the one with the shorter tail is not found.

    Args:
        wanted: by the folder of the table and the name in the row, the name to look for.
    """
    by_path: dict[str, list[Place]] = {}
    by_name: dict[str, list[tuple[list[str], Place]]] = {}
    for place in candidates:
        parts = [named.key(part) for part in named.parts(place.path)]
        by_path.setdefault("/".join(parts), []).append(place)
        by_name.setdefault(parts[-1], []).append((parts, place))
    found: dict[tuple[str, str], Place] = {}
    tails: dict[tuple[str, str], int] = {}
    why: dict[tuple[str, str], str] = {}
    for asked, name in wanted.items():
        if "://" in name or name.startswith("data:"):
            why[asked] = f"{named.shown(name)} is an address, and no file"
            continue
        parts = [named.key(part) for part in named.parts(name)]
        beside = [named.key(part) for part in named.parts(f"{asked[0]}/{name.lstrip('/')}")]
        exact = by_path.get("/".join(beside), [])
        if len(exact) == 1:
            found[asked] = exact[0]
            continue
        near = [(_common(parts, of), place) for of, place in by_name.get((parts or [""])[-1], [])]
        longest = max((length for length, _ in near), default=0)
        best = [place for length, place in near if length == longest]
        if len(best) > 1:  # where only case or accents differ, by the letters themselves
            letters = {place: _common(named.parts(name), named.parts(place.path)) for place in best}
            best = [place for place in best if letters[place] == max(letters.values())]
        if len(best) == 1:
            found[asked] = best[0]
            if longest < len(parts):
                tails[asked] = longest
        elif best:
            why[asked] = f"{named.shown(name)} ends like {len(best):,} files"
        else:
            why[asked] = f"{named.shown(name)}: no file ends like it"
    most: dict[Place, int] = {}
    for asked, place in found.items():
        length = tails.get(asked, len(named.parts(wanted[asked])))
        most[place] = max(most.get(place, 0), length)
    for asked, length in list(tails.items()):
        if length < most[found[asked]]:
            other = found.pop(asked).path
            del tails[asked]
            why[asked] = (
                f"{named.shown(wanted[asked])}: {named.shown(other)} fits another name better, so "
                "only a rule in data.source.remap can say that it is this"
            )
    return found, {asked: found[asked] for asked in tails}, why


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts at their ends are the same."""
    count = 0
    for first, second in zip(reversed(one), reversed(other), strict=False):
        if first != second:
            break
        count += 1
    return count


def _remapped(name: str, rules: Sequence[Remap]) -> str:
    for rule in rules:
        if name.startswith(rule["from"]):
            return rule["to"] + name.removeprefix(rule["from"])
    return name


# preprocess


def read(raw: Path) -> "tuple[Iterator[Record], Iterator[Question]]":
    """Rows of every file; there are no held-out questions."""
    return records(raw), iter(())


def records(raw: Path) -> "Iterator[Record]":
    """Every row of every file, held-out files first.

    Raises:
        UserError: the folder is not as fetch left it.
    """
    try:
        tables = [_table(values) for values in json.loads((raw / INDEX).read_bytes())["tables"]]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"{raw / INDEX} is missing or damaged; run `dvc repro -f fetch` to fetch the source "
            "again"
        ) from None
    files = {file.path: raw / file.path for file in manifest.read(raw).files}
    with ExitStack() as stack:
        contents = Contents(files, stack)
        for table in tables:
            for where, row in _rows(table, contents):
                yield _record(row, table, contents, where)


def _table(values: Mapping[str, Any]) -> Table:
    return Table(
        Place(**values["place"]),
        values["split"],
        values["origin"],
        Layout(**values["layout"]),
        {name: Place(**place) for name, place in values["images"].items()},
    )


def _record(row: Any, table: Table, contents: Contents, where: str) -> "Record":
    from stages.dataset.pairs import Record

    said = Said(note="it is no JSON object")
    names: list[str] | None = None
    if isinstance(row, dict):
        said = what_is_said(row, table.layout)
        names = _image_names(row, table.layout)
    note, images = said.note, None
    if names is None:
        note = note or f"{table.layout.images} holds no names of files"
    elif absent := [name for name in names if name not in table.images]:
        note = note or f"{named.shown(absent[0])} was not found by fetch"
    else:
        images = tuple(contents.read(table.images[name]) for name in names)
    return Record(
        where=where,
        images=images,
        question=said.question,
        chosen=said.chosen,
        rejected=said.rejected,
        origin=table.origin,
        note=note,
        system=said.system,
        history=said.history,
        split=table.split,
    )


@dataclass(frozen=True)
class Said:
    """The texts of a row; what it lacks is ``None``, and ``note`` says why."""

    question: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    note: str = ""


def what_is_said(row: Mapping[str, Any], layout: Layout) -> Said:
    """The texts of a row, as LLaMA-Factory reads them: turns that end with the user's, and two
    answers, each a message or a text. ms-swift's ``rejected_response`` is read too, whose chosen
    answer is the last message.
    """
    column = layout.messages or ("messages" if "messages" in row else "conversations")
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return Said(note=f"{column} holds no list of messages")
    if layout.messages is None and turns and "role" in turns[0]:
        layout = Layout(None, role_tag="role", content_tag="content")
    said = [(_role(turn, layout), _content(turn.get(layout.content_tag))) for turn in turns]
    system = row.get(layout.system) if isinstance(row.get(layout.system), str) else ""
    if said and said[0][0] == "system":
        system, said = said[0][1], said[1:]
    chosen, rejected = row.get(layout.chosen), row.get(layout.rejected)
    if layout.rejected not in row and "rejected_response" in row and said:
        chosen, rejected, said = said[-1][1], row["rejected_response"], said[:-1]
    for number, (role, content) in enumerate(said, start=1):
        if role != ("user" if number % 2 else "assistant") or content is None:
            return Said(note=f"message {number} is not a text of the {_who(number)}")
    if len(said) % 2 == 0:
        return Said(note="the last message is not the user's")
    texts = [str(content) for _, content in said]
    return Said(
        texts[-1],
        _answer(chosen, layout),
        _answer(rejected, layout),
        system or "",
        tuple(zip(texts[0:-1:2], texts[1:-1:2], strict=True)),
    )


def _who(number: int) -> str:
    return "user" if number % 2 else "assistant"


def _role(turn: Mapping[str, Any], layout: Layout) -> str:
    """user, assistant or system; what it is called in other files than these is taken as well."""
    role = turn.get(layout.role_tag)
    names = {
        layout.user_tag: "user",
        layout.assistant_tag: "assistant",
        layout.system_tag: "system",
    }
    if layout.messages is None:
        names |= {"user": "user", "assistant": "assistant"}
    return names.get(role, "another") if isinstance(role, str) else "another"


def _content(value: object) -> str | None:
    """A text, or the texts among the parts of one; an image among them is marked ``<image>``."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return None
    parts = ("<image>" if part.get("type") == "image" else part.get("text") for part in value)
    texts = list(parts)
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _answer(value: object, layout: Layout) -> str | None:
    """An answer: a text, a message, or a list of one message."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get(layout.content_tag, value.get("content"))
    return _content(value)


def _image_names(row: Any, layout: Layout) -> list[str] | None:
    """The names of a row's images, in order; ``None`` if there is something else."""
    value = row.get(layout.images) if isinstance(row, dict) else None
    if value is None and isinstance(row, dict) and layout.images not in row:
        value = row.get("image") if layout.messages is None else None
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    names = [each.get("path") if isinstance(each, dict) else each for each in values]
    return [str(n) for n in names] if all(isinstance(n, str) and n for n in names) else None


def _rows(table: Table, contents: Contents) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with a name for it."""
    name = table.place.path
    text = _text(contents.read(table.place), name)
    if text.lstrip()[:1] == "[":
        rows = enumerate(parsed(text, name), start=1)
        yield from ((f"{name} row {number}", row) for number, row in rows)
        return
    try:
        for number, row in json_lines(text.split("\n"), name):
            yield f"{name} line {number}", row
    except UserError:
        if text.count("\n") > 1 and suffix(name) == ".json":
            parsed(text, name)  # one object over several lines: no rows, and no mistake
            return
        raise


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; save it as UTF-8") from None


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(named.shown(name) for name in names[:_SHOWN])
    return listed + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


def _name(source: ShareGptSource, fetched: Source) -> str:
    return fetched.repo or "prepared preference files"


def _words(fetched: Source) -> str:
    many = f"{len(fetched.files):,}, {readable(fetched.size)}"
    where = f"from {fetched.repo}" if fetched.repo else "published nowhere that is known here"
    return f"preference files prepared for LLaMA-Factory ({many}), {where}"


KIND = Kind(section=ShareGptSource, fetch_data=fetch_data, read=read, name=_name, words=_words)
