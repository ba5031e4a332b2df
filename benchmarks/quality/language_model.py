"""The language suite's network: a BERT encoder, the mean of its outputs, and a frozen cosine head for each task."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertModel

HEAD_SCALE = 16.0  # the glyph suite's
PADDING = 0  # [PAD] of BERT's vocabulary
BATCH = 64  # texts; larger ones are no faster on a CPU


class SentenceEncoder(BertModel):
    """BERT from tokens (n, length) int, padded with 0, to the mean of the outputs, (n, d)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (n, d) of tokens (n, length); columns that hold nothing but padding are not computed."""
        mask = tokens != PADDING
        length = int(mask.sum(1).max())
        tokens, mask = tokens[:, :length].long(), mask[:, :length]
        outputs = super().forward(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask.unsqueeze(2).to(outputs.dtype)
        return (outputs * weights).sum(1) / weights.sum(1)


def load_encoder(folder: Path) -> SentenceEncoder:
    """The float32 network of a checkpoint of BERT, merged ones included; without dropout."""
    transformers.utils.logging.disable_progress_bar()
    model: SentenceEncoder = SentenceEncoder.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def save_encoder(model: SentenceEncoder, config: Path, folder: Path) -> None:
    """Write a folder that BertModel.from_pretrained reads: bfloat16 weights, `config` as it is; whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copy(config, partial / "config.json")
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    partial.replace(folder)


@torch.no_grad()
def features(model: SentenceEncoder, tokens: Tensor) -> Tensor:
    """Features (n, d) of tokens (n, length), computed in batches of texts of about one length."""
    order = (tokens != PADDING).sum(1).argsort(stable=True)
    found = torch.cat([model(tokens[places]) for places in order.split(BATCH)])
    return found[order.argsort()]


def make_head(found: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (d), head (classes, d)) of features (n, d): class means of the centred, normalised features, float16."""
    sums = torch.zeros(int(labels.max()) + 1, found.shape[1])
    counts = labels.bincount()[:, None]
    mean = (sums.index_add(0, labels, found) / counts).mean(0).half().float()
    centred = F.normalize(found - mean, dim=1)
    head = F.normalize(sums.index_add(0, labels, centred) / counts, dim=1)
    return mean.half(), head.half()


def cosine_logits(found: Tensor, mean: Tensor, head: Tensor) -> Tensor:
    """Logits (n, classes): cosines between centred features and the rows of the head, times HEAD_SCALE."""
    return HEAD_SCALE * F.normalize(found - mean.float(), dim=1) @ F.normalize(head.float(), dim=1).T
