"""Read the tables that rich prints."""

import re


def table_cells(output):
    """The rows of a printed table: ``{first cell: other cells}``."""
    rows = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in output.splitlines()
        if re.search("[│┃]", line)
    ]
    return {row[0]: row[1:] for row in rows}
