"""Kind ``sharegpt``: preference files as they were prepared for LLaMA-Factory, and their images.

What people carry between Colab, Drive and Kaggle: JSON or JSON Lines with ``messages`` or
``conversations``, ``chosen``, ``rejected`` and ``images``, perhaps a ``dataset_info.json``, and the
images in a folder, a zip or a tar archive, named by a path of the machine that wrote the files.

fetch brings the files, finds each image that a row names, and writes what goes where into
``index.json``; preprocess reads by that index. Archives stay packed.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator
from pydantic_core import PydanticCustomError

from stages.core.errors import UserError, did_you_mean
from stages.core.project import is_forced
from stages.core.schema import Section, SourceSection
from stages.core.text import readable
from stages.pairs import layouts, named
from stages.pairs.layouts import Odd
from stages.pairs.suffixes import published_split
from stages.sources import addresses, manifest
from stages.sources.kind import Kind
from stages.sources.local import refuse_nested, walk
from stages.sources.manifest import PARTIAL, File, Source
from stages.sources.names import suffix
from stages.sources.places import Contents, Place, match

if TYPE_CHECKING:  # pyarrow takes longer to import than all of the parameters
    from stages.pairs.pairs import Question, Record

Split = Literal["train", "validation", "test"]
JSON = (".json", ".jsonl")
# By which rows are known that have question and image in columns of their own.
COLUMNS = {name: name for name in ("image", "question", "chosen", "rejected", "origin", "kind")}
INDEX = "index.json"
INFO = "dataset_info.json"
_SHOWN = 5  # names that a message lists


class Given(Section):
    """A file, an archive or a folder: a path, or an address of https, s3 or gdrive."""

    at: str = Field(min_length=1)
    sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    split: Split | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_place_alone(cls, value: Any) -> Any:
        return {"at": value} if isinstance(value, str) else value


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

    @model_validator(mode="after")
    def _addresses_that_can_be_kept(self) -> "ShareGptSource":
        """Here and not where an address is: pydantic's error would hold it, password and all."""
        for given in self.files:
            if addresses.is_remote(given.at) and (problem := addresses.problem_with(given.at)):
                text = f"files: {problem}"
                raise PydanticCustomError("address", "{problem}", {"problem": text})
        return self


@dataclass(frozen=True)
class Described:
    """Names of columns and tags, as ``dataset_info.json`` gives them; LLaMA-Factory's defaults."""

    messages: str = "conversations"
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
    """A file of rows: where it is, its split as published, and how it is described, if it is.

    ``images`` says where each image is that a row names.
    """

    place: Place
    split: str
    origin: str
    described: Described | None
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
    origins: dict[str, tuple[str, str]] = {}
    for given in source.files:
        for name, path in _brought(given, out, kept, set(here)).items():
            here[name], splits[name] = path, given.split
            if addresses.is_remote(given.at):
                origins[name] = (addresses.shown(given.at), addresses.key_of(given.at))
    with ExitStack() as stack:
        contents = Contents(here, stack)
        places = list(contents.places())
        tables = _tables(contents, places, splits, source.datasets)
        found = _located(contents, places, tables, source.remap)
        used = {table.place.file for table in tables}
        used |= {place.file for table in found for place in table.images.values()}
    files = [_place(here[name], out, name) for name in sorted(used)]
    index = {
        "from": {f.path: [*origins[f.path], f.sha256] for f in files if f.path in origins},
        "tables": [asdict(table) for table in found],
    }
    text = json.dumps(index, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (out / PARTIAL / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    manifest.place(out / PARTIAL / INDEX, out, INDEX)
    files.append(manifest.described(out, INDEX))
    repo = ", ".join(dict.fromkeys(at for at, _ in origins.values())) or None
    return manifest.finish(out, Source("sharegpt", repo, None, None, source.licence, tuple(files)))


def _kept(out: Path) -> dict[str, tuple[str, str]]:
    """What an earlier fetch left: name and sha256 of a file by the key of its address."""
    if is_forced():
        return {}
    try:
        index = json.loads((out / INDEX).read_text(encoding="utf-8"))
        found = {key: (str(name), str(digest)) for name, (_, key, digest) in index["from"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {key: kept for key, kept in found.items() if (out / kept[0]).is_file()}


def _brought(
    given: Given, out: Path, kept: Mapping[str, tuple[str, str]], taken: set[str]
) -> dict[str, Path]:
    """Where the files of one entry are, by the paths below the folder that they will have."""
    if addresses.is_remote(given.at):
        name, digest = kept.get(addresses.key_of(given.at), (INDEX, ""))
        if digest and given.sha256 in (digest, None) and manifest.sha256_of(out / name) == digest:
            return {_free(name, taken): out / name}
        path = addresses.bring(given.at, out / PARTIAL, given.sha256)
        return {_free(addresses.name_of(given.at), taken): path}
    path = Path(given.at).expanduser()
    if path.is_dir():
        refuse_nested(path, out)
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


def _place(path: Path, out: Path, name: str) -> File:
    """A file at its place below ``out``; what is there already, and right, is left alone."""
    file = replace(manifest.described(path.parent, path.name), path=name)
    if path == out / name or manifest.is_there(out / name, file):
        return file
    if path.parent != out / PARTIAL:
        manifest.check_room(out, file.size, what=str(path))
        try:
            path = Path(shutil.copyfile(path, out / PARTIAL / "copying"))
        except OSError as error:
            raise UserError(f"{path} can't be copied ({error.strerror})") from None
    manifest.place(path, out, name)
    return file


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
        tables.append(Table(place, split, "", None))
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
        tables = [replace(table, split="") for table in tables]
    order = ["test", "validation", "train", ""]
    return sorted(tables, key=lambda table: order.index(table.split))


def _is_json(place: Place, contents: Contents) -> bool:
    """Whether a file is JSON by its name; one that the user named himself, by its content too."""
    if suffix(place.path) in JSON or place.member is not None or "/" in place.file:
        return suffix(place.path) in JSON
    with contents.files[place.file].open("rb") as file:
        return file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{")


def _split_of(path: str) -> str:
    return published_split(PurePosixPath(path).stem)


def _described(
    info: Place,
    places: Sequence[Place],
    contents: Contents,
    splits: Mapping[str, Split | None],
    datasets: Sequence[str] | None,
) -> Iterator[Table]:
    """The tables that a ``dataset_info.json`` describes."""
    from stages.pairs import formats

    entries = formats.parsed(contents.read(info), info.path)
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
        known = {key: str(given[key]) for key in Described.__dataclass_fields__ if given.get(key)}
        described = Described(**known)
        for place in there:
            split = splits[place.file] or _split_of(f"{name}-{place.path}")
            yield Table(place, split, name, described)


def _holds_preferences(table: Table, contents: Contents) -> bool:
    """Whether a file's first row has what a preference needs.

    Raises:
        UserError: it is described as preferences, and is not.
    """
    row = next((row for _, row in _rows(table, contents)), None)
    keys = list(row) if isinstance(row, dict) else []
    if (d := table.described) is None:
        return layouts.choose(keys, COLUMNS) is not None if keys else False
    if {d.messages, d.chosen, d.rejected} <= set(keys):
        return True
    raise UserError(
        f"{table.place.path} has no {d.messages}, {d.chosen} and {d.rejected}, by which {INFO} "
        f"describes {named.shown(table.origin)}; it has {_listed(keys) or 'no rows of keys'}"
    )


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
        for _, row in _rows(table, contents):
            for name in _image_names(row, table):
                wanted.setdefault((_folder(table), name), _remapped(name, rules))
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
    by_folder: dict[str, dict[str, Place]] = {}
    for (folder, name), place in found.items():
        by_folder.setdefault(folder, {})[name] = place
    return [replace(table, images=by_folder.get(_folder(table), {})) for table in tables]


def _folder(table: Table) -> str:
    return PurePosixPath(table.place.path).parent.as_posix()


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
        found = json.loads((raw / INDEX).read_bytes())["tables"]
        tables = TypeAdapter(list[Table]).validate_python(found)
    except (OSError, ValueError, LookupError, TypeError):  # pydantic's error is a ValueError
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


def _record(row: Any, table: Table, contents: Contents, where: str) -> "Record":
    from stages.pairs import tables
    from stages.pairs.pairs import Record

    def encoded(cell: Any) -> bytes | str:
        from stages.pairs import pictures

        name = _name_in(cell)
        if name is not None and name not in table.images:
            return f"{named.shown(name)} was not found by fetch"
        return pictures.encoded(contents.read(table.images[name]) if name else cell, ())

    try:
        said = fields(row, table.described)
        said = replace(said, images=said.images or (), origin=table.origin or said.origin)
        return tables.record(where, said, encoded, table.split)
    except Odd as odd:
        return Record(where, None, None, None, None, note=str(odd), split=table.split)


def fields(row: Any, described: Described | None) -> layouts.Fields:
    """What a row holds, by ``dataset_info.json``'s description or else by the names of its keys.

    Raises:
        Odd: it is no pair, or a value is not what it should be.
    """
    if not isinstance(row, dict):
        raise Odd("it is no JSON object")
    if described is not None:
        row = _by_common_names(row, described)
    layout = layouts.choose(row, COLUMNS)
    if layout is None:
        raise Odd("it has no messages (or conversations), chosen and rejected")
    return layouts.fields(row, layout)


def _by_common_names(row: Mapping[str, Any], described: Described) -> dict[str, Any]:
    """The row with the columns and tags that are known without a description."""
    roles = {
        described.user_tag: "user",
        described.assistant_tag: "assistant",
        described.system_tag: "system",
    }

    def message(value: Any) -> Any:
        if isinstance(value, list):
            return [message(each) for each in value]
        if not isinstance(value, dict):
            return value
        role = value.get(described.role_tag)
        role = roles.get(role, f"{role}?") if isinstance(role, str) else role
        return {"role": role, "content": value.get(described.content_tag)}

    return {
        "messages": message(row.get(described.messages)),
        "chosen": message(row.get(described.chosen)),
        "rejected": message(row.get(described.rejected)),
        "images": row.get(described.images),
        "system": row.get(described.system),
    }


def _image_names(row: Any, table: Table) -> list[str]:
    """The names of a row's image files; those of a row that can't be read do not matter."""
    try:
        cells = fields(row, table.described).images or ()
    except Odd:
        return []
    return [name for cell in cells if (name := _name_in(cell)) is not None]


def _name_in(cell: Any) -> str | None:
    """The file that an image's cell names; ``None`` where it holds the image itself, or nothing."""
    if isinstance(cell, dict) and not cell.get("bytes"):
        cell = cell.get("path") or cell.get("url")
    return cell if isinstance(cell, str) and cell and not cell.startswith("data:") else None


def _rows(table: Table, contents: Contents) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with a name for it."""
    from stages.pairs import formats

    return formats.json_rows(contents.read(table.place), table.place.path)


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
