"""`serve`: an adapted model behind OpenAI's HTTP endpoints, by Transformers' own server."""

import importlib.util
from collections.abc import Sequence
from typing import cast, get_args

import torch
from transformers import PreTrainedTokenizerBase

from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.inference import prepared_for_inference
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.adapters.serialization import read_adapter, trained_template
from gatera_lightning.backbone.config import Dtype, stored_backbone
from gatera_lightning.backbone.loading import default_device, load_backbone, load_config, load_tokenizer
from gatera_lightning.backbone.source import gguf_file
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.draft_arguments import add_draft_arguments, check_draft, draft_config, template_hint
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.generation.drafting import Drafter
from gatera_lightning.terminal.printing import print_text

_PACKAGES = ("fastapi", "uvicorn", "openai")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(argv: Sequence[str]) -> None:
    """Serve an adapter until a signal arrives.

    Args:
        argv: The flags.

    Raises:
        ConfigError: Something cannot work; no weight is loaded yet.
        AdapterFileError: The adapter folder is incomplete, or belongs to another backbone.
    """
    args = _parser().parse_args(argv)
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"serve: needs {', '.join(missing)}, not installed here: pip install 'gatera-lightning[serve]'"
        )
    problems = []
    if not 0 <= args.port <= 65535:
        problems.append(f"--port: {args.port}; accepted: a port from 1 to 65535, or 0 for any free one")
    if not args.name.strip() or "@" in args.name:
        problems.append(f"--name: {args.name!r}; accepted: a name without @")
    draft = check_draft(args, problems)
    if problems:
        raise ConfigError(problems)
    folder = adapter_folder(args.adapter, "RUN_OR_FOLDER")
    stored, _ = read_adapter(folder)  # all of it: an incomplete folder is refused before the backbone loads
    if stored.origin["id"] is None:
        raise AdapterFileError(f"{folder} does not store the id of its backbone")
    if problem := missing_mask_problem(stored.config):
        raise ConfigError(f"RUN_OR_FOLDER: {folder}: {problem}")
    backbone = stored_backbone(stored.origin, args.dtype)
    if problems := backbone.problems():
        raise ConfigError([f"{folder}: {problem}" for problem in problems])
    from gatera_lightning.generation.server import listening_socket, serve_forever

    listening = listening_socket(args.host, args.port)
    with listening:
        tokenizer = load_tokenizer(backbone)
        template = _template(args.template, folder, tokenizer)
        if gguf_file(backbone.id) is None:
            load_config(backbone)  # refuses what is no causal language model
        with default_device() as device:  # weights are read straight onto it
            model = load_backbone(backbone, device.type)
        load_adapter(model, folder)
        model = model.to(device).eval()  # type: ignore[arg-type]
        drafter, hint = None, ""
        if draft is not None:
            hint = template_hint(draft, template)
            drafter = Drafter(model, load_draft_adapter(model, draft), draft_config(args))
        from gatera_lightning.generation.served_model import PromptFormat, ServedModel

        served = ServedModel(args.name, model, PromptFormat(template, tokenizer), drafter)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print_text(f"serving {folder} as {args.name!r} (template {template}): http://{shown}:{port}/v1")
        if drafter is not None:
            print_text(f"drafts: {draft}, in blocks of {drafter.config.block} tokens{hint}")
        if args.host not in _LOOPBACK:
            print_text("other machines can reach it, and it asks nobody for a key")
        with torch.no_grad(), prepared_for_inference(model):
            serve_forever(served, listening)


def _template(given: str | None, folder: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of chat requests: the given one, else the one of training, else chat or plain."""
    has_chat_template = bool(tokenizer.chat_template)
    chosen = given or trained_template(folder) or ("chat" if has_chat_template else "plain")
    if chosen == "chat" and not has_chat_template:
        raise ConfigError(
            "--template: chat needs a tokenizer with a chat template, and this one has none; accepted: "
            "plain, alpaca"
        )
    return cast(Template, chosen)


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "serve",
        description="Serve a fine-tuned model with OpenAI's HTTP endpoints (/v1/chat/completions, "
        "/v1/completions, /v1/models), streaming or not, by the server of Transformers. Requests are "
        "answered one after another.",
    )
    parser.add_argument(
        "adapter",
        metavar="RUN_OR_FOLDER",
        help=ACCEPTED,
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; default: 127.0.0.1, which other machines cannot reach",
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=8000, help="port, or 0 for a free one; default: 8000"
    )
    parser.add_argument("--name", default="gatera", help="what requests call the model; default: gatera")
    parser.add_argument(
        "--template",
        choices=get_args(Template),
        help="prompt template of chat requests; default: the data.template of the adapter's training if its "
        "folder stores it, else chat if the tokenizer has a chat template, else plain",
    )
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="auto", help="dtype of the backbone; default: auto"
    )
    add_draft_arguments(parser)
    return parser
