"""Conditioner for captions with a ``transformers`` encoder: a BERT trained from scratch, or any pretrained encoder.

The first is the method of Rombach et al. 2022 (arXiv 2112.10752, section 4.3.1); the second makes use of pretraining, for
example on other languages. A model file contains the encoder's config and its tokenizer, so that loading it does not
need the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import ByteBPEConfig, Tokenizer, TokenizerConfig, backend_from_json
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, texts
from ldm.conditioning.text_states import TextEncoder
from ldm.config import config_field
from ldm.errors import CheckpointError, ConfigError, SamplingError, first_line
from ldm.nn.conditioning import Conditioning
from ldm.prompts import WeightedPrompt

PROVENANCE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
"""Keys of an encoder's config that record its origin and do not affect its architecture."""

UNSAFE = {
    "auto_map", "attn_implementation", "experts_implementation", "quantization_config", "backbone", "backbone_config",
    "use_pretrained_backbone", "use_timm_backbone", "model_args", "num_labels", "id2label", "label2id",
}  # fmt: skip
"""Keys of an encoder's config that name code, other checkpoints, or lists of labels of unbounded length."""


@dataclass(frozen=True)
class TransformerConditionerConfig(ConditionerConfig, kind="transformer"):
    """A caption, encoded by an encoder of transformers; padding is masked, and a dropped caption is the encoded empty string."""

    checkpoint: str | None = config_field(
        None, "folder or hub id of an encoder with its tokenizer; null = a BERT from scratch", path=True
    )
    context_length: int = config_field(
        77, "tokens of a caption, for a checkpoint; a BERT from scratch uses its tokenizer's context_length"
    )
    trainable: bool | None = config_field(
        None, "train the encoder with the denoiser; null = true from scratch, false for a checkpoint"
    )
    dropout: float = config_field(
        0.1, "fraction of the training captions that are dropped, for classifier-free guidance", changeable=True
    )
    width: int = config_field(768, "channels of a BERT from scratch")
    layers: int = config_field(12, "transformer blocks of a BERT from scratch")
    heads: int = config_field(12, "attention heads of a BERT from scratch; must divide width")
    tokenizer: TokenizerConfig = config_field(ByteBPEConfig(), "tokenizer of a BERT from scratch")
    architecture: Mapping[str, Any] | None = config_field(
        None, "config of the checkpoint's encoder; null = read from the checkpoint"
    )
    tokenizer_json: str | None = config_field(
        None, "contents of tokenizer.json; null = trained or read from the checkpoint when training starts"
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if min(self.width, self.layers, self.heads) < 1 or self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide the width {self.width}, or layers is below 1.")
        if self.checkpoint is None and self.trainable is False:
            raise ConfigError(
                "trainable is false, but a BERT from scratch must be trained; remove trainable, or set checkpoint."
            )

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("text",)

    @property
    def context_width(self) -> int | None:
        if self.checkpoint is None:
            return self.width
        return None if self.architecture is None else _encoder_config(self.architecture).hidden_size

    def resolved(
        self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int
    ) -> TransformerConditionerConfig:
        if self.checkpoint is None or self.architecture is not None:
            return self
        from transformers import AutoConfig

        try:
            found = AutoConfig.from_pretrained(self.checkpoint, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the checkpoint {self.checkpoint} cannot be read ({first_line(error)}); "
                "give a folder or the hub id of an encoder of transformers."
            ) from None
        longest = getattr(found, "max_position_embeddings", None) or self.context_length
        if self.context_length > longest:
            raise ConfigError(
                f"context_length is {self.context_length}, but {self.checkpoint} has {longest} positions; lower it."
            )
        described = json.loads(found.to_json_string(use_diff=False))
        return replace(self, architecture={key: value for key, value in described.items() if key not in PROVENANCE})

    def with_tokenizer(
        self, make: Callable[[TokenizerConfig, str], Tokenizer], name: str = ""
    ) -> TransformerConditionerConfig:
        if self.tokenizer_json is not None:
            return self
        if self.checkpoint is None:
            return replace(self, tokenizer_json=make(self.tokenizer, name).to_json())
        return replace(self, tokenizer_json=_pretrained_tokenizer(self.checkpoint, self.context_length))

    def build(self, tokenizer: Tokenizer | None = None) -> TransformerConditioner:
        assert self.tokenizer_json is not None, "the tokenizer is made when training starts"
        backend = backend_from_json(self.tokenizer_json)
        # Not on the meta device, which loading a model uses: encoders have buffers that are not in its file.
        with torch.device("cpu"):
            encoder = self._encoder()
        rows = encoder.get_input_embeddings().num_embeddings
        if backend.get_vocab_size() > rows:
            raise CheckpointError(
                f"the tokenizer has {backend.get_vocab_size()} tokens, but the encoder embeds {rows}; "
                "use the encoder's own tokenizer, or set tokenizer.vocab_size to at least that."
            )
        return TransformerConditioner(self, encoder, backend)

    def _encoder(self) -> Any:
        """Build the encoder of transformers, with random weights."""
        if self.checkpoint is not None:
            assert self.architecture is not None, "the architecture comes from the checkpoint"
            config = _encoder_config(self.architecture)
            return _without_head(_loader(config).from_config(config, trust_remote_code=False))
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            max_position_embeddings=self.tokenizer.context_length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,  # else its embedding stays zero; we pad with the end token
        )
        return _without_head(BertModel(config))


class TransformerConditioner(Conditioner):
    """Tokenizer and encoder; the last hidden states are the context."""

    def __init__(self, config: TransformerConditionerConfig, encoder: nn.Module, tokenizer: tokenizers.Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.trained = config.checkpoint is None if config.trainable is None else config.trainable
        self.encoder = encoder.requires_grad_(self.trained)

    def train(self, mode: bool = True) -> TransformerConditioner:
        """Set the training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and self.trained)
        return self

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        captions = texts(inputs, self.config.dropout, generator)
        weighted = [caption for caption in captions if isinstance(caption, WeightedPrompt)]
        if any(caption.weights or caption.breaks for caption in weighted):
            what = "word weights" if any(caption.weights for caption in weighted) else "BREAK"
            raise SamplingError(f"this model's encoder does not support {what}; set prompt_syntax to 'plain'.")
        states = self.text_states(inputs, captions)
        return Conditioning(context=states["context"], mask=states["mask"])

    def text_encoders(self) -> Iterator[TextEncoder]:
        if not self.trained:
            yield TextEncoder("encoder", self.encoder, self.config.architecture or {}, self.tokenizer.to_str())

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encodings = self.tokenizer.encode_batch(list(texts))
        device = next(self.encoder.parameters()).device
        tokens = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool, device=device)
        mask[:, 0] = True  # an empty text may have no tokens, and attention with all keys masked is undefined
        attended = (
            None if mask.is_meta else mask.long()
        )  # transformers reads its values; meta tensors of --dry-run have none
        return {"context": self.encoder(input_ids=tokens, attention_mask=attended).last_hidden_state, "mask": mask}

    def fits(self, text: str) -> bool:
        return not self.tokenizer.encode(text).overflowing

    def load_pretrained(self) -> None:
        if self.config.checkpoint is None:
            return
        assert self.config.architecture is not None
        loader = _loader(_encoder_config(self.config.architecture))
        try:
            pretrained = loader.from_pretrained(self.config.checkpoint, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"the weights of {self.config.checkpoint} cannot be read ({first_line(error)}); download it again."
            ) from None
        self.encoder.load_state_dict(_without_head(pretrained).state_dict())


def _encoder_config(architecture: Mapping[str, Any]) -> Any:
    """Return the transformers config object of ``architecture``, which is read from a file and not trusted.

    Raises:
        CheckpointError: transformers does not support such an encoder.
    """
    from transformers import AutoConfig

    values = _harmless({key: value for key, value in architecture.items() if key != "model_type"})
    try:
        return AutoConfig.for_model(architecture["model_type"], **values)
    except Exception as error:  # each config class raises its own errors
        raise CheckpointError(
            f"the encoder's architecture cannot be built ({first_line(error)}); install the transformers version that wrote it."
        ) from None


def _harmless(value: Any) -> Any:
    """Return a part of an encoder's config without the entries that could make transformers download or run something."""
    if isinstance(value, Mapping):
        return {
            key: _harmless(item) for key, item in value.items() if key not in UNSAFE and not str(key).startswith("_")
        }
    if isinstance(value, (list, tuple)):
        return [_harmless(item) for item in value]
    return value


def _loader(config: Any) -> Any:
    """Return the auto class of an encoder; for encoder-decoder models, the encoder-only one if there is one."""
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in AutoModelForTextEncoding._model_mapping else AutoModel


def _without_head(model: Any) -> Any:
    """Return the part of a model that computes the hidden states, without decoder and pooler."""
    if hasattr(model, "shared"):
        return model.encoder
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _pretrained_tokenizer(checkpoint: str, context_length: int) -> str:
    """Return the tokenizer.json of a checkpoint, set to truncate and pad to ``context_length``.

    Raises:
        CheckpointError: it has no tokenizer, one without a fast (JSON) form, or one without a padding token.
        ConfigError: ``context_length`` exceeds the tokenizer's maximum.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises many types of errors for a broken file
        raise CheckpointError(
            f"the tokenizer of {checkpoint} cannot be read ({first_line(error)}); put its tokenizer.json there."
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers returns this for a folder without one
        raise CheckpointError(f"{checkpoint} holds no tokenizer; put its tokenizer.json there.")
    if tokenizer.pad_token is None:
        raise CheckpointError(f"the tokenizer of {checkpoint} has no padding token; take another encoder.")
    if context_length > tokenizer.model_max_length:
        longest = tokenizer.model_max_length
        raise ConfigError(f"context_length is {context_length}, but {checkpoint} takes {longest} tokens; lower it.")
    backend.enable_truncation(context_length)
    backend.enable_padding(length=context_length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return backend.to_str()
