"""Public checkpoints: each is a config; its files lie in one folder, and are converted to our form once.

FOLDER/NAME/source/FILE          as published, with FILE.sha256: the hash it had when it was first converted
FOLDER/NAME/model.safetensors    and config.yaml, card.md: what is loaded, written by the first use of the files
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steadyflow.checkpoints.checkpoint import Checkpoint, load
from steadyflow.checkpoints.download import by_hand, record, verify
from steadyflow.checkpoints.files import CARD, CONFIG, read_card, save_converted
from steadyflow.checkpoints.formats import convert
from steadyflow.checkpoints.running import Running

BESIDE = (".sha256", ".part", ".crdownload", ".download", ".tmp")  # no files of weights: a hash, downloads that go on


@dataclass(frozen=True)
class Public:
    """A public checkpoint: where it comes from, and what it is read as.

    Attributes:
        name: of its config, and of its folder.
        folder: of all checkpoints.
        url: of its file; with `files`, of the folder they lie in; None where it has to be fetched by hand.
        page: where a person finds it.
        sha256, md5: of the file (of the last of `files`), where one is published; the sha256 that it has when it is
            first converted is kept in any case, and checked ever after.
        format, arguments: as `formats.convert` takes them.
        card: what people want to know: architecture, path, prediction, resolution, classes, data range, the published
            FID, licence, source. Resolution and classes are compared with what the file turns out to be.
        file: its name, where the url does not end in it. Of those to be fetched by hand it may be unknown: a file that
            lies alone in `source` is taken, whatever its name.
        files: several files instead of one.
    """

    name: str
    folder: str
    url: str | None
    page: str
    sha256: str | None
    format: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    files: Sequence[str] = ()
    md5: str | None = None

    @property
    def directory(self) -> Path:
        """Where it lies in our form."""
        return (Path(self.folder).expanduser() / self.name).resolve()

    def sources(self) -> dict[Path, str | None]:
        """Its files as published, and from where."""
        if self.files:
            base = self.url and self.url.rstrip("/")
            return {self.directory / "source" / name: base and f"{base}/{name}" for name in self.files}
        file = self.directory / "source" / (self.file or str(self.url or "weights").rpartition("/")[2])
        if self.url is None and not file.is_file():
            put = [it for it in file.parent.glob("[!.]*") if it.is_file() and it.suffix not in BESIDE]
            file = put[0] if len(put) == 1 else file
        return {file: self.url}

    def hashes(self, file: Path) -> tuple[str | None, str | None]:
        """The published sha256 and md5 of one of its files."""
        return (self.sha256, self.md5) if file == [*self.sources()][-1] else (None, None)

    def missing(self) -> dict[Path, str | None]:
        """Its files that are not there."""
        return {file: url for file, url in self.sources().items() if not file.is_file()}

    def converted(self) -> bool:
        """Whether it lies there in our form, made from the right file by the conversion that its config asks for.

        A directory that no conversion made, say of a network that somebody trained, is taken as it is.
        """
        if not (self.directory / CONFIG).is_file():
            return False
        made = read_card(self.directory / CARD).get("conversion")
        if made is None:
            return True
        right = self.sha256 is None or self.sha256 in made["sha256"].values()
        return right and (made["format"], made["arguments"]) == (self.format, dict(self.arguments))

    def prepare(self) -> None:
        """Brings it into our form, from its files.

        Raises:
            FileNotFoundError: a file is not there; says which to put where.
            ValueError: a file is another than the published or the first one, or not what its config says.
        """
        for file, url in self.missing().items():
            if url is None:
                raise FileNotFoundError(
                    f"checkpoint {self.name} has to be fetched by hand from {self.page}: put {self.file or 'its file'} "
                    f"into {file.parent}, under any name, alone"
                )
            raise FileNotFoundError(
                f"checkpoint {self.name} is not here: `steadyflow prepare checkpoint={self.name}` fetches it; "
                f"{by_hand(url, file)}"
            )
        files = [*self.sources()]
        hashes = {file: verify(file, *self.hashes(file)) for file in files}
        made = convert(files[0].parent if self.files else files[0], self.format, self.arguments)
        for key, found in (("resolution", made.shape[-1]), ("classes", made.num_classes)):
            if self.card.get(key) not in (None, found):
                raise ValueError(f"{files[-1]} has {key} {found}; checkpoint {self.name} has {self.card[key]}")
        kept = {file.name: sha256 for file, sha256 in hashes.items()}
        conversion = {"format": self.format, "arguments": dict(self.arguments), "sha256": kept}
        (self.directory / CONFIG).unlink(missing_ok=True)
        card = {**made.card, **self.card, "page": self.page, "conversion": conversion}
        save_converted(self.directory, replace(made, card=card), str(files[-1]))
        for file, sha256 in hashes.items():
            record(file, sha256)


def public(
    name: str,
    folder: str,
    url: str | None,
    page: str,
    sha256: str | None,
    format: str,
    arguments: Mapping[str, Any],
    card: Mapping[str, Any],
    file: str | None = None,
    files: Sequence[str] = (),
    md5: str | None = None,
    running: Running | None = None,
) -> Checkpoint:
    """A public checkpoint, from its files or from what they became.

    Args:
        running: how its network is to run; the rest: see `Public`.

    Raises:
        FileNotFoundError, ValueError: as `Public.prepare` and `load`.
    """
    source = Public(name, folder, url, page, sha256, format, arguments, card, file, files, md5)
    if not source.converted():
        source.prepare()
    return replace(load(source.directory, running=running), name=name)


def none() -> Checkpoint:
    """What `checkpoint=list` is outside `steadyflow prepare`: a mistake."""
    raise ValueError("checkpoint=list is no checkpoint: `steadyflow prepare checkpoint=list` prints which there are")
