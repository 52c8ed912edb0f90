# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""The released checkpoint's layout is rebuilt with random weights; the native class of transformers is the reference."""

import hashlib
import pickle

import pytest
import torch
from fixtures.segformer import old_state_dict
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, SegformerConfig
from transformers import SegformerForSemanticSegmentation as NativeSegformer

from diffdoctor import main
from diffusers_diffdoctor.detector import conversion
from diffusers_diffdoctor.detector.conversion import ARCHITECTURES, convert_detector_checkpoint


def native(architecture: str, num_labels: int = 1) -> NativeSegformer:
    depths, hidden_sizes, decoder_hidden_size = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = NativeSegformer(
        SegformerConfig(
            depths=depths,
            hidden_sizes=hidden_sizes,
            decoder_hidden_size=decoder_hidden_size,
            num_labels=num_labels,
        )
    ).eval()
    with torch.no_grad():  # the initial scale of 0.02 would hide a swap of two layers behind tiny logits
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + parameter)
    return model


@pytest.fixture
def b0(tmp_path):
    model = native("b0")
    torch.save(old_state_dict(model), tmp_path / "old.bin")
    return model, tmp_path / "old.bin"


def test_names_are_those_of_the_release():
    keys = set(old_state_dict(native("b0")))
    assert {
        "segformer.encoder.patch_embeddings.0.proj.weight",
        "segformer.encoder.patch_embeddings.3.layer_norm.bias",
        "segformer.encoder.block.0.0.layer_norm_1.weight",
        "segformer.encoder.block.0.0.attention.self.query.weight",
        "segformer.encoder.block.0.0.attention.self.sr.weight",
        "segformer.encoder.block.0.0.attention.self.layer_norm.weight",
        "segformer.encoder.block.0.0.attention.output.dense.bias",
        "segformer.encoder.block.3.1.mlp.dense1.weight",
        "segformer.encoder.block.3.1.mlp.dwconv.dwconv.weight",
        "segformer.encoder.layer_norm.3.weight",
        "decode_head.linear_c.0.proj.weight",
        "decode_head.linear_fuse.weight",
        "decode_head.batch_norm.running_mean",
        "decode_head.classifier.weight",
    } <= keys


@pytest.mark.parametrize("architecture", ["b0", "b5"])
def test_logits_are_those_of_the_native_class(architecture, tmp_path):
    reference = native(architecture)
    torch.save(old_state_dict(reference), tmp_path / "old.bin")
    result = convert_detector_checkpoint(tmp_path / "old.bin", tmp_path / "detector")
    assert result.architecture == architecture
    assert result.sha256 == hashlib.sha256((tmp_path / "old.bin").read_bytes()).hexdigest()
    assert result.known_as is None

    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "detector").eval()
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = reference(pixels).logits, model(pixels).logits
    assert expected.std() > 1e-2
    torch.testing.assert_close(found, expected)
    assert AutoImageProcessor.from_pretrained(tmp_path / "detector").size["shortest_edge"] == 512
    assert "detector" in (tmp_path / "detector/README.md").read_text()


def test_command_shows_and_compares_the_checksum(b0, tmp_path, capsys, monkeypatch):
    path = b0[1]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert main(["convert-detector", str(path), str(tmp_path / "a"), "--image-size", "256"]) == 0
    shown = capsys.readouterr().out
    assert digest in shown and "unknown" in shown and "SegFormer-b0" in shown

    monkeypatch.setitem(conversion.KNOWN_CHECKPOINTS, digest, "a release")
    assert main(["convert-detector", str(path), str(tmp_path / "b"), "--sha256", digest.upper()]) == 0
    assert "a release" in capsys.readouterr().out

    assert main(["convert-detector", str(path), str(tmp_path / "c"), "--sha256", "0" * 64]) == 1
    assert digest in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert main(["convert-detector", str(path), str(tmp_path / "c"), "--image-size", "500"]) == 1
    assert "multiple of 32" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return print, ("code of the pickle was run",)


def _truncate(state_dict, path):
    torch.save(state_dict, path)
    path.write_bytes(path.read_bytes()[:5000])


def _save(change):
    def save(state_dict, path):
        torch.save(change(state_dict), path)

    return save


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda state_dict, path: path.write_text("<html>404</html>"), "not a PyTorch state dict"),
        (lambda state_dict, path: path.write_bytes(b""), "not a PyTorch state dict"),
        (lambda state_dict, path: path.write_bytes(pickle.dumps(Malicious())), "not a PyTorch state dict"),
        (_truncate, "not a PyTorch state dict"),
        (_save(lambda _: [1, 2]), "holds a list"),
        (_save(lambda _: {}), "it is empty"),
        (_save(lambda _: torch.nn.Linear(2, 2).state_dict()), "not a SegformerForSemanticSegmentation"),
        (_save(lambda _: old_state_dict(native("b0", num_labels=2))), "2 output channels"),
        (_save(lambda s: {k: v for k, v in s.items() if ".block.2.1." not in k}), "depths"),
        (_save(lambda s: {k: v for k, v in s.items() if "batch_norm" not in k}), "tensors are missing"),
        (_save(lambda s: s | {"auxiliary.weight": torch.zeros(1)}), "1 are unexpected"),
        (_save(lambda s: s | {"decode_head.classifier.bias": torch.tensor([torch.nan])}), "not finite"),
        (_save(lambda s: s | {"decode_head.batch_norm.weight": torch.zeros(7)}), "does not fit"),
    ],
)
def test_bad_checkpoints_are_refused_and_leave_nothing(b0, tmp_path, capsys, write, message):
    path = tmp_path / "bad.bin"
    write(old_state_dict(b0[0]), path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_detector_checkpoint(path, tmp_path / "detector")
    assert sorted(tmp_path.iterdir()) == before
    assert "was run" not in capsys.readouterr().out


def test_output_is_not_overwritten(b0, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_detector_checkpoint(b0[1], tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert_detector_checkpoint(b0[1], tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="no file"):
        convert_detector_checkpoint(tmp_path / "nowhere.bin", tmp_path / "new")


def test_interrupted_writing_leaves_nothing(b0, tmp_path, monkeypatch):
    from diffusers_diffdoctor.detector import ArtifactDetectorImageProcessorPil

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(ArtifactDetectorImageProcessorPil, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_detector_checkpoint(b0[1], tmp_path / "detector")
    assert [file.name for file in tmp_path.iterdir()] == ["old.bin"]
