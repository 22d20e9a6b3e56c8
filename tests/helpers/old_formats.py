"""Turns an adapter folder of today into one of format 3, the last one with a schema of its own."""

import hashlib
import json

from safetensors.torch import load_file, save_file


def as_format_3(folder):
    """Rewrite both files of a folder in place, and return it."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    now = json.loads(path.read_text(encoding="utf-8"))
    record = now["gatera"]
    tensors = load_file(weights)
    for part in ("update", "gate"):
        tensors = {name.replace(f"gatera_{part}.", f"{part}."): tensor for name, tensor in tensors.items()}
    save_file({name.removeprefix("base_model.model."): t for name, t in tensors.items()}, weights)
    names = ("update", "gate", "alpha", "dropout", "target_modules", "adapter_dtype")
    adapter = {name: now[name] for name in names} | {"rank": now["r"], "layers": now["layers_to_transform"]}
    description = {
        "format_version": 3,
        "adapter": adapter,
        "adapter_sha256": hashlib.sha256(json.dumps(adapter, sort_keys=True).encode()).hexdigest(),
        "backbone": {
            "id": now["base_model_name_or_path"],
            "revision": now["revision"],
            "fingerprint": record["fingerprint"],
            "attn_implementation": record["attn_implementation"],
        },
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    if "template" in record:
        description["template"] = record["template"]
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return folder
