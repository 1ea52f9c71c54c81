"""What goes along with a merged model's weights: its tokenizer, and the card that says what it was made of."""

from collections.abc import Sequence
from pathlib import Path

from lorakit import __version__
from lorakit.core.hub import is_hub_id
from lorakit.core.merging.plan import Plan, Weighted
from lorakit.core.tokenization import MAX_BYTES
from lorakit.core.untrusted import read_small

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Without one of these the rest is no tokenizer."""
_TOKENIZER_FILES = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


def tokenizer_files(folders: Sequence[Path]) -> dict[str, bytes]:
    """The tokenizer of the first folder that has one, name → bytes: files as they are, chat template included.

    Raises InputRefused (what should be a file is none, or too large), DiskFailed.
    """
    for folder in folders:
        if any((folder / name).is_file() for name in _VOCABULARIES):
            found = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
            return {path.name: read_small(path, MAX_BYTES, "restore the file, or remove it") for path in found}
    return {}


def model_card(plan: Plan) -> str:
    """README.md of a merged model."""
    base = plan.adapters[0].adapter.base_name
    public = is_hub_id(base) and not Path(base).exists()  # a folder's place is nobody else's business
    named = f"base_model: {base}\nbase_model_relation: merge\n" if public else ""
    made_of = "\n".join(_line(each) for each in plan.adapters)
    rounding = plan.rounding
    precision = f", whose linear layers went through {rounding.kind} and back, as in training" if rounding else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{named}tags: [lora, lorakit]
---
# {Path(base).name or plan.base.folder.name}, merged

Base: {Path(base).name or plan.base.folder.name} (fingerprint {plan.base.fingerprint}){precision}

{made_of}

Merged by lorakit {__version__}: W + scale · B·A in fp32, rounded once.
{len(plan.changed)} of {len(plan.targets)} tensors differ from the base's.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")
```
"""


def _line(each: Weighted) -> str:
    adapter = each.adapter
    weight = "" if each.weight == 1 else f", weight {each.weight:g}"
    data = f", trained on data {adapter.artifact.parents['blocks']}" if adapter.artifact is not None else ""
    config = adapter.config
    return f"Adapter: {adapter.folder.name}, rank {config['r']}, alpha {config['lora_alpha']:g}{weight}{data}"
