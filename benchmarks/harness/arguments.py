"""Command-line arguments that several benchmarks have."""

import argparse
import os
import sys


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of the script, with its line breaks."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_dtype(parser: argparse.ArgumentParser, default: str = "bfloat16") -> None:
    """Add ``--dtype``, the dtype of the backbone."""
    parser.add_argument(
        "--dtype",
        default=default,
        choices=("bfloat16", "float32"),
        help="dtype of the backbone (default: %(default)s)",
    )


def require_data() -> None:
    """End the program unless ``GATERA_DATA`` names the folder with the real data."""
    if "GATERA_DATA" not in os.environ:
        sys.exit("set GATERA_DATA to the folder that contains commonsense/ and dialogue/")
