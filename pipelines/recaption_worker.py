"""What the workers of a re-captioning do: captions of chunks of samples, text states of whole shards."""

from __future__ import annotations

import tempfile
import threading
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.captioners import AltText, CaptionConfig
from pipelines.captioning import CHUNK, CaptionWorker, chunk_key, load_chunks, originals
from pipelines.originals import Picture
from starflow.encoders import VAE, TextEncoder, VAEIdentity, load_text_encoder, load_vae, to_pixels
from starflow.errors import StoreError
from starflow.objectstore import ObjectStore
from starflow.parts import LayerPlan, complete, layer_folder, write_states, written_states
from starflow.reader import SnapshotReader
from starflow.shardindex import ShardRef
from starflow.snapshots import Part, Snapshot, TextStates

#: Text states computed, and latents decoded, at once.
_TEXTS, _LATENTS = 256, 16


class RecaptionWorker(CaptionWorker):
    """Captions samples of a snapshot, and makes the text states of their captions.

    Each call is about one part, given as a snapshot that holds nothing else.
    """

    def __init__(
        self, store: str, config: CaptionConfig, vae: VAEIdentity, vae_spec: str | None, text: TextStates | None
    ) -> None:
        """`vae_spec` says where the VAE `vae` is, if not under its name; `text` are states like those to be made."""
        super().__init__(store, config)
        self._identity, self._spec, self._text = vae, vae_spec or vae.name, text
        self._device = "cuda" if config.gpus_per_actor else "cpu"
        self._folder = tempfile.TemporaryDirectory(prefix="starflow-recaption-")
        self._readers: dict[str, SnapshotReader] = {}
        self._lock = threading.Lock()

    def caption_samples(self, number: int, snapshot: Snapshot, layer: LayerPlan) -> dict[str, int]:
        """Commits chunk `number` of the part's new captions; returns how its pictures were had."""
        part, reader = snapshot.parts[0], self._reader(snapshot)
        ordinals = np.arange(number * CHUNK, min((number + 1) * CHUNK, part.count))
        table = complete(reader.samples(part.grid, ordinals))
        places = zip(*(table[name].to_pylist() for name in ("image_key", "image_offset", "image_size")), strict=True)
        pictures = [Picture(row, *place) for row, place in enumerate(places) if place[0] is not None]
        images = originals(self.store, pictures, table["id"].to_pylist())
        lost = [row for row in range(len(ordinals)) if row not in images]
        if lost:
            latents = reader.gather(part.grid, ordinals[lost]).mean
            images |= dict(zip(lost, self._decode(latents), strict=True))
        alts = [texts[0] if texts else "" for texts in reader.captions(part.grid, ordinals, AltText.name)]
        return self.commit(chunk_key(work_prefix(part, layer), number), dict(sorted(images.items())), alts, lost)

    def states(self, shard: int, snapshot: Snapshot, layer: LayerPlan) -> ShardRef:
        """Writes one shard of the text states of the part's new captions, unless it is there."""
        part, reader = snapshot.parts[0], self._reader(snapshot)
        found = written_states(self.store, part, layer, shard)
        if found is not None:
            return found
        rows = reader.samples(part.grid, np.arange(part.count))["row"].to_numpy()
        start, stop = shard * part.shard, min((shard + 1) * part.shard, part.rows)
        first, last = np.searchsorted(rows, (start, stop))
        captions, _ = load_captions(self.store, part, layer, int(first), int(last))
        chosen = [(row - start, text) for row, text in zip(rows[first:last], captions, strict=True) if text]
        states = np.zeros((stop - start, self._encoder.length, self._encoder.width), np.float16)
        for begin in range(0, len(chosen), _TEXTS):
            some = chosen[begin : begin + _TEXTS]
            encoded = self._encoder.encode([text for _, text in some])
            states[[row for row, _ in some]] = encoded.half().cpu().numpy()
        return write_states(self.store, part, layer, shard, states)

    def _reader(self, snapshot: Snapshot) -> SnapshotReader:
        part = snapshot.parts[0].id
        with self._lock:
            if part not in self._readers:
                while len(self._readers) > 1:  # two threads may be at two parts
                    del self._readers[next(iter(self._readers))]
                self._readers[part] = SnapshotReader(self.store, snapshot, Path(self._folder.name))
            return self._readers[part]

    def _decode(self, latents: np.ndarray) -> list[Image.Image]:
        """(n, C, h, w) to pictures."""
        import torch

        pictures = []
        for first in range(0, len(latents), _LATENTS):
            with self._lock:
                decoded = self._vae.decode(torch.from_numpy(latents[first : first + _LATENTS]).float())
            pictures += [Image.fromarray(each) for each in to_pixels(decoded)]
        return pictures

    @cached_property
    def _vae(self) -> VAE:
        vae = load_vae(self._spec, self._device)
        if vae.identity.sha256 != self._identity.sha256:
            raise StoreError(
                f"original pictures are gone, and {self._spec} ({vae.identity.sha256[:12]}) is not the VAE "
                f"{self._identity.name} ({self._identity.sha256[:12]}) of their latents; name the right one with vae"
            )
        return vae

    @cached_property
    def _encoder(self) -> TextEncoder:
        assert self._text is not None  # asked for states only where the snapshot stores them
        wanted = self._text.encoder
        encoder = load_text_encoder(wanted.name, self._text.spec.shape[1], self._device)
        if encoder.identity != wanted:
            raise StoreError(
                f"the text encoder {wanted.name} has other weights ({encoder.identity.sha256[:12]}) than the one that "
                f"made the stored text states ({wanted.sha256[:12]}); restore it"
            )
        return encoder


def work_prefix(part: Part, layer: LayerPlan) -> str:
    """Where a part's captions are kept until its layer is written: beside it, so that they go where it goes."""
    return f"{layer_folder(part, layer)}/chunks-{CHUNK}/"


def load_captions(
    store: ObjectStore, part: Part, layer: LayerPlan, first: int, last: int
) -> tuple[list[str], dict[str, int]]:
    """Captions of the part's samples [first, last), and how many pictures of their chunks were refused, by reason."""
    chunks = range(first // CHUNK, -(-last // CHUNK))
    texts, refused = load_chunks(store, work_prefix(part, layer), chunks)
    skip = first - chunks.start * CHUNK
    return texts[skip : skip + last - first], refused
