"""Public Perturb-seq data sets by name, from their public hosts into a cache folder.

Downloads resume where they were cut, are compared with the host's checksum where one is published, and appear under
their final name only when they are whole. Without a network the error says which file to put where.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from perturbzoo.data.reading import expand_path
from perturbzoo.errors import PerturbZooError, near_matches

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_CHUNK = 1 << 16  # what a broken connection may cost at the most


@dataclass(frozen=True)
class PublicDataset:
    """One public file.

    Attributes
    ----------
    name
        What the user types; the file becomes ``<cache>/<name>.h5ad``.
    address
        Where it is.
    member
        Name of the h5ad inside the zip archive at `address`; None where the address is the h5ad itself.
    checksum
        ``"md5:..."`` of the file at `address` as its host publishes it, None where we know of none. Never computed from
        a download of our own.
    verified
        Whether a download from `address` was tried and worked when this table was written.
    note
        What the file holds, and what is known of the address and the checksum.
    citation
        The paper that made the data.
    """

    name: str
    address: str
    member: str | None
    checksum: str | None
    verified: bool
    note: str
    citation: str


_DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
_GEARS = (
    "GEARS' preprocessing (doi:10.7910/DVN/Q2ZV3E, CC0): X is log1p-normalised; obs 'condition' ('ctrl', 'A+ctrl', 'A+B'). "
    "Address as in cell-gears 0.1.2, not tried from here; Dataverse may ask scripts for a browser. "
)
_MD5_NOTE = "md5: the one of the host's record, as quoted by two or more independent public projects that compared it."
_REPLOGLE = "Replogle et al. 2022, doi:10.1016/j.cell.2022.05.013"

DATASETS: dict[str, PublicDataset] = {
    dataset.name: dataset
    for dataset in (
        PublicDataset(
            name="norman",
            address=_DATAVERSE + "6154020",
            member="perturb_processed.h5ad",
            checksum="md5:cdc41d6050e619c37fd9dd44d440e2b4",
            verified=False,
            note="K562 CRISPRa, singles and doubles; counts in layers['counts']. " + _GEARS + _MD5_NOTE,
            citation="Norman et al. 2019, doi:10.1126/science.aax4438",
        ),
        PublicDataset(
            name="adamson",
            address=_DATAVERSE + "6154417",
            member="perturb_processed.h5ad",
            checksum="md5:0bde631bae60ee8c105991ff0e0d4a20",
            verified=False,
            note="K562 CRISPRi of the unfolded protein response, singles. " + _GEARS + _MD5_NOTE,
            citation="Adamson et al. 2016, doi:10.1016/j.cell.2016.11.048",
        ),
        PublicDataset(
            name="dixit",
            address=_DATAVERSE + "6154416",
            member="perturb_processed.h5ad",
            checksum=None,
            verified=False,
            note="K562 knockouts of transcription factors, singles. " + _GEARS + "No published md5 was found.",
            citation="Dixit et al. 2016, doi:10.1016/j.cell.2016.11.038",
        ),
        PublicDataset(
            name="replogle_k562_essential",
            address=_DATAVERSE + "7458695",
            member="perturb_processed.h5ad",
            checksum=None,
            verified=False,
            note="K562 CRISPRi of essential genes, strong perturbations only. "
            + _GEARS
            + "No published md5 was found (one public project notes 84eed779531de88f83d3eb16a773a261 of its own downloads).",
            citation=_REPLOGLE,
        ),
        PublicDataset(
            name="replogle_rpe1",
            address=_DATAVERSE + "7458694",
            member="perturb_processed.h5ad",
            checksum="md5:169370a8da6093470f122172ab30f7c5",
            verified=False,
            note="RPE1 CRISPRi of essential genes, strong perturbations only. " + _GEARS + _MD5_NOTE,
            citation=_REPLOGLE,
        ),
        PublicDataset(
            name="replogle_k562_gwps",
            address="https://zenodo.org/records/13350497/files/ReplogleWeissman2022_K562_gwps.h5ad?download=1",
            member=None,
            checksum="md5:13db594f8f1d2ccb88fec44a13e414dc",
            verified=False,
            note="K562 CRISPRi, genome-wide, 1,989,578 cells x 8,248 genes, raw counts, 8.8 GB; obs 'perturbation'. scPerturb "
            "1.4 (doi:10.5281/zenodo.13350497, CC BY 4.0). Address not tried from here. X is a dense matrix in the "
            "file (66 GB unpacked): a subset must be taken before it fits in memory. " + _MD5_NOTE,
            citation=_REPLOGLE + "; scPerturb: Peidli et al. 2024, doi:10.1038/s41592-023-02144-y",
        ),
        PublicDataset(
            name="vcc2025",
            address="https://storage.googleapis.com/arc-institute-virtual-cell-atlas/virtual-cell-challenge/2025/train/"
            "adata_Training.h5ad",
            member=None,
            checksum=None,
            verified=False,
            note="Training set of the Virtual Cell Challenge 2025: H1 embryonic stem cells, CRISPRi of 150 targets, raw counts, "
            "221,273 cells x 18,080 genes, 15 GB; obs 'target_gene' ('non-targeting'), 'guide_id', 'batch'. Address as in "
            "public projects that download it, not tried from here. No published md5 was found.",
            citation="Roohani et al. 2025, doi:10.1016/j.cell.2025.06.008",
        ),
        PublicDataset(
            name="open_problems",
            address="https://ftp.ncbi.nlm.nih.gov/geo/series/GSE279nnn/GSE279945/suppl/GSE279945_sc_counts_processed.h5ad",
            member=None,
            checksum=None,
            verified=False,
            note="Open Problems single-cell perturbations (OP3): blood cells of three donors under 146 compounds, raw counts; obs "
            "'sm_name' ('Dimethyl Sulfoxide' is the control), 'cell_type', 'donor_id', 'dose_uM'. Address as in Open Problems' own "
            "loader, not tried from here. No published md5 was found.",
            citation="Szalata et al. 2024, NeurIPS Datasets and Benchmarks; GSE279945",
        ),
        PublicDataset(
            name="kang",
            address="https://figshare.com/ndownloader/files/34464122",
            member=None,
            checksum=None,
            verified=False,
            note="Blood cells of eight lupus patients with and without interferon beta, raw counts; obs 'label' ('ctrl', 'stim'), "
            "'cell_type', 'replicate'. The file of pertpy's kang_2018. Address not tried from here; figshare may ask scripts for a "
            "browser. No published md5 was found.",
            citation="Kang et al. 2018, doi:10.1038/nbt.4042",
        ),
    )
}


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder of downloaded and simulated files: `cache`, else ``PERTURBZOO_CACHE``, else the system's cache folder."""
    import pooch

    return expand_path(cache or os.environ.get("PERTURBZOO_CACHE") or pooch.os_cache("perturbzoo"))


def is_cached(name: str) -> bool:
    """Whether a public data set has been downloaded, so that :func:`fetch` needs no network for it."""
    return (cache_folder() / f"{name}.h5ad").is_file()


def fetch(
    dataset: str | PublicDataset,
    cache: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    attempts: int = 3,
    pause: float = 2.0,
) -> Path:
    """Return the path of a public data set's h5ad, downloading it the first time.

    Parameters
    ----------
    dataset
        A name of :data:`DATASETS`, or an entry of one's own.
    cache
        Folder for the files; by default the environment variable ``PERTURBZOO_CACHE``, or else the system's cache
        folder for perturbzoo.
    progress
        Show a progress bar.
    attempts
        How many times in a row a connection may fail without a byte of progress.
    pause
        Seconds to wait before a further attempt.

    Raises
    ------
    PerturbZooError
        An unknown name; no connection; a file that is not there, not whole or not the published one; no room to write.
        What arrived before a cut stays in ``<file>.part`` and the next call continues it.
    """
    import pooch

    if isinstance(dataset, str):
        if dataset not in DATASETS:
            raise PerturbZooError(
                f"no public data set '{dataset}'{near_matches(dataset, DATASETS)}; there are {', '.join(sorted(DATASETS))}"
            )
        dataset = DATASETS[dataset]
    folder = cache_folder(cache)
    final = folder / f"{dataset.name}.h5ad"
    if final.exists():
        _require_hdf5(final, dataset)
        return final
    source = final if dataset.member is None else folder / f"{dataset.name}.zip"
    if source.exists() and not _has_checksum(source, dataset.checksum):
        raise PerturbZooError(
            f"{source}: not the file that {dataset.address} publishes ({dataset.checksum}): delete it and try again"
        )
    downloader = ResumingDownloader(source.with_name(source.name + ".part"), progress, attempts, pause)
    try:
        with _quiet(pooch.get_logger()):
            pooch.retrieve(dataset.address, known_hash=dataset.checksum, fname=source.name, path=folder, downloader=downloader)
        if dataset.member is not None:
            _unpack(source, dataset.member, final)
    except DownloadError as error:
        raise PerturbZooError(f"data set '{dataset.name}': {error}; {_by_hand(dataset, folder)}") from error
    except OSError as error:
        raise PerturbZooError(
            f"data set '{dataset.name}': cannot write to {folder}: {error.strerror or error}; "
            "make room, or name another folder with PERTURBZOO_CACHE"
        ) from error
    except ValueError as error:  # pooch's word for a wrong checksum; it has deleted the download
        raise PerturbZooError(
            f"data set '{dataset.name}': the download is not the published file ({dataset.checksum}) and was deleted; "
            f"try again, or {_by_hand(dataset, folder)}"
        ) from error
    _require_hdf5(final, dataset)
    return final


class DownloadError(Exception):
    """Why a download failed, as a clause; :func:`fetch` adds what to do about it."""


class ResumingDownloader:
    """A pooch downloader that keeps what arrived and asks for the rest.

    Bytes go to a file of their own, which outlives a failure; a further attempt sends an HTTP Range request for what is
    missing (RFC 9110, section 14). Attempts without progress are counted, so a slow line with many cuts gets through.

    Parameters
    ----------
    part
        The file of what has arrived.
    progress, attempts, pause
        See :func:`fetch`.
    timeout
        Seconds to wait for the connection, and for each piece of the answer.
    """

    def __init__(
        self, part: Path, progress: bool, attempts: int, pause: float, timeout: tuple[float, float] = (10.0, 60.0)
    ) -> None:
        self.part = part
        self.progress = progress
        self.attempts = attempts
        self.pause = pause
        self.timeout = timeout

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Download `url` and move it to `output_file`, as pooch asks of a downloader."""
        fruitless, furthest = 0, self._arrived()
        while reason := self._continue(url):
            fruitless = 0 if self._arrived() > furthest else fruitless + 1
            furthest = max(furthest, self._arrived())
            if fruitless >= self.attempts:
                kept = f"; {self._arrived():,} bytes are kept in {self.part}" if self._arrived() else ""
                raise DownloadError(reason + kept)
            time.sleep(self.pause)
        os.replace(self.part, output_file)

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str) -> str:
        """Ask for what is missing and append it. Returns why the file is not whole yet; an empty string once it is."""
        import requests

        have = self._arrived()
        # compression on the way would make byte positions meaningless
        headers = {"Accept-Encoding": "identity", "User-Agent": "perturbzoo"}
        if have:
            headers["Range"] = f"bytes={have}-"
        host = urlsplit(url).netloc
        try:
            answer = requests.get(url, headers=headers, stream=True, timeout=self.timeout)
        except requests.exceptions.RequestException as error:
            return f"no connection to {host} ({type(error).__name__})"
        with answer:
            if answer.status_code == 416 and have:
                if answer.headers.get("Content-Range") == f"bytes */{have}":
                    return ""  # everything was there already
                self.part.unlink()  # the file on the host is another one by now
                return f"{host} has no such part of the file any more"
            if answer.status_code in (429, 500, 502, 503, 504):
                return f"{host} answers HTTP {answer.status_code} {answer.reason}"
            _refuse_other_answers(answer)
            if answer.status_code == 200:
                have = 0  # this host does not do ranges and starts over
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise DownloadError(f"{host} sent another part of the file than it was asked for")
            missing = answer.headers.get("Content-Length")
            total = None if missing is None else have + int(missing)
            # a connection that ends early then gives what it brought, instead of an exception that throws it away
            answer.raw.enforce_content_length = False
            try:
                self._append(answer.iter_content(_CHUNK), have, total)
            except requests.exceptions.RequestException:
                return f"the connection to {host} was cut"
        return "" if total is None or self._arrived() >= total else f"the connection to {host} was cut"

    def _append(self, chunks: Iterator[bytes], have: int, total: int | None) -> None:
        from tqdm import tqdm

        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=self.part.stem, disable=not self.progress)
        with bar, self.part.open("ab" if have else "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                bar.update(len(chunk))


def _refuse_other_answers(answer: Any) -> None:
    """Refuse what is no file: errors, and the page with which a host asks for a browser."""
    if answer.status_code >= 400:
        raise DownloadError(f"the host answered HTTP {answer.status_code} {answer.reason}")
    if answer.status_code not in (200, 206) or answer.headers.get("Content-Type", "").startswith("text/html"):
        raise DownloadError("the host wants a browser, not a program (it answered with a page, not with the file)")


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silence pooch's advice on hashes, which is meant for those who write registries."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _has_checksum(path: Path, checksum: str | None) -> bool:
    """Whether a file has the checksum; anything does where none is known."""
    import pooch

    if checksum is None:
        return True
    algorithm, _, value = checksum.rpartition(":")
    return pooch.file_hash(str(path), alg=algorithm or "sha256") == value.lower()


def _unpack(archive: Path, member: str, final: Path) -> None:
    """Replace a zip archive by one file of it, under another name until it is whole; zip's own CRC is checked."""
    part = final.with_name(final.name + ".part")
    try:
        with zipfile.ZipFile(archive) as opened:
            found = [name for name in opened.namelist() if name.rsplit("/", 1)[-1] == member]
            if not found:
                raise DownloadError(f"{archive} holds no {member}")
            with opened.open(found[0]) as packed, part.open("wb") as file:
                shutil.copyfileobj(packed, file, _CHUNK)
        os.replace(part, final)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise DownloadError(f"the archive was damaged and is deleted ({error})") from error
    finally:
        part.unlink(missing_ok=True)
    archive.unlink()


def _require_hdf5(path: Path, dataset: PublicDataset) -> None:
    with path.open("rb") as file:
        signature = file.read(len(_HDF5_SIGNATURE))
    if signature != _HDF5_SIGNATURE:
        raise PerturbZooError(f"{path}: not an h5ad file; delete it, then {_by_hand(dataset, path.parent)}")


def _by_hand(dataset: PublicDataset, folder: Path) -> str:
    final = folder / f"{dataset.name}.h5ad"
    if dataset.member is None:
        return f"download {dataset.address} in a browser and save it as {final}"
    archive = final.with_suffix(".zip")
    return f"download {dataset.address} in a browser and save it as {archive} (or the {dataset.member} in it as {final})"
