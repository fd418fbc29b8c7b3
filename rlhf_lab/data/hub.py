"""The files of a data set by the names that they have on the hub, or in a copy of it on this machine."""

import gzip
import lzma
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

# split -> pattern or patterns of its files, relative to the data set, e.g. data/train-*.parquet; None for no such split
Named = Mapping[str, str | Sequence[str] | None]

# how the datasets library reads a file, by the end of its name
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
COMPRESSED = tuple(_OPENERS)


@contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """A compressed file, `train.jsonl.gz`, as it was before, `train.jsonl`, in a folder of its own until the end.

    Raises:
        ValueError: it is not compressed as its name says, or was cut off.
    """
    with TemporaryDirectory() as folder:
        plain = Path(folder) / file.stem
        try:
            with _OPENERS[file.suffix](file) as packed, plain.open("wb") as written:
                shutil.copyfileobj(packed, written)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{file} cannot be unpacked as {file.suffix}: {error}; fetch it again") from error
        yield plain


def _patterns(named: Named) -> dict[str, list[str]]:
    return {
        split: [patterns] if isinstance(patterns, str) else list(patterns)
        for split, patterns in named.items()
        if patterns
    }


def files_of(folder: Path, named: Named) -> dict[str, list[Path]]:
    """split -> its files in a folder, in the order of the patterns, and of their names for each.

    Raises:
        ValueError: a split has none.
    """
    found: dict[str, list[Path]] = {}
    for split, patterns in _patterns(named).items():
        found[split] = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        if not found[split]:
            raise ValueError(
                f"dataset.path={folder} has no file {' or '.join(patterns)} (dataset.files.{split}); say which files a "
                "split is with dataset.files.<split>=<pattern>, or read them by their names with dataset.files=null"
            )
    return found


def from_hub(path: str, revision: str | None, named: Named) -> dict[str, list[dict[str, Any]]]:
    """split -> rows of these files of a hub data set, whatever splits and configurations its own card declares.

    Raises:
        ValueError: it is not there, or a file is of no known kind.
    """
    import datasets  # half a second, which local files need not pay
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    patterns = _patterns(named)
    at = f"hf://datasets/{path}" + (f"@{revision.replace('/', '%2F')}" if revision else "")
    files = {split: [f"{at}/{pattern}" for pattern in each] for split, each in patterns.items()}
    kinds = {_kind(pattern) for each in patterns.values() for pattern in each}
    if len(kinds) > 1:
        raise ValueError(f"dataset.files names files of the kinds {sorted(kinds)}; one data set is of one kind")
    try:
        # each split by itself: their columns need not agree
        loaded = {
            split: datasets.load_dataset(next(iter(kinds)), data_files=each, split="train")
            for split, each in files.items()
        }
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"dataset.path={path}: no such file or folder here, and not from the hub: {reason}") from error
    return {split: [dict(row) for row in rows] for split, rows in loaded.items()}


def _kind(pattern: str) -> str:
    ends = [suffix for suffix in PurePosixPath(pattern.rstrip("*")).suffixes if suffix not in COMPRESSED]
    if not ends or ends[-1] not in _KINDS:
        raise ValueError(f"dataset.files has {pattern!r}; expected a name that ends with one of {', '.join(_KINDS)}")
    return _KINDS[ends[-1]]
