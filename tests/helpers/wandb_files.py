"""Read the file of an offline run of Weights & Biases, which has the format of LevelDB's logs."""

import json
import struct
from pathlib import Path

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """Every record of a ``.wandb`` file, as its protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    offset, pieces = HEADER, []
    while offset + HEADER <= len(data):
        if BLOCK - offset % BLOCK < HEADER:  # the rest of a block is padding
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + HEADER])
        assert kind in (FULL, FIRST, MIDDLE, LAST)
        pieces.append(data[offset + HEADER : offset + HEADER + length])
        offset += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def history(folder):
    """Key -> optimizer step -> value, of the offline run below a folder."""
    (path,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            values = {}
            for item in record.history.item:  # a dictionary is one item per entry
                *outer, last = list(item.nested_key) or [item.key]
                place = values
                for name in outer:
                    place = place.setdefault(name, {})
                place[last] = json.loads(item.value_json)
            step = values.get("trainer/global_step")
            for key, value in values.items():
                found.setdefault(key, {})[step] = value
    return found


def media(folder, entry):
    """The bytes of a media file that the history of the offline run below a folder names."""
    (path,) = Path(folder).glob(f"wandb/offline-run-*/files/{entry}")
    return path.read_bytes()
