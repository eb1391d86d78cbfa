"""Whether a file of ``torch.save`` is what was written: the zip format keeps a CRC-32 of every record in it.

``torch.load`` does not look at them: a flipped bit of a parameter loads as another number.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from fairseq.errors import FairseqError


def check_archive(path: str | Path) -> None:
    """Read a zip file through and compare all checksums; a file in another format passes, it has none.

    So does a file in which all are 0, as torch writes it when told to compute none. Raises FairseqError when something
    in the file has changed or is missing.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":  # torch.load's own test for a zip file
                return
            damage = _damage(zipfile.ZipFile(file))
    except Exception as error:  # what zipfile raises for bytes that are no zip file is not documented
        damage = str(error) or type(error).__name__
    if damage:
        raise FairseqError(f"checkpoint {path}: damaged ({damage.splitlines()[0]})")


def _damage(archive: zipfile.ZipFile) -> str:
    """What is wrong in an archive, or an empty string."""
    records = archive.infolist()
    for record in records:
        # torch writes none of these, and nothing is decompressed here
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            return f"record {record.filename} is compressed"
    if not any(record.CRC for record in records):
        return ""
    broken = archive.testzip()
    return f"the checksum of record {broken} does not match" if broken else ""
