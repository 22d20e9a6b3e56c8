"""Read a text file from a path or a URL, compressed or not; whatever is not a text file is named."""

import gzip
import os
import stat
import zlib
from pathlib import Path

from gatera_lightning.datamodules.sources.spec import is_compressed, is_url
from gatera_lightning.errors import ConfigError, printable

_GZIP = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def refused(location: str, reason: str) -> ConfigError:
    """Return the error that a file cannot be used."""
    return ConfigError(printable(f"{location}: {reason}"))


def download(url: str) -> Path:
    """Download a file into the cache of ``datasets``, or find it there.

    Raises:
        ConfigError: The file cannot be downloaded.
    """
    from datasets import DownloadConfig, DownloadManager

    try:
        return Path(str(DownloadManager(download_config=DownloadConfig(use_etag=False)).download(url)))
    except Exception as error:  # the client raises a dozen unrelated types
        raise ConfigError(
            printable(f"cannot download {url} ({type(error).__name__}: {' '.join(str(error).split())})")
        ) from error


def local_file(location: str) -> Path:
    """Return the path of a regular file, which is downloaded if it is at a URL.

    Raises:
        ConfigError: There is no such file; or it is a folder, a pipe or a device, which might never end.
    """
    path = download(location) if is_url(location) else Path(location)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        raise refused(location, f"cannot be read ({getattr(error, 'strerror', error)})") from error
    if stat.S_ISDIR(mode):
        raise refused(location, "cannot be read (Is a directory)")
    if not stat.S_ISREG(mode):
        raise refused(location, "cannot be read (not a regular file, but a pipe or a device)")
    return path


def read_text(location: str) -> str:
    """Read a UTF-8 text file, without its byte order mark; a name that ends in ``.gz`` is decompressed.

    Args:
        location: Path or URL.

    Raises:
        ConfigError: The file cannot be read, or is not UTF-8 text.
    """
    path = local_file(location)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise refused(location, f"cannot be read ({error.strerror})") from error
    if is_compressed(location):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise refused(location, f"not a valid gzip file ({error}); is it truncated?") from error
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")  # spreadsheets write one
    except UnicodeDecodeError as error:
        hint = ""
        if content.startswith(_UTF_16):
            hint = "; it looks like UTF-16: save it as UTF-8"
        elif content.startswith(_GZIP):
            hint = "; it is compressed: let its name end in .gz"
        raise refused(location, f"not UTF-8 text ({error.reason} at byte {error.start}){hint}") from error
    if "\0" in text:
        raise refused(
            location,
            f"not a text file (NUL at byte {content.index(0)}); if it is UTF-16, save it as UTF-8",
        )
    return text
