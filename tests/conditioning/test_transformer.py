from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from ldm.cli.dry_run import describe
from ldm.clip.tokenizer import ByteBPEConfig, Tokenizer, TokenizerConfig, train_byte_bpe
from ldm.conditioning import ConditionerConfig, TransformerConditioner
from ldm.conditioning.text_states import TEXT_STATES, TextStates
from ldm.config import from_dict, to_dict
from ldm.errors import CheckpointError, ConfigError
from ldm.formats import load
from ldm.formats.native import save_model
from ldm.model import LatentDiffusion, ModelConfig
from ldm.pipeline import Pipeline
from ldm.training.experiment import load_config
from tests.tiny import CAPTIONS, tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "car", "ein", "rotes", "auto", "красная", "машина"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def write_tokenizer(folder: Path, pad: str | None = "[PAD]", **options: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token=pad, **options).save_pretrained(
        folder
    )


def write_bert(folder: Path) -> Any:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **SIZES)).eval()
    model.save_pretrained(folder)
    return model


def write_xlm_roberta(folder: Path) -> Any:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(vocab_size=len(WORDS), max_position_embeddings=20, pad_token_id=0, **SIZES)
    model = XLMRobertaModel(config).eval()
    model.save_pretrained(folder)
    return model


def write_mt5(folder: Path) -> Any:
    """Encoder and decoder, as mT5 is published."""
    from transformers import MT5Config, MT5Model

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = MT5Model(MT5Config(vocab_size=len(WORDS), decoder_start_token_id=0, **sizes)).eval()
    model.save_pretrained(folder)
    return model.get_encoder()


ENCODERS: dict[str, Callable[[Path], Any]] = {"bert": write_bert, "xlm-roberta": write_xlm_roberta, "mt5": write_mt5}


@pytest.fixture(scope="module", params=ENCODERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of transformers with a tiny random encoder, and the encoder."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder)
    return folder, ENCODERS[request.param](folder)


def own_tokenizer(kind: TokenizerConfig, name: str) -> Tokenizer:
    return train_byte_bpe(CAPTIONS, kind.vocab_size, kind.context_length)


def resolved(**settings: Any) -> ConditionerConfig:
    config = from_dict(ConditionerConfig, {"kind": "transformer", "dropout": 0.0} | settings)
    return config.resolved(None, (4, 4), 2).with_tokenizer(own_tokenizer)


def conditioner(**settings: Any) -> TransformerConditioner:
    built = resolved(**settings).build()
    assert isinstance(built, TransformerConditioner)
    return built


SCRATCH = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "tokenizer": {"kind": "byte_bpe", "vocab_size": 300, "context_length": 12},
}


def test_a_checkpoint_says_what_its_encoder_says(checkpoint: tuple[Path, Any]) -> None:
    from transformers import AutoTokenizer

    folder, encoder = checkpoint
    texts = ["a red car", "Ein rotes Auto", "красная машина", ""]
    built = conditioner(checkpoint=str(folder), context_length=8)
    built.load_pretrained()
    cond = built.eval()({"text": [*texts, None]})
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        expected = encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    torch.testing.assert_close(cond.context[:4], expected)
    assert torch.equal(cond.mask[:4], tokens.attention_mask.bool())
    torch.testing.assert_close(cond.context[4], cond.context[3])  # an absent caption is the empty one
    assert cond.mask.sum(1).tolist() == [5, 5, 4, 2, 2]
    assert built.config.context_width == 16


def test_stored_states_give_the_conditioning_of_live_encoding(tmp_path: Path) -> None:
    write_bert(tmp_path)
    write_tokenizer(tmp_path)
    built = conditioner(checkpoint=str(tmp_path), context_length=8, dropout=0.5).train()  # the encoder is frozen
    captions = ["a red car", "", "a sky"]
    states = TextStates(captions, built.encode_texts(captions), built.encode_texts([""]))
    live, cached = (
        built({"text": captions, **stored}, torch.Generator().manual_seed(2)) for stored in ({}, {TEXT_STATES: states})
    )
    for a, b in ((live.context, cached.context), (live.mask, cached.mask)):
        assert torch.allclose(a.float(), b.float(), atol=1e-6)
    assert [each.name for each in built.text_encoders()] == ["encoder"]


def test_a_long_caption_is_cut_with_its_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write_bert(tmp_path)
    cond = conditioner(checkpoint=str(tmp_path), context_length=5)({"text": ["a red car " * 9]})
    assert cond.context.shape == (1, 5, 16)
    assert cond.mask.all()


def test_what_is_from_a_checkpoint_is_frozen_and_drops_nothing_out(checkpoint: tuple[Path, Any]) -> None:
    frozen = conditioner(checkpoint=str(checkpoint[0]), context_length=8).train()
    assert not [parameter for parameter in frozen.parameters() if parameter.requires_grad]
    assert torch.equal(frozen({"text": CAPTIONS}).context, frozen({"text": CAPTIONS}).context)
    trained = conditioner(checkpoint=str(checkpoint[0]), context_length=8, trainable=True).train()
    assert not torch.equal(trained({"text": CAPTIONS}).context, trained({"text": CAPTIONS}).context)
    trained({"text": CAPTIONS}).context.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_a_bert_from_scratch_is_trained_and_masks_its_padding() -> None:
    built = conditioner(**SCRATCH)
    cond = built({"text": ["a red apple", ""]})
    cond.context.square().sum().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert cond.context.shape == (2, 12, 16)
    assert cond.mask[1].sum() == 2, "start and end"
    assert 2 < cond.mask[0].sum() < 12


@pytest.mark.parametrize("scratch", [True, False])
def test_a_model_file_needs_nothing_beside_it(tmp_path: Path, scratch: bool) -> None:
    """Neither the folder of the encoder nor the tokenizer of the run; encoders have buffers that no file holds."""
    folder = tmp_path / "encoder"
    write_tokenizer(folder)
    write_xlm_roberta(folder)
    settings = SCRATCH if scratch else {"checkpoint": str(folder), "context_length": 12}
    sections = to_dict(tiny_model().config) | {"conditioner": to_dict(resolved(**settings))}
    model = LatentDiffusion(from_dict(ModelConfig, sections)).eval()
    model.conditioner.load_pretrained()
    save_model(tmp_path / "model.safetensors", model, {})
    shutil.rmtree(folder)
    loaded = load(tmp_path / "model.safetensors")
    texts = ["a red car", "rotes auto", ""]
    one, other = (each.conditioner({"text": texts}) for each in (model, loaded))
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.mask, other.mask)
    pictures = Pipeline(loaded)(texts, seed=0, num_inference_steps=2, output_type="pt", progress=False)
    assert pictures.isfinite().all()


def test_nothing_of_transformers_is_imported_before_it_is_needed() -> None:
    script = "import sys, ldm.conditioning; print([name for name in sys.modules if name.startswith('transformers')])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_a_checkpoint_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the checkpoint nowhere/encoder cannot be read \(.*\); give a folder or"):
        resolved(checkpoint="nowhere/encoder")
    write_bert(tmp_path)
    with pytest.raises(ConfigError, match=r"context_length is 77, but .* has 20 positions; lower it"):
        resolved(checkpoint=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; put its tokenizer\.json there"):
        resolved(checkpoint=str(tmp_path), context_length=8)
    write_tokenizer(tmp_path, pad=None)
    with pytest.raises(CheckpointError, match="has no padding token"):
        resolved(checkpoint=str(tmp_path), context_length=8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be read \("):
        resolved(checkpoint=str(tmp_path), context_length=8)
    write_tokenizer(tmp_path, model_max_length=6)
    with pytest.raises(ConfigError, match=r"context_length is 8, but .* takes 6 tokens"):
        resolved(checkpoint=str(tmp_path), context_length=8)
    built = conditioner(checkpoint=str(tmp_path), context_length=6)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"the weights of .* cannot be read"):
        built.load_pretrained()


def test_a_tokenizer_of_another_encoder_is_refused() -> None:
    other = train_byte_bpe(CAPTIONS, 300, 12)
    config = from_dict(ConditionerConfig, {"kind": "transformer"} | SCRATCH | {"tokenizer_json": other.to_json()})
    smaller = replace(config, tokenizer=ByteBPEConfig(vocab_size=270, context_length=12))
    with pytest.raises(CheckpointError, match=f"has {other.vocab_size} tokens, but the encoder embeds 270"):
        smaller.build()


@pytest.mark.slow
def test_a_dry_run_counts_the_encoder_where_it_is_trained(checkpoint: tuple[Path, Any]) -> None:
    trained = []
    for trainable in ("false", "true"):
        settings = f"{{kind: transformer, checkpoint: {checkpoint[0]}, context_length: 8, trainable: {trainable}}}"
        overrides = [f"denoiser.conditioner={settings}", "denoiser.model.context_width=16"]
        experiment = load_config(ROOT / "configs" / "conditioning" / "boxes.yaml", overrides)
        described = describe(experiment, ["denoiser"])
        built = conditioner(checkpoint=str(checkpoint[0]), context_length=8)
        count = sum(parameter.numel() for parameter in built.parameters())
        assert f"conditioner: {count:,} parameters" in described
        trained.append(re.search(r"trained: ([\d,]+)", described)[1].replace(",", ""))
    assert int(trained[1]) - int(trained[0]) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 16, "heads": 3}, "3 heads do not divide the width 16"),
        ({"trainable": False}, "a BERT from scratch must be trained"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ConditionerConfig, {"kind": "transformer"} | settings)
