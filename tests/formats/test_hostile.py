"""Files that are broken, or were made to do harm: each ends in one sentence, or loads as what it is."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import pickle
import random
import struct
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import from_dict, to_dict
from ldm.errors import CheckpointError, LdmError
from ldm.formats import load
from ldm.formats.native import save_model
from ldm.formats.tensors import fingerprint, read_metadata, read_tensors, read_weights
from ldm.model import LatentDiffusion, ModelConfig
from tests.tiny import TOKENIZER, tiny_model

Mutations = dict[str, bytes]
Loaded = tuple[str, Any, Mapping[str, Tensor]]
CHUNKS = 4
CANARY = "canary"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("native") / "model.safetensors"
    save_model(path, tiny_model(), {"steps": 3}, torch.float16)
    return path.read_bytes()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {f"{part}.weight": torch.randn(12, 10) for part in "abcdef"} | {"step": torch.tensor(7)}


@pytest.fixture
def harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that a file runs would leave a canary in the working directory."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / CANARY).exists()


def chunk(mutations: Mutations, part: int) -> Mutations:
    return dict(list(mutations.items())[part::CHUNKS])


def complaint(path: Path, load: Callable[[Path], Loaded], intact: Loaded) -> str | None:
    """What is wrong with the way that a mutated file is loaded; None: it is refused in a sentence, or known to be another."""
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            mark, config, tensors = load(path)
    except LdmError as error:
        told = str(error)
        return None if told.isprintable() and path.name in told and len(told) < 1000 else f"tells {told[:500]!r}"
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"
    if any("not those that it was written with" not in str(warning.message) for warning in warned):
        return f"warns {[str(warning.message) for warning in warned]}"
    if mark != intact[0]:
        return None
    same = config == intact[1] and tensors.keys() == intact[2].keys()
    if same and all(torch.equal(tensor, intact[2][name]) for name, tensor in tensors.items()):
        return None
    return "loads something else under the same fingerprint"


def refuse_or_tell(mutations: Mutations, path: Path, load: Callable[[Path], Loaded], intact: Loaded) -> None:
    wrong = {}
    for name, content in mutations.items():
        path.unlink(missing_ok=True)  # what is mapped must not be written to
        path.write_bytes(content)
        told = complaint(path, load, intact)
        if told:
            wrong[name] = told
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())


def as_model(path: Path) -> Loaded:
    model = load(path)
    return str(model.fingerprint), model.config, model.state_dict()


def as_tensors(path: Path) -> Loaded:
    tensors = read_tensors(path)
    return fingerprint(tensors, {}), None, tensors


def as_folder(path: Path) -> Loaded:
    tensors, _ = read_weights(path.parent)
    return fingerprint(tensors, {}), None, tensors


def bruised(content: bytes, seed: int, flips: int, starts: tuple[int, ...] = (0,)) -> Mutations:
    """Cut short, made longer, and with bits flipped, as many after each of ``starts`` up to the next."""
    draw = random.Random(seed)
    cuts = {0, 1, 7, 8, 9, *starts, *(len(content) * i // 12 for i in range(12)), len(content) - 1} - {len(content)}
    mutations = {f"cut to {length} bytes": content[:length] for length in sorted(cuts)}
    mutations |= {f"{length} bytes appended": content + b"\0x" * (length // 2) for length in (2, 4096)}
    for start, end in zip(starts, (*starts[1:], len(content)), strict=True):
        for _ in range(flips):
            place, bit = draw.randrange(start, end), draw.randrange(8)
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            mutations[f"bit {bit} of byte {place} flipped"] = bytes(flipped)
    return mutations


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_bruised_models(native: bytes, tmp_path: Path, harmless: None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(native)
    mutations = bruised(native, 0, 25, (0, 8, 8 + int.from_bytes(native[:8], "little")))
    refuse_or_tell(mutations, path, as_model, as_model(path))


def rewritten_headers(content: bytes) -> Mutations:
    """Names, shapes, types and places of tensors that are not those of the model, some of them consistent."""
    header, data = split(content)
    names = sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    matrix = next(n for n in names if len(header[n]["shape"]) == 2 and len(set(header[n]["shape"])) == 2)
    twins = [n for n in names if header[n]["shape"] == header[names[0]]["shape"]][:2]
    first, size = header[matrix], len(data)

    def changed(name: str, **fields: Any) -> bytes:
        return join(header | {name: header[name] | fields}, data)

    def without(*gone: str) -> dict[str, Any]:
        return {name: entry for name, entry in header.items() if name not in gone}

    dtypes = ("F64", "F32", "BF16", "I16", "U16", "I8", "BOOL", "F8_E4M3", "F8_E8M0", "F6_E2M3", "F4", "C64", "F7", "")
    shapes = ([], [0], [-1], first["shape"][::-1], [math.prod(first["shape"])], [2**40, 2**40], [1.5], ["16"], None,
              [1] * 70, [0, 2**62], [0, 2**63])  # fmt: skip
    start, end = first["data_offsets"]
    offsets = ([0, 0], [end, start], [start + 2, end + 2], [start, end - 2], [start, size + 2], [-2, end], [start], None,
               [2**70, 2**70], [0, end - start])  # fmt: skip
    renamed = ("", "x", matrix.upper(), matrix + "\n", matrix + "\0", "a" * 5000, "__class__", "../../x", "\ud800")
    text, metadata = json.dumps(header), {"__metadata__": header["__metadata__"]}
    entry = json.dumps({matrix: first})[1:-1]
    return (
        {f"dtype {dtype}": changed(matrix, dtype=dtype) for dtype in dtypes}
        | {f"shape {shape}": changed(matrix, shape=shape) for shape in shapes}
        | {f"offsets {places}": changed(matrix, data_offsets=places) for places in offsets}
        | {f"named {name!r:.40}": join(without(matrix) | {name: first}, data) for name in renamed}
        | {
            "two names exchanged": join(header | {twins[0]: header[twins[1]], twins[1]: header[twins[0]]}, data),
            "four bits a number": join(
                {"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}} | metadata, bytes(8)
            ),
            "a name twice": join(f"{text[:-1]}, {entry}}}".encode(), data),
            "a name gone": join(without(matrix), data),
            "all names gone": join(metadata, data),
            "no header": join({}, data),
            "header of a list": join(b"[]", data),
            "header of lists": join(b"[" * 100_000, data),
            "header of sections": join(b'{"a":' * 100_000, data),
            "header of no text": join(b"\xff" * 100, data),
            "header longer than the file": struct.pack("<Q", 10**7) + content[8:],
            "header of 200 MB": struct.pack("<Q", 2 * 10**8) + content[8:],
            "header without end": b"\xff" * 8 + content[8:],
            "a page": b"<!DOCTYPE html>\n<html><body>404: not found</body></html>" * 20,
            "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 47\n",
            "text": b"Entry not found",
            "NaN": join(header, data[:start] + b"\xff\x7e" + data[start + 2 :]),
            "infinite": join(header, data[:start] + b"\x00\x7c" + data[start + 2 :]),
        }
    )


def test_models_with_other_headers(native: bytes, tmp_path: Path, harmless: None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(native)
    refuse_or_tell(rewritten_headers(native), path, as_model, as_model(path))


BAD = (
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    1e308,
    math.nan,
    math.inf,
    "os.system",
    "",
    [],
    [10**9] * 3,
    {},
    {"kind": "os"},
)
"""What no config should have to bear."""


def leaves(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in JSON, those of sections and lists included."""
    yield place
    for key, item in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from leaves(item, (*place, key))


def replaced(node: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = node.copy()
    copy[place[0]] = replaced(copy[place[0]], place[1:], value)
    return copy


def rewritten_metadata(content: bytes) -> Mutations:
    header, data = split(content)
    metadata, draw = header["__metadata__"], random.Random(2)

    def changed(**entries: Any) -> bytes:
        return join(header | {"__metadata__": metadata | entries}, data)

    config = json.loads(metadata["config"])
    mutations = {}
    for place in leaves(config):
        for value in draw.sample(BAD, 2):
            mutated = changed(config=json.dumps(replaced(config, place, value)))
            mutations[f"config.{'.'.join(map(str, place))} = {value}"] = mutated
    for name in metadata:
        for text in ("", "0", "[]", "null", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\0\n", "\ud800"):
            mutations[f"{name} = {text[:8]!r} * {len(text)}"] = changed(**{name: text})
        mutations[f"{name} gone"] = join(
            header | {"__metadata__": {n: text for n, text in metadata.items() if n != name}}, data
        )
        mutations[f"{name} no text"] = changed(**{name: 1})
    tokenizer = json.loads(metadata["tokenizer"])
    for place in draw.sample(
        [place for place in leaves(tokenizer) if "vocab" not in place and "merges" not in place], 40
    ):
        value = draw.choice(BAD)
        mutated = changed(tokenizer=json.dumps(replaced(tokenizer, place, value)))
        mutations[f"tokenizer.{'.'.join(map(str, place))} = {value}"] = mutated
    tokenizer["model"]["continuing_subword_prefix"] = "os.system"  # over which the Rust of tokenizers panics
    mutations["tokenizer that panics"] = changed(tokenizer=json.dumps(tokenizer))
    calls = {"_target_": "os.system", "command": f"touch {CANARY}"}
    return mutations | {
        "config with a call": changed(config=json.dumps(config | calls)),
        "config that is a call": changed(config=json.dumps(calls)),
        "part that is a call": changed(config=json.dumps(config | {"denoiser": calls})),
        "no metadata": join({name: entry for name, entry in header.items() if name != "__metadata__"}, data),
        "metadata of a list": join(header | {"__metadata__": []}, data),
    }


@pytest.mark.parametrize("part", range(CHUNKS))
def test_models_with_other_metadata(native: bytes, tmp_path: Path, harmless: None, part: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(native)
    refuse_or_tell(chunk(rewritten_metadata(native), part), path, as_model, as_model(path))


def pickled(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_bruised_pickles(weights: dict[str, Tensor], tmp_path: Path, harmless: None, zipped: bool) -> None:
    path = tmp_path / "model.ckpt"
    content = pickled({"state_dict": weights, "global_step": 7}, _use_new_zipfile_serialization=zipped)
    path.write_bytes(content)
    refuse_or_tell(bruised(content, 3, 60), path, as_tensors, as_tensors(path))


class Calls:
    """Pickled as a call: who unpickles it runs ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Subclass(Tensor):
    """A tensor that brings code of its own."""


TOUCH = f"touch {CANARY}"
HARMFUL: dict[str, tuple[Callable[[], Any], str]] = {
    "a command": (lambda: Calls(os.system, TOUCH), "system"),
    "an expression": (lambda: Calls(eval, f"__import__('os').system('{TOUCH}')"), "eval"),
    "a program": (lambda: Calls(exec, f"import os; os.system('{TOUCH}')"), "exec"),
    "an attribute": (lambda: Calls(getattr, "", "join"), "getattr"),
    "a file": (lambda: Calls(builtins.open, CANARY, "w"), "open"),
    "an array": (lambda: np.zeros(3), "_reconstruct"),
    "a module": (lambda: nn.Linear(2, 2), "Linear"),
    "a subclass": (lambda: torch.zeros(3).as_subclass(Subclass), "Subclass"),
    "a pickle": (lambda: Calls(pickle.loads, pickle.dumps(Calls(os.system, TOUCH))), "loads"),
}


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("harm", HARMFUL)
def test_a_pickle_that_would_run_code_is_refused_with_the_reason(
    tmp_path: Path, harmless: None, harm: str, ending: str
) -> None:
    make, name = HARMFUL[harm]
    path = tmp_path / f"model{ending}"
    for content in (
        pickled({"a": torch.zeros(2), "b": make()}),
        pickled({"state_dict": {"a": torch.zeros(2)}, "callbacks": [make()]}),
        pickled({"a": make()}, _use_new_zipfile_serialization=False),
        pickle.dumps({"a": make()}, protocol=2),
    ):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(
                CheckpointError, match=rf"{path.name} is a pickle that would run code .*{name}.*convert it"
            ):
                read_tensors(path)


def test_a_checkpoint_that_names_a_callback_of_lightning_is_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    with pytest.MonkeyPatch.context() as patch:  # pickled by name, as Lightning of that time was called
        for name in (
            "pytorch_lightning",
            "pytorch_lightning.callbacks",
            "pytorch_lightning.callbacks.model_checkpoint",
        ):
            module = types.ModuleType(name)
            patch.setitem(sys.modules, name, module)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
        noted = {module.ModelCheckpoint: {"best_model_score": torch.tensor(0.1), "best_model_path": "x"}}
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": noted}, path)
    assert read_tensors(path).keys() == {"a"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("value", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.dtype("float16")])
def test_a_checkpoint_with_scalars_of_numpy_is_read_without_them(value: Any, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": {"a": torch.ones(2), "best": value}, "learning_rate": value, "metrics": [value]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert read_tensors(path).keys() == {"a"}
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))  # names of NumPy 1, of a broken zip
    if not zipped:
        assert read_tensors(path).keys() == {"a"}


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path, one = tmp_path / "model.pt", torch.ones(2)
    for content, told in (
        ([one], "holds a list, not a dict of weights"),
        (one, "holds a Tensor, not a dict of weights"),
        ({"optimizer": {"state": {"a": one}}}, "holds a nested dict"),
        ({"state_dict": {"a": {"b": {"c": one}}}}, "holds a nested dict"),
        ({1: one}, "is not a plain dense CPU tensor"),
        ({"a": one.to_sparse()}, "is not a plain dense CPU tensor"),
        ({"a": one.expand(1000, 2)}, "is not a plain dense CPU tensor"),
        ({"a": torch.empty(10**12, device="meta")}, "is not a plain dense CPU tensor"),
        ({"a\nb": one}, "holds a tensor with the invalid name"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=told) as caught:
            read_tensors(path)
        assert str(caught.value).isprintable()
    torch.save({"a": nn.Parameter(one), "global_step": 3, "note": "x", "tied": one}, path)
    assert [tensor.requires_grad for tensor in read_tensors(path).values()] == [False, False]


def test_bruised_folders(weights: dict[str, Tensor], tmp_path: Path, harmless: None) -> None:
    names = sorted(weights)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / shard)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    places = {name: shard for shard, held in shards.items() for name in held}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    index.write_bytes(text)
    intact = as_folder(index)
    assert intact[2].keys() == weights.keys()
    refuse_or_tell(bruised(text, 4, 40) | {"lists": b"[" * 100_000, "digits": b"9" * 5000}, index, as_folder, intact)
    index.write_bytes(text)
    shard = tmp_path / next(iter(shards))
    content = shard.read_bytes()
    refuse_or_tell(bruised(content, 5, 30), shard, as_folder, intact)
    shard.unlink()
    shard.write_bytes(content)
    outside = tmp_path.parent / "outside.safetensors"
    save_file(weights, outside)
    for place in (
        "../outside.safetensors",
        str(outside),
        "..",
        "",
        "sub/../x.safetensors",
        "..\\x",
        "a\0b",
        "gone.safetensors",
    ):
        index.write_text(json.dumps({"weight_map": places | {names[0]: place}}))
        with pytest.raises(CheckpointError, match=r"safetensors\.index\.json"):
            read_weights(tmp_path)
    for held, told in ((names, "is also in another file"), ([], r"which .* assigns to this file, is missing")):
        index.write_text(json.dumps({"weight_map": places}))
        save_file({name: weights[name] for name in held}, shard)
        with pytest.raises(CheckpointError, match=told):
            read_weights(tmp_path)


TRANSFORMER_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                     "vocab_size": 300, "max_position_embeddings": 12}  # fmt: skip


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model whose encoder is one of transformers, described in the file."""
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    conditioner = {"kind": "transformer", "checkpoint": "evil/encoder", "tokenizer_json": TOKENIZER.to_json()}
    architecture = {"model_type": "bert", **TRANSFORMER_SIZES}
    described = to_dict(tiny_model().config) | {"conditioner": conditioner | {"architecture": architecture}}
    save_model(path, LatentDiffusion(from_dict(ModelConfig, described)).eval(), {})
    return path.read_bytes()


FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


def test_the_config_of_an_encoder_fetches_and_runs_nothing(
    encoder_file: bytes, tmp_path: Path, harmless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    checkpoint = tmp_path / "evil" / "encoder"
    checkpoint.mkdir(parents=True)
    code = f"import os; os.system({TOUCH!r})"
    for file in ("modeling.py", "config.json", "kernel.py"):
        (checkpoint / file).write_text(code)
    path = tmp_path / "model.safetensors"
    path.write_bytes(encoder_file)
    intact, events, watching = as_model(path), [], True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and (event in FORBIDDEN or (event == "open" and "evil" in str(arguments[0]))):
            events.append((event, *arguments))

    sys.addaudithook(audit)
    header, data = split(encoder_file)
    config = json.loads(header["__metadata__"]["config"])

    def changed(**entries: Any) -> bytes:
        architecture = config["conditioner"]["architecture"] | entries
        mutated = replaced(config, ("conditioner", "architecture"), architecture)
        return join(header | {"__metadata__": header["__metadata__"] | {"config": json.dumps(mutated)}}, data)

    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForTextEncoding"), "modeling.Evil")
    mutations = {
        "code": changed(auto_map=auto),
        "code elsewhere": changed(auto_map={name: f"evil/encoder--{value}" for name, value in auto.items()}),
        "kernels": changed(attn_implementation="evil/encoder", _attn_implementation="evil/encoder:kernel"),
        "quantization": changed(quantization_config={"quant_method": "gptq", "bits": 4}),
        "another checkpoint": changed(_name_or_path="evil/encoder", name_or_path="evil/encoder"),
        "a backbone": changed(model_type="detr", backbone="evil/encoder", use_pretrained_backbone=True),
        "a wrapper": changed(model_type="timm_wrapper", architecture="resnet18", model_args={"pretrained": True}),
        "an unknown type": changed(model_type="evil", auto_map=auto),
        "no type": changed(model_type=None),
        "no architecture": join(
            header | {"__metadata__": header["__metadata__"] | {
                "config": json.dumps(replaced(config, ("conditioner", "architecture"), None))}}, data),
    }  # fmt: skip
    for key in (*TRANSFORMER_SIZES, "num_labels", "type_vocab_size", "hidden_act", "layer_norm_eps", "is_decoder"):
        for value in (10**9, 10**7, -1, math.nan, "../evil", {"auto_map": auto}):
            mutations[f"{key} = {value}"] = changed(**{key: value})
    try:
        refuse_or_tell(mutations, path, as_model, intact)
    finally:
        watching = False  # a hook stays for the life of the process
    assert not events


def test_a_model_that_was_changed_tells_so(native: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(native)
    stored = read_metadata(path)["fingerprint"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path).fingerprint == stored
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(native[:-2] + bytes([native[-2] ^ 1]) + native[-1:])
    with pytest.warns(UserWarning, match=rf"changed\.safetensors: its weights are not those .* written as '{stored}'"):
        loaded = load(changed)
    assert loaded.fingerprint != stored
