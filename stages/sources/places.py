"""Files and members of archives alike, by place, and the place that a foreign name means."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.core.errors import UserError
from stages.core.text import readable
from stages.pairs import named
from stages.pairs.suffixes import is_hidden
from stages.sources import archives
from stages.sources.names import IMAGES, suffix


@dataclass(frozen=True)
class Place:
    """Where content is: a file below the folder, or a member of an archive there."""

    file: str
    member: str | None = None

    @property
    def path(self) -> str:
        """The path by which it is known: of a member, below the archive's name."""
        return f"{PurePosixPath(self.file).stem}/{self.member}" if self.member else self.file


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
        path = self.files[place.file]
        try:
            if path.stat().st_size > archives.MEMBER:
                raise UserError(
                    f"{place.path} is above {readable(archives.MEMBER)}, and read at once; divide "
                    "it"
                )
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{place.path} can't be read ({error.strerror})") from None


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
        if "://" in name:
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
